"""Constraints that an answer's text must meet, decided on the host without running anything."""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qcn_jax import syntax


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'\-]+", text)


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _keys(text: str, keys: Sequence[str]) -> bool:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and set(found) == set(keys)


def names_of(source: str) -> set[str] | None:
    """Names, attributes and modules that Python source uses; None where it is none."""
    try:
        tree = syntax.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    found = set()
    for node in ast.walk(tree):
        found |= {node.id} if isinstance(node, ast.Name) else {node.attr} if isinstance(node, ast.Attribute) else set()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(alias.name for alias in node.names)}
        if isinstance(node, ast.For | ast.While | ast.comprehension):
            found.add("loop")
    return found


def _used(text: str, names: Sequence[str], language: str) -> list[bool]:
    found = names_of(text) if language == "python" else None
    if language == "python" and found is None:
        return [False]
    return [name in found if found is not None else re.search(rf"\b{re.escape(name)}\b", text) is not None
            for name in names]


# rule -> (type of its value, what it demands of a text and a language)
RULES: dict[str, tuple[type, Callable[[str, Any, str], bool]]] = {
    "words_at_least": (int, lambda text, value, _: len(_words(text)) >= value),
    "words_at_most": (int, lambda text, value, _: 0 < len(_words(text)) <= value),
    "lines": (int, lambda text, value, _: len(_lines(text)) == value),
    "lines_at_most": (int, lambda text, value, _: 0 < len(_lines(text)) <= value),
    "bullets": (int, lambda text, value, _: [line[:2] for line in _lines(text)] == ["- "] * value),
    "paragraphs": (int, lambda text, value, _: len(re.split(r"\n\s*\n", text.strip())) == value and bool(text.strip())),
    "contains": (list, lambda text, value, _: all(
        re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in value)),
    "avoids": (list, lambda text, value, _: bool(text.strip()) and not any(
        re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in value)),
    "without_characters": (str, lambda text, value, _: bool(text.strip()) and not set(text) & set(value)),
    "starts_with": (str, lambda text, value, _: text.lstrip().startswith(value)),
    "ends_with": (str, lambda text, value, _: text.rstrip().endswith(value)),
    "lower_case": (bool, lambda text, value, _: bool(text.strip()) and (text == text.lower()) == value),
    "json_keys": (list, lambda text, value, _: _keys(text, value)),
    "uses": (list, lambda text, value, language: all(_used(text, value, language))),
    "forbids": (list, lambda text, value, language: (language != "python" or names_of(text) is not None)
                and not any(_used(text, value, language))),
}


def fault(rule: Mapping[str, Any]) -> str:
    """What is wrong with a rule of a row; "" where nothing is."""
    if len(rule) != 1 or next(iter(rule)) not in RULES:
        return f"must be an object with one of {', '.join(RULES)}"
    name, value = next(iter(rule.items()))
    kind = RULES[name][0]
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    fits = fits and (kind is not list or all(isinstance(one, str) for one in value))
    return "" if fits else f"has a value of {name} that is no {'list of texts' if kind is list else kind.__name__}"


def met(rule: Mapping[str, Any], text: str, language: str) -> bool:
    """Whether an answer's text meets a rule."""
    name, value = next(iter(rule.items()))
    return RULES[name][1](text, value, language)
