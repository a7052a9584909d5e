"""Tool calls written as a list of Python calls; the third family of `call_syntax`."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

from qcn_jax.chat.call_syntax import IDENTIFIER, dumps, skip
from qcn_jax.chat.tool_calls import ParsedMessage, ToolCall
from qcn_jax.chat.values import NotJson, Schemas, read_literal


@dataclasses.dataclass(frozen=True)
class PythonForm:
    """A list of Python calls with literal keyword arguments: `[f(a='x', b=1), g()]`."""

    begin: str = ""
    end: str = ""

    @functools.cached_property
    def start(self) -> re.Pattern[str]:
        """What begins the list."""
        return re.compile(re.escape(self.begin) if self.begin else rf"\[{IDENTIFIER}\(")

    @property
    def head(self) -> str:
        """See `Form`."""
        return self.begin or "["

    def render(self, calls: Sequence[ToolCall]) -> str:
        """See `Form`."""
        return self.begin + "[" + ", ".join(map(self._call, calls)) + "]" + self.end

    @staticmethod
    def _call(call: ToolCall) -> str:
        return f"{call.name}({', '.join(f'{key}={_literal(value, call)}' for key, value in call.arguments.items())})"

    def read(self, text: str, position: int, schemas: Schemas, message: ParsedMessage) -> int:
        """See `Form`."""
        position = skip(re.escape(self.begin) + r"\s*\[", text, position)
        while position is not None and (match := _PYTHON_CALL.match(text, position)):
            position = _read_arguments(text, match, message)
            if position is None or (comma := skip(",", text, position)) is None:
                break
            position = comma
        if position is None or not message.calls:
            message.problems.append("a call that cannot be read")
            return len(text)
        for closing in ("]", self.end):
            after = skip(re.escape(closing), text, position)
            if after is None:
                message.problems.append(f"missing {closing}")
            position = position if after is None else after
        return position


_PYTHON_CALL = re.compile(rf"\s*(?P<name>{IDENTIFIER})\(")
_PYTHON_KEY = re.compile(rf"\s*(?P<key>{IDENTIFIER})\s*=\s*")
_PYTHON_STRING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)


def _literal(value: Any, call: ToolCall) -> str:
    dumps(value, call)  # the same values as the other forms: those of JSON
    return repr(value)


def _read_arguments(text: str, start: re.Match[str], message: ParsedMessage) -> int | None:
    """Reads `key=literal, ...)`; None (and no call) where that cannot be done."""
    arguments, position = {}, start.end()
    while match := _PYTHON_KEY.match(text, position):
        end = _literal_end(text, match.end())
        written = text[match.end():end].strip()
        try:
            arguments[match["key"]] = read_literal(written)
        except NotJson:
            message.problems.append("a value is no JSON")
            arguments[match["key"]] = written
        except ValueError:
            return None
        position = skip(",", text, end) or end
    closed = skip(r"\)", text, position)
    if closed is None:
        return None
    message.calls.append(ToolCall(start["name"], arguments))
    return closed


def _literal_end(text: str, position: int) -> int:
    """Where a Python literal ends: at a comma or closing bracket outside its own brackets and strings."""
    depth = 0
    while position < len(text):
        if string := _PYTHON_STRING.match(text, position):
            position = string.end()
            continue
        char = text[position]
        if depth == 0 and char in ",)]}":
            break
        depth += (char in "([{") - (char in ")]}")
        position += 1
    return position
