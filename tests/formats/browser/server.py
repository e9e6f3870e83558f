"""A local server with the headers that threads in WebAssembly need, and onnxruntime-web for it to serve."""

import http.server
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ORT_WEB = "onnxruntime-web@1.30.0"
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""Of the package's 140 MB, what running on the CPU needs."""
FETCH_SECONDS = 300
TYPES = {".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}


def ort_web() -> Path:
    """The folder with onnxruntime-web's FILES: fetched from npm once, into LALIA_ORT_WEB or the user's cache.

    Skips the test, with the reason, where it is not there and cannot be fetched; in CI (the variable CI is set) that
    is a failure.
    """
    given = os.environ.get("LALIA_ORT_WEB")
    folder = Path(given or Path.home() / ".cache" / "lalia" / ORT_WEB.replace("@", "-"))
    if not all((folder / name).is_file() for name in FILES):
        problem = _fetch(folder)
        if problem:
            message = f"NOT TESTED in a browser: {ORT_WEB} is not in {folder}, and {problem}"
            pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return folder


def _fetch(folder: Path) -> str | None:
    """Fill the folder; what went wrong, if something did."""
    npm = shutil.which("npm")
    if npm is None:
        return "npm, which would fetch it, is not installed (apt install npm)"
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [npm, "pack", ORT_WEB, "--silent"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=FETCH_SECONDS,
        check=False,
    )
    archives = list(folder.glob("*.tgz"))
    if done.returncode or not archives:
        return f"npm pack failed: {(done.stderr or done.stdout).strip()[-300:]}"
    with tarfile.open(archives[0]) as archive:
        for name in FILES:
            member = archive.extractfile(f"package/dist/{name}")
            assert member is not None, f"{ORT_WEB} has no dist/{name}"
            (folder / f"{name}.part").write_bytes(member.read())
            (folder / f"{name}.part").rename(folder / name)
    archives[0].unlink()
    return None


@contextmanager
def serving(routes: dict[str, Path]) -> Iterator[str]:
    """Serve files: a route is the path of a file, or ends in / and is a folder. Gives the server's URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = _file(routes, self.path.partition("?")[0])
            if path is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", TYPES.get(path.suffix, "application/octet-stream"))
            self.send_header("Content-Length", str(path.stat().st_size))
            # With these a page may share memory between threads.
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            self.end_headers()
            with path.open("rb") as file:
                shutil.copyfileobj(file, self.wfile)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _file(routes: dict[str, Path], path: str) -> Path | None:
    for route, target in routes.items():
        if route.endswith("/") and path.startswith(route) and ".." not in path:
            found = target / path[len(route) :]
            return found if found.is_file() else None
        if path == route:
            return target
    return None
