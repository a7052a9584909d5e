"""Defects of pages: in style sheets and HTML by rules over their text, in scripts those of inject.treesitter and react.

Every kind is a mistake that people make: a label whose `for` names nothing, a layer that covers what is below, a
breakpoint at the wrong width, text of its background's colour.
"""

import random
import re
from collections.abc import Callable, Collection, Iterator

from qcn_jax.envs.synthesis.inject import Injection, treesitter
from qcn_jax.envs.synthesis.pages import react
from qcn_jax.envs.testpaths import is_test_path
from qcn_jax.errors import UserError

Edits = Iterator[tuple[int, int, str]]
# What a value of a style sheet may be taken for.
_VALUES = {
    "row": ("column",), "column": ("row",), "flex": ("block",), "grid": ("block",), "wrap": ("nowrap",),
    "none": ("block",), "block": ("none",), "hidden": ("visible",), "visible": ("hidden",), "fixed": ("static",),
    "relative": ("absolute",), "absolute": ("static",), "sticky": ("static",), "inline-block": ("none",),
    "space-between": ("center",), "1fr 1fr": ("1fr",), "1fr": ("1fr 1fr",), "100%": ("30%", "200%"),
    "line-through": ("none",),
}  # fmt: skip
_DECLARATION = re.compile(r"(?m)^([ \t]*)([\w-]+):[ \t]*([^;{}\n]+);[ \t]*\n")
_NUMBER = re.compile(r"(?<![\w.#])(\d+)px\b")
_TAG = re.compile(r"<(button|input|label|select|a|h[1-6]|ul|ol|table|nav|section|p|output|div|span)\b([^<>]*)>")
_ATTRIBUTE = re.compile(r"\s([a-z-]+)(?:=\"([^\"]*)\")?")
_NEIGHBOURS = re.compile(r"(?m)^(<(?:button|input|label|select|tr|h2)\b.*>\n)"
                         r"(<(?:button|input|label|select|tr|h2)\b.*>\n)")
_DROPPED = re.compile(r"hidden|role|type|alt|selected|checked|disabled|required|tabindex|aria-[a-z]+")


def _drop_declaration(text: str) -> Edits:
    for found in _DECLARATION.finditer(text):
        yield found.start(), found.end(), ""


def _swap_value(text: str) -> Edits:
    for found in _DECLARATION.finditer(text):
        for value in _VALUES.get(found[3].strip(), ()):
            yield found.start(3), found.end(3), value


def _change_length(text: str) -> Edits:
    for found in _DECLARATION.finditer(text):
        for number in _NUMBER.finditer(found[3]):
            for value in ("0", str(4 * int(number[1]))):
                yield found.start(3) + number.start(1), found.start(3) + number.end(1), value


def _change_colour(text: str) -> Edits:
    for found in _DECLARATION.finditer(text):
        if found[2] == "color":
            yield found.start(3), found.end(3), "#222" if found[3].lower().startswith("#f") else "#fff"


def _change_breakpoint(text: str) -> Edits:
    for found in re.finditer(r"\((max|min)-width:\s*(\d+)px\)", text):
        yield found.start(2), found.end(2), "200" if found[1] == "max" else "2000"
        yield found.start(1), found.end(1), "min" if found[1] == "max" else "max"


def _change_stacking(text: str) -> Edits:
    for found in re.finditer(r"z-index:\s*(-?\d+)", text):
        yield found.start(1), found.end(1), "-1"


def _wrong_selector(text: str) -> Edits:
    for found in re.finditer(r"(?m)^[ \t]*[#.]([\w-]+)[^{}\n]*\{", text):
        yield found.start(1), found.end(1), f"{found[1]}s"


def _wrong_reference(text: str) -> Edits:
    for found in re.finditer(r"\b(?:for|aria-controls|aria-labelledby|aria-describedby|href)=\"(#?)([\w-]+)\"", text):
        yield found.start(2), found.end(2), f"{found[2]}-field"


def _drop_attribute(text: str) -> Edits:
    for tag in _TAG.finditer(text):
        for found in _ATTRIBUTE.finditer(tag[2]):
            if _DROPPED.fullmatch(found[1]):
                yield tag.start(2) + found.start(), tag.start(2) + found.end(), ""


def _add_attribute(text: str) -> Edits:
    for tag in _TAG.finditer(text):
        if tag[1] in ("button", "input", "select", "a"):
            for words in (' tabindex="1"', ' tabindex="-1"', " disabled", ' aria-hidden="true"'):
                if words.split("=")[0].strip() not in tag[2]:
                    yield tag.end(1), tag.end(1), words


def _wrong_element(text: str) -> Edits:
    for found in re.finditer(r"<button\b([^<>]*)>([^<>]*)</button>", text):
        yield found.start(), found.end(), f"<div{found[1]}>{found[2]}</div>"
    for found in re.finditer(r"<label\b[^<>]*>([^<>]*)</label>", text):
        yield found.start(), found.end(), f"<span>{found[1]}</span>"


def _wrong_id(text: str) -> Edits:
    for found in re.finditer(r"\bid=\"([\w-]+)\"", text):
        yield found.start(1), found.end(1), f"{found[1]}-1"


def _swap_lines(text: str) -> Edits:
    for found in _NEIGHBOURS.finditer(text):
        if found[1] != found[2]:
            yield found.start(), found.end(), found[2] + found[1]


RULES: dict[str, dict[str, Callable[[str], Edits]]] = {
    ".css": {"css_drop_declaration": _drop_declaration, "css_swap_value": _swap_value,
             "css_change_length": _change_length, "css_change_colour": _change_colour,
             "css_change_breakpoint": _change_breakpoint, "css_change_stacking": _change_stacking,
             "css_wrong_selector": _wrong_selector},
    ".html": {"html_wrong_reference": _wrong_reference, "html_drop_attribute": _drop_attribute,
              "html_add_attribute": _add_attribute, "html_wrong_element": _wrong_element, "html_wrong_id": _wrong_id,
              "html_swap_lines": _swap_lines},
}  # fmt: skip
SCRIPTS = (".js", ".mjs", ".jsx")
_SCRIPT_RULES = treesitter.KINDS | react.KINDS
KINDS = (*RULES[".css"], *RULES[".html"], *_SCRIPT_RULES)


def candidates(text: str, path: str, kinds: Collection[str] = (), rng: random.Random | None = None) -> list[Injection]:
    """All defects of the given kinds (none: all) that a file of a page allows, in the order of its text.

    Raises:
      UserError: an unknown kind, or tree-sitter-language-pack is not installed.
    """
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise UserError(f"kinds: unknown {unknown[0]!r}; allowed: {', '.join(KINDS)}")
    ending = path[path.rfind("."):]
    if is_test_path(path) or path.split("/")[0] == "tests":
        return []
    if ending in SCRIPTS:
        wanted = [kind for kind in _SCRIPT_RULES if not kinds or kind in kinds]
        return treesitter.candidates(text, path, wanted, rng=rng, rules=_SCRIPT_RULES)
    found = []
    for kind, rule in RULES.get(ending, {}).items():
        if not kinds or kind in kinds:
            for start, end, new in rule(text):
                first, last = _block(text, start, ending)
                found.append(Injection(kind, path, "", first, last, text, start, end, new))
    return sorted(found, key=lambda one: (one.start, one.end, one.kind, one.new))


def _block(text: str, at: int, ending: str) -> tuple[int, int]:
    """First and last line of what stands around a place: a rule of a style sheet, or one line."""
    line = text.count("\n", 0, at) + 1
    if ending != ".css":
        return line, line
    opened = text.rfind("{", 0, at)
    closed = text.find("}", at)
    return text.count("\n", 0, max(opened, 0)) + 1, text.count("\n", 0, closed if closed >= 0 else at) + 1
