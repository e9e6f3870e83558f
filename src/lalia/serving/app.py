"""The routes: OpenAI's API under /v1, /health, and the chat page at /."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from lalia.errors import UserError
from lalia.inference.encoder import Encoder
from lalia.serving import logprobs, page
from lalia.serving.answers import Answer, Choice
from lalia.serving.choices import ChatChoice, CompletionChoice
from lalia.serving.embeddings import Embeddings
from lalia.serving.errors import ApiError
from lalia.serving.gate import Gate, Traffic
from lalia.serving.openapi import ERRORS, describe_bodies, request_body
from lalia.serving.prompts import chat_prompt, completion_prompts, submit
from lalia.serving.schema import ChatRequest, CompletionRequest, EmbeddingRequest, GenerationRequest, parse_body
from lalia.serving.streaming import ClientLeft, EventStream, while_connected

if TYPE_CHECKING:
    from lalia.inference.language_model import LanguageModel
    from lalia.inference.request import Request as EngineRequest

Generating = TypeVar("Generating", bound=GenerationRequest)

MAX_ANSWERS = 256
"""Answers produced or waiting at a time; more are refused with 503, so that no queue grows without bound."""


def create_app(model: "LanguageModel | Encoder", name: str, allowed_hosts: Iterable[str] | None = None) -> FastAPI:
    """The server of one model.

    Args:
        model: what to serve; the engine of a language model is started and stopped with the app. An encoder has no
            engine, and of the routes that make something only /v1/embeddings.
        name: the model's name in the API.
        allowed_hosts: names the Host header may carry; None accepts all. See `Gate`.

    Returns:
        the app; its `state.traffic` counts what runs and, when told to, lets nothing new in; `state.cut_off()` ends
        what runs.
    """
    service = _Service(model, name)
    engine = None if isinstance(model, Encoder) else model.engine
    traffic = Traffic()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        if engine is not None:
            engine.start()
        yield
        if engine is not None:
            await asyncio.to_thread(engine.stop)

    app = FastAPI(
        title="Lalia",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from another site
        redoc_url=None,
        exception_handlers={ApiError: _api_error, UserError: _user_error, HTTPException: _http_error},
        # FastAPI can report to OpenTelemetry; this server reports to nobody.
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
        },
    )
    app.state.traffic = traffic
    app.state.cut_off = service.cut_off
    app.add_middleware(Gate, traffic=traffic, allowed_hosts=allowed_hosts)

    @app.get("/health")
    async def health() -> Response:
        """200 while requests are taken, 503 while the server stops."""
        if traffic.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The one model served here."""
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{model:path}", responses=ERRORS)
    async def get_model(model: str) -> dict[str, Any]:
        """The same, by its name."""
        service.check_name(model)
        return service.card()

    @app.post("/v1/chat/completions", responses=ERRORS, openapi_extra=request_body(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Continue a conversation."""
        return await service.answer(request, ChatRequest, service.start_chat)

    @app.post("/v1/completions", responses=ERRORS, openapi_extra=request_body(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue a text."""
        return await service.answer(request, CompletionRequest, service.start_completion)

    @app.post("/v1/embeddings", responses=ERRORS, openapi_extra=request_body(EmbeddingRequest))
    async def embeddings(request: Request) -> Response:
        """Vectors for texts."""
        return await service.embed(request)

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        if engine is None:
            return PlainTextResponse(f"{name} makes vectors of texts: POST /v1/embeddings\n")
        return page.response()

    describe_bodies(app)
    return app


class _Service:
    """One model and the answers it is producing."""

    def __init__(self, model: "LanguageModel | Encoder", name: str) -> None:
        self._generates = not isinstance(model, Encoder)
        self._model: Any = model
        self._name = name
        self._embeddings = Embeddings(model if isinstance(model, Encoder) else Encoder.of(model), name)
        self._created = int(time.time())
        self._num_answers = 0
        self._running: set[EngineRequest] = set()
        self._scoring = threading.Lock()

    def card(self) -> dict[str, Any]:
        """The entry of /v1/models. `max_model_len` is what vLLM calls the context's length."""
        return {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "lalia",
            "max_model_len": self._model.max_length,
        }

    def check_name(self, name: str | None) -> None:
        """Refuse a request for another model with 404."""
        if name is not None and name != self._name:
            raise ApiError(
                f"there is no model {name[:80]!r} here; this server has {self._name!r}",
                404,
                param="model",
                code="model_not_found",
            )

    async def answer(
        self,
        request: Request,
        kind: type[Generating],
        start: "Callable[[Generating], tuple[Answer, Sequence[Choice], Sequence[EngineRequest]]]",
    ) -> Response:
        """Parse, start and deliver one request. What takes time runs off the event loop."""
        body = await asyncio.to_thread(parse_body, kind, await request.body())
        self.check_name(body.model)
        if not self._generates:
            raise ApiError(
                f"{self._name!r} generates no text: it makes vectors of texts, at /v1/embeddings", code="no_generation"
            )
        num_answers = body.num_choices * (len(body.prompt) if isinstance(body, CompletionRequest) else 1)
        if self._num_answers + num_answers > MAX_ANSWERS:
            raise ApiError(
                f"{self._num_answers} answers are being produced, {MAX_ANSWERS} is the limit; try again later",
                503,
                code="overloaded",
                headers={"retry-after": "1"},
            )
        self._num_answers += num_answers
        try:
            answer, choices, requests = await asyncio.to_thread(start, body)
        except BaseException:
            self._num_answers -= num_answers
            raise

        self._running.update(requests)

        def done() -> None:
            self._num_answers -= num_answers
            self._running.difference_update(requests)

        if body.stream:
            return EventStream(answer.stream(choices, requests), done)
        try:
            return JSONResponse(await while_connected(request.receive, answer.whole(choices, requests)))
        except ClientLeft:
            return Response(status_code=499)  # nginx's number for it; nobody reads this
        finally:
            done()

    async def embed(self, request: Request) -> Response:
        """Answer a request for vectors."""
        body = await asyncio.to_thread(parse_body, EmbeddingRequest, await request.body())
        self.check_name(body.model)
        try:
            return await while_connected(request.receive, self._embeddings.answer(body))
        except ClientLeft:
            return Response(status_code=499)

    def cut_off(self) -> None:
        """End all running answers; their clients get an error."""
        self._embeddings.cut_off()
        for request in list(self._running):
            request.cancel()

    def start_chat(self, body: ChatRequest) -> "tuple[Answer, Sequence[Choice], Sequence[EngineRequest]]":
        prompt = chat_prompt(self._model, body)
        tokenizer = self._model.tokenizer
        choices = [ChatChoice(tokenizer, body.num_logprobs is not None) for _ in range(body.num_choices)]
        answer = Answer("chat.completion", self._name, body, len(prompt))
        return answer, choices, submit(self._model, [prompt], body)

    def start_completion(self, body: CompletionRequest) -> "tuple[Answer, Sequence[Choice], Sequence[EngineRequest]]":
        prompts = completion_prompts(self._model, body)
        choices: list[Choice] = []
        for given, ids in zip(body.prompt, prompts, strict=True):
            echoed, scores = "", []
            if body.echo:
                echoed = given if isinstance(given, str) else self._model.tokenizer.decode(ids)
                if body.logprobs is not None:
                    with self._scoring:  # one at a time: each holds the logits of many tokens
                        scores = logprobs.of_prompt(self._model, ids, body.logprobs)
            for _ in range(body.num_choices):
                choices.append(CompletionChoice(self._model.tokenizer, body.logprobs is not None, echoed, scores))
        answer = Answer("text_completion", self._name, body, sum(map(len, prompts)))
        return answer, choices, [] if body.max_tokens == 0 else submit(self._model, prompts, body)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _user_error(_: Request, error: Exception) -> Response:
    return ApiError(str(error)).response()


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: "there is no such route; the API is under /v1, the page at /",
        405: "this route does not know this method",
    }
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(message, error.status_code, headers=error.headers).response()
