"""Functions of Python text, found and parsed safely from many threads."""

import ast
import functools
import threading
from collections.abc import Sequence

from qcn_jax import syntax

_LOOKING = threading.Lock()
MOST = 100  # occurrences that are told apart


def parses(lines: Sequence[str]) -> bool:
    """Whether `lines` are Python."""
    try:
        syntax.parse("\n".join(lines))
    except (SyntaxError, ValueError):
        return False
    return True


def occurrences(line: str, old: str) -> int:
    """How often `old` occurs in `line`, overlapping ones included, counted up to MOST; an empty `old` never occurs."""
    count, at = 0, line.find(old) if old else -1
    while at >= 0 and count < MOST:
        count, at = count + 1, line.find(old, at + 1)
    return count


def function_spans(source: str) -> tuple[tuple[str, int, int], ...]:
    """All functions and classes of `source` as (qualified name, first line, last line), 1-based.

    The first line is that of `def` or `class`, below decorators, as everywhere here: defects and mid-training
    documents count lines from it. Names nest with dots (`Class.method`, `outer.inner`); the order is that of the text;
    a source that does not parse has none.
    """
    with _LOOKING:  # looked up under the lock: samples of one prompt ask for the same module at the same time
        return _function_spans(source)


@functools.lru_cache(maxsize=256)  # a parsed module costs 10 ms and more
def _function_spans(source: str) -> tuple[tuple[str, int, int], ...]:
    try:
        tree = syntax.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ()
    found: list[tuple[str, int, int]] = []

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}.{child.name}" if prefix else child.name
                found.append((name, child.lineno, child.end_lineno or child.lineno))
            if not isinstance(child, ast.expr):
                walk(child, name)

    walk(tree, "")
    return tuple(sorted(found, key=lambda item: (item[1], -item[2])))

