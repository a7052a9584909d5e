"""Rewritten tests: what is withheld, what is claimed, what of a repository is the suite's."""

import random
import textwrap

import pytest

from qcn_jax.envs.tasks import claims, opinion, permissions, suite, withheld

SOURCE = textwrap.dedent('''
    """Words."""
    from __future__ import annotations
    import unittest
    import pytest
    from pkg import f, g

    @pytest.mark.parametrize("x, wanted", [(1, "eins"), (2, "zwei")])
    def test_table(x, wanted):
        assert f(x) == wanted

    def test_many():
        assert f(5) == [1, {"a": (2.5, None)}] and g() is None, "why"
        assert not f(0)
        assert "part" in g()
        assert f(1) < g()
        if g():
            assert f(2) == 2
        with pytest.raises((ValueError, KeyError), match="no .* here"):
            f(9)
        pytest.raises(TypeError, f, 1, key=2)

    class TestOld(unittest.TestCase):
        def test_equal(self):
            self.assertEqual(f(3), "three", "words")
            self.assertIsNone(g())

    def test_plain():
        assert f(4) == "four"
''')
WANTED = {("test_table",): {"[1-eins]", "[2-zwei]"}, ("test_many",): {""}, ("TestOld", "test_equal"): {""},
          ("test_plain",): {""}}


def rewritten(**options):
    return withheld.rewrite(**{"source": SOURCE, "wanted": WANTED, "plain": {("test_plain",)}, "inside": set(),
                               "rng": random.Random(0), **options})


def test_what_is_expected_is_gone():
    made = rewritten()
    compile(made.text, "test", "exec")
    for word in ("eins", "zwei", "2.5", "three", "ValueError", "no .* here", "test_many", "test_equal", "TypeError", "part"):
        assert word not in made.text, word
    assert "four" in made.text and "test_plain" in made.text and "x, wanted" in made.text
    assert set(made.names.values()) == {("test_table",), ("test_many",), ("TestOld", "test_equal")}
    assert made.brackets == {("test_table",): {"[1-eins]": "[0]", "[2-zwei]": "[1]"}}
    kinds = sorted(claim.kind for claim in made.claims.values())
    assert kinds == ["compare", "compare", "end", "end", "end", "end", "end", "raises", "raises", "truth", *["value"] * 7]
    conditional = [claim for claim in made.claims.values() if not claim.always]
    assert [claim.expected for claim in conditional] == ["2"]
    other = rewritten(rng=random.Random(1))
    assert {c.key for c in made.claims.values()} == {c.key for c in other.claims.values()}
    assert not made.claims.keys() & other.claims.keys() and made.names.keys() != other.names.keys()


@pytest.mark.parametrize("source", ["", "# nothing\n", "\"\"\"Words.\"\"\"\n", "from __future__ import annotations\n",
                                    "'''Words.'''\nfrom __future__ import annotations\nx = 1\n", "b'no words'\n"])
def test_helpers_of_any_form_stay_python(source):
    made = rewritten(source=source, wanted={}, plain=set())
    exec(compile(made.text, "helper", "exec"), space := {})
    assert "PYTEST_DONT_REWRITE" in space["__doc__"] and ("Words." in space["__doc__"]) == ("Words." in source)


def test_claims_inside():
    """A value with comparisons of its own is compared where it is."""
    keys = {claim.key for claim in rewritten().claims.values() if claim.kind == "value" and not isinstance(claim.expected, str)}
    made = rewritten(inside=keys)
    assert "'eins'" in made.text and not made.brackets


@pytest.mark.parametrize("claim, found, verdict", [
    (claims.Claim("1", "value", "[1, 2]", "=="), {"list": [1, 2]}, "holds"),
    (claims.Claim("1", "value", "[1, 2]", "=="), {"tuple": [1, 2]}, "fails"),
    (claims.Claim("1", "value", "{'a': (1.5, b'x')}", "=="), {"dict": [["a", {"tuple": [1.5, {"bytes": "78"}]}]]}, "holds"),
    (claims.Claim("1", "value", "'a'", "in", True), "cat", "holds"),
    (claims.Claim("1", "value", "'a'", "in", True), 7, "fails"),
    (claims.Claim("1", "value", "True", "is"), 1, "fails"),
    (claims.Claim("1", "value", "1", "=="), True, "holds"),
    (claims.Claim("1", "value", "1", "=="), {"opaque": "Any", "as": []}, "opaque"),
    (claims.Claim("1", "value", "1", "=="), {"opaque": "int64", "as": [1, 1.0, "1"]}, "holds"),
    (claims.Claim("1", "value", "1", "=="), {"opaque": "int64", "as": [2, "1"]}, "opaque"),
    (claims.Claim("1", "value", "1", "=="), {"opaque": "Any"}, "fails"),
    (claims.Claim("1", "value", "1", "=="), {"evil": 1}, "fails"),
    (claims.Claim("1", "value", "1", "=="), {}, "fails"),
    (claims.Claim("1", "truth", True), 1, "fails"),
    (claims.Claim("1", "truth", False), False, "holds"),
    (claims.Claim("1", "compare"), [True, True], "fails"),
    (claims.Claim("1", "compare"), [True, False], "holds"),
    (claims.Claim("1", "raises", (("ValueError",), "^no")), [["UnicodeError", "ValueError"], "no text"], "holds"),
    (claims.Claim("1", "raises", (("ValueError",), None)), [[], "None"], "fails"),
    (claims.Claim("1", "raises", (("ValueError",), None)), "ValueError", "fails"),
    (claims.Claim("1", "end"), True, "holds")])
def test_claims_are_judged(claim, found, verdict):
    assert claim.judge(found) == verdict


def test_node_ids():
    assert opinion.split("t/a.py::C::test_x[a::b-1]") == ("t/a.py", ("C", "test_x"), "[a::b-1]")


FILES = {
    "src/pkg/core.py": "from . import other\nimport second\n", "src/pkg/other.py": "", "src/pkg/plugin.py": "",
    "second.py": "", "third.py": "", "src/pkg/data.json": "{}", "src/pkg/golden.json": "{}", "docs/expected.txt": "",
    "tests/conftest.py": "pytest_plugins = ['pkg.plugin', 'tests.extra']\n", "tests/extra.py": "", "helpers/__init__.py": "",
    "tests/test_a.py": "from helpers import same\nfrom .support import x\nfrom pkg import core\n", "tests/support.py": "import third\n"}


def test_the_suite_is_what_is_not_the_package():
    found = suite.find(["src/pkg/core.py"], FILES, ["src/pkg/golden.json"])
    assert found.package == ("second.py", "src/pkg/")
    own = {path for path in FILES if found.holds(path)}
    assert own == {"src/pkg/plugin.py", "src/pkg/golden.json", "third.py", "docs/expected.txt", "helpers/__init__.py",
                   "tests/conftest.py", "tests/extra.py", "tests/test_a.py", "tests/support.py"}
    assert suite.helpers(["tests/test_a.py"], FILES, found) == ["helpers/__init__.py", "tests/support.py", "third.py"]
    assert not permissions.allowed("third.py", FILES, (), found) and permissions.allowed("src/pkg/data.json", FILES, (), found)


def test_words_of_a_trade_are_no_forgery():
    """pytest's own fixes name pytest's modules; in another package the same line is caught."""
    before = {"src/_pytest/runner.py": "from _pytest.reports import X\n", "src/_pytest/main.py": "", "src/other/a.py": ""}
    line = "from _pytest.nodes import Item\n"
    assert permissions.forbidden_lines({"src/_pytest/main.py": line}, before) == ()
    assert permissions.forbidden_lines({"src/other/a.py": line}, before) == ("src/other/a.py: from _pytest.nodes import Item",)
    assert permissions.forbidden_lines({"src/_pytest/main.py": "import os\nos._exit(0)\n"}, before)


@pytest.mark.parametrize("path, text, forged", [
    ("conftest.py", "import pytest\n\n@pytest.fixture\ndef x(): return 1\n", False), ("tests/test_new.py", "def test(): pass\n", False),
    ("conftest.py", "def pytest_runtest_makereport(item, call): pass\n", True), ("setup.cfg", "[tool:pytest]\naddopts = -p evil\n", True),
    ("x.pth", "import os\n", True), ("pytest.py", "", True), ("tox.ini", "[tox]\nenvlist = py\n", False),
    ("pytest.ini", "addopts " * 100_000, False)])
def test_forged_files(path, text, forged):
    assert bool(permissions.forged_files({path: text}, {}, [path])) == forged
