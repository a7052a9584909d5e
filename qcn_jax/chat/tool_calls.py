r"""Qwen3-Coder's XML tool calls: written canonically, read leniently.

Canonical form: `<tool_call>\n<function=NAME>\n` then per argument `<parameter=KEY>\nVALUE\n</parameter>\n`, then
`</function>\n</tool_call>`. The published template writes string values raw, so a value that holds these tags
can read like structure. Two rules make parse(render(x)) == x for every string all the same:

* Reading is structural. A value ends at the first `</parameter>` that closes it (tags nested inside the value
  are matched with each other) and is followed by the next piece of a call. Balanced or stray tags inside a
  value are text. Only where no such end exists is the text malformed, and then the earliest place is taken at
  which a writer can have forgotten `</parameter>`.
* Writing escapes only what that reading would get wrong: each `<` that begins one of the six tags in that
  value becomes `<\`, and reading takes one backslash away from `<\` before such a tag. A value that already
  holds `<\` before such a tag is escaped too, which makes the rule reversible. All other text is written as
  the published template writes it, byte for byte.

Accepted malformed forms: no opening `<tool_call>`; no closing `</tool_call>` or `</function>`, also between
consecutive calls; `</parameter>` missing before `</function>`, the next `<parameter=`, the next call or the
end; a cut last call; a parameter tag without `>`; blanks or quotes inside tags; repeated parameters (the last
counts); text after a call (dropped); `<tool_call>` without a function (text). Each is named in `problems`.
"""

import ast
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax.errors import UserError

NAME = r"[^\s<>{}\"'=]+"
_TAG = re.compile(
    r"<[ \t]*(?:"
    r"/[ \t]*(?P<closed>parameter|function|tool_call)[ \t]*>"
    r"|(?P<opened>parameter|function)[ \t]*=[ \t]*[\"']?(?P<name>" + NAME + r")[\"']?[ \t]*(?:>|(?=\n))"
    r"|(?P<wrapper>tool_call)[ \t]*>)")
_ESCAPABLE = re.compile(r"<(?=\\*[ \t]*/?[ \t]*(?:parameter|function|tool_call)(?![a-z_]))")
_ESCAPED = re.compile(r"<\\(?=\\*[ \t]*/?[ \t]*(?:parameter|function|tool_call)(?![a-z_]))")
_SPACE = re.compile(r"\s*")
_END = re.compile(r"\s*(?:<[^<>\n]*)?\Z")  # nothing more, or a tag cut in its middle
_NAME_ONLY = re.compile(NAME)
_LAST_TAG = "\n</parameter>"


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """One call; `arguments` maps parameter names to JSON values (strings where no schema is known)."""

    name: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class ParsedMessage:
    """An assistant turn taken apart; `problems` says in what the text was not canonical."""

    content: str = ""
    calls: list[ToolCall] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def malformed(self) -> bool:
        """Whether anything was repaired, dropped or left open."""
        return bool(self.problems)


def format_value(value: Any) -> str:
    """A value as the published template writes it: strings raw, containers JSON, other scalars Python's str."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def render_tool_call(call: ToolCall) -> str:
    """The canonical text of one call.

    Raises:
      UserError: a name that no parser could read back (empty, or with blanks, quotes or any of `<>{}=`), or
        arguments that are no mapping.
    """
    if not isinstance(call.arguments, Mapping):
        raise UserError(f"tool call {call.name!r}: arguments must be a mapping, got {type(call.arguments).__name__}")
    for name in (call.name, *call.arguments):
        if not isinstance(name, str) or not _NAME_ONLY.fullmatch(name):
            raise UserError(f"tool call: {name!r} cannot name a function or parameter")
    lines = [f"<tool_call>\n<function={call.name}>\n"]
    for key, value in call.arguments.items():
        lines.append(f"<parameter={key}>\n{_escape_value(format_value(value))}\n</parameter>\n")
    return "".join([*lines, "</function>\n</tool_call>"])


def escape_content(content: str) -> str:
    """Assistant text with its tags escaped if they could be read as a call (or already look escaped)."""
    if not _ESCAPABLE.search(content):
        return content
    safe = not _ESCAPED.search(content) and not any(
        _starts_call(content, tag) for tag in _TAG.finditer(content))
    return content if safe else _ESCAPABLE.sub(r"<\\", content)


def parse_tool_calls(text: str, tools: Sequence[Mapping[str, Any]] | None = None) -> ParsedMessage:
    """Reads an assistant turn (without `<|im_end|>`): content, calls and what was wrong with them.

    Args:
      text: what the model wrote.
      tools: OpenAI-style tool list; where given, values take the types of the schema and a parameter without
        `</parameter>` can only be cut short by a parameter that its function has.

    Never raises for any text. Content is trimmed where calls follow it, as the template does when writing.
    """
    schemas = parameter_schemas(tools)
    message = ParsedMessage()
    start = _next_call(text, 0)
    if start is None:
        message.content = _unescape(text)
        if any(_own_line(text, 0, tag) for tag in _TAG.finditer(text)):
            message.problems.append("tags of a call, but no call")
        return message
    message.content = _unescape(text[:start.start()].strip())
    while start is not None:
        end = _parse_call(text, start, schemas, message)
        start = _next_call(text, end)
        if text[end:start.start() if start else len(text)].strip():
            message.problems.append("text after a call")
    return message


def _parse_call(text: str, start: re.Match, schemas: Mapping[str, Mapping], message: ParsedMessage) -> int:
    """Appends the call that begins at tag `start` to `message`; returns the position behind it."""
    wrapped = bool(start["wrapper"])
    tag = _tag_at(text, start.end()) if wrapped else start
    name, problems = tag["name"], message.problems
    properties = schemas.get(name)
    arguments: dict[str, Any] = {}
    if not wrapped:
        problems.append("missing <tool_call>")
    _check_tag(tag, problems)
    position = tag.end()
    while (tag := _tag_at(text, position)) and tag["opened"] == "parameter":
        _check_tag(tag, problems)
        key = tag["name"]
        value, position = _parse_value(text, tag.end(), properties, problems)
        if key in arguments:
            problems.append(f"parameter {key} given twice")
        arguments[key] = coerce(value, properties.get(key)) if properties else value
    message.calls.append(ToolCall(name, arguments))
    if tag and tag["closed"] == "function":
        position = tag.end()
        tag = _tag_at(text, position)
    else:
        problems.append("missing </function>")
    if tag and tag["closed"] == "tool_call":
        position = tag.end()
    else:
        problems.append("missing </tool_call>")
    return position


def _parse_value(text: str, position: int, properties: Mapping | None, problems: list[str]) -> tuple[str, int]:
    """The raw value that begins at `position` and the position behind its `</parameter>` (or where that lacks)."""
    position += text.startswith("\n", position)
    start, end = _value_span(text, position, properties)
    if start == end:
        problems.append("missing </parameter>" if start < len(text) else "cut inside a value")
    value = text[position:start]
    if start == len(text):
        value = _without_partial_tag(value)
    return _unescape(value.removesuffix("\n")), end


def _value_span(text: str, position: int, properties: Mapping | None) -> tuple[int, int]:
    """Where the value that begins at `position` ends, and where reading goes on: see the module's docstring.

    Both are equal where `</parameter>` is missing.
    """
    nested: list[str] = []  # tags opened inside the value: "parameter", "function" (bare call), "tool_call"
    fallback = None  # the earliest end if the value turns out to have no closing tag of its own
    for tag in _TAG.finditer(text, position):
        span = None
        if tag["closed"] == "parameter":
            if _continues_call(text, tag.end()):
                if not nested:
                    return tag.span()
                span = tag.span()
            if nested and nested[-1] == "parameter":
                nested.pop()
        elif tag["closed"]:
            ends = tag["closed"] == "tool_call" or _follows_function(text, tag.end())
            if tag["closed"] in nested:
                del nested[len(nested) - 1 - nested[::-1].index(tag["closed"]):]
            elif ends:
                span = (tag.start(), tag.start())
        elif tag["opened"] == "parameter":
            if _own_line(text, position, tag):
                nested.append("parameter")
                if properties is None or tag["name"] in properties:
                    span = (tag.start(), tag.start())
        elif (tag["wrapper"] or _own_line(text, position, tag)) and _starts_call(text, tag):
            if tag["wrapper"] or "tool_call" not in nested:
                nested.append(tag["wrapper"] or "function")
                span = (tag.start(), tag.start())
        fallback = fallback or span
    return fallback or (len(text), len(text))


def _tag_at(text: str, position: int) -> re.Match | None:
    """The tag at `position`, blanks skipped."""
    return _TAG.match(text, _SPACE.match(text, position).end())


def _at_end(text: str, position: int) -> bool:
    return _END.match(text, position) is not None


def _starts_call(text: str, tag: re.Match) -> bool:
    """Whether `tag` is `<tool_call>` or `<function=...>` with the inside of a call behind it."""
    if tag["wrapper"]:
        tag = _tag_at(text, tag.end())
    if not tag or tag["opened"] != "function":
        return False
    inner = _tag_at(text, tag.end())
    if inner is None:
        return _at_end(text, tag.end())
    return inner["opened"] == "parameter" or inner["closed"] in ("function", "tool_call")


def _continues_call(text: str, position: int) -> bool:
    """Whether what follows a `</parameter>` at `position` can follow one."""
    tag = _tag_at(text, position)
    if tag is None:
        return _at_end(text, position)
    return tag["opened"] == "parameter" or tag["closed"] in ("function", "tool_call") or _starts_call(text, tag)


def _follows_function(text: str, position: int) -> bool:
    """Whether what follows a `</function>` at `position` can follow one."""
    tag = _tag_at(text, position)
    return _at_end(text, position) if tag is None else tag["closed"] == "tool_call" or _starts_call(text, tag)


def _own_line(text: str, value_start: int, tag: re.Match) -> bool:
    line = max(text.rfind("\n", 0, tag.start()) + 1, value_start)
    return not text[line:tag.start()].strip()


def _next_call(text: str, position: int) -> re.Match | None:
    return next((tag for tag in _TAG.finditer(text, position) if _starts_call(text, tag)), None)


def _check_tag(tag: re.Match, problems: list[str]) -> None:
    if tag[0] != f"<{tag['opened']}={tag['name']}>":
        problems.append(f"tag {tag[0]!r} is not canonical")


def _without_partial_tag(value: str) -> str:
    """`value` without the beginning of a closing tag at its very end."""
    for length in range(len(_LAST_TAG) - 1, 1, -1):
        if value.endswith(_LAST_TAG[:length]):
            return value[:-length]
    return value


def _escape_value(value: str) -> str:
    if not _ESCAPABLE.search(value):
        return value
    probe = value + "\n</parameter>\n</function>\n</tool_call>"
    if not _ESCAPED.search(value) and _value_span(probe, 0, None)[0] == len(value) + 1:
        return value
    return _ESCAPABLE.sub(r"<\\", value)


def _unescape(text: str) -> str:
    return _ESCAPED.sub("<", text)


def parameter_schemas(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Mapping[str, Any]]:
    """Function name -> parameter name -> JSON schema."""
    schemas = {}
    for tool in tools or ():
        function = tool.get("function", tool)
        parameters = function.get("parameters") or {}
        schemas[function["name"]] = parameters.get("properties") or {}
    return schemas


def coerce(value: str, schema: Mapping[str, Any] | None) -> Any:
    """`value` in the type that `schema` names, or as it is where it does not read as one (vLLM's rules)."""
    if schema is None:
        return value
    kinds, nullable = _types(schema)
    kind = kinds[0] if kinds else "string"
    text_like = kind in ("string", "str", "text", "varchar", "char", "enum")
    if value.strip().lower() in ("null", "none") and (nullable or not text_like):
        return None
    if text_like:
        return value
    try:
        if re.match("int|uint|long|short|unsigned", kind):
            return int(value)
        if re.match("num|float", kind):
            number = float(value)
            if not math.isfinite(number):  # JSON has no such number
                return value
            return int(number) if number.is_integer() else number
        if kind in ("boolean", "bool", "binary"):
            return value.strip().lower() == "true"
        if re.match("object|array|arr|dict|list", kind):
            return _json_or_literal(value)
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, OverflowError):
        return value


def _types(schema: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Lower-case type names of a schema other than null, and whether null is among them."""
    if "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    else:
        kinds = [option.get("type", "object") for option in schema.get("anyOf", ()) if isinstance(option, Mapping)]
    names = [str(kind).strip().lower() for kind in kinds]
    return [name for name in names if name != "null"], "null" in names


def _json_or_literal(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return ast.literal_eval(value)
