"""A client for OpenAI-compatible chat endpoints; what a busy or broken server does not answer whole is asked again.

`Endpoint.ask` gives a text and keeps it on disk, so that a rerun asks nothing twice; `Endpoint.turn` gives an agent's
next turn, with its tool calls as the server parsed them.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

from qcn_jax import files
from qcn_jax.chat.completion import Broken, Completion, read_stream, read_whole
from qcn_jax.errors import UserError

MAX_ANSWER = 64 << 20  # bytes of one answer: far more than its tokens take, also each in an event of its own
MAX_REFUSAL = 1 << 16  # bytes that are read of an answer that is none
LONGEST_ANSWER = 3600.0  # seconds, where nobody says how long they wait
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
ATTEMPTS = 6
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds; doubles with every attempt, the server's Retry-After counts
# How servers say that a conversation is longer than the model's context; only some have OpenAI's code for it.
_TOO_LONG = re.compile(r"context.?(?:length|window|size)|too many tokens|too long|max_model_len|max_tokens must be",
                       re.IGNORECASE)
_NEVER = (401, 403, 404, 405)  # what is wrong for every request


class EndpointError(UserError):
    """The endpoint refuses. `everywhere`: any other request would be refused as well."""

    def __init__(self, line: str, everywhere: bool = False):
        super().__init__(line)
        self.everywhere = everywhere


class EndpointFailed(EndpointError):
    """It fails, however often it is tried; later it may work."""


class ContextExceeded(EndpointError):
    """The conversation is longer than the model's context."""


class Late(Exception):
    """The deadline passed before the answer was whole."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where a model answers.

    `url` ends where `/chat/completions` begins (`http://localhost:8000/v1`); `key_variable` names the environment
    variable that holds the key (none is sent where it is not set); `cache` is a folder of answers, of `ask` alone.
    `flag` named it, for what is said of
    failures. `timeout` are seconds without a byte; `top_p` 0 and `top_k` 0 leave the choice to the server. `stream`:
    answers come in pieces, so that a long one is not taken for a dead server.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    cache: str = ""
    max_tokens: int = 2048
    temperature: float = 0.0
    timeout: float = 300.0
    top_p: float = 0.0
    stream: bool = True
    top_k: int = 0
    attempts: int = ATTEMPTS
    flag: str = "--endpoint"

    def __post_init__(self) -> None:
        _ = self._closed, self._client  # made by one thread, whatever many ask later

    def ask(self, messages: Sequence[Mapping[str, Any]], seed: int = 0) -> str:
        """The answer's text; the same messages and seed give the same one from the cache.

        Raises:
          UserError: the endpoint cannot be reached, refuses, or answers something else; names the URL.
        """
        body = self._body(messages, seed)
        path = self._path(body)
        if path is not None and path.exists():
            return files.read_json(path)["content"]
        try:
            content = self._post(body, time.monotonic() + LONGEST_ANSWER).content
        except Late:
            raise EndpointFailed(f"{self.flag}={self.url}: does not end within {LONGEST_ANSWER:.0f} s") from None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(path, {"request": body, "content": content})
        return content

    def turn(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, seed: int = 0,
             deadline: float | None = None) -> Completion:
        """The model's next turn.

        Args:
          messages: OpenAI's.
          tools: schemas that it may call; None where calls are part of its text.
          seed: of sampling.
          deadline: of time.monotonic(), after which nobody waits any more.

        Raises:
          EndpointFailed: it cannot be reached or fails again and again.
          ContextExceeded: the conversation is too long.
          EndpointError: it refuses for another reason.
          Late: the deadline has passed.
        """
        body = self._body(messages, seed)
        if tools:
            body["tools"] = list(tools)
        return self._post(body, deadline)

    def check(self) -> None:
        """Raises EndpointError where nothing answers, or the key is refused; for asking before long work."""
        reason = ""
        for attempt in range(2):
            try:
                with self._client.stream("GET", f"{self.url.rstrip('/')}/models", headers=self._headers(),
                                         timeout=30.0) as reply:
                    status = reply.status_code  # and nothing of a body that may have no end
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                reason = f"cannot be reached ({_words(error)})"
                time.sleep(FIRST_PAUSE * (1 - attempt))
                continue
            if status in (401, 403):
                raise EndpointError(f"{self.flag}={self.url}: answers {status}; its key is read from the "
                                    f"environment variable {self.key_variable} (--key_variable)", everywhere=True)
            return
        raise EndpointFailed(f"{self.flag}={self.url}: {reason}")

    def close(self) -> None:
        """Ends requests under way and waiting between tries, from any thread; nothing can be asked afterwards."""
        self._closed.set()
        self._client.close()

    @functools.cached_property
    def _closed(self) -> threading.Event:
        return threading.Event()

    @functools.cached_property
    def _client(self) -> httpx.Client:
        # Whoever asks decides how many requests run; a proxy's pool must not.
        return httpx.Client(limits=httpx.Limits(max_connections=None, max_keepalive_connections=64))

    def __getstate__(self) -> dict[str, Any]:  # without connections: for worker processes
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _body(self, messages: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
        chosen = {"top_p": self.top_p, "top_k": self.top_k}
        return {"model": self.model, "messages": list(messages), "max_tokens": self.max_tokens,
                "temperature": self.temperature, "seed": seed} | {name: v for name, v in chosen.items() if v}

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(self.key_variable, "")
        # Unpacking gives no measure of what comes: some bytes can be gigabytes.
        return {"accept-encoding": "identity", **({"authorization": f"Bearer {key}"} if key else {})}

    def _path(self, body: Mapping[str, Any]) -> pathlib.Path | None:
        if not self.cache:
            return None
        name = hashlib.sha256(repr((self.url, sorted(body.items()))).encode()).hexdigest()[:32]
        return pathlib.Path(self.cache, f"{name}.json")

    def _post(self, body: Mapping[str, Any], deadline: float | None) -> Completion:
        pause, reason = FIRST_PAUSE, ""
        for attempt in range(self.attempts):
            if attempt:
                self._wait(pause, deadline)
                pause = min(2 * pause, LONGEST_PAUSE)
            if self._closed.is_set():
                raise EndpointFailed(f"{self.flag}={self.url}: is not asked any more")
            try:
                with self._request(body, deadline) as reply:
                    if reply.status_code == 200:
                        return dataclasses.replace(_read(reply, deadline), retries=attempt)
                    status, text = reply.status_code, _text(reply, deadline)
            except (httpx.HTTPError, httpx.InvalidURL, Broken) as error:
                _check(deadline)
                what = "breaks off" if isinstance(error, Broken) else "cannot be reached"
                reason = f"{what} ({_words(error)})"
                continue
            reason = f"answers {status}: {' '.join(text.split())[:200]}"
            if status in (400, 413, 422) and _TOO_LONG.search(text):
                raise ContextExceeded(f"{self.flag}={self.url}: {reason}")
            if status in (404, 405):
                reason += "; the URL ends where /chat/completions begins, e.g. http://localhost:8000/v1"
            if status not in RETRIED:
                raise EndpointError(f"{self.flag}={self.url}: {reason}", status in _NEVER)
            pause = max(pause, _retry_after(reply))
        raise EndpointFailed(f"{self.flag}={self.url}: {reason}")

    def _wait(self, seconds: float, deadline: float | None) -> None:
        """Waits, by chance up to a quarter shorter: many who were refused together shall not come back together."""
        seconds *= random.uniform(0.75, 1.0)
        if deadline is not None and time.monotonic() + seconds > deadline:
            raise Late
        self._closed.wait(seconds)

    @contextlib.contextmanager
    def _request(self, body: Mapping[str, Any], deadline: float | None) -> Iterator[httpx.Response]:
        left = self.timeout if deadline is None else max(0.1, min(self.timeout, deadline - time.monotonic()))
        limits = httpx.Timeout(left, pool=None)
        if self.stream:
            body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        # What tools and tests print may hold halves of characters.
        content = json.dumps(dict(body), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
        with self._client.stream("POST", f"{self.url.rstrip('/')}/chat/completions", content=content, timeout=limits,
                                 headers={"content-type": "application/json", **self._headers()}) as reply:
            yield reply


def _read(reply: httpx.Response, deadline: float | None) -> Completion:
    if reply.headers.get("content-type", "").startswith("text/event-stream"):
        return read_stream(_lines(reply, deadline))
    return read_whole("\n".join(_lines(reply, deadline)))


def _lines(reply: httpx.Response, deadline: float | None) -> Iterator[str]:
    """The lines of an answer; raises Broken where it is packed or without end."""
    if reply.headers.get("content-encoding", "identity").lower() != "identity":
        raise Broken("the answer is packed, which was not asked for")
    size, begun = 0, [b""]
    for part in reply.iter_raw():
        _check(deadline)
        size += len(part)
        if size > MAX_ANSWER:
            raise Broken(f"the answer has more than {MAX_ANSWER} bytes")
        first, *others = part.split(b"\n")
        begun.append(first)
        for other in others:
            yield b"".join(begun).decode("utf-8", "replace").rstrip("\r")
            begun = [other]
    yield b"".join(begun).decode("utf-8", "replace")


def _text(reply: httpx.Response, deadline: float | None) -> str:
    """The beginning of an answer."""
    found = b""
    try:
        for part in reply.iter_raw():
            _check(deadline)
            found += part
            if len(found) > MAX_REFUSAL:
                break
    except httpx.HTTPError:  # the status says enough
        pass
    return found[:MAX_REFUSAL].decode("utf-8", "replace")


def _retry_after(reply: httpx.Response) -> float:
    """Seconds that the server asks to wait, at most LONGEST_PAUSE."""
    asked = reply.headers.get("retry-after", "")
    return min(float(asked), LONGEST_PAUSE) if re.fullmatch(r"\d{1,6}(\.\d+)?", asked) else 0.0


def _check(deadline: float | None) -> None:
    if deadline is not None and time.monotonic() > deadline:
        raise Late


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def code_block(text: str) -> str:
    """The longest fenced block of an answer, or the whole answer where there is none."""
    blocks, inside = [], None
    for line in text.splitlines():
        if line.strip().startswith("```"):
            if inside is None:
                inside = []
            else:
                blocks.append("\n".join(inside) + "\n")
                inside = None
        elif inside is not None:
            inside.append(line)
    if inside:
        blocks.append("\n".join(inside) + "\n")  # the answer was cut
    return max(blocks, key=len, default=text)
