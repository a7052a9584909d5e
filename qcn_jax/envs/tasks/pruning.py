"""Test files without the tests that are not to run, so that rewriting, compiling and collecting them costs little.

What is left has the line numbers that it had. A test stays where its name is used in what stays, where a decorator
may do more than mark it, and where it may be one that a class inherits.
"""

import ast
import dataclasses
import functools
from collections.abc import Collection

from qcn_jax.envs import python_source

# Whose decorators mark or wrap a test and leave nothing elsewhere.
_MARKS = frozenset({
    "pytest", "mark", "parametrize", "unittest", "skip", "skipIf", "skipUnless", "expectedFailure", "mock", "patch",
    "hypothesis", "given", "settings", "example", "staticmethod", "classmethod"})


@dataclasses.dataclass(frozen=True)
class _Test:
    """A function that can be taken out: its lines from `first` to `last`, its column, and the names in it."""

    name: str
    first: int
    last: int
    column: int
    used: frozenset[str]


def without_others(source: str, wanted: Collection[str]) -> str:
    """A test file without test functions whose names are not `wanted`; `pass` stands in the place of each.

    Raises:
      SyntaxError: the file cannot be read.
    """
    tests, used = _tests(source)
    kept, waiting = set(), [test for test in tests if test.name not in wanted]
    front = set(used).union(*(test.used for test in tests if test.name in wanted))
    while front - kept:
        kept |= front
        front = set().union(*(test.used for test in waiting if test.name in kept))
    lines = source.split("\n")
    for test in waiting:
        if test.name not in kept:
            lines[test.first - 1:test.last] = [" " * test.column + "pass", *[""] * (test.last - test.first)]
    return "\n".join(lines)


@functools.lru_cache(maxsize=256)
def _tests(source: str) -> tuple[tuple[_Test, ...], frozenset[str]]:
    """The test functions of a file that may be taken out, and the names that all the rest uses."""
    tree, found = python_source.parse(source), []
    if "\f" in source or "\r" in source or "\t" in source:  # lines and columns are then not what they seem
        return (), frozenset()

    def look(body: list[ast.stmt]) -> None:
        for node in list(body):
            if isinstance(node, ast.ClassDef):
                look(node.body)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test") and all(
                    _root(mark) in _MARKS and "fixture" not in ast.unparse(mark) for mark in node.decorator_list):
                first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
                found.append(_Test(node.name, first, node.end_lineno or first, node.col_offset, _names(node)))
                body.remove(node)

    look(tree.body)
    return tuple(found), _names(tree)


def _root(mark: ast.expr) -> str:
    """The first name of a decorator: `pytest` of pytest.mark.skipif(...)."""
    while isinstance(mark, ast.Call | ast.Attribute):
        mark = mark.func if isinstance(mark, ast.Call) else mark.value
    return getattr(mark, "id", "")


def _names(tree: ast.AST) -> frozenset[str]:
    """Names, attributes, parameters and texts in a tree: whatever a function may be asked for by."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return frozenset(found)
