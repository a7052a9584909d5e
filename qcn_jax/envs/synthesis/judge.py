"""The quality judge: a model reads a task as whoever solves it cannot, and says what nobody could know.

A model's word alone refuses no task. It must quote the tests, and where it says that the statement contradicts them the
statement too; what it quotes must stand there, and what it says is missing must not stand in the statement.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qcn_jax.chat.asking import Ask, asked_for_json
from qcn_jax.envs import patches
from qcn_jax.envs.tasks.schema import Task

SHOWN = 12_000  # characters of a task's tests and of its fix
LEAST = 3  # characters of a quotation that says anything

_REMINDER = 'That is not the JSON object that was asked for: {"faults": [...]}.'
_SYSTEM = """You judge programming tasks before anybody works on them. You see the statement, which is all that the
solver gets beside the repository, and the hidden tests and the fix, which the solver does not get. Say what the tests
demand that a competent solver cannot know from the statement and the repository: exact messages, names of new
functions, classes or parameters, formats, numbers. Say where statement and tests contradict each other. Details that
any right fix has anyway are no fault.

Answer with one JSON object and nothing else:
{"faults": [{"kind": "missing" or "contradiction", "test": "exact quotation from the tests",
"statement": "exact quotation from the statement, for a contradiction", "why": "one sentence"}]}
With nothing to object to: {"faults": []}"""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What is wrong with a task's statement.

    Attributes:
      faults: those that the texts bear out, in words.
      unfounded: objections whose quotations do not stand there, or whose missing words do.
      judged: whether an answer could be read at all.
    """

    faults: tuple[str, ...] = ()
    unfounded: int = 0
    judged: bool = True


def judge(task: Task, ask: Ask) -> Judgement:
    """Asks a model about one task; an answer that is no JSON is asked for again.

    Raises:
      UserError: the endpoint cannot be used.
    """
    tests = _tests(task)
    shown = f"Statement:\n{task.problem_statement}\n\nTests:\n{tests[:SHOWN]}\n\nFix:\n{task.patch[:SHOWN]}"
    answer = asked_for_json(ask, _SYSTEM, shown, 0, _has_faults, _REMINDER)
    if answer is None:
        return Judgement(judged=False)
    found = [_borne_out(fault, task.problem_statement, tests) for fault in answer["faults"]]
    return Judgement(tuple(words for words in found if words), found.count(""))


def sifted(tasks: Sequence[Task], ask: Ask, log: Callable[[str], None]) -> tuple[list[Task], dict[str, int]]:
    """The tasks that a judge leaves, and counts: judged, refused, unfounded (objections), unreadable (kept, unjudged).
    """
    kept, counts = [], {"judged": 0, "refused": 0, "unfounded": 0, "unreadable": 0}
    for task in tasks:
        found = judge(task, ask)
        counts["judged"] += found.judged
        counts["unreadable"] += not found.judged
        counts["unfounded"] += found.unfounded
        counts["refused"] += bool(found.faults)
        if found.faults:
            log(f"{task.instance_id}: refused by the judge: {found.faults[0]}")
        else:
            kept.append(task)
    return kept, counts


def _tests(task: Task) -> str:
    """What is known of a task's tests: their ids, and the lines that the test patch adds."""
    added = "\n".join(line.rstrip("\n") for file in patches.parse(task.test_patch) for hunk in file.hunks
                      for sign, line in hunk.lines if sign in "+ ")
    return "\n".join([*task.FAIL_TO_PASS, added])


def _has_faults(answer: Mapping[str, Any]) -> bool:
    """Whether an answer is a list of objections."""
    faults = answer.get("faults")
    return isinstance(faults, list) and all(
        isinstance(fault, dict) and all(isinstance(text, str) for text in fault.values()) for fault in faults)


def _borne_out(fault: Mapping[str, str], statement: str, tests: str) -> str:
    """The objection in words where the texts bear it out, else empty."""
    quoted, why = _plain(fault.get("test", "")), " ".join(fault.get("why", "").split())[:200]
    if len(quoted) < LEAST or quoted not in _plain(tests):
        return ""
    if fault.get("kind") == "contradiction":
        said = _plain(fault.get("statement", ""))
        if len(said) < LEAST or said not in _plain(statement):
            return ""
        return f"the statement says {json.dumps(said[:100])}, the tests {json.dumps(quoted[:100])}: {why}"
    if fault.get("kind") != "missing" or quoted in _plain(statement):
        return ""
    return f"the tests want {json.dumps(quoted[:100])}, which nobody says: {why}"


def _plain(text: str) -> str:
    return " ".join(text.split())
