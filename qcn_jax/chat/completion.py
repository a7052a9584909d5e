"""What a chat endpoint answers, whole or as a stream of server-sent events, as one turn.

Format: OpenAI's chat completions; other servers leave fields out, send `arguments` as an object, or number no calls.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from qcn_jax.chat.values import encodable

MOST_TOKENS = 1 << 40  # that a server may say it counted
# Of a turn's text and arguments, and of its reasoning; what is longer is cut off, as by a server's own limit. And of a
# name.
MOST_CHARACTERS, LONGEST_NAME = 400_000, 200


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
        content, found = _text(message.get("content")), tuple(_call(call, number) for number, call in enumerate(calls))
        long = len(content) + sum(len(call.arguments) for call in found) > MOST_CHARACTERS
        return Completion(_cut(content), found, "length" if long else choice.get("finish_reason") or "stop",
                          _cut(_reasoning(message)), **_usage(reply))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise Broken(f"the answer has no choices[0].message: {' '.join(text.split())[:100]}") from error


def read_stream(lines: Iterable[str]) -> Completion:
    """Puts the pieces of a stream together; raises Broken where it ends without a finish_reason or with an error."""
    content, reasoning, finish, usage = [], [], "", {}
    calls: dict[Any, dict[str, Any]] = {}
    length = thought = 0
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
                reasoning.append(_reasoning(delta) if thought < MOST_CHARACTERS else "")
                thought += len(reasoning[-1])
                length += len(content[-1]) + sum(_add(calls, piece) for piece in delta.get("tool_calls") or ())
                finish = choice.get("finish_reason") or finish
            if length > MOST_CHARACTERS:
                finish = "length"
                break
        except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise Broken(f"the stream holds no event: {data[:100]}") from error
    if not finish:
        raise Broken("the stream ends before the answer does")
    try:
        found = tuple(_call(_joined(call), number) for number, call in enumerate(calls.values()))
    except TypeError as error:
        raise Broken("the stream holds a call whose name is no text") from error
    # A character may have come in two pieces, each half of it.
    return Completion(_cut("".join(content)), found, finish, _cut("".join(reasoning)), **usage)


def _add(calls: dict[Any, dict[str, Any]], piece: Mapping[str, Any]) -> int:
    """Adds a piece to the call that it belongs to: by its index, else by its id, else to the last one; its length."""
    key = piece.get("index")
    if key is None:
        key = piece.get("id") or next(reversed(calls), 0)
    call = calls.setdefault(key, {"id": "", "name": [], "arguments": []})
    call["id"] = piece.get("id") or call["id"]
    function = piece.get("function") or {}
    arguments = function.get("arguments")
    call["name"].append(function.get("name") or "")
    call["arguments"].append(arguments if isinstance(arguments, str) else "" if arguments is None else
                             json.dumps(arguments))
    return len(call["name"][-1]) + len(call["arguments"][-1])


def _joined(call: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": call["id"], "name": "".join(call["name"]), "arguments": "".join(call["arguments"])}


def _call(call: Mapping[str, Any], number: int) -> RawCall:
    function = call.get("function") or call
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments)
    name, given = str(function.get("name") or ""), str(call.get("id") or f"call_{number}")
    return RawCall(_cut(given, LONGEST_NAME), _cut(name, LONGEST_NAME), _cut(arguments))


def _cut(text: str, most: int = MOST_CHARACTERS) -> str:
    return encodable(text[:most])


def _text(content: Any) -> str:
    if isinstance(content, list):  # parts
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _reasoning(message: Mapping[str, Any]) -> str:
    return _text(message.get("reasoning_content") or message.get("reasoning"))


def _usage(reply: Mapping[str, Any]) -> dict[str, int]:
    usage = reply.get("usage") or {}
    return {key: min(max(int(usage.get(key) or 0), 0), MOST_TOKENS) for key in ("prompt_tokens", "completion_tokens")}
