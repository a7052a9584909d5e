"""OpenAI's requests and answers: what is read, what is refused, what is written. Pure functions of JSON values."""

import dataclasses
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax.inference.sampling import Sampling

MAX_CHOICES = 16
MAX_STOPS = 4  # as OpenAI has it
ROLES = ("system", "developer", "user", "assistant", "tool")


class BadRequest(Exception):
    """The client's fault; `str(error)` tells it why, `parameter` which field is meant."""

    def __init__(self, message: str, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.parameter, self.code = parameter, code


@dataclasses.dataclass(frozen=True)
class Options:
    """What both kinds of request share."""

    sampling: Sampling
    max_new_tokens: int | None
    stops: tuple[str, ...]
    choices: int
    seed: int | None
    stream: bool
    include_usage: bool
    logprobs: bool


def read_options(body: Mapping[str, Any]) -> Options:
    """Reads sampling and output options.

    Raises:
      BadRequest: a field has another type or lies out of range.
    """
    limit = _number(body, "max_completion_tokens", None, 1, None, int)
    limit = _number(body, "max_tokens", limit, 1, None, int)
    sampling = Sampling(
        _number(body, "temperature", 1.0, 0.0, 2.0, float), _number(body, "top_p", 1.0, 1e-6, 1.0, float),
        _number(body, "top_k", 0, 0, None, int),
    )  # fmt: skip
    stops = body.get("stop") or ()
    stops = (stops,) if isinstance(stops, str) else tuple(stops) if isinstance(stops, list | tuple) else None
    if stops is None or len(stops) > MAX_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise BadRequest(f"stop: expected a text or up to {MAX_STOPS} texts", "stop")
    stream_options = body.get("stream_options") or {}
    if not isinstance(stream_options, Mapping):
        raise BadRequest("stream_options: expected an object", "stream_options")
    # Chat asks for logprobs with true, plain completion with a number of alternatives.
    logprobs = body.get("logprobs")
    return Options(
        sampling, limit, stops, _number(body, "n", 1, 1, MAX_CHOICES, int),
        _number(body, "seed", None, None, None, int), _flag(body, "stream"),
        bool(stream_options.get("include_usage")), logprobs is not None and logprobs is not False,
    )  # fmt: skip


def read_messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Messages in the form that chat.rendering renders; arguments of tool calls become mappings.

    Raises:
      BadRequest: they are missing or malformed; names the message.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages: expected a list with at least one message", "messages")
    result = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise BadRequest(f"{where}.role: expected one of {', '.join(ROLES)}", "messages")
        read = {key: message[key] for key in ("role", "content") if key in message}
        read["role"] = "system" if read["role"] == "developer" else read["role"]
        if message.get("tool_calls"):
            read["tool_calls"] = [_tool_call(call, where) for call in message["tool_calls"]]
        result.append(read)
    return result


def read_tools(body: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The tool list, or None; `tool_choice` may be auto or none.

    Raises:
      BadRequest: a tool without a name, or a choice that cannot be forced.
    """
    tools, choice = body.get("tools"), body.get("tool_choice", "auto")
    if choice not in ("auto", "none", None):
        raise BadRequest("tool_choice: only auto and none are supported", "tool_choice")
    if not tools or choice == "none":
        return None
    named = isinstance(tools, list) and all(
        isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping)
        and isinstance(tool["function"].get("name"), str) for tool in tools
    )  # fmt: skip
    if not named:
        raise BadRequest("tools: expected a list of {type: function, function: {name, ...}}", "tools")
    return tools


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRequest(f"{where}.tool_calls: expected {{function: {{name, arguments}}}}", "messages")
    arguments = function.get("arguments") or {}
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        arguments = None
    if not isinstance(arguments, Mapping):
        raise BadRequest(f"{where}.tool_calls: arguments must be a JSON object", "messages")
    return {"name": function["name"], "arguments": dict(arguments)}


def _number(body: Mapping[str, Any], name: str, default: Any, least: Any, most: Any, kind: type) -> Any:
    value = body.get(name)
    if value is None:
        return default
    fits = isinstance(value, kind | int) and not isinstance(value, bool)
    if not fits or (least is not None and value < least) or (most is not None and value > most):
        bounds = " and ".join(
            [f"at least {least}"] * (least is not None) + [f"at most {most}"] * (most is not None)
        )  # fmt: skip
        raise BadRequest(f"{name}: expected {'an integer' if kind is int else 'a number'} {bounds}".strip(), name)
    return kind(value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{name}: expected true or false", name)
    return bool(value)


# --- answers


def new_id(chat: bool) -> str:
    """A fresh id of an answer."""
    return f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"


def error_body(message: str, kind: str, parameter: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error answer."""
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


def tool_calls_body(calls: Sequence[Any], streamed: bool = False) -> list[dict[str, Any]]:
    """chat.rendering.ToolCalls as OpenAI writes them; streamed ones carry their index."""
    return [
        ({"index": index} if streamed else {}) | {
            "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        } for index, call in enumerate(calls)
    ]  # fmt: skip


def envelope(answer_id: str, kind: str, model: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    """What every answer and every streamed piece has in common."""
    return {"id": answer_id, "object": kind, "created": int(time.time()), "model": model, "choices": choices}


def usage_body(prompt: int, generated: int) -> dict[str, int]:
    """Token counts."""
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
