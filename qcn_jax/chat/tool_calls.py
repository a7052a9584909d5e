r"""Qwen3-Coder's XML tool calls: what they are made of, and how they are written; `call_reader` reads them.

Canonical form: `<tool_call>\n<function=NAME>\n` then per argument `<parameter=KEY>\nVALUE\n</parameter>\n`, then
`</function>\n</tool_call>`. The published template writes string values raw, so a value that holds these tags
can read like structure. Two rules make parse(render(x)) == x for every string all the same:

* Reading is structural (`value_span`). A value ends at the first `</parameter>` that closes it (tags nested inside
  the value are matched with each other) and is followed by the next piece of a call, or stands alone on its line.
  Balanced or stray tags inside a value are text. Only where no such end exists is the text malformed, and then the
  earliest place is taken at which a writer can have meant the value to end.
* Writing escapes only what that reading would get wrong, or right for want of better: each `<` that begins one of the
  six tags in that value becomes `<\`, and reading takes one backslash away from `<\` before such a tag. A value that
  already holds `<\` before such a tag is escaped too, which makes the rule reversible. All other text is written as
  the published template writes it, byte for byte.
"""

import dataclasses
import re
from collections.abc import Callable, Container, Mapping
from typing import Any

from qcn_jax.chat.values import format_value
from qcn_jax.errors import UserError

NAME = r"[^\s<>{}\"'=]+"
_WORDS = ("parameter", "function", "tool_call")
_ANY = "|".join(_WORDS)
TAG = re.compile(
    r"<[ \t]*(?:"
    r"/[ \t]*(?P<closed>" + _ANY + r")[ \t]*>"
    r"|(?P<opened>parameter|function)[ \t]*=[ \t]*[\"']?(?P<name>" + NAME + r")[\"']?[ \t]*(?:>|(?=\n))"
    r"|(?P<wrapper>tool_call)[ \t]*>"
    r"|(?P<odd>parameter)(?![\w\-])[^<>\n]*(?:>|(?=[<\n])))")  # a parameter whose name cannot be read
ESCAPABLE = re.compile(r"<(?=\\*[ \t]*/?[ \t]*(?:" + _ANY + r")(?![a-z_]))")
ESCAPED = re.compile(r"<\\(?=\\*[ \t]*/?[ \t]*(?:" + _ANY + r")(?![a-z_]))")
_SPACE = re.compile(r"\s*")
_NAME_ONLY = re.compile(NAME)
_COMMENTS = re.compile(r"(?:\s*<!--.*?-->)*", re.DOTALL)
_OPEN_COMMENT = re.compile(r"\s*<!--")
_VALUE_END = "\n</parameter>\n</function>\n</tool_call>"
_CLOSING = re.compile(r"<[ \t]*/[ \t]*parameter[ \t]*>")
_ALONE = re.compile(r"[ \t\r]*(?:\n|\Z)")


def _prefixes(word: str) -> str:
    """A pattern of all beginnings of `word`."""
    return f"(?:{word[0]}{_prefixes(word[1:])})?" if word else ""


# The text ends here, or in the middle of what may be a tag.
_CUT = re.compile(
    r"\s*(?:<[\\ \t/]*(?:" + "|".join(map(_prefixes, _WORDS)) + rf"|(?:{_ANY})(?![\w\-])[^<>\n]*))?\Z")


class Undecided(Exception):
    """What a piece of text means depends on what follows it."""


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


def render_tool_call(call: ToolCall, guard: Callable[[str], str] = str) -> str:
    """The canonical text of one call; `guard` is applied to what is the call's own: names and written values.

    Raises:
      UserError: a name that no parser could read back (empty, or with blanks, quotes or any of `<>{}=`), or
        arguments that are no mapping.
    """
    if not isinstance(call.arguments, Mapping):
        raise UserError(f"tool call {call.name!r}: arguments must be a mapping, got {type(call.arguments).__name__}")
    for name in (call.name, *call.arguments):
        if not isinstance(name, str) or not _NAME_ONLY.fullmatch(name):
            raise UserError(f"tool call: {name!r} cannot name a function or parameter")
    lines = [f"<tool_call>\n<function={guard(call.name)}>\n"]
    for key, value in call.arguments.items():
        lines.append(f"<parameter={guard(key)}>\n{guard(_escape_value(format_value(value)))}\n</parameter>\n")
    return "".join([*lines, "</function>\n</tool_call>"])


def escape_content(content: str) -> str:
    """Assistant text with its tags escaped if they could be read as a call (or already look escaped)."""
    if not ESCAPABLE.search(content):
        return content
    followed = [content, content + "\n"]  # by nothing, and as by calls: a tag needs no ">" then
    if "<!--" in content:  # what follows may close the comment, and be the inside of a call
        followed.append(content + "\n-->\n</function>")
    safe = not ESCAPED.search(content) and not any(
        function_tag(text, tag) for text in followed for tag in TAG.finditer(text))
    return content if safe else ESCAPABLE.sub(r"<\\", content)


def unescape(text: str) -> str:
    """The inverse of what writing does to free text."""
    return ESCAPED.sub("<", text)


def _escape_value(value: str) -> str:
    if not ESCAPABLE.search(value):
        return value
    probes = [value + _VALUE_END]
    if "<!--" in value:  # a later value may close the comment, and look like the inside of a call
        probes.append(value + "\n</parameter>\n<parameter=b>\n-->\n</function>" + _VALUE_END)
    end = len(value) + 1
    meant = (end, end + len("</parameter>"), True)
    if not ESCAPED.search(value) and all(value_span(probe, 0, None) == meant for probe in probes):
        return value
    return ESCAPABLE.sub(r"<\\", value)


# --- structure, as reading and escaping see it


def is_cut(text: str, position: int) -> bool:
    """Whether `text` ends behind `position`, but for blanks and the beginning of a tag."""
    return _CUT.match(text, position) is not None


def tag_at(text: str, position: int, more: bool = False) -> re.Match[str] | None:
    """The tag at `position`, blanks skipped; raises Undecided where `more` text may yet make one."""
    if more and is_cut(text, position):
        raise Undecided
    return TAG.match(text, _SPACE.match(text, position).end())


def function_tag(text: str, tag: re.Match[str], more: bool = False) -> re.Match[str] | None:
    """The `<function=...>` of the call that `tag` begins, or None where it begins none.

    A call is `<function=...>`, with or without `<tool_call>` before it, and the inside of a call behind it; behind
    both tags on lines of their own stray text may stand before the inside.

    Raises:
      Undecided: `more` text may follow, and it decides.
    """
    wrapped = bool(tag["wrapper"])
    function = tag_at(text, tag.end(), more) if wrapped else tag
    if not function or function["opened"] != "function":
        return None
    inner = tag_at(text, function.end(), more)
    if inner is None:
        if is_cut(text, function.end()):
            return function
        if not (wrapped and _ALONE.match(text, function.end())):
            return None
        behind = skip_comments(text, function.end())
        inner = None if _OPEN_COMMENT.match(text, behind) and more else TAG.search(text, behind)
        if inner is None and more:
            raise Undecided
        if inner is None or not own_line(text, function.end(), inner):
            return None
    inside = inner["opened"] == "parameter" or inner["odd"] or inner["closed"]
    return function if inside and (wrapped or inner["closed"] != "parameter") else None


def skip_comments(text: str, position: int) -> int:
    """The position behind comments, if any, that stand at `position`."""
    return _COMMENTS.match(text, position).end()


def value_span(text: str, position: int, names: Container[str] | None) -> tuple[int, int, bool]:
    """Where the value that begins at `position` ends, where reading goes on, and whether that is beyond doubt.

    The first two are equal where `</parameter>` is missing. See the module's docstring.

    Args:
      names: parameters of the function; only these can follow a value without `</parameter>`. None for any.
    """
    nested: list[str] = []  # tags opened inside the value: "parameter", "function" (bare call), "tool_call"
    fallback = None  # the earliest end if the value turns out to have none that is beyond doubt
    closed = _CLOSING.search(text, position)  # if none, no end is: models that repeat a tag for ever write such texts
    inline = position > 0 and text[position - 1] != "\n"  # its writer does not put tags on lines of their own
    for tag in TAG.finditer(text, position):
        span, alone = None, own_line(text, position, tag)
        if tag["closed"] == "parameter":
            follows = _continues_call(text, tag.end())
            if not nested and (follows or inline or (alone and _ALONE.match(text, tag.end()))):
                return *tag.span(), True
            if not nested or follows:
                span = tag.span()
            if nested and nested[-1] == "parameter":
                nested.pop()
        elif tag["closed"]:
            if tag["closed"] in nested:
                del nested[len(nested) - 1 - nested[::-1].index(tag["closed"]):]
            elif tag["closed"] == "tool_call" or _follows_function(text, tag.end()):
                span = (tag.start(), tag.start())
        elif tag["odd"] or tag["opened"] == "parameter":
            if (tag["odd"] or alone or inline) and not tag[0].endswith("/>"):
                nested.append("parameter")
            if alone and (tag["odd"] or names is None or tag["name"] in names):
                span = (tag.start(), tag.start())
        elif (tag["wrapper"] or alone) and function_tag(text, tag):
            if tag["wrapper"] or "tool_call" not in nested:
                nested.append(tag["wrapper"] or "function")
                span = (tag.start(), tag.start())
        fallback = fallback or span
        if fallback and not closed:
            break
    return *(fallback or (len(text), len(text))), False


def own_line(text: str, start: int, tag: re.Match[str]) -> bool:
    """Whether nothing but blanks stands before `tag` on its line, as far as the line lies behind `start`."""
    line = max(text.rfind("\n", 0, tag.start()) + 1, start)
    return not text[line:tag.start()].strip()


def _continues_call(text: str, position: int) -> bool:
    """Whether what follows a `</parameter>` at `position` can follow one."""
    tag = tag_at(text, position)
    if tag is None:
        return is_cut(text, position)
    return bool(tag["opened"] == "parameter" or tag["odd"] or tag["closed"] or function_tag(text, tag))


def _follows_function(text: str, position: int) -> bool:
    """Whether what follows a `</function>` at `position` can follow one."""
    tag = tag_at(text, position)
    return is_cut(text, position) if tag is None else bool(tag["closed"] == "tool_call" or function_tag(text, tag))
