"""Injection in JavaScript and Go: the kinds, minimal edits, nothing in tests."""

import random

import pytest

pytest.importorskip("tree_sitter_language_pack", reason="tree-sitter-language-pack is not installed")

from qcn_jax.envs.synthesis.inject import treesitter  # noqa: E402
from qcn_jax.errors import UserError  # noqa: E402
from tests.envs.synthesis import foreign  # noqa: E402

CASES = [
    ("flip_comparison", "if (a === b) { f(); }", "if (a !== b) { f(); }"),
    ("change_boundary", "return a < b;", "return a <= b;"),
    ("swap_and_or", "return a && b;", "return a || b;"),
    ("drop_not", "return !a;", "return a;"),
    ("add_not", "if (a) { f(); }", "if (!(a)) { f(); }"),
    ("flip_boolean", "return true;", "return false;"),
    ("change_arithmetic", "return a - b;", "return a + b;"),
    ("change_augmented", "a += b;", "a -= b;"),
    ("swap_operands", "return a / b;", "return b / a;"),
    ("swap_ternary", "return a ? b : 1;", "return a ? 1 : b;"),
    ("swap_arguments", "f(a,  b);", "f(b,  a);"),
    ("wrong_function", "a.push(b);", "a.unshift(b);"),
    ("break_continue", "for (const x of a) { break; }", "for (const x of a) { continue; }"),
    ("wrong_variable", "f(a);", "f(b);"),
]


@pytest.mark.parametrize(("kind", "body", "expected"), CASES, ids=[case[0] for case in CASES])
def test_javascript_kind(kind, body, expected):
    before, after = (f"// é\nfunction g(a, b) {{\n  {text}\n}}\n" for text in (body, expected))
    assert [i.after_source for i in treesitter.candidates(before, "lib/m.js", [kind])] == [after]


@pytest.mark.parametrize(
    ("kind", "removed"),
    [("drop_guard", "\tif value < low {\n\t\treturn low\n\t}\n"), ("drop_loop", "\tfor _, value := range values {\n"
      "\t\ttotal += value\n\t}\n"), ("drop_statement", "\t\ttotal += value\n")],
)  # fmt: skip
def test_go_deletions(kind, removed):
    source = foreign.GO["core.go"]
    found = [i.after_source for i in treesitter.candidates(source, "core.go", [kind])]
    assert source.replace(removed, "") in found


@pytest.mark.parametrize(("path", "source"), [("core.go", foreign.GO["core.go"]),
                                              ("lib/core.js", foreign.JAVASCRIPT["lib/core.js"])])  # fmt: skip
def test_whole_files(path, source):
    """Repeats from the seed, stays in its function, still parses."""
    found = treesitter.candidates(source, path, rng=random.Random(3))
    assert found == treesitter.candidates(source, path, rng=random.Random(3)) and len({i.kind for i in found}) >= 8
    names = {"Clamp", "Sum", "Unused", "clamp", "Stack.push", "Stack.constructor", "mean", "unused"}
    for injection in found:
        assert injection.qualname in names and injection.after_source != source
        assert injection.function_start_line <= injection.line <= injection.function_end_line
        assert not treesitter.parser(treesitter.GRAMMARS["." + path.rpartition(".")[2]].name).parse(
            injection.after_source.encode()).root_node.has_error  # fmt: skip


@pytest.mark.parametrize("path", ["core_test.go", "test/m.js", "lib/m.test.js", "src/__tests__/m.js", "m.spec.mjs"])
def test_tests_are_never_changed(path):
    source = foreign.GO["core.go"] if path.endswith(".go") else foreign.JAVASCRIPT["lib/core.js"]
    assert treesitter.candidates(source, path) == []


def test_refusals():
    assert treesitter.candidates("function (", "m.js") == []
    with pytest.raises(UserError, match="unknown 'nonsense'"):
        treesitter.candidates("", "m.js", ["nonsense"])
    with pytest.raises(UserError, match="no language known"):
        treesitter.candidates("", "m.rb")
