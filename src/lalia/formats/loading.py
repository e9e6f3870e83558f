"""From a path to a model and its tokenizer, whatever the format: a Hugging Face folder, or a GGUF file.

A GGUF file may be given itself, or the folder in which it is the only one and beside which no config.json stands.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lalia.errors import CorruptFile, UserError
from lalia.files import read_json
from lalia.formats.gguf.file import GGUFFile
from lalia.formats.hf_folder import CONFIG, GENERATION, SafetensorFiles, read_config, refuse_links_out
from lalia.formats.weights import Reader, TensorSource, assemble
from lalia.model.config import ModelConfig
from lalia.model.families import registry
from lalia.model.transformer import Transformer
from lalia.tokenizer.importers.gguf import tokenizer_from_gguf
from lalia.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class OpenModel:
    """A model whose files are open and whose weights have not been read.

    Attributes:
        path: of the folder or GGUF file.
        config, tokenizer: of the model; the tokenizer is None where a folder has none.
        source: the weights, under the names of a Hugging Face folder.
        end_ids: tokens that end a generation, as the files say.
    """

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer | None
    source: TensorSource
    end_ids: frozenset[int]

    def model(
        self, dtype: torch.dtype = torch.float32, trainable: bool = False, reader: Reader | None = None
    ) -> Transformer:
        """Read the weights; see `lalia.formats.weights.assemble`."""
        return assemble(self.config, self.source, dtype, trainable, reader)

    def needed_tokenizer(self) -> Tokenizer:
        """The tokenizer; UserError where there is none."""
        if self.tokenizer is None:
            raise UserError(f"{self.path} has no tokenizer.json; give the folder of a tokenizer or of a model")
        return self.tokenizer


@contextlib.contextmanager
def open_model(path: Path | str) -> Iterator[OpenModel]:
    """Open a model for reading: `with open_model(path) as files: files.model()`.

    Raises:
        UserError: if there is no model, or it is of a kind that is not implemented.
        CorruptFile: if a file is damaged, or tokenizer and config disagree.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        gguf = gguf_path(path)
        if gguf is not None:
            if path.is_dir():
                refuse_links_out(path)
            file = GGUFFile(gguf)
            values, source = file.config_values(), file
            try:
                config = registry.from_hf(values)
            except UserError as error:
                raise UserError(f"{gguf}: {error}") from None
            tokenizer: Tokenizer | None = tokenizer_from_gguf(file.metadata)
            end_ids = _ids(values, config.vocab_size, gguf)
        else:
            config = read_config(path)
            source = stack.enter_context(SafetensorFiles(path))
            has_tokenizer = (path / "tokenizer.json").is_file()
            tokenizer = Tokenizer.load(path) if has_tokenizer else None
            end_ids = _end_ids_of_folder(path, config.vocab_size)
        if config.head == "none" and config.pooler != "none" and not any("pooler" in name for name in source.names()):
            # GGUF files of BERT, and some folders of sentence encoders, leave out the pooler that nothing else needs.
            config = config.model_copy(update={"pooler": "none"})
        if tokenizer is not None and config.vocab_size and _surplus(tokenizer, config.vocab_size):
            raise UserError(
                f"{path}: the tokenizer has {tokenizer.vocab_size} tokens but {CONFIG} says vocab_size = "
                f"{config.vocab_size}; this tokenizer belongs to another model"
            )
        yield OpenModel(path, config, tokenizer, source, end_ids)


def gguf_path(path: Path) -> Path | None:
    """The GGUF file that is meant by a path, None where a Hugging Face folder is.

    Raises:
        UserError: if a folder holds several GGUF files and no config.json.
    """
    if path.suffix == ".gguf" and not path.is_dir():
        return path
    if not path.is_dir() or (path / CONFIG).is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{path} holds {len(files)} GGUF files; give one of them: {', '.join(f.name for f in files)}")
    return files[0] if files else None


def load_folder(
    path: Path | str, dtype: torch.dtype = torch.float32, trainable: bool = False
) -> tuple[Transformer, Tokenizer]:
    """A model and its tokenizer.

    Raises:
        UserError, CorruptFile: as `open_model` and `OpenModel.model`, and if there is no tokenizer.
    """
    with open_model(path) as files:
        tokenizer = files.needed_tokenizer()
        return files.model(dtype, trainable), tokenizer


def _surplus(tokenizer: Tokenizer, vocab_size: int) -> bool:
    """Whether the tokenizer has ordinary tokens that the model has no embedding for.

    A special one too many is allowed: Gemma 3's text models come with a token for images, which no text contains. Were
    it given all the same, the engine would refuse its id.
    """
    special = set(tokenizer.special.values())
    return any(token_id not in special for token_id in range(vocab_size, tokenizer.vocab_size))


def _end_ids_of_folder(folder: Path, vocab_size: int) -> frozenset[int]:
    """eos_token_id of generation_config.json and config.json."""
    ids: frozenset[int] = frozenset()
    for path in (folder / GENERATION, folder / CONFIG):
        values = read_json(path) if path.is_file() else {}
        ids |= _ids(values if isinstance(values, dict) else {}, vocab_size, path)
    return ids


def _ids(values: dict[str, Any], vocab_size: int, path: Path) -> frozenset[int]:
    """eos_token_id: absent, an id, or a list."""
    found = values.get("eos_token_id")
    ids: Iterable[Any] = found if isinstance(found, list) else [] if found is None else [found]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < max(vocab_size, 1):
            raise CorruptFile(f"{path}: eos_token_id = {token_id!r}; expected ids from 0 to {vocab_size - 1}")
    return frozenset(ids)
