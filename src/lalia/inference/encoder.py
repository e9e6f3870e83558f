"""Encoders: vectors for texts, masked tokens filled in, texts classified."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lalia.errors import UserError
from lalia.formats.gguf.file import GGUFFile
from lalia.formats.loading import gguf_path, load_folder
from lalia.formats.sentence_transformers import Mode, Pooling, read_pooling
from lalia.model.config import ModelConfig
from lalia.model.transformer import Transformer
from lalia.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lalia.inference.language_model import LanguageModel

BATCH_TOKENS = 16_384
"""Most tokens of a batch, padding included, whatever the batch size: what bounds the memory."""
ENOUGH_TOKENS, WASTE = 1024, 0.15
"""A batch of that many tokens computes as fast as a larger one, so it takes no row that would be padded by a larger
share."""

GGUF_POOLING: dict[object, tuple[Mode, ...]] = {0: ("mean",), 1: ("mean",), 2: ("cls",), 3: ("lasttoken",)}
"""By llama.cpp's number; 0 is "not said"."""


class Filling(NamedTuple):
    """A token in a mask's place, as the vocabulary spells it ("##ing" continues a word), and its probability."""

    token: str
    probability: float


class Classification(NamedTuple):
    """The most probable label of a text, its probability, and those of all labels."""

    label: str
    probability: float
    probabilities: dict[str, float]


class Encoder:
    """A model of whole texts and its tokenizer. `lalia.load(folder)` returns one for BERT-like folders.

    What it can do depends on its head: `embed` always, `fill` with a masked-language-model head, `classify` with a
    classifier.

    Attributes:
        model, tokenizer, config, name: what was loaded.
        pooling: how `embed` makes one vector of a text's token vectors.
        max_length: longest text in tokens, specials included.
        dim: length of a vector.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, name: str = "model", pooling: Pooling | None = None
    ) -> None:
        """Wrap a model; without `pooling` a text's vector is the mean of its tokens', scaled to length one."""
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.config: ModelConfig = model.config
        # A causal model without a recipe of its own reads texts as its documents begin; others as their tokenizer says.
        self._as_document = pooling is None and model.config.causal and model.config.head == "language_model"
        self.pooling = pooling or Pooling()
        limit = self.pooling.max_length or model.config.max_position_embeddings
        self.max_length = min(limit, model.config.max_position_embeddings)
        self.dim = model.config.hidden_size * len(self.pooling.modes)

    @classmethod
    def of(cls, model: "LanguageModel") -> "Encoder":
        """The encoder inside a language model: a text's vector is the mean of its tokens' final hidden states."""
        encoder = cls(model.model, model.tokenizer, model.name)
        encoder.max_length = min(encoder.max_length, model.max_length)
        return encoder

    def embed(self, texts: Sequence[str], batch_size: int = 32, truncate: bool = True) -> np.ndarray:
        """One vector for each text.

        Args:
            texts: any number; they are computed in batches of similar length, and given back in their order.
            batch_size: texts computed together, fewer where they are long.
            truncate: cut texts longer than `max_length`, with one warning that says how many; False refuses them.

        Returns:
            (texts, dim) float32

        Raises:
            UserError: if `texts` is one string or holds something else than text, or a text is too long.
        """
        return self.embed_ids(self.encode(texts, truncate), batch_size)

    @torch.inference_mode()
    def embed_ids(self, ids: Sequence[list[int]], batch_size: int = 32) -> np.ndarray:
        """`embed` of texts that are encoded already, each with 1 to `max_length` ids."""
        vectors = np.empty((len(ids), self.dim), dtype=np.float32)
        for rows in _batches([len(row) for row in ids], batch_size):
            hidden, lengths = self._hidden([ids[i] for i in rows])
            vectors[rows] = self._pool(hidden.float(), lengths).cpu().numpy()
        return vectors

    @torch.inference_mode()
    def fill(self, text: str, top_k: int = 5) -> list[Filling]:
        """What could stand in the place of the mask.

        Args:
            text: with the tokenizer's mask token (BERT's is [MASK]) in it once.
            top_k: how many tokens to give, the most probable first.

        Raises:
            UserError: if the model has no masked-language-model head, the text has no mask or several, or is too long.
        """
        config, mask = self.config, self.tokenizer.mask_token
        if config.head != "language_model" or config.causal or mask is None:
            raise UserError(f"{self.name} fills in no masks; {self._abilities()}")
        pieces = _check_texts([text])[0].split(mask)
        if len(pieces) != 2:
            raise UserError(f"the text has {len(pieces) - 1} masks; write {mask} once, where a token is to be found")
        if not 1 <= top_k <= config.vocab_size:
            raise UserError(f"top_k = {top_k}; expected 1 to {config.vocab_size}")
        mask_id = self.tokenizer.special_id(mask)
        before, after = self.tokenizer.encode_batch(pieces)
        around = self.tokenizer.encode_with_specials([""])[0].ids
        ids = [*around[:1], *before, mask_id, *after, *around[1:]]
        if len(ids) > self.max_length:
            raise UserError(f"the text has {len(ids)} tokens, this model reads {self.max_length}; shorten it")
        hidden, _ = self._hidden([ids])
        probabilities = self.model.logits(hidden[0, 1 + len(before)]).float().softmax(-1)
        best = probabilities.topk(top_k)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [Filling(self.tokenizer.token(i), probability) for i, probability in pairs]

    @torch.inference_mode()
    def classify(self, texts: Sequence[str], batch_size: int = 32, truncate: bool = True) -> list[Classification]:
        """The label of each text. Arguments and errors as for `embed`.

        Raises:
            UserError: also if the model is no classifier.
        """
        if self.model.classifier is None:
            raise UserError(f"{self.name} classifies nothing; {self._abilities()}")
        probabilities = self.scores(self.encode(texts, truncate), batch_size).softmax(-1)
        labels = self.config.labels
        results = []
        for row in probabilities.tolist():
            shares = dict(sorted(zip(labels, row, strict=True), key=lambda pair: -pair[1]))
            best = next(iter(shares))
            results.append(Classification(best, shares[best], shares))
        return results

    @torch.inference_mode()
    def scores(self, ids: Sequence[list[int]], batch_size: int = 32) -> Tensor:
        """A classifier's logits for encoded texts, (texts, labels) float32."""
        logits = torch.empty(len(ids), len(self.config.labels))
        for rows in _batches([len(row) for row in ids], batch_size):
            hidden, _ = self._hidden([ids[i] for i in rows])
            logits[rows] = self.model.classify(hidden).float().cpu()
        return logits

    def encode(self, texts: Sequence[str], truncate: bool = True) -> list[list[int]]:
        """Ids of texts with the specials that the model expects around them. Arguments and errors as for `embed`."""
        ids = self.encode_whole(texts)
        long = [number for number, row in enumerate(ids) if len(row) > self.max_length]
        if not long:
            return ids
        if not truncate:
            raise UserError(
                f"text {long[0]} has {len(ids[long[0]])} tokens, this model reads {self.max_length} ({len(long)} of "
                f"{len(texts)} texts are too long); split them, or let them be cut (truncate=True)"
            )
        warnings.warn(
            f"{len(long)} of {len(texts)} texts have more than {self.max_length} tokens and were cut there",
            stacklevel=3,
        )
        if self._as_document:
            return [row[: self.max_length] for row in ids]
        cut = self.tokenizer.encode_with_specials(
            [self.pooling.prompt + texts[number] for number in long], max_tokens=self.max_length
        )
        for number, encoded in zip(long, cut, strict=True):
            ids[number] = encoded.ids
        return ids

    def encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode`, whatever the length."""
        texts = [self.pooling.prompt + text for text in _check_texts(texts)]
        if self._as_document:
            bos = self.tokenizer.special.get(self.tokenizer.bos_token or "")
            ids = [[*([] if bos is None else [bos]), *row] for row in self.tokenizer.encode_batch(texts)]
        else:
            ids = [encoded.ids for encoded in self.tokenizer.encode_with_specials(texts)]
        empty = next((number for number, row in enumerate(ids) if not row), None)
        if empty is not None:
            raise UserError(f"text {empty} has no tokens, and this tokenizer puts none around it; leave it out")
        return ids

    def _hidden(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Final hidden states (batch, longest, hidden) of padded rows, and the rows' lengths (batch,)."""
        lengths = torch.tensor([len(row) for row in ids])
        longest = int(lengths.max())
        device = self.model.device
        if len(ids) == 1 or int(lengths.min()) == longest:
            return self.model(torch.tensor(ids, device=device)), lengths.to(device)
        tokens = torch.zeros(len(ids), longest, dtype=torch.int64)
        for row, of_row in zip(tokens, ids, strict=True):
            row[: len(of_row)] = torch.tensor(of_row)
        padding = torch.arange(longest) >= lengths[:, None]  # (batch, longest)
        return self.model(tokens.to(device), document_ids=padding.to(device, torch.int32)), lengths.to(device)

    def _pool(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """(batch, seq, hidden) -> (batch, dim)"""
        inside = (torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None])[..., None]  # (batch, seq, 1)
        parts = []
        for mode in self.pooling.modes:
            if mode == "mean":
                parts.append((hidden * inside).sum(1) / lengths[:, None])
            elif mode == "cls":
                parts.append(hidden[:, 0])
            elif mode == "max":
                parts.append(hidden.masked_fill(~inside, float("-inf")).amax(1))
            else:
                parts.append(hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1])
        vectors = torch.cat(parts, -1)
        return torch.nn.functional.normalize(vectors, dim=-1) if self.pooling.normalize else vectors

    def _abilities(self) -> str:
        if self.model.classifier is not None:
            return f"it is a classifier of the labels {', '.join(self.config.labels[:8])}"
        if self.config.head == "language_model" and not self.config.causal:
            return "it is a masked language model: use fill, or embed"
        return "it makes vectors: use embed"


def load(path: Path | str) -> Encoder:
    """Load an encoder: a Hugging Face folder, or a GGUF file. A sentence-transformers folder brings its own pooling.

    Raises:
        UserError, CorruptFile: if it is no complete model.
    """
    path = Path(path)
    model, tokenizer = load_folder(path)
    pooling = read_pooling(path)
    if (gguf := gguf_path(path)) is not None:
        metadata = GGUFFile(gguf).metadata
        number = metadata.get(f"{metadata.get('general.architecture')}.pooling_type", 1)
        if type(number) is not int or number not in GGUF_POOLING:
            raise UserError(f"{gguf}: pooling_type = {number!r}; known: {GGUF_POOLING}")
        pooling = Pooling(GGUF_POOLING[number])
    return Encoder(model, tokenizer, path.resolve().name.removesuffix(".gguf"), pooling)


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Numbers of rows of similar length, the longest first, so that too little memory shows at once."""
    if batch_size < 1:
        raise UserError(f"batch_size = {batch_size}; expected at least 1")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        count = max(1, min(batch_size, BATCH_TOKENS // longest))
        rows = order[start : start + count]
        enough = -(-ENOUGH_TOKENS // longest)
        rows = [i for place, i in enumerate(rows) if place < enough or lengths[i] > longest * (1 - WASTE)]
        yield rows
        start += len(rows)


def _check_texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise UserError("expected a list of texts, got one string; write [text]")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"text {number} is {type(text).__name__}, expected a string")
    return list(texts)
