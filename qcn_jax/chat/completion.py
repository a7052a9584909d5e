"""What a chat endpoint answers, whole or as a stream of server-sent events, as one turn.

Format: OpenAI's chat completions; other servers leave fields out, send `arguments` as an object, or number no calls.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any


class Broken(Exception):
    """The answer ends before it is whole, or is none; asking again may help."""


@dataclasses.dataclass(frozen=True)
class RawCall:
    """A tool call as the server gives it; `arguments` is JSON text, if the model wrote JSON."""

    id: str
    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class Completion:
    """One turn.

    `finish` is stop, tool_calls or length (cut off), or a word of the server's own. Tokens are 0 where it counts none.
    """

    content: str
    calls: tuple[RawCall, ...] = ()
    finish: str = "stop"
    reasoning: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0


def read_whole(text: str) -> Completion:
    """Reads an answer that came in one piece; raises Broken."""
    try:
        reply = json.loads(text)
        choice = reply["choices"][0]
        message = choice["message"]
        calls = [call for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
        return Completion(
            _text(message.get("content")), tuple(_call(call, number) for number, call in enumerate(calls)),
            choice.get("finish_reason") or "stop", _reasoning(message), **_usage(reply))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise Broken(f"the answer has no choices[0].message: {' '.join(text.split())[:100]}") from error


def read_stream(lines: Iterable[str]) -> Completion:
    """Puts the pieces of a stream together; raises Broken where it ends without a finish_reason or with an error."""
    content, reasoning, finish, usage = [], [], "", {}
    calls: dict[Any, dict[str, Any]] = {}
    for line in lines:
        if not line.startswith("data:") or (data := line[5:].strip()) == "[DONE]":
            continue
        try:
            event = json.loads(data)
            if event.get("error"):
                raise Broken(f"the stream ends with an error: {str(event['error'])[:100]}")
            usage |= {key: value for key, value in _usage(event).items() if value}
            for choice in event.get("choices") or ():
                delta = choice.get("delta") or {}
                content.append(_text(delta.get("content")))
                reasoning.append(_reasoning(delta))
                for piece in delta.get("tool_calls") or ():
                    _add(calls, piece)
                finish = choice.get("finish_reason") or finish
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise Broken(f"the stream holds no event: {data[:100]}") from error
    if not finish:
        raise Broken("the stream ends before the answer does")
    found = tuple(_call(call, number) for number, call in enumerate(calls.values()))
    return Completion("".join(content), found, finish, "".join(reasoning), **usage)


def _add(calls: dict[Any, dict[str, Any]], piece: Mapping[str, Any]) -> None:
    """Adds a piece to the call that it belongs to: by its index, else by its id, else to the last one."""
    key = piece.get("index")
    if key is None:
        key = piece.get("id") or next(reversed(calls), 0)
    call = calls.setdefault(key, {"id": "", "function": {"name": "", "arguments": ""}})
    call["id"] = piece.get("id") or call["id"]
    function = piece.get("function") or {}
    call["function"]["name"] += function.get("name") or ""
    arguments = function.get("arguments")
    call["function"]["arguments"] += arguments if isinstance(arguments, str) else "" if arguments is None else \
        json.dumps(arguments)


def _call(call: Mapping[str, Any], number: int) -> RawCall:
    function = call.get("function") or call
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments)
    return RawCall(str(call.get("id") or f"call_{number}"), str(function.get("name") or ""), arguments)


def _text(content: Any) -> str:
    if isinstance(content, list):  # parts
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _reasoning(message: Mapping[str, Any]) -> str:
    return _text(message.get("reasoning_content") or message.get("reasoning"))


def _usage(reply: Mapping[str, Any]) -> dict[str, int]:
    usage = reply.get("usage") or {}
    return {key: int(usage.get(key) or 0) for key in ("prompt_tokens", "completion_tokens")}
