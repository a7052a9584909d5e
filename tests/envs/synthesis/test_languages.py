"""Tests of JavaScript and Go are cut out of their files, and calls are recorded, by what the languages' own tools say."""

import json
import random
import shutil
import subprocess

import pytest

from qcn_jax.envs.synthesis.languages import LANGUAGES, hiding, programs, record
from tests.envs.synthesis import foreign

pytest.importorskip("tree_sitter_language_pack", reason="tree-sitter-language-pack is not installed")
NODE = shutil.which("node")
PATH = "test/core.test.js"
MOCHA = """describe('numbers', function () {
  // of the first
  it('adds', () => { assert.equal(add(1, 2), 3); });

  it("it's odd", async () => {});
});

describe('alone', () => {
  it('stands', () => {});
});
"""
TAPE = """test('one', (t) => {
  t.equal(1, 1);
});
test('two', (t) => {
  t.equal(2, 2);
});
"""


@pytest.mark.parametrize(("language", "files", "tests", "gone", "left"), [
    ("javascript", foreign.JAVASCRIPT, ["clamp > below"], ["'below'"], ["'inside'", "'above'", "test('clamp'", "'mean'"]),
    ("javascript", foreign.JAVASCRIPT, ["clamp > below", "clamp > inside", "clamp > above"], ["clamp'", "subtests"],
     ["test('stack'"]),
    ("javascript", {PATH: MOCHA}, ["numbers adds"], ["'adds'", "of the first"], ["it's odd", "describe('alone'"]),
    ("javascript", {PATH: MOCHA}, [f"{PATH} > alone > stands"], ["alone"], ["'adds'", "it's odd"]),
    ("javascript", {PATH: MOCHA}, ["/testbed/test/core.test.js > numbers > it's odd"], ["it's odd"], ["'adds'"]),
    ("javascript", {PATH: TAPE}, ["two > should be equal"], ["'two'", "2, 2"], ["'one'"]),
    ("javascript", {PATH: TAPE}, ["one > (unnamed assert)", "two > should be equal"], None, []),
    ("javascript", {PATH: TAPE.replace("'two'", "`${2} two`")}, ["2 two > should be equal"], "unknown", []),
    ("go", foreign.GO, ["example.org/numbers::TestClamp", "example.org/numbers::TestClamp/below"], ["TestClamp"],
     ['"fmt"', '"testing"', "func TestSum"]),
    ("go", foreign.GO, ["example.org/numbers::TestSum"], ["TestSum", '"fmt"'], ["TestClamp", '"testing"']),
    ("go", foreign.GO, ["example.org/numbers::TestSum", "example.org/numbers::TestClamp"], None, []),
    ("go", foreign.GO, ["example.org/numbers::TestNone"], "unknown", []),
])  # fmt: skip
def test_cut(language, files, tests, gone, left):
    """Only what shows the defect goes; a file without tests goes whole, and a test that is in no file is said so."""
    made = hiding.without(language, tests, files)
    if gone == "unknown":
        assert made is None
        return
    (path, text), = made.items()
    assert hiding.without(language, tests, files, whole=True) == {path: None}
    if gone is None:
        assert text is None
        return
    assert not any(word in text for word in gone) and all(word in text for word in left)


SOURCE = """'use strict';
function join(first, second = 'x', ...more) {
  if (first === null) throw new TypeError('no first');
  return [first, second, ...more].join(arguments.length > 3 ? '+' : '-');
}
const twice = (value) => value.concat(value);
class Stack {
  constructor() { this.items = [1]; }
  top(at) { return this.items[this.items.length - at]; }
}
module.exports = { join, twice, Stack };
"""


def recorded(tmp_path, monkeypatch, text, function, program):
    """What is recorded of a function while a program runs in Node."""
    if NODE is None:
        pytest.skip("node is not installed")
    monkeypatch.setattr(record, "CALLS", str(tmp_path / "calls"))
    found = LANGUAGES["javascript"].candidates(text, "lib.js", None, None, rng=random.Random(0))
    injection = next(one for one in found if one.qualname == function)
    for path, content in record.recording("javascript", injection, text).items():
        (tmp_path / path).write_text(content)
    done = subprocess.run([NODE, "-e", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert all(map(record.well_formed, calls))
    return done.stdout, calls


def test_calls_are_recorded_and_change_nothing(tmp_path, monkeypatch):
    program = "const { join } = require('./lib.js'); console.log(join('a'), join(1, [2], {a: 3}, `it's`)); try { join(null) } catch (e) " \
              "{ console.log(e.message) }; join(() => 1)"
    said, calls = recorded(tmp_path, monkeypatch, SOURCE, "join", program)
    assert said == "a-x 1+2+[object Object]+it's\nno first\n"
    assert [(call["args"], call["result"], call["raised"]) for call in calls] == [
        ([["first", "'a'"], ["second", "'x'"], ["more", "[]"]], ["'a-x'"], ""),
        ([["first", "1"], ["second", "[2]"], ["more", "[{ a: 3 }, 'it\\'s']"]], ["'1+2+[object Object]+it\\'s'"], ""),
        ([["first", "null"], ["second", "'x'"], ["more", "[]"]], [], "TypeError: no first")]  # a function has no literal


def test_receivers_are_shown(tmp_path, monkeypatch):
    _, calls = recorded(tmp_path, monkeypatch, SOURCE, "Stack.top",
                        "const { Stack } = require('./lib.js'); new Stack().top(1)")
    assert calls[0]["args"] == [["self", "Stack { items: [ 1 ] }"], ["at", "1"]] and calls[0]["result"] == ["1"]


CALL = {"args": [["x", "1"]], "after": [["x", "1"]], "raised": "", "result": ["1"], "values": "[1]"}


@pytest.mark.parametrize("change", [{"args": 3}, {"after": [["y", "1"]]}, {"raised": None}, {"result": "1"}, {"values": [1]},
                                    {"types": "int"}, {"args": [["x"]]}, {"result": [None]}])
def test_calls_of_other_forms_are_none(change):
    """Tests could write where calls are recorded."""
    assert record.well_formed(CALL) and not record.well_formed({**CALL, **change})


@pytest.mark.parametrize(("value", "kind", "text"), [
    (3, "int8", "3"), (200, "int8", None), (-1, "uint", None), (1.5, "float64", "1.5"), ("é\n", "string", '"é\\n"'),
    ([1, 2], "[]int", "[]int{1, 2}"), ({"a": [True]}, "map[string][]bool", 'map[string][]bool{"a": []bool{true}}'),
    (1, "numbers.Kind", None), (True, "int", None)])  # fmt: skip
def test_literals_of_go(value, kind, text):
    assert programs.literal("go", value, kind) == text


def test_unseen_calls():
    """Other arguments than any recorded call's, and none where JSON does not hold them."""
    call = {"args": [["value", "5"], ["low", "0"]], "values": "[5, 0]"}
    made = programs.unseen("javascript", "lib/core.js", "clamp", [call], "seed", foreign.JAVASCRIPT)
    assert len(made) > 3 and "clamp(5, 0)" not in made and all(text.startswith("clamp(") for text in made)
    assert not programs.unseen("javascript", "lib/core.js", "clamp", [{**call, "args": [["value", "NaN"], ["low", "0"]],
                                                                     "values": "[null, 0]"}], "seed", {})
    assert programs.of_calls("go", "core.go", ["numbers.Clamp(1, 2, 3)"], "Clamp", foreign.GO) == [
        'import "example.org/numbers"\nnumbers.Clamp(1, 2, 3)']
    assert not programs.of_calls("go", "core.go", ["numbers.clamp(1, 2, 3)"], "clamp", foreign.GO)
