"""Injection: every kind on a small module, minimal and deterministic edits, nothing outside function bodies."""

import argparse
import ast
import configparser
import difflib
import inspect
import json
import pathlib
import random

import pytest

from qcn_jax.envs.synthesis import inject
from qcn_jax.errors import UserError
from tests.envs.synthesis.small import SOURCE

# (kind, a function body before, the defects expected after), written by hand.
CASES = [
    ("add_not", "    if x == 1:  # c\n        return 2\n", ["    if not x == 1:  # c\n        return 2\n"]),
    ("drop_not", "    return not x\n", ["    return x\n"]),
    ("flip_boolean", "    return True\n", ["    return False\n"]),
    ("change_constant", "    return 0\n", ["    return 1\n"]),
    ("swap_and_or", "    return x  and y\n", ["    return x  or y\n"]),
    ("drop_operand", "    return x and y\n", ["    return x\n", "    return y\n"]),
    ("flip_comparison", "    return x<y\n", ["    return x>=y\n"]),
    ("change_boundary", "    return x < y\n", ["    return x <= y\n"]),
    ("flip_membership", "    return x not in y\n", ["    return x in y\n"]),
    ("flip_identity", "    return x is None\n", ["    return x is not None\n"]),
    ("change_arithmetic", "    return x + (y)\n", ["    return x - (y)\n"]),
    ("change_augmented", "    x += y\n    return x\n", ["    x -= y\n    return x\n", "    x = y\n    return x\n"]),
    ("swap_operands", "    return x-y\n", ["    return y-x\n"]),
    ("break_chain", "    return x + y + 1\n", ["    return x + y\n", "    return x + 1\n"]),
    ("swap_ternary", "    return 1 if x else y\n", ["    return y if x else 1\n"]),
    ("slice_off_by_one", "    return x[-1]\n", ["    return x[-2]\n"]),
    ("range_off_by_one", "    return range(x)\n", ["    return range(x + 1)\n", "    return range(x - 1)\n"]),
    ("swap_arguments", "    return min(x,  y)\n", ["    return min(y,  x)\n"]),
    ("drop_argument", "    return max(x, default=y)\n", ["    return max(x)\n"]),
    ("wrong_function", "    return x.lstrip()\n", ["    return x.rstrip()\n", "    return x.strip()\n"]),
    ("alias_mutable", "    y = list(x)\n    return y\n", ["    y = x\n    return y\n"]),
    (
        "swap_branches",
        "    if x:\n        y = 1  # one\n    else:\n        y = 2\n    return y\n",
        ["    if x:\n        y = 2\n    else:\n        y = 1  # one\n    return y\n"],
    ),
    ("drop_guard", "    if x is None:\n        return None\n    return y\n", ["    return y\n"]),
    ("drop_conditional", "    if x:\n        y = 1\n    return y\n", ["    return y\n"]),
    ("drop_loop", "    for i in x:\n        y += i\n    return y\n", ["    return y\n"]),
    ("unwrap", "    try:\n        y = x()\n    except OSError:\n        y = 1\n    return y\n", ["    y = x()\n    return y\n"]),
    ("drop_wrapper", "    with x:\n        y = 1\n    return y\n", ["    return y\n"]),
    ("drop_statement", "    x.append(y)\n    return x\n", ["    return x\n"]),
    ("drop_assignment", "    y = y or []\n    return y\n", ["    return y\n"]),
    ("drop_return", "    return x(y)\n", ["    x(y)\n"]),
    ("shuffle_lines", "    x = y\n    y = 1\n    return x, y\n", ["    y = 1\n    x = y\n    return x, y\n"]),
    ("change_exception", "    raise KeyError(x)\n", ["    raise IndexError(x)\n"]),
    ("break_continue", "    for i in x:\n        break\n", ["    for i in x:\n        continue\n"]),
    ("wrong_variable", "    return [x]\n", ["    return [y]\n"]),
]


def test_every_kind_has_a_case():
    assert {kind for kind, _, _ in CASES} | {"change_default", "mutable_default"} | inject.CLASS_KINDS == set(inject.KINDS)


@pytest.mark.parametrize(("kind", "body", "expected"), CASES, ids=[case[0] for case in CASES])
def test_kind(kind, body, expected):
    """One defect in a function with non-ASCII text around it, at both nesting depths."""
    before = 'ü = "é"\n\n\ndef f(x, y):\n' + body
    found = inject.candidates(before, "pkg/m.py", [kind])
    assert [i.qualname for i in found] == ["f"] * len(found)
    assert found and {i.after_source for i in found} <= {'ü = "é"\n\n\ndef f(x, y):\n' + text for text in expected}
    method = "class C:\n    é = 1\n\n" + "".join("    " + row for row in ("def f(x, y):\n" + body).splitlines(True))
    inner = inject.candidates(method, "pkg/m.py", [kind])
    assert len(inner) == len(found) and inner[0].qualname == "C.f"
    texts = [inspect.cleandoc("\n" + i.function_after) + "\n" for i in inner]
    assert set(texts) <= {"def f(x, y):\n" + text for text in expected}


def test_change_default():
    found = inject.candidates("def f(x=True): return x\n", "m.py", ["change_default"])
    assert [(i.old, i.new in ("False", "None")) for i in found] == [("True", True)]


def test_mutable_default():
    before = "def f(x=None, y=None):\n    if x is None:\n        x = []\n    if y is None:\n        y = 1\n    return x, y\n"
    assert [i.after_source for i in inject.candidates(before, "m.py", ["mutable_default"])] == [
        before.replace("x=None", "x=[]")]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("drop_base", [("C", "(A, B)", "(B)"), ("C", "(A, B)", "(A)"), ("D", "(C)", "")]),
        ("drop_method", [("C.f", "    def f(self):\n        return 1\n", ""), ("C.g", "    def g(self): return 2\n", "")]),
        ("shuffle_methods", [("C.f", "f(self):\n        return 1\n\n    # über\n    def g(self): return 2",
                              "g(self): return 2\n\n    # über\n    def f(self):\n        return 1")]),
    ],
)  # fmt: skip
def test_class_kinds(kind, changes):
    """Bases and methods; not touched where functions of bounded length are asked for."""
    before = ("class C(A, B):\n    'Döc'\n    def f(self):\n        return 1\n\n    # über\n    def g(self): return 2\n\n"
              "    @property\n    def h(self):\n        return 3\n\n\nclass D(C):\n    x = 1\n")  # fmt: skip
    found = inject.candidates(before, "m.py", [kind])
    assert [(i.qualname, i.after_source) for i in found] == [(n, before.replace(a, b, 1)) for n, a, b in changes]
    assert inject.candidates(before, "m.py", [kind], max_function_lines=30) == []


@pytest.mark.parametrize("module", [argparse, configparser, difflib], ids=lambda module: module.__name__)
def test_real_modules(module):
    """On real code every defect parses, stays in its function and outside docstrings, and repeats from its seed."""
    source = inspect.getsource(module)
    tree = ast.parse(source)
    found = inject.candidates(source, "m.py", max_function_lines=25, rng=random.Random(3))
    assert found == inject.candidates(source, "m.py", max_function_lines=25, rng=random.Random(3))
    assert len({i.kind for i in found}) > 20
    places = {(f.qualname, f.start_line, f.end_line) for f in inject.functions(tree)}
    for i in random.Random(1).sample(found, 200):
        assert (i.qualname, i.function_start_line, i.function_end_line) in places
        assert i.function_end_line - i.function_start_line < 25
        assert i.function_start_line <= i.line <= i.function_end_line
        assert i.after_source.count("\n") - source.count("\n") == i.new.count("\n") - i.old.count("\n")
        assert i.function_before in source and i.function_after in i.after_source and i.function_after != i.function_before
    for i in random.Random(0).sample(found, 25):
        after = ast.parse(i.after_source)
        docstrings = [ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        assert docstrings == [ast.get_docstring(n) for n in ast.walk(after) if isinstance(n, ast.FunctionDef | ast.ClassDef)]


# swesmith's kind: ours that do the same (swesmith may also make several such changes at once).
SWESMITH = {
    "func_pm_class_rm_base": ["drop_base"], "func_pm_class_rm_funcs": ["drop_method"],
    "func_pm_class_shuffle_funcs": ["shuffle_methods"], "func_pm_ctrl_invert_if": ["swap_branches"],
    "func_pm_ctrl_shuffle": ["shuffle_lines"], "func_pm_remove_assign": ["drop_assignment"],
    "func_pm_remove_cond": ["drop_guard", "drop_conditional"], "func_pm_remove_loop": ["drop_loop"],
    "func_pm_remove_wrapper": ["drop_wrapper"], "func_pm_op_break_chains": ["break_chain"],
    "func_pm_op_change_const": ["change_constant"], "func_pm_op_change": ["change_arithmetic"],
    "func_pm_op_swap": ["swap_operands"],
}  # fmt: skip


def test_kinds_of_swesmith():
    """What its thirteen modifiers made of small sources (tests/golden/swesmith_kinds.py), ours make too, over seeds."""
    path = pathlib.Path(__file__).parents[2] / "golden" / "swesmith_kinds.json"
    golden = json.loads(path.read_text())
    assert set(golden) == set(SWESMITH)
    for theirs, row in golden.items():
        made = {ast.dump(ast.parse(i.after_source)) for seed in range(8)
                for i in inject.candidates(row["source"], "m.py", SWESMITH[theirs], rng=random.Random(seed))}
        wanted = {ast.dump(ast.parse(text)) for text in row["outputs"] if text.count("def ") or "class" not in text}
        assert wanted and wanted <= made, theirs


def test_nothing_outside_functions():
    source = "X = 1 < 2\n\n\n@deco(True)\ndef f(a: 'list[0]') -> Literal[True]:\n    'not 1'\n    pass\n"
    assert inject.candidates(source, "m.py") == []


@pytest.mark.parametrize("path", ["tests/m.py", "pkg/test_m.py", "pkg/tests/util.py", "conftest.py", "pkg/m_test.py"])
def test_tests_are_never_changed(path):
    assert inject.candidates("def f(x):\n    return not x\n", path) == []
    assert inject.candidates("def f(x):\n    return not x\n", "pkg/contest.py") != []


def test_odd_sources():
    assert inject.candidates("print 'python 2'\n", "m.py") == []
    crlf = "def f(x):\r\n    return not x\r\n"
    assert [i.after_source for i in inject.candidates(crlf, "m.py", ["drop_not"])] == ["def f(x):\r\n    return x\r\n"]
    with pytest.raises(UserError, match="unknown 'nonsense'"):
        inject.candidates("", "m.py", ["nonsense"])


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("text", ["\x0c\n", "# a\u2028b\x85c\x1c\n", "x = '''\x0b\u2029'''\n", "\r\n"])
def test_odd_characters_move_no_defect(mark, text):
    """A byte order mark, form feeds and separators of lines that end none in Python: the same defects, in their places."""
    plain = [(i.kind, i.qualname, i.old, i.new) for i in inject.candidates(SOURCE, "a.py")]
    odd = SOURCE.replace("\n", "\r\n") if text == "\r\n" else text + SOURCE.replace("\n\ndef mean", f"\n{text}\ndef mean")
    found = inject.candidates(mark + odd, "a.py")
    assert [(i.kind, i.qualname) for i in found] == [(kind, name) for kind, name, _, _ in plain]
    for injection in found:
        assert injection.after_source[:injection.start] == (mark + odd)[:injection.start] and injection.before_source == mark + odd
        compile(injection.after_source.encode(), "a.py", "exec")
        assert injection.qualname.split(".")[-1] in injection.function_before
