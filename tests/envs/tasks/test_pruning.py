"""Tests that are not to run are taken out of files before these are rewritten."""

import ast

import pytest

from qcn_jax.envs.tasks import pruning

SOURCE = '''"""Tests."""
import pytest
from package import add, register


def test_wanted(test_data):
    assert add(1, 2) == 3


@pytest.mark.parametrize("a, b", [(1, 1),
                                  (2, 2)])
def test_other(a, b):
    assert add(a, 0) == b


@pytest.fixture
def test_data():
    return 7


@register
def test_registered():
    pass


def test_called():
    return 5


def helper():
    return test_called()


class TestBase:
    limit = 3

    def test_inherited(self):
        assert add(self.limit, 0) == 3

    async def test_gone(self):
        assert 41 == 42


class TestLeft(TestBase):
    def test_alone(self):
        assert "literal"


LAST = 1
'''


def test_tests_beside_the_wanted_ones_go():
    made = pruning.without_others(SOURCE, {"test_wanted", "test_inherited"})
    names = {node.name for node in ast.walk(ast.parse(made)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert names == {"test_wanted", "test_data", "test_registered", "test_called", "helper", "test_inherited"}
    assert "literal" not in made and "42" not in made and "(2, 2)" not in made


def test_lines_keep_their_numbers():
    before, after = SOURCE.split("\n"), pruning.without_others(SOURCE, {"test_alone"}).split("\n")
    assert len(before) == len(after) and "test_other" not in "\n".join(after)
    assert all(new == old or new.strip() in ("", "pass") for old, new in zip(before, after))


def test_files_with_odd_line_ends_stay_whole():
    source = "def test_a():\n\tpass\n\f\ndef test_b():\n\tpass\n"
    assert pruning.without_others(source, {"test_a"}) == source
    with pytest.raises(SyntaxError):
        pruning.without_others("def test_a(:\n", {"test_a"})
