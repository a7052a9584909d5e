"""Each checker takes a right answer and rejects planted wrong ones of many kinds, in real sandboxes."""

import json
import shutil

import pytest

from qcn_jax.envs import patches
from qcn_jax.envs.problems import check, make, schema, vote
from qcn_jax.envs.sandbox import Limits
from qcn_jax.envs.tasks.grading import Grader
from qcn_jax.errors import UserError
from tests.sandboxes import make_provider

STDIO = {"id": "double", "kind": "stdio", "prompt": "Print twice the number.", "timeout": 20.0,
         "tests": [{"input": "4\n", "output": "8\n"}, {"input": "-3\n", "output": "-6\n"}]}
LIBRARY = {"id": "order", "kind": "library", "prompt": "order(rows): sorted, by heapq.", "rules": [{"uses": ["heapq"]}],
           "timeout": 20.0, "tests": [{"call": {"function": "order", "args": [[3, 1]]}, "returns": [1, 3]},
                                      {"call": {"function": "order", "args": [[]]}, "returns": []},
                                      {"call": {"function": "order", "args": [[True]]}, "returns": [True]}]}
TABLE = "CREATE TABLE t (a INTEGER);"
SQL = {"id": "rows", "kind": "sql", "prompt": "All a above 1.", "timeout": 20.0, "tests": [
    {"setup": TABLE + "INSERT INTO t VALUES (1), (2), (3);", "rows": [[2], [3]]},
    {"setup": TABLE + "INSERT INTO t VALUES (5), (0);", "rows": [[5]]}, {"setup": TABLE, "rows": []}]}
FILES = {"open/a.txt": "alpha", "shut/key.txt": "{secret}"}
SECURE = {"id": "read", "kind": "secure", "prompt": "read(name) of a file in open, else None.", "timeout": 20.0, "tests": [
    {"call": {"function": "read", "args": ["a.txt"]}, "returns": "alpha", "files": FILES},
    {"call": {"function": "read", "args": ["none"]}, "refuses": True, "files": FILES},
    {"call": {"function": "read", "args": ["../shut/key.txt"]}, "without": ["{secret}"], "files": FILES}]}
TEXT = {"id": "text", "kind": "instructions", "prompt": "Two bullets on caching.", "rules": [
    {"bullets": 2}, {"contains": ["cache"]}, {"avoids": ["very"]}, {"words_at_most": 20}, {"ends_with": "Done."}]}

INSIDE = "import pathlib\ndef read(name):\n    root = pathlib.Path('open').resolve()\n    path = (root / name).resolve()\n    {}\n    return path.read_text() if path.is_file() else None\n"
SAFE = INSIDE.format("if not path.is_relative_to(root): return None")
SLOW = "import time\nwhile True: time.sleep(1)\n"
RIGHT = {"double": "print(2 * int(input()))\n", "order": "import heapq\ndef order(rows):\n    return heapq.nsmallest(len(rows), rows)\n",
         "rows": "SELECT a FROM t WHERE a > 1", "read": SAFE, "text": "- a cache keeps\n- what was made. Done.\n"}
WRONG = [
    (STDIO, "empty", ""), (STDIO, "hard-coded", "print(8)\n"), (STDIO, "exits early", "import sys\nsys.exit(0)\n"),
    (STDIO, "kills its parent", "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nprint(2 * int(input()))\n"),
    (STDIO, "prints everything", "for n in range(-99, 99): print(n)\n"), (STDIO, "fails behind", "print(2 * int(input()))\nraise SystemExit(1)\n"),
    (STDIO, "forges a result", "print('{\"value\": \"8\"}')\n"), (STDIO, "no program", "twice the number\n"),
    (LIBRARY, "empty", ""), (LIBRARY, "hard-coded", "import heapq\ndef order(rows):\n    return [1, 3]\n"),
    (LIBRARY, "exits early", "import heapq, os\nos._exit(0)\n"),
    (LIBRARY, "prints everything", "import heapq\ndef order(rows):\n    print([1, 3], [])\n"),
    (LIBRARY, "writes the result itself", "import heapq, os\nos.write(1, b'{\"value\": [1, 3]}\\n')\ndef order(rows): return 0\n"),
    (LIBRARY, "equal to everything", "import heapq\nclass Any(list):\n    def __eq__(self, other): return True\ndef order(rows): return Any()\n"),
    (LIBRARY, "one for true", "import heapq\ndef order(rows): return sorted(map(int, rows))\n"),
    (LIBRARY, "another library", "def order(rows):\n    return sorted(rows)\n"),
    (SQL, "empty", "\n"), (SQL, "hard-coded", "SELECT 2 UNION SELECT 3"), (SQL, "writes", "DELETE FROM t"),
    (SQL, "returns everything", "SELECT a FROM t"), (SQL, "two statements", "SELECT a FROM t WHERE a > 1; SELECT 1"),
    (SQL, "another column", "SELECT a, a FROM t WHERE a > 1"), (SQL, "twice", "SELECT t.a FROM t, (SELECT 1 UNION SELECT 2) WHERE t.a > 1"),
    (SECURE, "empty", ""), (SECURE, "vulnerable", INSIDE.format("pass")), (SECURE, "refuses everything", "def read(name): return None\n"),
    (SECURE, "hard-coded", "def read(name): return 'alpha'\n"), (SECURE, "exits early", "raise SystemExit\n"),
    (SECURE, "looks for dots alone", INSIDE.format("if name.startswith('./'): return None")),
    (TEXT, "empty", ""), (TEXT, "too long", "- a cache\n- " + "cache " * 30 + "Done."), (TEXT, "three bullets", "- cache\n- cache\n- Done."),
    (TEXT, "without the word", "- caching\n- Done."), (TEXT, "a word to avoid", "- very cache\n- Done."), (TEXT, "no end", "- cache\n- done"),
    (TEXT, "the instructions again", "Two bullets on caching."),
]


@pytest.fixture(name="provider", scope="module")
def _provider(tmp_path_factory):
    with make_provider("local", tmp_path_factory.mktemp("problems"), limits=Limits()) as provider:
        provider.prepare(schema.spec())
        yield provider


def graded(provider, row, answer):
    task = schema.to_task(row)
    return Grader(provider, fail_fast=True).grade(task, patches.make_diff({}, {task.path: answer}))


@pytest.mark.parametrize("row", [STDIO, LIBRARY, SQL, SECURE, TEXT], ids=lambda row: row["kind"])
def test_a_right_answer_is_taken(provider, row):
    verdict = graded(provider, row, RIGHT[row["id"]])
    assert verdict.resolved, verdict


@pytest.mark.parametrize("row, kind, answer", WRONG, ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "")
def test_planted_wrong_answers_are_rejected(provider, row, kind, answer):
    verdict = graded(provider, row, answer)
    assert verdict.outcome in ("unresolved", "empty_patch"), verdict


@pytest.mark.parametrize("row, answer", [
    (STDIO, SLOW), (LIBRARY, "import heapq\n" + SLOW),
    (SQL, "WITH RECURSIVE n(a) AS (SELECT 1 UNION ALL SELECT a + 1 FROM n) SELECT COUNT(*) FROM n"), (SECURE, SLOW)],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "")
def test_what_is_too_slow_is_rejected(provider, row, answer):
    assert graded(provider, row | {"timeout": 0.5}, answer).outcome == "timeout"


def test_go_takes_a_right_answer_and_rejects_planted_wrong_ones(provider):
    if shutil.which("go") is None:
        pytest.skip("no go on this machine")
    program = lambda body: f'package main\nimport ("fmt"; "os"; "time")\nvar _, _ = os.Args, time.Now\nfunc main() {{ {body} }}\n'
    row, read = STDIO | {"language": "go"}, "var n int; fmt.Scan(&n); fmt.Println(2 * n)"
    assert graded(provider, row, program(read)).resolved
    wrong = {"empty": "", "no program": "twice the number\n", "hard-coded": program("fmt.Println(8)"), "exits early": program("os.Exit(0)"),
             "prints everything": program("for n := -99; n < 99; n++ { fmt.Println(n) }"), "fails behind": program(f"{read}; os.Exit(1)")}
    for kind, answer in wrong.items():
        assert graded(provider, row, answer).outcome in ("unresolved", "empty_patch"), kind
    slow = program(f"time.Sleep(time.Hour); {read}")
    assert graded(provider, row | {"timeout": 0.5}, slow).outcome == "timeout"


def test_an_answer_can_change_no_other_file(provider):
    """A patch that brings its own driver is left with its answer."""
    task = schema.to_task(LIBRARY)
    patch = patches.make_diff({}, {task.path: "import heapq\n", "call.py": "print('{\"value\": [1, 3]}')\n"})
    verdict = Grader(provider).grade(task, patch)
    assert verdict.outcome == "unresolved" and list(verdict.dropped) == ["call.py"]


@pytest.mark.parametrize("language", ["python", "javascript", "go"])
def test_problems_that_are_made_are_solved_by_their_references(provider, language):
    """One of each kind, and of Go, whose compilers differ, one of each family at least; `qcn problems` does so with many."""
    program = {"javascript": "node", "go": "go"}.get(language)
    if program and shutil.which(program) is None:
        pytest.skip(f"no {program} on this machine")
    rows = make.problems(6, 7, ("stdio", "library") if language == "javascript" else ("stdio",) if language == "go" else schema.KINDS,
                         (language,))
    for row in {"python": rows[:5], "javascript": rows[:2], "go": rows[::2] + rows[-1:]}[language]:
        task = schema.to_task(json.loads(json.dumps(row)))
        verdict = Grader(provider, fail_fast=True).grade(task, task.patch)
        assert verdict.resolved, (row["id"], verdict)


def test_made_problems_depend_on_seed_and_split_alone():
    assert make.problems(10, 3) == make.problems(20, 3)[:10] != make.problems(10, 4)
    assert not {row["prompt"] for row in make.problems(60, 3)} & {row["prompt"] for row in make.problems(60, 3, split="heldout")
                                                                  if row["kind"] in ("stdio", "sql")}


def test_tests_that_most_solutions_agree_on_are_kept(provider):
    row = {"id": "v", "kind": "stdio", "prompt": "Twice.", "timeout": 20.0, "inputs": [{"input": "3\n"}, {"input": "0\n"}, {"input": "x\n"}],
           "solutions": ["print(int(input()) ** 2)", "print(2 * int(input()))", "print(int(input()) * 2)"]}
    made, dropped = vote.voted(provider, row, 0.5)
    assert made["tests"] == [{"input": "3\n", "output": "6\n"}, {"input": "0\n", "output": "0\n"}] and dropped == 1
    assert made["solution"] == row["solutions"][1] and schema.to_task(made).FAIL_TO_PASS == ("test 0", "test 1")


@pytest.mark.parametrize("change, line", [
    ({"kind": "maths"}, "field kind must be one of stdio"), ({"tests": []}, "field tests is empty"), ({"prompt": ""}, "field prompt must be text"),
    ({"language": "perl"}, "field language must be one of python, javascript, go"), ({"timeout": 0}, "field timeout must be above 0"),
    ({"tests": [{"input": "4"}]}, "tests[0] needs one of output"), ({"tests": [{"output": "4"}]}, "tests[0] needs input"),
    ({"rules": [{"rhymes": 1}]}, "rules[0] must be an object with one of words_at_least"), ({"hints": 1}, "field 'hints' is unknown"),
    ({"rules": [{"bullets": "2"}]}, "rules[0] has a value of bullets that is no int"), ({"solution": 3}, "field solution must be text"),
])
def test_bad_rows_are_named(tmp_path, change, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(STDIO) + "\n" + json.dumps(STDIO | {"id": "b"} | change) + "\n")
    with pytest.raises(UserError) as raised:
        schema.read(path)
    assert str(raised.value).startswith(f"{path}:2: ") and line in str(raised.value)


def test_a_compiler_that_no_machine_has_is_one_line(provider, monkeypatch):
    monkeypatch.setitem(check._NEEDS, "go", "no-such-go")
    with pytest.raises(UserError, match="^problems in go: the sandbox has no no-such-go; install it"):
        graded(provider, STDIO | {"language": "go"}, "package main\n")


def test_a_language_that_is_missing_is_one_line(provider):
    if shutil.which("go") is not None:
        pytest.skip("this machine has go")
    with pytest.raises(UserError, match="^problems in go: the sandbox has no go; install it"):
        graded(provider, STDIO | {"language": "go"}, "package main\n")
    assert not check.same(True, 1) and check.same([1, 2.0000000001], [1.0, 2])
