r"""Families of tool-call syntax that `templates` is made of: JSON arguments, tagged parameters; and see `python_calls`.

Each form writes canonical text and reads it back exactly; where a piece of free text (the assistant's words, a raw
parameter value) holds the very marker that a reader looks for, a backslash is written after the marker's first
character and taken away again on reading. Reading never raises: what is wrong is named in `problems`.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qcn_jax.chat.tool_calls import ParsedMessage, ToolCall
from qcn_jax.chat.values import (
    STRICT,
    Expected,
    Schemas,
    check_depth,
    coerce,
    format_value,
    read_json,
)
from qcn_jax.errors import UserError

IDENTIFIER = r"[A-Za-z_][A-Za-z0-9_.\-]*"


class Form(Protocol):
    """How calls are written and read."""

    start: re.Pattern[str]  # what begins the first call
    head: str  # what `start` begins with, whatever the call

    def render(self, calls: Sequence[ToolCall]) -> str:
        """The text of one or more calls."""

    def read(self, text: str, position: int, schemas: Schemas, message: ParsedMessage) -> int:
        """Appends the calls that begin at `position` to `message`; returns where they end."""


class Escape:
    """Marks occurrences of `first` and `rest` (a literal character and a pattern) in free text, reversibly."""

    def __init__(self, first: str, rest: str):
        self._plain = re.compile(f"{re.escape(first)}(?=\\\\*(?:{rest}))")
        self.marked = re.compile(f"{re.escape(first)}\\\\(?=\\\\*(?:{rest}))")
        self._first = first

    def mark(self, text: str) -> str:
        """`text` without a plain occurrence."""
        return self._plain.sub(lambda _: self._first + "\\", text)

    def unmark(self, text: str) -> str:
        """The inverse of `mark`."""
        return self.marked.sub(lambda _: self._first, text)


def render(form: Form, content: str, calls: Sequence[ToolCall]) -> str:
    """Words, then calls; words are trimmed where calls follow."""
    escape = content_escape(form.start.pattern)
    if not calls:
        return escape.mark(content)
    for call in calls:
        _check_names(call)
    lead = escape.mark(content.strip())
    return (lead + "\n\n" if lead else "") + form.render(calls)


@functools.cache
def content_escape(pattern: str) -> Escape:
    """What keeps an assistant's words from being taken for what `pattern`, a Form's start, finds."""
    first, rest = re.fullmatch(r"(\\?.)(.*)", pattern, re.DOTALL).groups()
    return Escape(first[-1], rest)


def _check_names(call: ToolCall) -> None:
    if not isinstance(call.arguments, Mapping):
        raise UserError(f"tool call {call.name!r}: arguments must be a mapping, got {type(call.arguments).__name__}")
    for name in (call.name, *call.arguments):
        if not isinstance(name, str) or not re.fullmatch(IDENTIFIER, name):
            raise UserError(f"tool call: {name!r} cannot name a function or parameter")


def _loose(literal: str) -> str:
    """A pattern for `literal` that takes any white space where it has a line end."""
    return r"\s*".join(re.escape(part) for part in literal.split("\n"))


def skip(pattern: str, text: str, position: int) -> int | None:
    """Position behind `pattern` (leading blanks allowed) at `position`, or None."""
    match = re.compile(r"\s*" + pattern).match(text, position)
    return match.end() if match else None


def dumps(value: Any, call: ToolCall) -> str:
    """A call's value as JSON; raises UserError where it is none."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"tool call {call.name!r}: arguments are not JSON: {error}") from error


@dataclasses.dataclass(frozen=True)
class JsonForm:
    """Calls whose arguments are one JSON object.

    Attributes:
      prefix, suffix: around each call.
      separator: between the name and the JSON of the arguments, `{i}` is the call's number; None where the JSON
        holds both, as {"name": ..., "arguments": ...}.
      begin, between, end: around and between all calls.
      marker: what begins the first call; by default `begin` and `prefix`.
    """

    prefix: str = ""
    suffix: str = ""
    separator: str | None = None
    begin: str = ""
    between: str = "\n"
    end: str = ""
    marker: str = ""

    @functools.cached_property
    def start(self) -> re.Pattern[str]:
        """What begins the first call."""
        return re.compile(re.escape(self.head))

    @property
    def head(self) -> str:
        """See `Form`."""
        return self.marker or (self.begin + self.prefix).strip()

    def render(self, calls: Sequence[ToolCall]) -> str:
        """See `Form`."""
        return self.begin + self.between.join(self._call(call, i) for i, call in enumerate(calls)) + self.end

    def _call(self, call: ToolCall, number: int) -> str:
        if self.separator is None:
            body = dumps({"name": call.name, "arguments": dict(call.arguments)}, call)
        else:
            body = call.name + self.separator.replace("{i}", str(number)) + dumps(dict(call.arguments), call)
        return self.prefix + body + self.suffix

    def read(self, text: str, position: int, schemas: Schemas, message: ParsedMessage) -> int:
        """See `Form`."""
        after = skip(_loose(self.begin), text, position)
        if after is None:
            message.problems.append(f"missing {self.begin.strip()}")
        position = position if after is None else after
        head = _loose(self.prefix)
        if self.separator is not None:
            separator = _loose(self.separator).replace(re.escape("{i}"), r"\d+")
            head += f"(?P<name>{IDENTIFIER}?)" + separator
        head_pattern = re.compile(rf"\s*{head}(?=\s*\{{)" if self.separator is None else r"\s*" + head)
        while match := head_pattern.match(text, position):
            try:
                value, end = STRICT.raw_decode(text, re.compile(r"\s*").match(text, match.end()).end())
                check_depth(value)
                call = self._to_call(match, value)
            except (ValueError, RecursionError):
                call = None
            if call is None:
                message.problems.append("arguments are no JSON object")
                later = head_pattern.search(text, match.end()) if self.prefix else None
                position = later.start() if later else len(text)
                continue
            message.calls.append(call)
            position, missing = self._behind(text, end)
            message.problems += [f"missing {missing}"] if missing else []
            behind = skip(_loose(self.between), text, position)
            if not self.between.strip():
                behind = position
            if behind is None:
                break
            position = behind
        if not message.calls:
            message.problems.append("a call that cannot be read")
            return len(text)
        after = skip(_loose(self.end), text, position)
        if after is None:
            message.problems.append(f"missing {self.end.strip()}")
        return position if after is None else after

    def _behind(self, text: str, end: int) -> tuple[int, str]:
        after = skip(_loose(self.suffix), text, end)
        return (end, self.suffix.strip()) if after is None else (after, "")

    def _to_call(self, match: re.Match[str], value: Any) -> ToolCall | None:
        if not isinstance(value, dict):
            return None
        if self.separator is not None:
            return ToolCall(match["name"], value)
        name, arguments = value.get("name"), value.get("arguments")
        return ToolCall(name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


@dataclasses.dataclass(frozen=True)
class TaggedForm:
    """Calls with one pair of tags for each parameter; values are raw text.

    Attributes:
      call: what opens a call, with `{name}`; call_end closes it and may hold `{name}`.
      parameter: what opens a value, with `{key}`; parameter_end closes it and may hold `{key}`.
      json_parameter: opens a value that is JSON and no string; empty where nothing tells text from JSON.
      json_values: without json_parameter, what is no string is written as JSON, and not as Python's str.
      begin, end: around all calls.
    """

    call: str
    call_end: str
    parameter: str
    parameter_end: str
    json_parameter: str = ""
    begin: str = ""
    end: str = ""
    json_values: bool = False

    @functools.cached_property
    def start(self) -> re.Pattern[str]:
        """What begins the first call."""
        literal = (self.begin + self.call).strip()
        if literal.startswith("<{name}>"):  # the tag is the tool's name: only a tag that ends its line
            return re.compile(rf"<(?P<name>{IDENTIFIER})>[ \t]*(?:\n|\Z)")
        return re.compile(re.escape(self.head))

    @property
    def head(self) -> str:
        """See `Form`."""
        return (self.begin + self.call).strip().split("{name}")[0].rstrip()

    def render(self, calls: Sequence[ToolCall]) -> str:
        """See `Form`."""
        return self.begin + "\n".join(map(self._call, calls)) + self.end

    def _call(self, call: ToolCall) -> str:
        parts = [self.call.replace("{name}", call.name)]
        for key, value in call.arguments.items():
            opening, text = self.parameter, format_value(value)
            if (self.json_parameter or self.json_values) and not isinstance(value, str):
                opening, text = self.json_parameter or opening, dumps(value, call)
            text = _value_escape(_value_end(self.parameter_end, key)).mark(text)
            parts.append(opening.replace("{key}", key) + text + self.parameter_end.replace("{key}", key))
        return "".join([*parts, self.call_end.replace("{name}", call.name)])

    def read(self, text: str, position: int, schemas: Schemas, message: ParsedMessage) -> int:
        """See `Form`."""
        after = skip(_loose(self.begin), text, position)
        position = position if after is None else after
        while match := self._opening.match(text, position):
            position = self._read_call(text, match, schemas.get(match["name"]) or {}, message)
        if not message.calls:
            message.problems.append("a call that cannot be read")
            return len(text)
        after = skip(_loose(self.end), text, position)
        if after is None:
            message.problems.append(f"missing {self.end.strip()}")
        return position if after is None else after

    def _read_call(
        self, text: str, start: re.Match[str], schema: Mapping[str, Expected], message: ParsedMessage
    ) -> int:
        arguments: dict[str, Any] = {}
        message.calls.append(ToolCall(start["name"], arguments))
        position, call_end = start.end(), _loose(self.call_end.replace("{name}", start["name"]))
        while match := self._next_parameter(text, position, call_end, message):
            key = match["key"] or match["json_key"]
            stop = _value_end(self.parameter_end, key)
            end = text.find(stop, match.end())
            position = end + len(stop)
            if end < 0:
                message.problems.append(f"missing {stop}")
                closing = re.compile(call_end).search(text, match.end())
                end = position = closing.start() if closing else len(text)
            if _open_tag(stop).search(text, match.end(), end):
                message.problems.append(f"{stop[:-1]} without {stop[-1]}")
            value = _value_escape(stop).unmark(text[match.end():end])
            if match["json_key"]:
                arguments[key] = self._json(value, message)
            else:
                arguments[key] = coerce(value, schema.get(key))
        after = skip(call_end, text, position)
        if after is None:
            message.problems.append(f"missing {self.call_end.replace('{name}', start['name']).strip()}")
            # What stands before the call's end, if no other call does, is no value: it is dropped.
            closing, opening = re.compile(call_end).search(text, position), self._opening.search(text, position)
            after = closing.end() if closing and not (opening and opening.start() < closing.start()) else position
        return after

    def _next_parameter(self, text: str, position: int, call_end: str, message: ParsedMessage) -> re.Match[str] | None:
        """What opens the call's next value: at `position`, or behind text that can be no part of a call."""
        match = self._parameter.match(text, position)
        if match or skip(call_end, text, position) is not None:
            return match
        later = self._parameter.search(text, position)
        ends = (re.compile(call_end).search(text, position), self._opening.search(text, position))
        if later is None or any(end and end.start() <= later.start() for end in ends):
            return None
        message.problems.append("text between parameters")
        return later

    @functools.cached_property
    def _opening(self) -> re.Pattern[str]:
        """What opens a call."""
        return re.compile(r"\s*" + _loose(self.call).replace(re.escape("{name}"), f"(?P<name>{IDENTIFIER})"))

    @functools.cached_property
    def _parameter(self) -> re.Pattern[str]:
        """What opens a value: group key, or json_key where the value is JSON."""
        plain = _loose(self.parameter).replace(re.escape("{key}"), f"(?P<key>{IDENTIFIER})")
        typed = _loose(self.json_parameter).replace(re.escape("{key}"), f"(?P<json_key>{IDENTIFIER})")
        return re.compile(rf"\s*(?:{plain}|{typed or '(?P<json_key>(?!))'})")

    @staticmethod
    def _json(value: str, message: ParsedMessage) -> Any:
        try:
            return read_json(value)
        except ValueError:
            message.problems.append("a value is no JSON")
            return value


def _value_end(tag: str, key: str) -> str:
    return tag.replace("{key}", key).strip()


@functools.cache
def _value_escape(end: str) -> Escape:
    return Escape(end[0], re.escape(end[1:-1]) + r"(?![\w\-])")


@functools.cache
def _open_tag(end: str) -> re.Pattern[str]:
    """A tag that was to end a value and lacks its last character; in values it is written escaped."""
    return re.compile(re.escape(end[:-1]) + rf"(?![\w\-]|{re.escape(end[-1])})")
