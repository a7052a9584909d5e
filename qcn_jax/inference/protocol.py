"""OpenAI's requests and answers: what is read, what is refused, what is written. Pure functions of JSON values.

Nothing of a request goes further than what is read here: fields that would change the answer and are not read are
refused by name.
"""

import dataclasses
import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax.chat.tool_calls import NAME
from qcn_jax.chat.values import read_json
from qcn_jax.inference.sampling import MAX_ALTERNATIVES, MAX_TOP_K, Sampling

MAX_CHOICES = 16
MAX_SEQUENCES = 128  # choices of all prompts of one request
MAX_STOPS = 4  # as OpenAI has it
ROLES = ("system", "developer", "user", "assistant", "tool")
_NAME = re.compile(NAME)

_SHARED = {"model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "n",
           "seed", "stream", "stream_options", "logprobs", "frequency_penalty", "presence_penalty",
           "repetition_penalty", "logit_bias"}  # fmt: skip
_CHAT = _SHARED | {"messages", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"}
_COMPLETION = _SHARED | {"prompt", "echo"}
# They say who asks, and where to keep what; the answer is the same.
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
            "prompt_cache_retention"}  # fmt: skip
# What is not supported may be there as long as it asks for nothing.
_NEUTRAL = {"suffix": "", "response_format": {"type": "text"}, "modalities": ["text"], "echo": False, "functions": [],
            "tools": [], "parallel_tool_calls": True}  # fmt: skip
_IN_MESSAGES = {"function_call", "audio"}


class BadRequest(Exception):
    """The client's fault; `str(error)` tells it why, `parameter` which field is meant."""

    def __init__(self, message: str, parameter: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.parameter, self.code, self.status = parameter, code, status


@dataclasses.dataclass(frozen=True)
class Options:
    """What both kinds of request share; `one_call`: at most one tool call; `echo`: the prompt comes first."""

    sampling: Sampling
    max_new_tokens: int | None
    stops: tuple[str, ...]
    choices: int
    seed: int | None
    stream: bool
    include_usage: bool
    logprobs: bool
    one_call: bool
    echo: bool


def read_body(data: bytes) -> dict[str, Any]:
    """A request's JSON object; numbers in it are finite, and it is nested no deeper than values.MAX_DEPTH.

    Raises:
      BadRequest: it is none.
    """
    try:
        body = read_json(data.decode())
    except ValueError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    return body


def check_model(body: Mapping[str, Any], name: str) -> None:
    """Raises BadRequest where another model than `name` is asked for; none at all means this one."""
    model = body.get("model")
    if model is not None and model != name:
        raise BadRequest(f"model: there is no {str(model)[:100]!r}; this is {name!r}", "model", "model_not_found", 404)


def read_options(body: Mapping[str, Any], chat: bool, vocabulary: int) -> Options:
    """Reads sampling and output options; biases are of ids below `vocabulary`.

    Raises:
      BadRequest: a field has another type, lies out of range or is not supported.
    """
    _refuse_unread(body, _CHAT if chat else _COMPLETION)
    limit = _number(body, "max_completion_tokens", None, 1, None, int)
    limit = _number(body, "max_tokens", limit, 1, None, int)
    logprobs, alternatives = _logprobs(body, chat)
    sampling = Sampling(
        _number(body, "temperature", 1.0, 0.0, 2.0, float), _number(body, "top_p", 1.0, 1e-6, 1.0, float),
        min(_number(body, "top_k", 0, 0, None, int), MAX_TOP_K), _number(body, "min_p", 0.0, 0.0, 1.0, float),
        _number(body, "presence_penalty", 0.0, -2.0, 2.0, float),
        _number(body, "frequency_penalty", 0.0, -2.0, 2.0, float),
        _number(body, "repetition_penalty", 1.0, 0.01, 10.0, float), _biases(body, vocabulary), alternatives,
    )  # fmt: skip
    stops = body.get("stop") or ()
    stops = (stops,) if isinstance(stops, str) else tuple(stops) if isinstance(stops, list | tuple) else None
    if stops is None or len(stops) > MAX_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise BadRequest(f"stop: expected a text or up to {MAX_STOPS} texts", "stop")
    stream_options = body.get("stream_options") or {}
    if not isinstance(stream_options, Mapping):
        raise BadRequest("stream_options: expected an object", "stream_options")
    choices = _number(body, "n", 1, 1, MAX_CHOICES, int)
    if _number(body, "best_of", choices, 1, None, int) != choices:
        raise BadRequest("best_of: not supported", "best_of")
    echo = not chat and _flag(body, "echo")
    if logprobs and echo:
        raise BadRequest("logprobs: not supported together with echo", "logprobs")
    return Options(
        sampling, limit, stops, choices, _number(body, "seed", None, None, None, int), _flag(body, "stream"),
        _flag(stream_options, "include_usage", "stream_options"), logprobs,
        chat and not _flag(body, "parallel_tool_calls", default=True), echo,
    )  # fmt: skip


def _refuse_unread(body: Mapping[str, Any], read: set[str]) -> None:
    for name, value in body.items():
        if name in read or name in _IGNORED or name == "best_of" or value is None:
            continue
        if name not in _NEUTRAL or value != _NEUTRAL[name]:
            raise BadRequest(f"{name[:100]}: not supported", name[:100])


def _logprobs(body: Mapping[str, Any], chat: bool) -> tuple[bool, int]:
    """Whether log-probabilities are wanted, and how many alternatives; plain completion asks for both with a number."""
    if not chat:
        wanted = _number(body, "logprobs", None, 0, MAX_ALTERNATIVES, int)
        return wanted is not None, wanted or 0
    wanted, alternatives = _flag(body, "logprobs"), _number(body, "top_logprobs", 0, 0, MAX_ALTERNATIVES, int)
    if alternatives and not wanted:
        raise BadRequest("top_logprobs: needs logprobs to be true", "top_logprobs")
    return wanted, alternatives


def _biases(body: Mapping[str, Any], vocabulary: int) -> tuple[tuple[int, float], ...]:
    """`logit_bias`: from ids, as JSON's keys are written, to numbers from -100 to 100."""
    biases = body.get("logit_bias") or {}
    if not isinstance(biases, Mapping):
        raise BadRequest("logit_bias: expected an object from token ids to numbers", "logit_bias")
    found = {}
    for key in biases:
        id_ = int(key) if re.fullmatch(r"[0-9]{1,9}", key) else vocabulary
        if id_ >= vocabulary:
            raise BadRequest(f"logit_bias: {key[:40]!r} is no token id below {vocabulary}", "logit_bias")
        found[id_] = _number({"logit_bias": biases[key]}, "logit_bias", 0.0, -100.0, 100.0, float)
    return tuple(sorted(found.items()))


def read_prompts(body: Mapping[str, Any], vocabulary: int) -> list[str | list[int]]:
    """The prompts of a plain completion: texts, or token ids below `vocabulary`.

    Raises:
      BadRequest: something else, or too many.
    """
    prompt = body.get("prompt")
    prompts = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else [prompt]
    for each in prompts:
        ids = isinstance(each, list) and all(type(token) is int and 0 <= token < vocabulary for token in each)
        if not (ids or isinstance(each, str)):
            raise BadRequest("prompt: expected a text, a list of token ids, or a list of either", "prompt")
    choices = _number(body, "n", 1, 1, MAX_CHOICES, int)
    if len(prompts) * choices > MAX_SEQUENCES:
        raise BadRequest(f"prompt: {len(prompts)} prompts by {choices} choices; at most {MAX_SEQUENCES}", "prompt")
    return prompts


def read_messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Messages in the form that chat.rendering renders; arguments of tool calls become mappings.

    Raises:
      BadRequest: they are missing, malformed or not supported; names the message.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages: expected a list with at least one message", "messages")
    result = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise BadRequest(f"{where}.role: expected one of {', '.join(ROLES)}", "messages")
        for name in _IN_MESSAGES & message.keys():
            if message[name] is not None:
                raise BadRequest(f"{where}.{name}: not supported", "messages")
        role = "system" if message["role"] == "developer" else message["role"]
        read = {"role": role, "content": _content(message.get("content"), where)}
        if calls := message.get("tool_calls"):
            if role != "assistant" or not isinstance(calls, list):
                raise BadRequest(f"{where}.tool_calls: expected a list, of an assistant", "messages")
            read["tool_calls"] = [_tool_call(call, where) for call in calls]
        result.append(read)
    return result


def _content(content: Any, where: str) -> str | list[dict[str, str]] | None:
    """A text, or parts that hold nothing but theirs: what else parts can say is the scaffolds' own."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{where}.content: expected text or a list of text parts", "messages")
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind != "text":
            raise BadRequest(f"{where}.content: parts of type {kind[:40]!r} are not supported", "messages")
        if kind is None or not isinstance(part.get("text"), str):
            raise BadRequest(f"{where}.content: expected text or a list of text parts", "messages")
    return [{"type": "text", "text": part["text"]} for part in content]


def read_tools(body: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The tool list, or None; `tool_choice` may be auto or none.

    Raises:
      BadRequest: a malformed tool, a name that no call could spell, or a choice that cannot be forced.
    """
    tools, choice = body.get("tools"), body.get("tool_choice", "auto")
    if choice not in ("auto", "none", None):
        raise BadRequest("tool_choice: only auto and none are supported", "tool_choice")
    if tools is not None and not isinstance(tools, list):
        raise BadRequest("tools: expected a list of {type: function, function: {name, ...}}", "tools")
    for index, tool in enumerate(tools or ()):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
            raise BadRequest(f"tools[{index}]: expected {{type: function, function: {{name, ...}}}}", "tools")
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise BadRequest(f"tools[{index}].function.name: expected one without blanks, quotes and <>{{}}=", "tools")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise BadRequest(f"tools[{index}].function.parameters: expected a JSON schema of an object", "tools")
    return tools if tools and choice != "none" else None


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadRequest(f"{where}.tool_calls: expected {{function: {{name, arguments}}}}", "messages")
    arguments = function.get("arguments") or {}
    try:
        arguments = read_json(arguments) if isinstance(arguments, str) else arguments
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


def _flag(body: Mapping[str, Any], name: str, parameter: str = "", default: bool = False) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{name}: expected true or false", parameter or name)
    return default if value is None else value


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


def model_body(name: str) -> dict[str, Any]:
    """How a model is listed."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "qcn_jax"}


def envelope(answer_id: str, kind: str, model: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    """What every answer and every streamed piece has in common."""
    return {"id": answer_id, "object": kind, "created": int(time.time()), "model": model, "choices": choices}


def usage_body(prompt: int, generated: int, reused: int = 0) -> dict[str, Any]:
    """Token counts; `reused` of the prompt were held already."""
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": reused}}
