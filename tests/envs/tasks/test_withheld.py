"""Rewritten tests: what is withheld, what is claimed, what of a repository is the suite's."""

import ast
import random
import textwrap

import pytest

from qcn_jax.envs.sandbox.inside import evidence
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


@pytest.mark.parametrize("used, line, forged", [
    ("import pytest", "from pytest import Config", False),  # pytest-xdist 3.6 over 3.5
    ("import pytest", "name = os.environ['PYTEST_XDIST_WORKER']", False),
    ("import pytest", "from _pytest.terminal import TerminalReporter", False),
    ("frame = sys._getframe(1)", "frame = frame.f_back", False), ("import pytest", "frame = sys._getframe(1)", True),
    ("frame = sys._getframe(1)", "import pytest", True), ("import pytest", "os._exit(0)", True),
    ("import ctypes", "gc.get_objects()", True), ("value = 1", "from pytest import Config", True)])
def test_a_trade_knows_all_its_words(used, line, forged):
    """Real releases of plugins name what earlier ones did not; a package of another trade still may not."""
    before = {"src/pkg/__init__.py": f"{used}\n", "src/pkg/plugin.py": "", "src/other.py": "import pytest\nsys._getframe()\n"}
    assert bool(permissions.forbidden_lines({"src/pkg/plugin.py": f"{line}\n"}, before)) == forged


@pytest.mark.parametrize("path, text, forged", [
    ("conftest.py", "import pytest\n\n@pytest.fixture\ndef x(): return 1\n", False), ("tests/test_new.py", "def test(): pass\n", False),
    ("conftest.py", "def pytest_runtest_makereport(item, call): pass\n", True), ("setup.cfg", "[tool:pytest]\naddopts = -p evil\n", True),
    ("x.pth", "import os\n", True), ("pytest.py", "", True), ("tox.ini", "[tox]\nenvlist = py\n", False),
    ("pytest.ini", "addopts " * 100_000, False)])
def test_forged_files(path, text, forged):
    assert bool(permissions.forged_files({path: text}, {}, [path])) == forged


# --- what the fixed state teaches

TAUGHT = textwrap.dedent('''
    import datetime
    import json
    import unittest
    import pytest
    from pkg import f, g

    ROWS = [(1, "one"), (2, "two")]
    WANTED = {"a": "secret"}
    USED = ["kept"]

    @pytest.fixture
    def known():
        return "from a fixture"

    @pytest.fixture
    def made():
        return f(0)

    def test_loop(tmp_path):
        for given, wanted in ROWS:
            assert f(given) == wanted
        assert f(tmp_path) == tmp_path

    def test_names(known, made):
        local = json.loads("[1]")
        other = g()
        assert f(1) == local
        assert f(2) == WANTED["a"]
        assert f(3) == known
        assert f(4) == made
        assert f(5) == other
        assert f(6) == len(USED), USED
        assert f(8) == datetime.date.today().year
        with pytest.raises(KeyError) as info:
            f(7)
        assert g() == info.value

    @pytest.mark.slow
    @pytest.mark.parametrize("x, wanted", [pytest.param(1, "eins", id="eins"), (2, "zwei")])
    def test_marked(x, wanted):
        assert f(x) == wanted

    class TestNear(unittest.TestCase):
        def test_near(self):
            self.assertAlmostEqual(f(1), 0.25, delta=0.5)
            self.assertCountEqual(f(2), [1, 2])
            self.assertRegex(f(3), "a+")
            self.assertIsInstance(f(4), int)
            assert f(5) == pytest.approx(7.5, abs=1)
''')
PLACES = {("test_loop",): {""}, ("test_names",): {""}, ("test_marked",): {"[eins]", "[2-zwei]"}, ("TestNear", "test_near"): {""}}


def test_the_fixed_state_teaches_what_code_has_no_part_in():
    teaching = rewritten(source=TAUGHT, wanted=PLACES, plain=set())
    taught = {claim.key for claim in teaching.claims.values() if claim.kind == "taught" and not claim.key.endswith("!?")}
    lines = {TAUGHT.split("\n")[int(key.partition(":")[0]) - 1].strip() for key in taught}
    assert lines == {"assert f(given) == wanted", "assert f(1) == local", 'assert f(2) == WANTED["a"]', "assert f(3) == known",
                     "assert f(6) == len(USED), USED"}
    asked = rewritten(source=TAUGHT, wanted=PLACES, plain=set(), known=dict.fromkeys(taught, "x"))
    compile(asked.text, "test", "exec")
    for word in ("secret", "from a fixture", "json.loads", "eins", "zwei", "7.5", "0.25", "a+"):
        assert word not in asked.text, word
    assert "ROWS = [(1, 'one'), (2, 'two')]" in asked.text and "return f(0)" in asked.text and "other = g()" in asked.text
    kinds = [claim for claim in asked.claims.values() if claim.kind == "compare"]
    assert sum(claim.expected is True for claim in kinds) == sum(claim.expected is False for claim in kinds) == 5
    assert {claim.operator for claim in asked.claims.values() if claim.kind == "value"} == {"==", "near", "count", "regex", "approx"}
    assert asked.brackets == {("test_marked",): {"[eins]": "[0]", "[2-zwei]": "[1]"}}


@pytest.mark.parametrize(("claim", "found", "known", "verdict"), [
    (claims.Claim("1", "value", None, "=="), [1], None, "fails"),
    (claims.Claim("1", "value", None, "=="), {"list": [1]}, {"list": [1]}, "holds"),
    (claims.Claim("1", "value", "7", "=="), {"opaque": "x", "as": list(range(100))}, None, "fails"),
    (claims.Claim("1", "value", "'12'", "in", True), "12", 2, "holds"),
    (claims.Claim("1", "value", "'12'", "in", True), " ".join(map(str, range(1000))), 2, "fails"),
    (claims.Claim("1", "value", "((0.3,), {'abs': 0.1})", "approx"), 0.35, None, "holds"),
    (claims.Claim("1", "value", "((0.3,), {'abs': 0.1})", "approx"), 0.45, None, "fails"),
    (claims.Claim("1", "value", "(0.25, 7, None)", "near"), 0.25000001, None, "holds"),
    (claims.Claim("1", "value", "(0.25, 1, None)", "near"), 0.4, None, "fails"),
    (claims.Claim("1", "value", "[2, 1]", "count"), {"tuple": [1.0, 2]}, None, "holds"),
    (claims.Claim("1", "value", "[2, 1]", "count"), {"tuple": [1, 2, 2]}, None, "fails"),
    (claims.Claim("1", "compare", False), [False, False], None, "holds"),
    (claims.Claim("1", "compare", False), [True, False], None, "fails"),
    (claims.Claim("1", "compare", False), [False, True], None, "holds"),  # what a decoy was compared with was the true value
    (claims.Claim("1", "compare", False), [0, False], None, "fails"),
    (claims.Claim("1", "compare", False), [], None, "fails"),
    (claims.Claim("1", "raises", (("ValueError",), None)), [["UnicodeError", "ValueError", "Exception"], "x"], ["ValueError"], "holds"),
    (claims.Claim("1", "raises", (("KeyError",), None)), [["A", "KeyError", "TypeError", "LookupError"], "x"], ["KeyError"], "holds"),
    (claims.Claim("1", "raises", (("KeyError",), None)), [["KeyError", "TypeError", "ValueError"], "x"], ["KeyError"], "fails"),
    (claims.Claim("1", "raises", (("A",), None)), [[*"ABCDEFGH", "Exception"], "x"], ["A", "Exception"], "fails"),
    (claims.Claim("1", "raises", (("A",), "x")), [["A"], "x" * 3000], ["A"], "fails")])
def test_what_the_fixed_state_showed_decides(claim, found, known, verdict):
    assert claim.judge(found, known=known) == verdict


@pytest.mark.parametrize("found", [1, 2.5, True, None, "a", {"bytes": "61"}, {"list": [1, {"list": []}]}, {"dict": [["a", 1]]},
                                   {"tuple": []}, {"opaque": "x", "as": []}, {"set": [1]}])
def test_decoys_differ(found):
    for number in range(20):
        different = claims.differing(found, random.Random(number))
        assert eval(repr(different)) == different
        if "opaque" not in (found if isinstance(found, dict) else ()):
            assert different != claims.plain_value(found)


@pytest.mark.parametrize("found", [[1, 2, 3, -1, -2, 0], [{"tuple": [1]}, {"tuple": [2]}, {"tuple": [3]}],
                                   [None, *range(2, 100)], [{"opaque": "Decimal", "as": [n, float(n), str(n)]} for n in range(99)]])
def test_decoys_differ_from_all_that_stands_in_their_place(found):
    """A helper's assertion compares many values."""
    true = [value for one in found for value in (one["as"] if isinstance(one, dict) and "as" in one else [claims.plain_value(one)])]
    for number in range(200):
        assert claims.decoy(found, random.Random(number)) not in true


@pytest.mark.parametrize("value", [2.0 ** 53, -1e300, float("inf"), complex(1e300, 1), 3, 0.5, True, "", "ab", b"", (), [2.0 ** 60], {},
                                   {"a": 1e20}, {1, 2}, frozenset()])
def test_what_is_compared_besides_differs(value):
    """In floats this large nothing of a small step is left."""
    assert all(evidence.other(value) != value for _ in range(20))


def test_numbers_without_literals():
    found = {"list": [1.5, float("inf"), float("-inf"), float("nan"), "inf"]}
    for number in range(20):
        text = ast.unparse(withheld._literal(claims.differing(found, random.Random(number))))
        assert len(eval(text, {"__builtins__": {}})) == 5


@pytest.mark.parametrize("found, measure", [
    (7, lambda value: value), (-2.5, lambda value: value), ("monkly 4", lambda value: value),
    ({"list": [{"list": [1]}, {"list": []}]}, len), ({"dict": [["a", 1], ["b", 2]]}, len),
    ({"list": [4, 9]}, sum), ({"tuple": ["kl", "mn"]}, lambda value: "".join(value))])
def test_decoys_are_not_known_by_size_or_order(found, measure):
    """Whoever takes the smaller, the shorter or the first in order for the true one is wrong as often as not."""
    true, count = measure(claims.plain_value(found)), 400
    others = [measure(claims.differing(found, random.Random(number))) for number in range(count)]
    smaller, larger = (sum(test) for test in zip(*((other < true, other > true) for other in others)))
    assert smaller + larger == count
    assert abs(smaller - larger) < 2 * 4 * 0.5 * count ** 0.5 * 1.5  # four deviations of a coin, letters being uneven
