"""The chat page: four files of ours, put together into one response that needs nothing else."""

import base64
import functools
import hashlib
from importlib.resources import files

from fastapi.responses import HTMLResponse


def response() -> HTMLResponse:
    """The page, with a policy under which the browser runs this script and style and nothing else."""
    html, policy = _page()
    return HTMLResponse(
        html,
        headers={
            "content-security-policy": policy,
            "cross-origin-opener-policy": "same-origin",
            "cache-control": "no-cache",
        },
    )


@functools.cache
def _page() -> tuple[str, str]:
    """The HTML and its Content-Security-Policy."""
    folder = files("lalia.serving")
    names = ("page.html", "page.css", "tokens.js", "page.js")
    html, css, tokens, chat = ((folder / name).read_text(encoding="utf-8") for name in names)
    style, script = f"\n{css}", f"\n{tokens}\n{chat}"
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "connect-src": "'self'",
        "img-src": "data:",  # the icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert "</style" not in style and "</script" not in script
    html = html.replace("<style></style>", f"<style>{style}</style>")
    html = html.replace("<script></script>", f"<script>{script}</script>")
    return html, "; ".join(f"{name} {value}" for name, value in policy.items())


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
