"""Weight files and folders that lie about themselves, beyond those of test_hf_folder.py."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lalia.errors import CorruptFile, UserError
from lalia.formats.hf_folder import load_model
from lalia.formats.loading import load_folder
from tests.formats.test_fuzz_safetensors import write_seeds

NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    write_seeds(folder)
    return folder


@pytest.fixture
def folder(seeds: Path, tmp_path: Path) -> Path:
    """A copy of a good folder, to spoil."""
    return shutil.copytree(seeds / "whole", tmp_path / "model")


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any], more: bytes = b"", text: str = "") -> None:
    """Change the header; `more` bytes behind the data, `text` instead of the header's last brace."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    encoded = json.dumps(header).encode()
    if text:
        encoded = encoded[:-1] + text.encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + size :] + more)


def test_rewriting_alone_changes_nothing(folder: Path) -> None:
    """Negative control of the cases below."""
    rewrite(folder, lambda header: None)
    load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[NORM].update(data_offsets=h[EMBEDDING]["data_offsets"]), "no safetensors file"),
        (lambda h: h[NORM].update(data_offsets=[o - 4 for o in h[NORM]["data_offsets"]]), "no safetensors file"),
        (lambda h: h[NORM].update(data_offsets=h[NORM]["data_offsets"][::-1]), "no safetensors file"),
        (lambda h: h[EMBEDDING].update(shape=[2**32, 2**32]), "no safetensors file"),
        (lambda h: h[EMBEDDING].update(shape=[2**63, 2]), "no safetensors file"),
        (lambda h: h[EMBEDDING].update(shape=[-1, 16]), "no safetensors file"),
        (lambda h: h[EMBEDDING].update(shape=[0, 16]), "no safetensors file"),
        (lambda h: h.update(extra={"dtype": "F32", "shape": [0, 16], "data_offsets": [0, 0]}), "unknown .* extra"),
        (lambda h: h[NORM].update(dtype="I32"), f"{NORM} is I32, expected a floating type"),
        (lambda h: h[NORM].update(dtype="Q9"), "no safetensors file"),
        (lambda h: h[NORM].update(shape=[4, 4]), rf"{NORM} has shape \[4, 4\], expected \[16\]"),
        (lambda h: h.update({"\x1b[2J" + NORM: h.pop(NORM)}), r"unknown weights: \\x1b\[2J"),
    ],
    ids=["same", "overlap", "reversed", "overflow", "overflow63", "negative", "zero", "zero-extra", "ints", "type",
         "shape", "escape"],
)  # fmt: skip
def test_headers_that_lie(folder: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    rewrite(folder, change)
    with pytest.raises(CorruptFile, match=message):
        load_model(folder)


def test_holes_are_refused(folder: Path) -> None:
    rewrite(folder, lambda header: None, more=b"hidden")
    with pytest.raises(CorruptFile, match="no safetensors file"):
        load_model(folder)


def test_a_name_twice_in_the_header(folder: Path) -> None:
    """Whichever of the two the reader takes, the other leaves a hole or an overlap, or is the same."""
    rewrite(folder, lambda h: None, more=b"\0" * 64, text=f', "{NORM}": {json.dumps(_entry_behind(folder))}}}')
    with pytest.raises(CorruptFile):
        load_model(folder)


def _entry_behind(folder: Path) -> dict[str, Any]:
    content = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    end = len(content) - 8 - size
    return {"dtype": "F32", "shape": [16], "data_offsets": [end, end + 64]}


def test_a_key_twice_in_json(folder: Path, seeds: Path, tmp_path: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"hidden_size": 32,', 1))
    with pytest.raises(CorruptFile, match=r"config\.json is not valid JSON \('hidden_size' is there twice\)"):
        load_model(folder)
    sharded = shutil.copytree(seeds / "sharded", tmp_path / "sharded")
    index = sharded / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"weight_map": {', f'"weight_map": {{"{NORM}": "x.safetensors",', 1))
    with pytest.raises(CorruptFile, match=f"'{NORM}' is there twice"):
        load_model(sharded)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", "", "..", 7, None]
)
def test_an_index_that_names_what_is_elsewhere(seeds: Path, tmp_path: Path, name: Any) -> None:
    folder = shutil.copytree(seeds / "sharded", tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"][NORM] = name
    index.write_text(json.dumps(values))
    with pytest.raises(UserError, match="expected .safetensors files beside it"):
        load_model(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_links_out_of_the_folder(folder: Path, tmp_path: Path, file: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / file).touch()
    (folder / file).rename(elsewhere / file)
    (folder / file).symlink_to(elsewhere / file)
    with pytest.raises(UserError, match=f"{file} is a link to .*elsewhere/{file}, outside the model folder"):
        load_folder(folder)


def test_links_that_are_well(folder: Path, tmp_path: Path) -> None:
    """Those within the folder, a link to the folder, and the layout of the Hub's cache."""
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    load_folder(folder)
    (tmp_path / "alias").symlink_to(folder)
    load_folder(tmp_path / "alias")
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for path in folder.iterdir():
        if not path.is_symlink():
            shutil.copy(path, cache / "blobs" / f"{path.name}-blob")
            name = "model.safetensors" if path.name == "weights" else path.name
            (snapshot / name).symlink_to(f"../../blobs/{path.name}-blob")
    load_folder(snapshot)
    (cache / "private").write_text("{{ secret }}")
    (snapshot / "chat_template.jinja").symlink_to("../../private")
    with pytest.raises(UserError, match="outside the model folder"):
        load_folder(snapshot)


def test_weights_that_are_no_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")  # opening it would wait for ever
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        load_model(folder)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"auto_map": {"AutoModel": "modeling_own.Own"}},
            "asks to run code from the model folder, which Lalia never does",
        ),
        ({"model_type": "mamba"}, "model_type = 'mamba' is not implemented; known types are .*llama"),
        ({"model_type": None}, "model_type = None is not implemented"),
        ({"architectures": ["Qwen3ForTokenClassification"]}, "is not implemented; expected Qwen3ForCausalLM"),
        ({"architectures": 7}, "architectures = 7 is not a list"),
        ({"vocab_size": 321}, r"embed_tokens\.weight has shape \[320, 16\], expected \[321, 16\]"),
        ({"hidden_size": 10**9}, "weights and config disagree"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": 2**70}, "hidden_size"),
    ],
)
def test_configs_that_do_not_fit(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(UserError, match=message):
        load_model(folder)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt"])
def test_pickles_are_refused_with_a_remedy(folder: Path, tmp_path: Path, file: str) -> None:
    """A pickle that would leave a trace if it were read."""
    trace = tmp_path / "trace"
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(f"cos\nsystem\n(S'touch {trace}'\ntR.".encode())
    with pytest.raises(UserError, match=f"only as {file}, a pickle, which can run code when read; convert it"):
        load_model(folder)
    assert not trace.exists()
