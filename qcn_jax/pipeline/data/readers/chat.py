"""Conversations of somebody's files: rows of JSONL and Parquet, one conversation each, in the forms that are usual.

  {"messages": [{"role": ..., "content": ..., "tool_calls": [...], "weight": 1}, ...], "tools": [...]}     OpenAI's
  {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}], "system": ...}       ShareGPT's
  {"prompt": ..., "completion": ...}                              texts, or lists of messages; the completion counts
  agents' trajectories, also a file each                                                       see `published`

The loss is on what assistants wrote and on nothing else; an assistant message's `weight` scales its own, 0 leaves it
out. Every value is somebody else's text: what in it is spelt like the frame of a turn never becomes one.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qcn_jax import files
from qcn_jax.chat.templates import NATIVE, TEMPLATES
from qcn_jax.chat.tokenizer import END_OF_TEXT, TURN_END, TURN_START
from qcn_jax.config import ChatSource, RunConfig, from_config_dict
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.readers import ChatReader, Conversation, published
from qcn_jax.pipeline.data.readers.published import Malformed
from qcn_jax.pipeline.data.readers.rows import (
    PARQUET,
    Row,
    is_row_file,
    matching,
    read_document,
    read_rows,
    row_files,
)
from qcn_jax.pipeline.data.texts import Findings

if TYPE_CHECKING:
    from qcn_jax.pipeline.context import StageContext

_ROLES = {  # of `role` and `from` alike
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "tool": "tool", "function": "tool",
    "observation": "tool", "function_call": "assistant",
}  # fmt: skip
_FRAME = (END_OF_TEXT, TURN_START, TURN_END)
_COLUMNS = (
    "messages", "conversations", "prompt", "completion", "tools", "system", "trajectory", "history", "info",
    "trajectory_format", "exit_status", "resolved", "target", "reward", "report", "test_result", "scaffold", "template",
    "outcomes", "failed", "search")
REASONING = ("keep", "drop")


@dataclasses.dataclass(frozen=True)
class Options:
    """What a source's `options` may hold."""

    messages: str = ""  # the column of messages, where it is not called messages
    # How tool calls are written (chat.templates); as the frame writes them where it is empty. What is not native the
    # rows' own system messages must describe, as the frame lists `tools` for its own form alone.
    template: str = ""
    tools: str = ""  # a JSON file with the list of tools of rows that list none
    resolved: bool = False  # only what resolved its task; a row that does not say is malformed
    submitted: bool = False  # only what the agent itself ended; likewise
    reasoning: str = "keep"  # of assistants' reasoning_content: keep, which a template may have no place for, or drop
    marks: bool = False  # parts and arguments that rows mark as `special` may become added tokens; for rows of ours


class Chat(ChatReader):
    """See the module's docstring."""

    def check(self, config: RunConfig, source: ChatSource, field: str) -> None:
        """See ChatReader; the first conversation is read, too."""
        options = from_config_dict(Options, source.options, f"{field.removeprefix('--')}.options")
        for name, allowed in (("template", ("", *TEMPLATES)), ("reasoning", REASONING)):
            if getattr(options, name) not in allowed:
                words = ", ".join(filter(None, allowed))
                raise UserError(f"{field}.options.{name}: {getattr(options, name)!r}; allowed: {words}")
        _given_tools(options, f"{field}.options.tools")
        where = f"{field}.path" if ".sources" in field else field
        paths = matching(source.path, where)
        if not row_files(paths, trajectories=True):
            raise UserError(f"{where}={source.path}: holds no rows; allowed: *.jsonl, *.ndjson, *.json (also .gz or "
                            ".zst), *.parquet, *.traj, or a folder of them")
        findings = Findings(config.sft.malformed, "--config.sft.malformed")
        if next(_read(source, options, findings), None) is None:
            raise UserError(f"{field}: holds no conversation: {source.path} ({findings.line()})")

    def read(self, context: "StageContext", source: ChatSource, findings: Findings, stopped: Callable[[], bool]
             ) -> Iterator[Conversation]:
        """See ChatReader."""
        for conversation in _read(source, from_config_dict(Options, source.options), findings):
            if stopped():
                return
            yield conversation


CHAT = Chat()


def _given_tools(options: Options, field: str = "options.tools") -> list[dict[str, Any]] | None:
    if not options.tools:
        return None
    try:
        return _tools(files.read_json(options.tools))
    except Malformed as error:
        raise UserError(f"{field}: {options.tools}: {error}") from error


def _read(source: ChatSource, options: Options, findings: Findings) -> Iterator[Conversation]:
    given = _given_tools(options)
    for file in row_files(matching(source.path, "path"), trajectories=True):
        for place, row in _rows(file, [*_COLUMNS, options.messages], findings):
            findings.read += 1
            try:
                found = _usable(row, options, findings)
                if found is not None:
                    yield conversation(found, options, place, given)
            except Malformed as error:
                findings.row(place, str(error))


def _rows(file: pathlib.Path, wanted: list[str], findings: Findings) -> Iterator[tuple[str, Any]]:
    """(place, row) of a file, which may also be one trajectory, or one list of rows."""
    document = read_document(file, findings)
    if document is not None:
        yield from ((f"{file}:{number}", row) for number, row in enumerate(published.rows_of(document), 1))
    elif is_row_file(file.name):
        fill = file.name.lower().endswith(PARQUET)  # which fills the keys that a value lacks
        for place, row in read_rows(file, findings, wanted):
            for one in published.rows_of(row):
                yield place, {key: _without_nulls(value) for key, value in one.items()} if fill else one


def _usable(row: Any, options: Options, findings: Findings) -> Row | None:
    """The row in the usual keys; None where the options leave it out, which is counted."""
    if not isinstance(row, Mapping):
        raise Malformed(f"expected a JSON object, got {type(row).__name__}")
    row = published.normalised(row)
    for name, words in (("resolved", "whether it resolved its task"), ("submitted", "how it ended")):
        if getattr(options, name) and row[name] is None:
            raise Malformed(f"does not say {words}, which options.{name} asks for")
        if getattr(options, name) and not row[name]:
            findings.without(f"not {name}")
            return None
    return dict(row)


def conversation(row: Row, options: Options = Options(), place: str = "", given: list[dict[str, Any]] | None = None
                 ) -> Conversation:
    """Reads a row of one of the forms; raises Malformed, which says what is wrong and where in the row.

    Args:
      given: tools of a row that lists none.
    """
    key = options.messages or "messages"
    ours = published.is_ours(row)
    if ours:  # as its scaffold wrote it
        options = dataclasses.replace(options, template=options.template or str(row["template"]))
    if key in row:
        messages = _messages(_parsed(row[key], key), key, options)
    elif "conversations" in row:
        messages = _system(row) + _messages(_parsed(row["conversations"], "conversations"), "conversations", options)
    elif "prompt" in row and "completion" in row:
        prompt = _messages(_turns(row["prompt"], "user", "prompt"), "prompt", options)
        prompt = [message | {"weight": 0.0} if message["role"] == "assistant" else message for message in prompt]
        messages = prompt + _messages(_turns(row["completion"], "assistant", "completion"), "completion", options)
    else:
        names = ", ".join(map(str, [name for name in row if name not in ("resolved", "submitted")][:8]))
        raise Malformed(f"has no {key}, no conversations, no prompt with a completion, only "
                        f"{names or 'an empty object'}")
    if ours and not row.get("search"):
        messages = [dict(message) for message in published.weighted(messages, row.get("failed") or ())]
    if messages[0]["role"] == "tool":
        raise Malformed("begins with a tool's answer")
    if not any(message["role"] == "assistant" and message["weight"] for message in messages):
        raise Malformed("no assistant's message counts; there is nothing to learn")
    tools = _tools(_parsed(row.get("tools"), "tools")) or given
    if tools and options.template not in ("", NATIVE) and not ours:
        if messages[0]["role"] != "system":
            raise Malformed(f"tools: with template {options.template} a system message must describe them")
        tools = None
    return Conversation(tuple(messages), tools, place)


def _parsed(value: Any, name: str) -> Any:
    """A value that is often stored as JSON text."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{name}: is not valid JSON: {error}") from error


def _system(row: Row) -> list[dict[str, Any]]:
    text = row.get("system")
    if text in (None, ""):
        return []
    if not isinstance(text, str):
        raise Malformed(f"system: expected text, got {type(text).__name__}")
    return [{"role": "system", "content": text}]


def _turns(value: Any, role: str, name: str) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _messages(values: Any, name: str, options: Options) -> list[dict[str, Any]]:
    if not isinstance(values, list) or not values:
        found = "an empty list" if values == [] else "null" if values is None else type(values).__name__
        raise Malformed(f"{name}: expected a list of messages, got {found}")
    return [_message(value, f"{name}[{number}]", options) for number, value in enumerate(values)]


def _message(value: Any, name: str, options: Options) -> dict[str, Any]:
    """One message with the keys that the encoder is to see and no other: data must not mark text as the frame's."""
    if not isinstance(value, Mapping):
        raise Malformed(f"{name}: expected an object, got {type(value).__name__}")
    said = value.get("role", value.get("from"))
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise Malformed(f"{name}.role: {said!r:.40}; allowed: {', '.join(_ROLES)}")
    content = _content(value.get("content", value.get("value")), name)
    if role != "assistant":
        if value.get("tool_calls"):
            raise Malformed(f"{name}.tool_calls: of a {role}; only assistants call tools")
        shown = _marked(value["content"]) if options.marks and isinstance(value.get("content"), list) else content
        ids = value.get("tool_call_ids")  # SWE-agent's
        of_call = {"tool_call_id": ids[0]} if isinstance(ids, list) and ids else {}
        named = {key: value.get(key, of_call.get(key)) for key in ("tool_call_id", "name") if role == "tool"}
        return {"role": role, "content": shown, **{key: text for key, text in named.items() if isinstance(text, str)}}
    calls = value.get("tool_calls") or []
    if said == "function_call":
        content, calls = "", _parsed(content, f"{name}.value")
        calls = calls if isinstance(calls, list) else [calls]
    if not isinstance(calls, list):
        raise Malformed(f"{name}.tool_calls: expected a list, got {type(calls).__name__}")
    for token in _FRAME:
        if token in content:
            raise Malformed(f"{name}.content: an assistant's text holds {token}, which ends a turn")
    if not content and not calls:
        raise Malformed(f"{name}: an assistant's message with neither content nor tool calls")
    message = {"role": role, "content": content, "weight": _weight(value.get("weight"), name)}
    if value.get("reasoning_content") and options.reasoning == "keep":
        message["reasoning_content"] = _content(value["reasoning_content"], name, "reasoning_content")
    if calls:
        message["tool_calls"] = [
            _call(call, f"{name}.tool_calls[{number}]", options.marks) for number, call in enumerate(calls)]
        message |= {"template": options.template} if options.template else {}
    return message


def _marked(parts: list[Any]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": part["text"]} | ({"special": True} if part.get("special") is True else {})
            for part in parts]


def _content(value: Any, name: str, key: str = "content") -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and all(isinstance(part, Mapping) for part in value):
        kinds = {str(part.get("type", "text")) for part in value} - {"text"}
        if kinds:
            raise Malformed(f"{name}.{key}: a part of type {min(kinds)}; the model reads text alone")
        if all(isinstance(part.get("text"), str) for part in value):
            return "".join(part["text"] for part in value)
    raise Malformed(f"{name}.{key}: expected text or a list of text parts, got {type(value).__name__}")


def _weight(value: Any, name: str) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise Malformed(f"{name}.weight: {value!r}; allowed: a number from 0")
    return float(value)


def _call(value: Any, name: str, marks: bool = False) -> dict[str, Any]:
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping):
        raise Malformed(f"{name}: expected an object with a function's name and arguments")
    called = function.get("name")
    if not isinstance(called, str) or not called:
        raise Malformed(f"{name}: the function has no name")
    arguments = _parsed(function.get("arguments", function.get("parameters")), f"{name}.arguments") or {}
    if not isinstance(arguments, Mapping):
        raise Malformed(f"{name}.arguments: expected an object, got {type(arguments).__name__}")
    kept = {"id": value["id"]} if isinstance(value.get("id"), str) else {}
    kept |= {"special": list(value["special"])} if marks and isinstance(value.get("special"), list | tuple) else {}
    return {**kept, "name": called, "arguments": dict(arguments)}


def _tools(values: Any) -> list[dict[str, Any]] | None:
    if not values:
        return None
    if not isinstance(values, list):
        raise Malformed(f"tools: expected a list, got {type(values).__name__}")
    values = [_parsed(tool, f"tools[{number}]") for number, tool in enumerate(values)]
    for number, tool in enumerate(values):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise Malformed(f"tools[{number}]: expected an object with a function's name, description and parameters")
        parameters = function.get("parameters") or {}
        fields = parameters.get("properties") or {} if isinstance(parameters, Mapping) else None
        if not isinstance(fields, Mapping) or not all(isinstance(field, Mapping) for field in fields.values()):
            raise Malformed(f"tools[{number}].parameters: expected a JSON schema whose properties are objects")
    return [dict(tool) for tool in values]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
