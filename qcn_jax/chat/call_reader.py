"""Qwen3-Coder's XML tool calls read leniently, piece by piece or whole.

There is one reader. Words leave it as soon as nothing that may follow can change what they mean; calls are read at the
end. A whole text is one piece, so what is streamed and what is read at once cannot differ.

Accepted malformed forms: no opening `<tool_call>`; no closing `</tool_call>` or `</function>`, also between
consecutive calls; `</parameter>` missing before `</function>`, the next `<parameter=`, the next call or the
end, or doubled; a parameter whose name cannot be read (dropped); text between parameters (dropped); a cut last call; a
parameter tag without `>`; blanks or quotes inside tags; repeated parameters (the last counts); text after a call
(dropped); `<tool_call>` without a function (text). Each is named in `problems`.

Where tools are known, calls of others are calls only if the turn ends with them: an example that is followed by more
words is words.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax.chat.tool_calls import (
    ESCAPED,
    TAG,
    ParsedMessage,
    ToolCall,
    Undecided,
    function_tag,
    is_cut,
    own_line,
    skip_comments,
    tag_at,
    unescape,
    value_span,
)
from qcn_jax.chat.values import Expected, Schemas, coerce, parameter_schemas

_LAST_TAG = "\n</parameter>"
# Whole calls that hold no other tag, and that words follow.
_EXAMPLE = re.compile(
    r"((?:\s*(?:<tool_call>\s*)?<function=[^\s<>{}\"'=]+>(?:\s*<parameter=[^\s<>{}\"'=]+>[^<]*</parameter>)*\s*</function>"
    r"(?:\s*</tool_call>)?)+)\s*[^\s<]")


class CallReader:
    """Reads one assistant turn (without `<|im_end|>`) as it comes.

    Attributes:
      message: after `finish`, the turn taken apart; its content is all that `push` and `finish` returned.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None = None) -> None:
        """See `parse_tool_calls`."""
        self._schemas = parameter_schemas(tools)
        self._text = ""
        self._at = 0  # words up to here have been decided
        self._blanks = ""  # the end of those: only words that more words follow keep theirs
        self._start: re.Match[str] | None = None  # the tag that begins the calls
        self.message = ParsedMessage()

    def push(self, text: str) -> str:
        """Takes more of the turn; returns the words that are now certain."""
        self._text += text
        return self._words(more=True)

    def finish(self) -> str:
        """Ends the turn; returns the words that were still in doubt."""
        rest, message = self._words(more=False), self.message
        if self._start is not None:
            _read_calls(self._text, self._start, self._schemas, message)
        elif any(not tag["odd"] and own_line(self._text, 0, tag) for tag in TAG.finditer(self._text)):
            message.problems.append("tags of a call, but no call")
        return rest

    def _words(self, more: bool) -> str:
        words = [self._blanks]
        try:
            while self._start is None and self._at < len(self._text):
                at = self._text.find("<", self._at)
                at = at if at >= 0 else len(self._text)
                words.append(self._text[self._at : at])
                self._at = at
                if at < len(self._text):
                    words.append(self._tag(more))
        except Undecided:
            pass
        found = "".join(words)
        if more or self._start is not None:
            kept = found.rstrip()
            found, self._blanks = kept, found[len(kept) :]
        self.message.content += found
        return found

    def _tag(self, more: bool) -> str:
        """The words that begin with the `<` that comes next; none where the calls begin there."""
        text, at = self._text, self._at
        if more and is_cut(text, at):
            raise Undecided
        if ESCAPED.match(text, at):
            self._at += 2
            return "<"
        tag = TAG.match(text, at)
        if tag and (tag["wrapper"] or tag["opened"] == "function") and (function := function_tag(text, tag, more)):
            end = None
            if self._schemas and function["name"] not in self._schemas:
                end = self._example(tag, more)
            if end is None:
                self._start = tag
                return ""
            self._at = end
            return unescape(text[at:end])
        self._at += 1
        return "<"

    def _example(self, tag: re.Match[str], more: bool) -> int | None:
        """Where calls of unknown tools end that words follow, or None where the turn ends with them."""
        text = self._text
        if example := _EXAMPLE.match(text, tag.start()):
            names = re.findall(r"<function=([^>]*)>", example[1])
            return None if any(name in self._schemas for name in names) else example.end(1)
        if more:
            raise Undecided
        read = ParsedMessage()
        end = _read_calls(text, tag, self._schemas, read)
        known = any(call.name in self._schemas for call in read.calls)
        return None if known or not text[end:].strip() else end


def parse_tool_calls(text: str, tools: Sequence[Mapping[str, Any]] | None = None) -> ParsedMessage:
    """Reads an assistant turn (without `<|im_end|>`): content, calls and what was wrong with them.

    Args:
      text: what the model wrote.
      tools: OpenAI-style tool list; where given, values take the types of the schema, a parameter without
        `</parameter>` can only be cut short by a parameter that its function has, and calls of other tools are calls
        only at the end of the turn.

    Never raises for any text. Where calls follow, content ends with its last word.
    """
    reader = CallReader(tools)
    reader.push(text)
    reader.finish()
    return reader.message


def _read_calls(text: str, start: re.Match[str] | None, schemas: Schemas, message: ParsedMessage) -> int:
    """Appends the calls from tag `start` on to `message`; returns where the last one ends."""
    end = 0
    while start is not None:
        end = _read_call(text, start, schemas, message)
        start = next((tag for tag in TAG.finditer(text, end) if function_tag(text, tag)), None)
        if text[end : start.start() if start else len(text)].strip():
            message.problems.append("text after a call")
    return end


def _read_call(text: str, start: re.Match[str], schemas: Schemas, message: ParsedMessage) -> int:
    """Appends the call that begins at tag `start` to `message`; returns the position behind it."""
    function = tag_at(text, start.end()) if start["wrapper"] else start
    assert function is not None, "a call has a function"
    name, problems = function["name"], message.problems
    if not start["wrapper"]:
        problems.append("missing <tool_call>")
    _check_tag(function, problems)
    arguments, tag, position = _read_arguments(text, function.end(), schemas.get(name), problems)
    message.calls.append(ToolCall(name, arguments))
    if tag and tag["closed"] == "function":
        position = tag.end()
        tag = tag_at(text, position)
    else:
        problems.append("missing </function>")
    if tag and tag["closed"] == "tool_call":
        position = tag.end()
    else:
        problems.append("missing </tool_call>")
    return position


def _read_arguments(
    text: str, position: int, expected: Mapping[str, Expected] | None, problems: list[str]
) -> tuple[dict[str, Any], re.Match[str] | None, int]:
    """The arguments from `position` on, the tag that ends them, and the position behind the last of them."""
    arguments: dict[str, Any] = {}
    while tag := TAG.search(text, skip_comments(text, position)):
        stray = bool(text[position : tag.start()].strip())
        if tag["opened"] == "parameter":
            _check_tag(tag, problems)
            key = tag["name"]
            value, position = _read_value(text, tag.end(), expected, problems)
            if key in arguments:
                problems.append(f"parameter {key} given twice")
            arguments[key] = coerce(value, expected.get(key)) if expected else value
        elif tag["odd"]:
            problems.append(f"parameter {tag[0][:40]!r} cannot be read")
            position = tag.end() if tag[0].endswith("/>") else _skip_value(text, tag.end(), expected)
        elif tag["closed"] == "parameter":
            problems.append("a second </parameter>")
            position = tag.end()
        else:
            if stray and tag["closed"]:
                problems.append("text between parameters")
            return arguments, None if stray and not tag["closed"] else tag, position
        if stray:
            problems.append("text between parameters")
    return arguments, None, position


def _read_value(text: str, position: int, names: Mapping[str, Any] | None, problems: list[str]) -> tuple[str, int]:
    """The raw value that begins at `position` and the position behind its `</parameter>` (or where that lacks)."""
    position += text.startswith("\n", position)
    start, end, _ = value_span(text, position, names)
    if start == end:
        problems.append("missing </parameter>" if start < len(text) else "cut inside a value")
    value = text[position:start]
    if start == len(text):
        value = _without_partial_tag(value)
    return unescape(value.removesuffix("\n")), end


def _skip_value(text: str, position: int, names: Mapping[str, Any] | None) -> int:
    return value_span(text, position + text.startswith("\n", position), names)[1]


def _check_tag(tag: re.Match[str], problems: list[str]) -> None:
    if tag[0] != f"<{tag['opened']}={tag['name']}>":
        problems.append(f"tag {tag[0]!r} is not canonical")


def _without_partial_tag(value: str) -> str:
    """`value` without the beginning of a closing tag at its very end."""
    for length in range(len(_LAST_TAG) - 1, 1, -1):
        if value.endswith(_LAST_TAG[:length]):
            return value[:-length]
    return value
