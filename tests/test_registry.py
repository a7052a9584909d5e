"""Names of a configuration: registered ones and paths, and one line for whatever cannot be found."""

import pytest

from qcn_jax.errors import UserError
from qcn_jax.registry import Registry, is_path

NUMBERS = Registry("number", int, {"four": "tests.test_registry:FOUR", "lost": "tests.test_registry:Holder.none"})
FOUR = 4


class Holder:
    six = 6


def test_a_registered_name_is_short_for_a_path():
    assert NUMBERS.resolve("four") == NUMBERS("tests.test_registry:FOUR") == 4 and list(NUMBERS) == ["four", "lost"]
    assert NUMBERS.resolve("tests.test_registry:Holder.six") == 6


@pytest.mark.parametrize(("name", "message"), [
    ("five", "allowed: four, lost, package.module:OBJECT"),
    ("", "allowed: four, lost, package.module:OBJECT"),
    ("a.b", "allowed: four, lost, package.module:OBJECT"),
    ("no_such_package.module:X", "module no_such_package.module cannot be imported: No module named 'no_such_package'"),
    ("tests.test_registry:FIVE", "module tests.test_registry has no FIVE"),
    ("lost", "module tests.test_registry has no Holder.none"),
    ("tests.test_registry:Holder", "is a type; number needs an int"),
])
def test_what_cannot_be_found_is_one_line(name, message):
    with pytest.raises(UserError) as raised:
        NUMBERS.resolve(name, "--config.x.number")
    assert str(raised.value) == f"--config.x.number: {name!r}; {message}"
    with pytest.raises(UserError) as raised:
        NUMBERS(name)
    assert str(raised.value) == message


def test_a_module_that_fails_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_module_of_a_test.py").write_text("raise RuntimeError('first line\\nsecond line')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="^module broken_module_of_a_test cannot be imported: first line$"):
        NUMBERS("broken_module_of_a_test:X")


def test_any_callable_will_do_where_no_class_is_asked_for():
    assert Registry("function", None, {}).resolve("qcn_jax.registry:is_path") is is_path
    with pytest.raises(UserError, match="is an int; function needs a function"):
        Registry("function", None, {}).resolve("tests.test_registry:FOUR")


@pytest.mark.parametrize("name", ["a:b", "a.b_1:C.d"])
def test_paths(name):
    assert is_path(name) and not any(map(is_path, (name + ":", "." + name, name.replace(":", "/"), "C:/x", "a b:c")))
