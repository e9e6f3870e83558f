"""POST /v1/embeddings: vectors for texts."""

import asyncio
import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from fastapi.responses import JSONResponse, Response

from lalia.serving.errors import ApiError
from lalia.serving.schema import EmbeddingRequest

if TYPE_CHECKING:
    from lalia.inference.encoder import Encoder

TEXTS_AT_ONCE = 32
"""Texts of one turn. Requests take turns, so that one of a few texts need not wait for all of one of thousands."""
MAX_WAITING_TEXTS = 8192
"""Texts of all requests being answered; more are refused with 503, so that no queue grows without bound."""


class Embeddings:
    """Answers requests for vectors, several at a time, off the event loop."""

    def __init__(self, encoder: "Encoder", name: str) -> None:
        self._encoder, self._name = encoder, name
        self._num_texts = 0
        self._turn = asyncio.Lock()  # first come, first served
        self._turns: set[asyncio.Future[np.ndarray]] = set()
        self._stopped = False

    async def answer(self, body: EmbeddingRequest) -> Response:
        """The response, made off the event loop as well: it may be megabytes of numbers.

        Raises:
            ApiError: 400 for other dimensions than the model's, a text longer than the model reads or an id outside the
                vocabulary; 503 if too much is waiting or the server stops.
        """
        encoder = self._encoder
        if body.dimensions not in (None, encoder.dim):
            raise ApiError(
                f"dimensions = {body.dimensions}: this model's vectors have {encoder.dim} and are not made to be cut; "
                "leave dimensions out",
                param="dimensions",
            )
        if self._num_texts + len(body.input) > MAX_WAITING_TEXTS:
            raise ApiError(
                f"{self._num_texts} texts are being embedded, {MAX_WAITING_TEXTS} is the limit; try again later",
                503,
                code="overloaded",
                headers={"retry-after": "1"},
            )
        self._num_texts += len(body.input)
        try:
            ids = await asyncio.to_thread(self._encode, body.input)
            vectors = await self._embed(ids)
            return await asyncio.to_thread(self._response, body, ids, vectors)
        finally:
            self._num_texts -= len(body.input)

    def cut_off(self) -> None:
        """End what runs, and what comes; the clients get an error."""
        self._stopped = True

    async def _embed(self, ids: list[list[int]]) -> np.ndarray:
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        vectors = np.empty((len(ids), self._encoder.dim), dtype=np.float32)
        for start in range(0, len(order), TEXTS_AT_ONCE):
            rows = order[start : start + TEXTS_AT_ONCE]
            turn = asyncio.ensure_future(self._compute([ids[i] for i in rows]))
            self._turns.add(turn)
            turn.add_done_callback(self._turns.discard)
            # A client that leaves ends its request, but not the computation under way, which keeps the turn until it is
            # done: otherwise clients that come and leave would have many run at once.
            vectors[rows] = await asyncio.shield(turn)
        return vectors

    async def _compute(self, ids: list[list[int]]) -> np.ndarray:
        async with self._turn:
            if self._stopped:
                raise ApiError("the server stopped before the answer was complete", 503, code="stopping")
            return await asyncio.to_thread(self._encoder.embed_ids, ids, TEXTS_AT_ONCE)

    def _encode(self, texts: Sequence[str | list[int]]) -> list[list[int]]:
        encoder, limit = self._encoder, self._encoder.max_length
        ids = [text for text in texts if not isinstance(text, str)]
        vocab_size = encoder.config.vocab_size
        wrong = next((i for row in ids for i in row if not 0 <= i < vocab_size), None)
        if wrong is not None:
            raise ApiError(f"input: token id {wrong} is outside the vocabulary of 0 to {vocab_size - 1}", param="input")
        if not ids:
            ids = encoder.encode_whole([text for text in texts if isinstance(text, str)])
        long = next((number for number, row in enumerate(ids) if len(row) > limit), None)
        if long is not None:
            raise ApiError(
                f"input.{long}: {len(ids[long])} tokens, but this model reads {limit}; shorten or split the text",
                param="input",
                code="context_length_exceeded",
            )
        return ids

    def _response(self, body: EmbeddingRequest, ids: list[list[int]], vectors: np.ndarray) -> Response:
        as_text = body.encoding_format == "base64"
        num_tokens = sum(map(len, ids))
        content = {
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "index": number,
                    # Little-endian float32, as OpenAI's client expects them.
                    "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode()
                    if as_text
                    else vector.tolist(),
                }
                for number, vector in enumerate(vectors)
            ],
            "model": self._name,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
        return JSONResponse(content)
