"""The judge of statements: what tests want and nobody says is refused, what a model only claims is not."""

import dataclasses
import json

import pytest

from qcn_jax.chat.endpoint import Endpoint
from qcn_jax.cli import main as cli
from qcn_jax.envs import patches
from qcn_jax.envs.synthesis import judge, quality
from qcn_jax.envs.tasks.schema import Task, write_tasks
from tests.agents import playing
from tests.envs.synthesis.answering import serve
from tests.pipeline import chain

PATH, FILE = "calc/core.py", "tests/test_core.py"
BEFORE = "def clamp(value, low, high):\n    return max(low, min(value, high))\n"
# What the fix becomes, what the tests say of it, an ambiguous statement, the tests' words that nobody could know, a clear
# statement of the same.
CASES = [
    ("def clamp(value, low, high):\n    if low > high:\n        raise ValueError('low exceeds high by far')\n    return 1\n",
     "with pytest.raises(ValueError, match='low exceeds high'): clamp(1, 3, 2)", "clamp(1, 3, 2) gives 2, though the bounds "
     "are the wrong way round.", "low exceeds high", " It should raise a ValueError that says low exceeds high."),
    (BEFORE + "\n\ndef clamp_all(values):\n    return [clamp(v, 0, 1) for v in values]\n", "assert clamp_all([2]) == [1]",
     "There should be a way to clamp several values of a list at once to the unit range.", "clamp_all",
     " `clamp_all(values)` should do it."),
    ("def clamp(value, low, high, strict=False):\n    return low\n", "assert clamp(5, 1, 2, strict=True) == 1",
     "It should be possible to have clamp complain instead of guessing.", "strict=True", " With strict=True, that is."),
    ("class RangeError(ValueError):\n    pass\n" + BEFORE, "with pytest.raises(RangeError): clamp(1, 3, 2)",
     "clamp(1, 3, 2) should fail with an error of its own kind.", "RangeError", " The kind is RangeError, a ValueError."),
    ("def clamp(value, low, high):\n    return round(max(low, min(value, high)), 3)\n", "assert clamp(0.12345, 0, 1) == 0.123",
     "Results of clamp have too many digits behind the point; please give fewer of them.", "0.123",
     " clamp(0.12345, 0, 1) should be 0.123."),
    ("def clamp(value, low, high):\n    return str(max(low, min(value, high)))\n", "assert clamp(5, 1, 2) == '2'",
     "What clamp gives back cannot be written into a report as it is, which is a nuisance.", "== '2'",
     " It should be a text: clamp(5, 1, 2) == '2'."),
    ("def clamp(value, low, high):\n    return None if value is None else 1\n", "assert clamp(None, 1, 2) is None",
     "clamp fails for missing values. It should do something sensible with those instead.", "is None",
     " It should hand them on: clamp(None, 1, 2) is None."),
    ("def clamp(value, low, high):\n    print('clamped value')\n    return 1\n", "assert capsys.readouterr().out == 'clamped value\\n'",
     "clamp(5, 1, 2) should tell people that it changed the value, so that they are not surprised.", "clamped value",
     " It should print clamped value."),
    ("LIMIT = 64\n" + BEFORE, "assert core.LIMIT == 64", "There should be a largest value that nobody exceeds in the module.",
     "LIMIT == 64", " That is, LIMIT == 64 in calc/core.py."),
    ("def clamp(value, low, high):\n    return 7\n", "assert clamp(9, 1, 8) == 7", "clamp(9, 1, 8) gives 8, but it should give 6.",
     "clamp(9, 1, 8) == 7", None),
]


def task(number: int, clear: bool) -> Task:
    after, test, statement, _, said = CASES[number]
    if clear:
        statement = statement + said if said else statement.replace("give 6", "give 7, clamp(9, 1, 8) == 7")
    return Task(f"t{number}", "r==1", "", patches.make_diff({PATH: BEFORE}, {PATH: after}),
                patches.make_diff({}, {FILE: f"def test_it():\n    {test}\n"}), statement, (f"{FILE}::test_it",), (), path=PATH)


def objection(number: int) -> dict:
    kind = {"kind": "missing"} if CASES[number][4] else {"kind": "contradiction", "statement": "it should give 6"}
    return {**kind, "test": CASES[number][3], "why": "nobody can know"}


def answering(messages) -> str:
    """A judge that objects to every task: by what is true of it in its ambiguous form, and by things that it made up."""
    said = messages[1]["content"]
    number = next(n for n, case in enumerate(CASES) if case[2][:30] in said)
    inventions = [{"kind": "missing", "test": "assert frobnicate()", "why": "made up"}, {"kind": "other", "test": "def test_it"},
                  {"kind": "contradiction", "statement": "never said", "test": "def test_it()", "why": "made up"}, {}]
    if len(messages) == 2 and number % 2:
        return "I would rather talk about it."
    return f"```json\n{json.dumps({'faults': [objection(number), *inventions]})}\n```"


def test_ambiguous_statements_are_refused_and_inventions_are_not_believed():
    with serve(answering) as (url, bodies):
        model = Endpoint(url, "m")
        lines = []
        kept, counts = judge.sifted([task(n, clear=False) for n in range(10)], model.ask, lines.append)
        assert not kept and len(lines) == 10 and (counts["judged"], counts["refused"]) == (10, 10), counts
        assert len(bodies) == 15 and '"low exceeds high"' in lines[0] and "the statement says" in lines[9]
        kept, counts = judge.sifted([task(n, clear=True) for n in range(10)], model.ask, lines.append)
        assert len(kept) == 10 and (counts["refused"], counts["unfounded"]) == (0, 50), lines[10:]


@pytest.mark.parametrize("answer", ["", "{", '{"faults": 5}', '{"faults": [1]}', "[]", '{"faults": [{"kind": []}]}'])
def test_an_answer_that_cannot_be_read_refuses_nothing(answer):
    asked = []
    found = judge.judge(task(0, clear=False), lambda messages, seed: asked.append(len(messages)) or answer)
    assert found == judge.Judgement(judged=False) and asked == [2, 4, 4]


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_rules_alone_know_names_and_messages_that_nobody_says(number):
    assert quality.ambiguity(task(number, clear=False)) >= quality.AMBIGUOUS > quality.ambiguity(task(number, clear=True))


def test_verify_names_what_the_judge_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tmp_path.chmod(0o755)
    chain.write(tmp_path)
    tasks = [playing.words("count"), dataclasses.replace(playing.words("short"), problem_statement="Something is odd.")]
    write_tasks(tmp_path / "tasks.jsonl", tasks)
    odd = {"faults": [{"kind": "missing", "test": "test_short", "why": "which texts are too long"}]}
    with serve(lambda messages: json.dumps(odd if "odd" in messages[1]["content"] else {"faults": []})) as (url, _):
        command = ["verify", f"--tasks={tmp_path}/tasks.jsonl", f"--repo={tmp_path}/words-1.0", "--sandbox=local",
                   "--isolation=shared", "--workers=1", f"--endpoint={url}"]
        assert cli.main(command) == 1 and "--model" in capsys.readouterr().err
        assert cli.main([*command, "--model=m"]) == 1
    printed = capsys.readouterr().out
    assert "short: the tests want \"test_short\", which nobody says: which texts are too long" in printed
    assert "1 of 2 tasks are valid" in printed and "count:" not in printed
