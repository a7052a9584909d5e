"""OpenAI-compatible HTTP over the engine: chat with tools, plain completion, streaming, n samples, seeds, logprobs.

  GET /health, GET /v1/models, POST /v1/chat/completions, POST /v1/completions
"""

import asyncio
import contextlib
import dataclasses
import json
import secrets
import zlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from qcn_jax.chat.rendering import parse_tool_calls
from qcn_jax.chat.tokenizer import IncrementalDecoder, Tokenizer
from qcn_jax.errors import UserError
from qcn_jax.inference import protocol
from qcn_jax.inference.protocol import BadRequest, Options
from qcn_jax.inference.scheduler import Piece, Request, Scheduler

MAX_BODY = 32 << 20  # bytes; a prompt of the longest context is some megabytes
CALL_OPENINGS = ("<tool_call>", "<function=")  # text from here on is not streamed as content
DISCONNECT_POLL = 1.0  # seconds between looks whether a client that streams nothing is still there

Encode = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None], list[int]]


@dataclasses.dataclass(frozen=True)
class Service:
    """What the server serves.

    scheduler: runs the engine.
    tokenizer: of the model.
    encode: (messages, tools) -> prompt ids, up to where the assistant begins.
    stop_ids: tokens that end a turn; they are not part of the text.
    name: of the model, as clients see it.
    """

    scheduler: Scheduler
    tokenizer: Tokenizer
    encode: Encode
    stop_ids: frozenset[int]
    name: str

    def app(self) -> Starlette:
        """The ASGI application; its end closes the scheduler."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.scheduler.close)

        return Starlette(
            routes=[
                Route("/health", self._health), Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
            ],
            lifespan=lifespan,
            exception_handlers={BadRequest: _refuse, 404: _unknown_path, 405: _unknown_path},
        )  # fmt: skip

    async def _health(self, _: HttpRequest) -> Response:
        active, waiting = self.scheduler.load()
        return JSONResponse({"status": "ok", "active": active, "waiting": waiting})

    async def _models(self, _: HttpRequest) -> Response:
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "qcn_jax"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _chat(self, http: HttpRequest) -> Response:
        body = await _json(http)
        messages, tools = protocol.read_messages(body), protocol.read_tools(body)
        try:
            tokens = self.encode(messages, tools)
        except UserError as error:
            raise BadRequest(str(error), "messages") from error
        return await self._answer(http, protocol.read_options(body), tokens, tools, chat=True)

    async def _complete(self, http: HttpRequest) -> Response:
        body = await _json(http)
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt)
        elif isinstance(prompt, list) and all(
            isinstance(t, int) and 0 <= t < self.tokenizer.vocab_size for t in prompt
        ):
            tokens = prompt
        else:
            raise BadRequest("prompt: expected a text or a list of token ids", "prompt")
        return await self._answer(http, protocol.read_options(body), tokens, None, chat=False)

    async def _answer(
        self, http: HttpRequest, options: Options, tokens: list[int], tools: Any, chat: bool
    ) -> Response:
        room = self.scheduler.engine.max_length - len(tokens)
        if room < 1 or not tokens:
            message = f"the prompt has {len(tokens)} tokens; allowed: 1 to {self.scheduler.engine.max_length - 1}"
            raise BadRequest(message, "messages" if chat else "prompt", "context_length_exceeded" if tokens else None)
        answer = _Answer(self, options, tokens, min(options.max_new_tokens or room, room), tools, chat)
        if not self.scheduler.submit(answer.requests):
            return JSONResponse(protocol.error_body("too many requests wait", "overloaded"), 429, {"Retry-After": "1"})
        if options.stream:
            return StreamingResponse(answer.stream(), media_type="text/event-stream")
        return await answer.whole(http)


class _Choice:
    """One sample's text so far: what may be sent, what is held back, what has been sent."""

    def __init__(self, service: Service, stops: Sequence[str], hold_calls: bool) -> None:
        self._decoder = IncrementalDecoder(service.tokenizer)
        self._service, self._stops = service, stops
        self._marks = (*stops, *(CALL_OPENINGS if hold_calls else ()))
        self.text, self.sent, self.count = "", 0, 0
        self.logprobs: list[tuple[str, float]] = []
        self.finish: str | None = None

    def push(self, piece: Piece) -> str:
        """Takes tokens in; returns the text that is now safe to show."""
        for token, logprob in zip(piece.tokens, piece.logprobs, strict=True):
            self.count += 1
            added = "" if token in self._service.stop_ids else self._decoder.push(token)
            self.logprobs.append((self._service.tokenizer.token_bytes(token).decode("utf-8", "replace"), logprob))
            before, self.text = len(self.text), self.text + added
            at = min((i for stop in self._stops if (i := self.text.find(stop, max(0, before - len(stop)))) >= 0),
                     default=-1)  # fmt: skip
            if at >= 0:
                self.text, self.finish = self.text[:at], "stop"
                return self._show(len(self.text))
        if piece.finish is not None:
            self.text, self.finish = self.text + self._decoder.finish(), piece.finish
        return self._show(len(self.text) if self.finish else len(self.text) - self._unsafe())

    def _unsafe(self) -> int:
        """Characters at the end that could be the beginning of a mark."""
        longest = max((len(mark) for mark in self._marks), default=1)
        return next((n for n in range(min(longest - 1, len(self.text)), 0, -1)
                     if any(mark.startswith(self.text[-n:]) for mark in self._marks)), 0)  # fmt: skip

    def _show(self, end: int) -> str:
        opening = [i for mark in self._marks if mark in CALL_OPENINGS and (i := self.text.find(mark)) >= 0]
        end = max(min([end, *opening]), self.sent)
        shown, self.sent = self.text[self.sent : end], end
        return shown


class _Answer:
    """The answer to one HTTP request: its samples, and how they are written."""

    def __init__(
        self, service: Service, options: Options, tokens: list[int], limit: int, tools: Any, chat: bool
    ) -> None:
        self._service, self._options, self._tools, self._chat = service, options, tools, chat
        self._prompt, self._id = len(tokens), protocol.new_id(chat)
        self._choices = [_Choice(service, options.stops, bool(tools)) for _ in range(options.choices)]
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        loop, seed = asyncio.get_running_loop(), options.seed if options.seed is not None else secrets.randbits(32)

        def emit_to(index: int) -> Callable[[Piece], None]:
            def emit(piece: Piece) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
                    loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

            return emit

        self.requests = [
            Request(tokens, options.sampling, limit, zlib.crc32(f"{seed} {index}".encode()), emit_to(index))
            for index in range(options.choices)
        ]

    async def whole(self, http: HttpRequest) -> Response:
        """One JSON answer once all samples have ended."""
        try:
            while any(choice.finish is None for choice in self._choices):
                try:
                    index, piece = await asyncio.wait_for(self._queue.get(), DISCONNECT_POLL)
                except TimeoutError:
                    if await http.is_disconnected():
                        return Response(status_code=499)
                    continue
                self._take(index, piece)
        finally:
            self._cancel()
        failed = next((c.finish for c in self._choices if c.finish.startswith("error")), None)
        if failed:
            return JSONResponse(protocol.error_body(failed, "server_error"), 500)
        kind = "chat.completion" if self._chat else "text_completion"
        choices = [self._final(i) for i in range(len(self._choices))]
        body = protocol.envelope(self._id, kind, self._service.name, choices)
        return JSONResponse(body | {"usage": self._usage()})

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events, one for each piece of text."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        event = lambda choices, **more: f"data: {json.dumps(self._envelope(kind, choices) | more)}\n\n"
        try:
            if self._chat:
                for index in range(len(self._choices)):
                    delta = {"role": "assistant", "content": ""}
                    yield event([{"index": index, "delta": delta, "finish_reason": None}])
            while any(choice.finish is None for choice in self._choices):
                index, piece = await self._queue.get()
                text, choice = self._take(index, piece), self._choices[index]
                if choice.finish is not None and choice.finish.startswith("error"):
                    yield f"data: {json.dumps(protocol.error_body(choice.finish, 'server_error'))}\n\n"
                    return
                for part in self._parts(index, text):
                    yield event([part])
            if self._options.include_usage:
                yield event([], usage=self._usage())
            yield "data: [DONE]\n\n"
        finally:
            self._cancel()

    def _take(self, index: int, piece: Piece) -> str:
        choice = self._choices[index]
        if choice.finish is not None:  # tokens after a stop text
            return ""
        text = choice.push(piece)
        if choice.finish is not None:
            self.requests[index].cancel()
        return text

    def _parts(self, index: int, text: str) -> list[dict[str, Any]]:
        """The choices of the events that one piece becomes."""
        choice, parts = self._choices[index], []
        wrap = lambda delta, finish: {"index": index, "finish_reason": finish} | (
            {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        )
        if text:
            parts.append(wrap({"content": text}, None))
        if choice.finish is not None:
            message, finish = self._message(choice)
            calls = message.get("tool_calls")
            if calls:
                parts.append(wrap({"tool_calls": protocol.tool_calls_body(calls, streamed=True)}, None))
            elif choice.sent < len(choice.text):  # looked like a call, and was none
                parts.append(wrap({"content": choice.text[choice.sent :]}, None))
            parts.append(wrap({}, finish))
        if parts and self._options.logprobs:
            parts[0]["logprobs"] = self._logprobs(choice)
            choice.logprobs = []
        return parts

    def _message(self, choice: _Choice) -> tuple[dict[str, Any], str]:
        """The assistant's message (calls as chat.rendering.ToolCalls) and the finish reason."""
        parsed = parse_tool_calls(choice.text, self._tools) if self._tools else None
        if parsed is None or not parsed.calls:
            return {"role": "assistant", "content": choice.text}, choice.finish
        finish = "tool_calls" if choice.finish == "stop" else choice.finish
        return {"role": "assistant", "content": parsed.content or None, "tool_calls": parsed.calls}, finish

    def _final(self, index: int) -> dict[str, Any]:
        choice = self._choices[index]
        logprobs = {"logprobs": self._logprobs(choice) if self._options.logprobs else None}
        if not self._chat:
            return {"index": index, "text": choice.text, "finish_reason": choice.finish} | logprobs
        message, finish = self._message(choice)
        if "tool_calls" in message:
            message["tool_calls"] = protocol.tool_calls_body(message["tool_calls"])
        return {"index": index, "message": message, "finish_reason": finish} | logprobs

    def _logprobs(self, choice: _Choice) -> dict[str, Any]:
        if not self._chat:
            tokens, values = [list(column) for column in zip(*choice.logprobs)] if choice.logprobs else ([], [])
            return {"tokens": tokens, "token_logprobs": values, "top_logprobs": None, "text_offset": None}
        content = [
            {"token": token, "logprob": value, "bytes": list(token.encode()), "top_logprobs": []}
            for token, value in choice.logprobs
        ]
        return {"content": content}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return protocol.envelope(self._id, kind, self._service.name, choices)

    def _usage(self) -> dict[str, int]:
        return protocol.usage_body(self._prompt, sum(choice.count for choice in self._choices))

    def _cancel(self) -> None:
        for request in self.requests:
            request.cancel()


async def _json(http: HttpRequest) -> dict[str, Any]:
    if int(http.headers.get("content-length") or 0) > MAX_BODY:
        raise BadRequest(f"the body is larger than {MAX_BODY} bytes")
    try:
        body = await http.json()
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    return body


async def _refuse(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, BadRequest)
    return JSONResponse(protocol.error_body(str(error), "invalid_request_error", error.parameter, error.code), 400)


async def _unknown_path(http: HttpRequest, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    message = f"{http.method} {http.url.path}: no such endpoint"
    return JSONResponse(protocol.error_body(message, "invalid_request_error"), status)
