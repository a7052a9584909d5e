"""A client for OpenAI-compatible chat endpoints, with answers kept on disk so that a rerun asks nothing twice."""

import dataclasses
import hashlib
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from qcn_jax import files
from qcn_jax.errors import UserError

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
ATTEMPTS = 5
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds; doubles with every attempt


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where a model answers.

    `url` ends where `/chat/completions` begins (`http://localhost:8000/v1`); `key_variable` names the environment
    variable that holds the key (none is sent where it is not set); `cache` is a folder of answers.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    cache: str = ""
    max_tokens: int = 2048
    temperature: float = 0.0
    timeout: float = 300.0

    def ask(self, messages: Sequence[Mapping[str, str]], seed: int = 0) -> str:
        """The answer's text; the same messages and seed give the same one from the cache.

        Raises:
          UserError: the endpoint cannot be reached, refuses, or answers something else; names the URL.
        """
        body = {"model": self.model, "messages": list(messages), "max_tokens": self.max_tokens,
                "temperature": self.temperature, "seed": seed}
        path = self._path(body)
        if path is not None and path.exists():
            return files.read_json(path)["content"]
        content = _content(self._post(body), self.url)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(path, {"request": body, "content": content})
        return content

    def _path(self, body: Mapping[str, Any]) -> pathlib.Path | None:
        if not self.cache:
            return None
        name = hashlib.sha256(repr((self.url, sorted(body.items()))).encode()).hexdigest()[:32]
        return pathlib.Path(self.cache, f"{name}.json")

    def _post(self, body: Mapping[str, Any]) -> Any:
        key = os.environ.get(self.key_variable, "")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        url = f"{self.url.rstrip('/')}/chat/completions"
        pause, reason = FIRST_PAUSE, ""
        for attempt in range(ATTEMPTS):
            try:
                reply = httpx.post(url, json=body, headers=headers, timeout=self.timeout)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                reason = f"cannot be reached ({error})"
            else:
                if reply.status_code == 200:
                    try:
                        return reply.json()
                    except ValueError as error:
                        raise UserError(f"--endpoint={self.url}: the answer is not JSON") from error
                reason = f"answers {reply.status_code}: {' '.join(reply.text.split())[:200]}"
                if reply.status_code not in RETRIED:
                    break
            if attempt < ATTEMPTS - 1:
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        raise UserError(f"--endpoint={self.url}: {reason}")


def _content(reply: Any, url: str) -> str:
    try:
        return reply["choices"][0]["message"]["content"] or ""
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"--endpoint={url}: the answer has no choices[0].message.content") from error


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
