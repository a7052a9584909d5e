"""OpenAI-compatible HTTP over the engine: chat with tools, plain completion, streaming, n samples, seeds, logprobs.

  GET /health, GET /v1/models, GET /v1/models/NAME, POST /v1/chat/completions, POST /v1/completions
"""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from qcn_jax.chat.templates import NATIVE
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.errors import UserError
from qcn_jax.inference import protocol
from qcn_jax.inference.answer import Answer
from qcn_jax.inference.protocol import BadRequest
from qcn_jax.inference.scheduler import Scheduler

MAX_BODY = 32 << 20  # bytes; a prompt of the longest context is some megabytes
SMALL = 1 << 14  # characters that are read or encoded at once; more of them in another thread
# No prompt has as many characters a token as the first; most that do not fit show it within as many as the second.
MOST_PER_TOKEN, PROBED_PER_TOKEN = 64, 8

Encode = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None], list[int]]


class Json(JSONResponse):
    """JSON that every text can be written in, lone surrogates too."""

    def render(self, content: Any) -> bytes:
        """ASCII; raises ValueError for numbers that JSON does not have."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


@dataclasses.dataclass(frozen=True)
class Service:
    """What the server serves.

    scheduler: runs the engine.
    tokenizer: of the model.
    encode: (messages, tools) -> prompt ids, up to where the assistant begins; called from several threads.
    stop_ids: tokens that end a turn; they are not part of the text.
    name: of the model, as clients see it.
    form: of its tool calls (chat.templates).
    """

    scheduler: Scheduler
    tokenizer: Tokenizer
    encode: Encode
    stop_ids: frozenset[int]
    name: str
    form: str = NATIVE

    def app(self) -> Starlette:
        """The ASGI application; its end closes the scheduler."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.scheduler.close)

        return Starlette(
            routes=[
                Route("/health", self._health), Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
            ],
            lifespan=lifespan,
            exception_handlers={BadRequest: _refuse, ClientDisconnect: _left, 404: _unknown_path, 405: _unknown_path,
                                Exception: _failed},
        )  # fmt: skip

    async def _health(self, _: HttpRequest) -> Response:
        active, waiting = self.scheduler.load()
        return Json({"status": "ok", "active": active, "waiting": waiting, "prompt_tokens": {
            "prefilled": self.scheduler.prefilled, "reused": self.scheduler.reused},
            "blocks": self.scheduler.engine.counts()})

    async def _models(self, _: HttpRequest) -> Response:
        return Json({"object": "list", "data": [protocol.model_body(self.name)]})

    async def _model(self, http: HttpRequest) -> Response:
        protocol.check_model({"model": http.path_params["name"]}, self.name)
        return Json(protocol.model_body(self.name))

    async def _chat(self, http: HttpRequest) -> Response:
        body, size = await _body(http)
        protocol.check_model(body, self.name)
        options = protocol.read_options(body, chat=True, vocabulary=self.tokenizer.vocab_size)
        messages, tools = protocol.read_messages(body), protocol.read_tools(body)
        work = lambda: [self._fitting(lambda: self.encode(messages, tools), [messages, tools], "messages")]
        return await self._answer(http, options, await _off_loop(work, size), tools, chat=True)

    async def _complete(self, http: HttpRequest) -> Response:
        body, size = await _body(http)
        protocol.check_model(body, self.name)
        options = protocol.read_options(body, chat=False, vocabulary=self.tokenizer.vocab_size)
        prompts = protocol.read_prompts(body, self.tokenizer.vocab_size)
        ids = lambda prompt: self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        work = lambda: [self._fitting(lambda p=prompt: ids(p), prompt, "prompt") for prompt in prompts]
        tokens = await _off_loop(work, size)
        echoes = [p if isinstance(p, str) else self.tokenizer.decode(p) for p in prompts] if options.echo else None
        return await self._answer(http, options, tokens, None, chat=False, echoes=echoes)

    async def _answer(
        self, http: HttpRequest, options: protocol.Options, prompts: list[list[int]], tools: Any, chat: bool,
        echoes: list[str] | None = None,
    ) -> Response:  # fmt: skip
        answer = Answer(self, options, prompts, tools, chat, echoes)
        if not self.scheduler.submit(answer.requests):
            return Json(protocol.error_body("too many requests wait", "overloaded"), 429, {"Retry-After": "1"})
        if options.stream:
            return StreamingResponse(answer.stream(), media_type="text/event-stream")
        whole = await answer.whole(http)
        return Response(status_code=499) if whole is None else Json(*whole)

    def _fitting(self, encode: Callable[[], list[int]], source: Any, field: str) -> list[int]:
        """What `encode` gives, if it leaves room for an answer; texts that cannot are not encoded whole."""
        room = self.scheduler.engine.max_length - 1
        texts = list(_strings(source))
        most = MOST_PER_TOKEN * (room + 1)
        if (size := sum(map(len, texts))) > most:
            message = f"the prompt has {size} characters; allowed: up to {most}"
            raise BadRequest(message, field, "context_length_exceeded")
        for text in texts:
            if len(text) > (probed := PROBED_PER_TOKEN * room):
                # What follows can at most join the last few tokens of the beginning.
                if (count := len(self.tokenizer.encode_ordinary(text[:probed]))) > room + room // 8 + 16:
                    message = f"the prompt has more than {count} tokens; allowed: 1 to {room}"
                    raise BadRequest(message, field, "context_length_exceeded")
        try:
            tokens = encode()
        except UserError as error:
            raise BadRequest(str(error), field) from error
        if not 1 <= len(tokens) <= room:
            message = f"the prompt has {len(tokens)} tokens; allowed: 1 to {room}"
            raise BadRequest(message, field, "context_length_exceeded" if tokens else None)
        return tokens


def _strings(value: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list) and not (value and isinstance(value[0], int)):
        for item in value:
            yield from _strings(item)


async def _off_loop(work: Callable[[], Any], size: int) -> Any:
    """What `work` on `size` bytes gives; the event loop does not wait for much of it."""
    return work() if size <= SMALL else await asyncio.to_thread(work)


async def _body(http: HttpRequest) -> tuple[dict[str, Any], int]:
    """The request's object and its size in bytes, which is counted as it comes: not all say it beforehand."""
    too_large = BadRequest(f"the body is larger than {MAX_BODY} bytes", status=413)
    declared = http.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > MAX_BODY):
        raise too_large
    data = bytearray()
    async for chunk in http.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise too_large
    return await _off_loop(lambda: protocol.read_body(bytes(data)), len(data)), len(data)


async def _refuse(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, BadRequest)
    body = protocol.error_body(str(error), "invalid_request_error", error.parameter, error.code)
    return Json(body, error.status)


async def _failed(_: HttpRequest, __: Exception) -> Response:  # Starlette has uvicorn log what it was
    return Json(protocol.error_body("the server failed at this request", "server_error"), 500)


async def _left(_: HttpRequest, __: Exception) -> Response:
    return Response(status_code=499)


async def _unknown_path(http: HttpRequest, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    what = "no such endpoint" if status == 404 else "no such method there"
    return Json(protocol.error_body(f"{http.method} {http.url.path}: {what}", "invalid_request_error"), status)
