"""The answer to one request: samples turned into text, words and calls, whole or streamed.

Both forms are made of the same pieces in the same order; the whole form joins them.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest

from qcn_jax.chat import templates
from qcn_jax.chat.rendering import ToolCall
from qcn_jax.chat.tokenizer import IncrementalDecoder, Tokenizer
from qcn_jax.inference import protocol
from qcn_jax.inference.protocol import Options
from qcn_jax.inference.scheduler import Piece, Request, Scheduler


class Source(Protocol):
    """What an answer needs of the server."""

    scheduler: Scheduler
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    name: str
    form: str


class Choice:
    """One sample's text so far.

    Attributes:
      words: of the message, as far as they are certain.
      calls: of the message, once it has ended.
      finish: why it ended, or None.
      count: tokens so far.
      logprobs: (token, log-probability, alternatives) of each since the list was last emptied.
    """

    def __init__(self, source: Source, stops: Sequence[str] = (), tools: Any = None, one_call: bool = False) -> None:
        """Makes an empty one; where there are `tools`, its calls are read, only the first of them if `one_call`."""
        self._decoder, self._tokenizer = IncrementalDecoder(source.tokenizer), source.tokenizer
        self._stop_ids, self._stops, self._one_call = source.stop_ids, stops, one_call
        self._reader = templates.reader(source.form, tools) if tools else None
        self._text, self._read = "", 0  # what was generated, and how much of it no stop text can begin in
        self.words, self.count = "", 0
        self.calls: list[ToolCall] = []
        self.logprobs: list[tuple[int, float, list[tuple[int, float]]]] = []
        self.finish: str | None = None

    def push(self, piece: Piece) -> str:
        """Takes tokens in; returns the words that are now certain. `end` follows where `finish` is set."""
        beside = piece.alternatives or [[]] * len(piece.tokens)
        for token, logprob, others in zip(piece.tokens, piece.logprobs, beside, strict=True):
            self.count += 1
            self.logprobs.append((token, logprob, others))
            before = len(self._text)
            self._text += "" if token in self._stop_ids else self._decoder.push(token)
            if self._stopped(before):
                return self._certain(len(self._text))
        if piece.finish is not None:
            before, self.finish = len(self._text), piece.finish
            self._text += self._decoder.finish()
            self._stopped(before)
        return self._certain(len(self._text) if self.finish else len(self._text) - self._unsafe())

    def end(self) -> str:
        """Reads the calls; returns the words that were in doubt until now."""
        if self._reader is None:
            return ""
        rest = self._reader.finish()
        self.words += rest
        self.calls = self._reader.message.calls[: 1 if self._one_call else None]
        if self.calls and self.finish == "stop":
            self.finish = "tool_calls"
        return rest

    def _stopped(self, before: int) -> bool:
        """Cuts the text at the first stop text that ends behind `before`, if there is one."""
        at = min((i for stop in self._stops if (i := self._text.find(stop, max(0, before - len(stop)))) >= 0),
                 default=-1)  # fmt: skip
        if at >= 0:
            self._text, self.finish = self._text[:at], "stop"
        return at >= 0

    def _unsafe(self) -> int:
        """Characters at the end that could be the beginning of a stop text."""
        longest = max((len(stop) for stop in self._stops), default=1)
        return next((n for n in range(min(longest - 1, len(self._text)), 0, -1)
                     if any(stop.startswith(self._text[-n:]) for stop in self._stops)), 0)  # fmt: skip

    def _certain(self, end: int) -> str:
        text, self._read = self._text[self._read : max(end, self._read)], max(end, self._read)
        words = self._reader.push(text) if self._reader else text
        self.words += words
        return words


class Answer:
    """The answer to one HTTP request: its samples, and how they are written."""

    def __init__(
        self, source: Source, options: Options, prompts: Sequence[list[int]], tools: Any, chat: bool,
        echoes: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        """Makes `requests`, to be submitted; `echoes` are texts to begin with, one a prompt."""
        self._source, self._options, self._chat, count = source, options, chat, options.choices
        self._prompt, self._id = sum(map(len, prompts)), protocol.new_id(chat)
        self._echoes = [echoes[i // count] if echoes else "" for i in range(len(prompts) * count)]
        self._choices = [Choice(source, options.stops, tools, options.one_call) for _ in self._echoes]
        self._queue: asyncio.Queue[tuple[int, Piece] | None] = asyncio.Queue()
        loop, seed = asyncio.get_running_loop(), options.seed if options.seed is not None else secrets.randbits(32)

        def emit_to(index: int) -> Callable[[Piece], None]:
            def emit(piece: Piece) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
                    loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

            return emit

        room = lambda tokens: source.scheduler.engine.max_length - len(tokens)
        self.requests = [
            Request(tokens, options.sampling, min(options.max_new_tokens or room(tokens), room(tokens)),
                    zlib.crc32(f"{seed} {index}".encode()), emit_to(index))
            for index, tokens in enumerate(tokens for tokens in prompts for _ in range(count))
        ]  # fmt: skip

    async def whole(self, http: HttpRequest) -> tuple[dict[str, Any], int] | None:
        """One JSON body, and its status, once all samples have ended; None where the client has left."""
        gone = asyncio.ensure_future(_gone(http))
        gone.add_done_callback(lambda _: self._queue.put_nowait(None))
        try:
            while any(choice.finish is None for choice in self._choices):
                item = await self._queue.get()
                if item is None:
                    return None
                await self._take(*item)
        finally:
            gone.cancel()
            self._cancel()
        failed = next((c.finish for c in self._choices if c.finish and c.finish.startswith("error")), None)
        if failed:
            return protocol.error_body(failed, "server_error"), 500
        choices = [self._final(i) for i in range(len(self._choices))]
        return self._envelope("chat.completion" if self._chat else "text_completion", choices) | {
            "usage": self._usage()}, 200  # fmt: skip

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events, one for each piece of text."""
        try:
            async for event in self._events():
                yield f"data: {json.dumps(event, allow_nan=False)}\n\n"
            yield "data: [DONE]\n\n"
        except _Failed as error:
            yield f"data: {json.dumps(protocol.error_body(str(error), 'server_error'))}\n\n"
        except Exception:
            logging.getLogger(__name__).exception("an answer failed")
            body = protocol.error_body("the server failed at this request", "server_error")
            yield f"data: {json.dumps(body)}\n\n"
        finally:
            self._cancel()

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        for index, echo in enumerate(self._echoes):
            if self._chat:
                delta = {"role": "assistant", "content": ""}
                yield self._envelope(kind, [{"index": index, "delta": delta, "finish_reason": None}])
            elif echo:
                yield self._envelope(kind, [{"index": index, "text": echo, "finish_reason": None}])
        while any(choice.finish is None for choice in self._choices):
            item = await self._queue.get()
            assert item is not None, "only the whole form is told so that the client has left"
            words, choice = await self._take(*item), self._choices[item[0]]
            if choice.finish is not None and choice.finish.startswith("error"):
                raise _Failed(choice.finish)
            for part in self._parts(item[0], words):
                yield self._envelope(kind, [part])
        if self._options.include_usage:
            yield self._envelope(kind, []) | {"usage": self._usage()}

    async def _take(self, index: int, piece: Piece) -> str | None:
        """The words that a piece brings; None where its sample had ended before."""
        choice = self._choices[index]
        if choice.finish is not None:  # tokens after a stop text
            return None
        words = choice.push(piece)
        if choice.finish is not None:
            self.requests[index].cancel()
            words += await asyncio.to_thread(choice.end)  # reading calls of a long text takes its time
        return words

    def _parts(self, index: int, words: str | None) -> list[dict[str, Any]]:
        """The choices of the events that one piece becomes."""
        if words is None:
            return []
        choice, parts = self._choices[index], []
        wrap = lambda delta, finish: {"index": index, "finish_reason": finish} | (
            {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        )
        if words:
            parts.append(wrap({"content": words}, None))
        if choice.finish is not None:
            if choice.calls:
                parts.append(wrap({"tool_calls": protocol.tool_calls_body(choice.calls, streamed=True)}, None))
            parts.append(wrap({}, choice.finish))
        if parts and self._options.logprobs:
            parts[0]["logprobs"] = self._logprobs(choice)
            choice.logprobs = []
        return parts

    def _final(self, index: int) -> dict[str, Any]:
        choice = self._choices[index]
        logprobs = {"logprobs": self._logprobs(choice) if self._options.logprobs else None}
        if not self._chat:
            text = self._echoes[index] + choice.words
            return {"index": index, "text": text, "finish_reason": choice.finish} | logprobs
        message: dict[str, Any] = {"role": "assistant", "content": choice.words}
        if choice.calls:
            message["content"] = choice.words or None
            message["tool_calls"] = protocol.tool_calls_body(choice.calls)
        return {"index": index, "message": message, "finish_reason": choice.finish} | logprobs

    def _logprobs(self, choice: Choice) -> dict[str, Any]:
        """As chat and as plain completion write them; of alternatives that read alike the latter keeps the first."""
        rows = [(self._spelt(token, value), [self._spelt(*other) for other in others])
                for token, value, others in choice.logprobs]
        if self._chat:
            return {"content": [one | {"top_logprobs": others} for one, others in rows]}
        best = [{other["token"]: other["logprob"] for other in reversed(others)} for _, others in rows]
        return {"tokens": [one["token"] for one, _ in rows], "token_logprobs": [one["logprob"] for one, _ in rows],
                "top_logprobs": best if self._options.sampling.alternatives else None, "text_offset": None}

    def _spelt(self, token: int, value: float) -> dict[str, Any]:
        raw = self._source.tokenizer.token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": value, "bytes": list(raw)}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return protocol.envelope(self._id, kind, self._source.name, choices)

    def _usage(self) -> dict[str, int]:
        count = self._options.choices  # of a prompt, which is prefilled once for all of them
        reused = sum(min(request.reused for request in self.requests[first : first + count])
                     for first in range(0, len(self.requests), count))
        return protocol.usage_body(self._prompt, sum(choice.count for choice in self._choices), reused)

    def _cancel(self) -> None:
        for request in self.requests:
            request.cancel()


class _Failed(Exception):
    """The engine failed at a sample."""


async def _gone(http: HttpRequest) -> None:
    """Returns when the client has left."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
