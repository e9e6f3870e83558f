"""A page that runs an exported language model in a browser or on a phone: what stands beside the graph for it."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lalia.errors import UserError
from lalia.files import read_json, write_json
from lalia.formats.hf_folder import GENERATION
from lalia.tokenizer.bpe import Tokenizer

PAGE = Path(__file__).parent / "page"


def write_page(folder: Path | str, prompts: Sequence[str], max_tokens: int = 60) -> Path:
    """Write index.html, onnx_model.js and page.json into a folder that `lalia convert --to onnx` made.

    The page continues the prompts, which are encoded here, so that no tokenizer runs in the browser; page.json has
    their ids, the bytes of every token, and where the model is. Besides, the page needs onnxruntime-web in ort/.

    Args:
        max_tokens: at which the page stops, if no end token comes before.

    Returns:
        the path of index.html.

    Raises:
        UserError: if the folder has no graph or tokenizer, or no prompt is given.
    """
    folder = Path(folder)
    graphs = sorted(folder.glob("*.onnx"))
    if not graphs:
        raise UserError(f"{folder} has no .onnx file; lalia convert MODEL --to onnx-int8 --out {folder} makes one")
    if not prompts or not all(prompts):
        raise UserError("the page needs at least one prompt, none of them empty")
    tokenizer = Tokenizer.load(folder)
    data = graphs[0].with_name(graphs[0].name + "_data")
    files = {"model": graphs[0].name, **({"data": data.name} if data.is_file() else {})}
    content: dict[str, Any] = {
        "files": files,
        "bytes": sum((folder / name).stat().st_size for name in files.values()),
        "prompts": [{"text": text, "ids": tokenizer.encode(text)} for text in prompts],
        "stop_ids": _stop_ids(folder),
        "max_tokens": max_tokens,
        "token_bytes": [list(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)],
    }
    for name in ("index.html", "onnx_model.js"):
        shutil.copyfile(PAGE / name, folder / name)
    write_json(folder / "page.json", content)
    return folder / "index.html"


def _stop_ids(folder: Path) -> list[int]:
    generation = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    ids = generation.get("eos_token_id")
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
