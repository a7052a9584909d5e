"""A small repository for tests of synthesis, written to a folder."""

import pathlib
from collections.abc import Mapping

SOURCE = '''"""Numbers."""


def clamp(value, low, high):
    """Keeps `value` between `low` and `high`."""
    if value < low:
        return low
    if value > high:
        return high
    return value


def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values) if values else None


class Stack:
    def __init__(self, items=()):
        self.items = list(items)

    def push(self, item):
        self.items.append(item)
        return self

    def pop(self, index=-1):
        if not self.items:
            raise IndexError("empty stack")
        return self.items.pop(index)


def countdown(start):
    while start > 0:
        yield start
        start -= 1


def unused(flag=True):
    return not flag
'''

TESTS = '''import random

import pytest

from numbers_pkg.core import Stack, clamp, countdown, mean


@pytest.mark.parametrize("value, expected", [(5, 5), (-1, 0), (11, 10), (0, 0), (10, 10)])
def test_clamp(value, expected):
    assert clamp(value, 0, 10) == expected


def test_mean():
    assert mean([1, 2, 3]) == 2
    assert mean([]) is None


def test_stack():
    items = [1, 2]
    stack = Stack(items).push(3)
    assert stack.pop() == 3 and stack.pop(0) == 1 and items == [1, 2]


def test_empty_stack():
    with pytest.raises(IndexError):
        Stack().pop()


def test_countdown():
    assert list(countdown(3)) == [3, 2, 1]


def test_already_failing():
    assert clamp(1, 2, 3) == 1


@pytest.mark.parametrize("pair", {("a", str), ("b", int), ("c", float)})
def test_wandering_ids(pair):
    assert mean([2]) == 2
'''


def write_files(root: pathlib.Path, files: Mapping[str, str]) -> None:
    """Writes texts by their paths below `root`."""
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def write_repository(folder: pathlib.Path, name: str = "numbers_pkg-1.0") -> pathlib.Path:
    """Writes the repository below `folder` and returns its root."""
    root = folder / name
    write_files(root, {
        "numbers_pkg/__init__.py": "",
        "numbers_pkg/core.py": SOURCE,
        "tests/test_core.py": TESTS,
        "setup.cfg": "[metadata]\nname = numbers_pkg\n",
    })
    return root
