"""The Python API: load a model folder, complete, chat, score."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from lalia.errors import UserError
from lalia.formats.loading import gguf_path, open_model
from lalia.formats.store import find_model, stored_name
from lalia.inference.engine import Engine, FinishReason, Request, TokenLogprob
from lalia.inference.quantization import quantized_reader
from lalia.inference.sampling import SamplingParams
from lalia.model.config import ModelConfig
from lalia.model.transformer import Transformer
from lalia.tokenizer.bpe import Tokenizer
from lalia.tokenizer.chat import render

END_TOKENS = ("<|endoftext|>", "<|im_end|>")
"""Specials that end a generation wherever a tokenizer has them, besides those that the model folder names."""

LOGIT_ROWS = 256
"""Positions whose logits `log_probs` holds in memory at a time."""


@dataclass(frozen=True)
class Generation:
    """A finished generation.

    Attributes:
        text: without the prompt, the end token and the stop string.
        finish_reason: "stop" (end token or stop string) or "length" (max_tokens or the end of the context).
        token_ids: all generated tokens, an end token included.
        logprobs, alternatives: of each of `token_ids`, if asked for.
        num_prompt_tokens: tokens of the prompt.
    """

    text: str
    finish_reason: FinishReason
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    alternatives: tuple[tuple[TokenLogprob, ...], ...]
    num_prompt_tokens: int

    def __str__(self) -> str:
        return self.text


class LanguageModel:
    """A model and its tokenizer, ready to generate. `lalia.load(folder)` returns one.

    Attributes:
        model, tokenizer, config, name: what was loaded.
        engine: computes all requests; `engine.submit` takes token ids.
        max_length: longest sequence in tokens, prompt and answer together.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        name: str = "model",
        max_batch: int = 16,
        max_length: int | None = None,
        stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Wrap a model. `stop_ids` end a generation, besides the tokenizer's own end tokens."""
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.config: ModelConfig = model.config
        named = (*END_TOKENS, tokenizer.eos_token)
        named_ids = {tokenizer.special[token] for token in named if token in tokenizer.special}
        stop_ids |= {token_id for token_id in named_ids if token_id < model.config.vocab_size}
        self.engine = Engine(model, tokenizer, max_batch, max_length, stop_ids)
        self.max_length = self.engine.max_length

    @overload
    def generate(self, prompt: str, **sampling: Any) -> Generation: ...
    @overload
    def generate(self, prompt: list[str], **sampling: Any) -> list[Generation]: ...
    def generate(self, prompt: str | list[str], **sampling: Any) -> Generation | list[Generation]:
        """Continue a prompt, or several at once.

        Args:
            prompt: text; a list gives a list of generations, computed together.
            sampling: fields of `SamplingParams`, for example max_tokens=200, temperature=0.7, seed=1.

        Raises:
            UserError: on a sampling value out of range, or a prompt that does not fit in the context.
        """
        params = SamplingParams.parse(sampling, "sampling")
        if isinstance(prompt, str):
            return self._run([self.encode(prompt)], params)[0]
        return self._run([self.encode(text) for text in prompt], params)

    def stream(self, prompt: str, **sampling: Any) -> Iterator[str]:
        """Continue a prompt, text by text as it comes. Arguments and errors as for `generate`."""
        params = SamplingParams.parse(sampling, "sampling")
        return self._texts(self.engine.submit(self.encode(prompt), params))

    @overload
    def chat(
        self, messages: str | Sequence[dict[str, str]], stream: Literal[False] = False, **sampling: Any
    ) -> str: ...
    @overload
    def chat(
        self, messages: str | Sequence[dict[str, str]], stream: Literal[True], **sampling: Any
    ) -> Iterator[str]: ...
    def chat(
        self, messages: str | Sequence[dict[str, str]], stream: bool = False, **sampling: Any
    ) -> str | Iterator[str]:
        """The assistant's answer to a conversation.

        Args:
            messages: what the user says, or a list of {"role": "system" | "user" | "assistant", "content": text}.
            stream: give an iterator of texts as they come.
            sampling: as for `generate`.

        Raises:
            UserError: as `generate`, and on malformed messages.
        """
        if not stream:
            return self.reply(messages, **sampling).text
        params = SamplingParams.parse(sampling, "sampling")
        return self._texts(self.engine.submit(self.encode_chat(messages), params))

    def reply(self, messages: str | Sequence[dict[str, str]], **sampling: Any) -> Generation:
        """The assistant's answer with everything known about it. Arguments and errors as for `chat`."""
        params = SamplingParams.parse(sampling, "sampling")
        return self._run([self.encode_chat(messages)], params)[0]

    def encode_chat(self, messages: str | Sequence[dict[str, str]]) -> list[int]:
        """Ids of a conversation up to where the assistant's answer begins."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return render(self.tokenizer, messages, add_generation_prompt=True)

    def fit_messages(self, messages: Sequence[dict[str, str]], room: int) -> list[dict[str, str]]:
        """The end of a conversation that leaves `room` tokens of context for the answer.

        A leading system message stays; the oldest exchanges go first, so that the rest begins with the user. The
        last message always stays, even if it is too long by itself.
        """
        kept = list(messages)
        first = 1 if kept and kept[0]["role"] == "system" else 0
        while len(kept) > first + 1 and len(self.encode_chat(kept)) + room > self.max_length:
            del kept[first]
            while len(kept) > first + 1 and kept[first]["role"] != "user":
                del kept[first]
        return kept

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt as documents begin: after the token that begins a text, where the tokenizer has one."""
        bos = self.tokenizer.special.get(self.tokenizer.bos_token or "")
        return [*([] if bos is None else [bos]), *self.tokenizer.encode(prompt)]

    @torch.no_grad()
    def log_probs(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """Natural logarithm of the probability of each token given those before it.

        Args:
            token_ids: at least two.

        Returns:
            (len(token_ids) - 1,) float32; the first token has nothing before it.

        Raises:
            UserError: on fewer than two tokens, on more than the context and one, or on an id outside the vocabulary.
        """
        ids = torch.as_tensor(token_ids, dtype=torch.int64).reshape(-1)
        if not 2 <= len(ids) <= self.max_length + 1:
            raise UserError(f"{len(ids)} token ids; expected 2 to {self.max_length + 1} (context {self.max_length})")
        if bool(((ids < 0) | (ids >= self.config.vocab_size)).any()):
            raise UserError(
                f"token ids {int(ids.min())} to {int(ids.max())}; expected 0 to {self.config.vocab_size - 1}"
            )
        ids = ids.to(self.model.embedding.weight.device)
        hidden = self.model(ids[None, :-1])[0]  # (len - 1, hidden)
        pieces = []
        for rows, targets in zip(hidden.split(LOGIT_ROWS), ids[1:].split(LOGIT_ROWS), strict=True):
            log_probs = self.model.logits(rows).float().log_softmax(-1)
            pieces.append(log_probs.gather(-1, targets[:, None]).squeeze(-1))
        return torch.cat(pieces).cpu()

    def _run(self, prompts: list[list[int]], params: SamplingParams) -> list[Generation]:
        for prompt_ids in prompts:
            self.engine.check(prompt_ids, params)
        requests = [self.engine.submit(prompt_ids, params) for prompt_ids in prompts]
        try:
            return [_finished(request) for request in requests]
        finally:
            for request in requests:
                if not request.finished:
                    request.cancel()

    @staticmethod
    def _texts(request: Request) -> Iterator[str]:
        try:
            for delta in request:
                if delta.text:
                    yield delta.text
        finally:
            if not request.finished:  # the reader went away
                request.cancel()


def load(
    model: Path | str,
    max_batch: int = 16,
    max_length: int | None = None,
    quantize: str | None = None,
) -> LanguageModel:
    """Load a model: a Hugging Face folder, a GGUF file, or a name in the model store.

    Args:
        max_batch: generations computed at the same time.
        max_length: longest sequence in tokens, prompt and answer together; None means the model's context.
        quantize: "int8" or "int4" turns weights of floating point into integers of so many bits. None leaves them as
            they are, and those that a GGUF file has as integers too; "none" makes everything float32.

    Raises:
        UserError, CorruptFile: if it is no complete model.
    """
    path = find_model(model)
    with open_model(path) as files:
        tokenizer = files.needed_tokenizer()
        how = None if quantize == "none" else quantize
        keep = quantize != "none" and (how is not None or gguf_path(path) is not None)
        transformer = files.model(reader=quantized_reader(files.source, how) if keep else None)
    return LanguageModel(transformer, tokenizer, _name(path), max_batch, max_length, files.end_ids)


def _name(path: Path) -> str:
    """The store's name, or the folder's with that of its run in front: runs/shakespeare/chat is "shakespeare-chat"."""
    path = path.resolve()
    in_run = (path.parent / "recipe.toml").is_file()
    return stored_name(path) or (f"{path.parent.name}-{path.name}" if in_run else path.name.removesuffix(".gguf"))


def _finished(request: Request) -> Generation:
    request.wait()
    assert request.finish_reason is not None
    return Generation(
        request.text,
        request.finish_reason,
        tuple(request.token_ids),
        request.logprobs,
        request.alternatives,
        request.num_prompt_tokens,
    )
