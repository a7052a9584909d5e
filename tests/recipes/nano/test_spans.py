"""Spans are the smallest unique ones and always reproduce the changed line."""

import io
import pathlib
import shlex
import tokenize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcn_jax.recipes.nano import spans


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("    return x", "    return not x", ("x", "not x")),
        ("if not value:", "if value:", ("if not", "if")),
        ("if not x:", "if x:", ("not x", "x")),
        ("return True", "return False", ("True", "False")),
        ("a = b + 1", "a = b + 2", ("1", "2")),
        ("f(1, 10)", "f(2, 10)", ("1,", "2,")),  # 1 alone occurs twice as text
        ("if i <= n:", "if i < n:", ("<=", "<")),
        ("x = 'a b'", "x = 'a c'", ("b", "c")),
        ("return f'{a}_{exc}'", "return f'{a}_{exc_name}'", ("exc", "exc_name")),
        ("f(x)", "f(xx)", ("x", "xx")),
        ("a.b(c and d)", "a.b(c or d)", ("and", "or")),
        ("return a is b", "return a is not b", ("b", "not b")),
    ],
)
def test_known_spans(before, after, expected):
    assert spans.minimal_edit(before, after) == expected


@pytest.mark.parametrize(("before", "after"), [("x", "x"), ("", "x"), ("x", ""), ("  x", "    x"), ("x\ny", "x\nz")])
def test_no_span(before, after):
    assert spans.minimal_edit(before, after) is None


words = st.sampled_from(["x", "xs", "not", "and", "(", ")", "==", "=", "1", "10", "'a b'", "if", ":", ".", "é", "'"])
lines = st.lists(words, min_size=1, max_size=8).flatmap(
    lambda items: st.lists(st.sampled_from(["", " "]), min_size=len(items), max_size=len(items)).map(
        lambda gaps: "".join(g + w for g, w in zip(gaps, items, strict=True)).strip()
    )
)


@settings(max_examples=400, deadline=None)
@given(lines, lines)
def test_replacing_the_span_gives_the_line(before, after):
    span = spans.minimal_edit(before, after)
    if span is None:
        assert before == after
        return
    old, new = span
    assert old == old.strip() and new == new.strip() and old and new
    assert before.count(old) == 1
    assert before.replace(old, new) == after


def test_tokens_agree_with_pythons_own_on_real_code():
    source = pathlib.Path(shlex.__file__).read_text()
    compared = 0
    for line in source.split("\n"):
        try:
            expected = [
                t.string for t in tokenize.generate_tokens(io.StringIO(line.strip() + "\n").readline)
                if t.type in (tokenize.NAME, tokenize.NUMBER, tokenize.OP)
            ]
        except (tokenize.TokenError, SyntaxError):
            continue
        if any(mark in line for mark in "#'\""):
            continue
        compared += 1
        assert spans._TOKEN.findall(line) == expected, line
    assert compared > 100


def test_dedent_keeps_lines_that_are_indented_less():
    lines = ["    def f():", "        return '''", "x'''", ""]
    assert spans.dedent(lines) == ["def f():", "    return '''", "x'''", ""]
