"""How good tasks are: difficulty and ambiguity as scores, near duplicates, flakiness test by test.

The scores are heuristics over what is known of a task, meant for sorting and filtering; they are no solve rates.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from qcn_jax.envs import patches
from qcn_jax.envs.sandbox.base import PASSING, Provider, sandbox
from qcn_jax.envs.tasks import grading, hidden
from qcn_jax.envs.tasks.schema import Task

AMBIGUOUS = 0.35  # ambiguity from which a task is refused: tests want names that nobody says, or values are cut away
NEAR = 0.9  # similarity from which two changes of one file count as the same task
_MESSAGE = re.compile(r"""(["'])((?:(?!\1)[^\\\n]){8,})\1""")
_TOKEN = re.compile(r"\w+|[^\w\s]")
_DEFINED = re.compile(r"^\s*(?:def|class|func|function)\s+(\w+)|^\s*(?:const|let|var)\s+(\w+)\s*=", re.M)


def scored(task: Task, callers: int = 0, suite: int = 0, function: str = "") -> Task:
    """The task with its scores; `callers` of `suite` tests run the changed `function` (0, "": not known)."""
    return dataclasses.replace(task, difficulty=difficulty(task, callers, suite), ambiguity=ambiguity(task),
                               localisation=localisation(task, function))


def localisation(task: Task, function: str = "") -> float:
    """How much of the fix's place the statement gives away: 0 (nothing) to 1 (the file by its path, and the function).

    The file's path counts 0.4 and its module's name 0.2; the changed function's name counts 0.6, that of its class 0.3.
    """
    text = task.problem_statement
    place = max((0.4 if path in text else 0.2 if _says(text, path.rpartition("/")[2].rpartition(".")[0]) else 0.0
                 for path in patches.touched(task.patch)), default=0.0)
    names = [name.strip().split(".") for name in function.split(",") if name.strip()]
    named = max((0.6 if _says(text, parts[-1]) else 0.3 if len(parts) > 1 and _says(text, parts[-2]) else 0.0
                 for parts in names), default=0.0)
    return round(place + named, 3)


def _says(text: str, word: str) -> bool:
    return bool(word) and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def summary(tasks: Sequence[Task]) -> dict[str, Any]:
    """What tasks give away and test, JSON-ready: localisation by quarter, tests hidden, PASS_TO_PASS."""
    quarters = collections.Counter(min(int(task.localisation * 4), 3) for task in tasks)
    counts = sorted(len(task.PASS_TO_PASS) for task in tasks)
    return {
        "localisation": {f"{quarter / 4} to {(quarter + 1) / 4}": quarters[quarter] for quarter in range(4)},
        "mean_localisation": round(sum(task.localisation for task in tasks) / len(tasks), 3) if tasks else 0.0,
        "tests_hidden": sum(hidden.takes_out(task) for task in tasks),
        "without_pass_to_pass": sum(not count for count in counts),
        "median_pass_to_pass": counts[len(counts) // 2] if counts else 0,
    }


def difficulty(task: Task, callers: int = 0, suite: int = 0) -> float:
    """0 (trivial) to 1: size and spread of the fix, how few tests show the defect, distance from symptom to cause."""
    changed = [line for _, line in _changed(task.patch)]
    hunks = sum(len(file.hunks) for file in patches.parse(task.patch))
    size = min(1.0, math.log2(1 + len(changed)) / 6)  # full from 63 lines on
    spread = min(1.0, (hunks - 1) / 3)
    total = len(task.FAIL_TO_PASS) + len(task.PASS_TO_PASS)
    rarity = 1 - len(task.FAIL_TO_PASS) / total if total else 0.0
    if callers and suite:
        rarity *= 1 - callers / suite
    distance = 0.0 if task.path in patches.touched(task.patch) else 1.0
    return round(0.4 * size + 0.25 * spread + 0.2 * rarity + 0.15 * distance, 3)


def ambiguity(task: Task) -> float:
    """0 (everything that the tests want is said) to 1."""
    text = task.problem_statement
    score = 0.3 if text.count("...") >= 2 else 0.15 if "..." in text else 0.0  # values that were cut
    place = task.function.split(".")[-1]
    if place and place not in text:
        score += 0.2
    wanted = _added_names(task.patch) & set(_TOKEN.findall(task.test_patch))
    wanted |= _added_parameters(task.patch) & set(re.findall(r"[(,]\s*(\w+)=(?!=)", task.test_patch))
    missing = [name for name in wanted if not re.search(rf"\b{re.escape(name)}\b", text)]
    if missing or _unsaid_messages(task):
        score += 0.35  # tests use names or whole messages that only the fix brings, and nobody says so
    return round(min(score + (0.2 if len(text) < 40 else 0.0), 1.0), 3)


def _added_names(patch: str) -> set[str]:
    added = "".join(line for sign, line in _changed(patch) if sign == "+")
    removed = "".join(line for sign, line in _changed(patch) if sign == "-")
    return {a or b for a, b in _DEFINED.findall(added)} - {a or b for a, b in _DEFINED.findall(removed)}


def _added_parameters(patch: str) -> set[str]:
    """Names of parameters in added lines that begin a function, and in no removed one."""
    def named(wanted: str) -> set[str]:
        heads = (line for sign, line in _changed(patch) if sign == wanted and line.lstrip().startswith("def "))
        return {name for head in heads for name in re.findall(r"[(,]\s*\*{0,2}(\w+)", head)}

    return named("+") - named("-")


def _unsaid_messages(task: Task) -> set[str]:
    """Texts of several words that the tests quote, that the fix brings, and that the statement does not say."""
    lines = _changed(task.patch)
    brought = {text for sign, line in lines if sign == "+" for text in _texts(line)}
    brought -= {text for sign, line in lines if sign == "-" for text in _texts(line)}
    quoted = {text for line in task.test_patch.splitlines() if line.startswith("+") for text in _texts(line)}
    said = " ".join(task.problem_statement.split())
    return {text for text in quoted if any(text in message for message in brought) and text not in said}


def _texts(line: str) -> list[str]:
    return [text for _, text in _MESSAGE.findall(line) if " " in text.strip()]


def _changed(patch: str) -> list[tuple[str, str]]:
    """(sign, line) of all added and removed lines."""
    return [(sign, line) for file in patches.parse(patch) for hunk in file.hunks
            for sign, line in hunk.lines if sign in "+-"]


def shingles(task: Task) -> frozenset[tuple[str, ...]]:
    """Runs of three tokens of the added and removed lines, signs included."""
    found: set[tuple[str, ...]] = set()
    for sign, line in _changed(task.patch):
        tokens = [sign, *_TOKEN.findall(line), "$"]
        found.update(tuple(tokens[at:at + 3]) for at in range(max(len(tokens) - 2, 1)))
    return frozenset(found)


class Sieve:
    """Refuses tasks that nobody can solve by what they say, and those that repeat an earlier one.

    Args:
      near: similarity of two changes of the same files from which the later one is refused; above 1 none is.
    """

    def __init__(self, near: float = NEAR):
        self._near = near
        self._buckets: dict[tuple, list[tuple[str, frozenset]]] = collections.defaultdict(list)

    def refuses(self, task: Task) -> str:
        """Why a task is refused: ambiguous or near_duplicate; "" where it is not."""
        return "ambiguous" if task.ambiguity >= AMBIGUOUS else "near_duplicate" if self.repeats(task) else ""

    def repeats(self, task: Task) -> str:
        """The id of the earlier task that this one repeats, or ""; what repeats none is remembered."""
        bucket, own = self._buckets[task.repo, *patches.touched(task.patch)], shingles(task)
        for name, other in bucket:
            union = len(own | other)
            if union and len(own & other) / union >= self._near:
                return name
        bucket.append((task.instance_id, own))
        return ""


def sifted(tasks: Iterable[Task], near: float = NEAR) -> tuple[list[Task], dict[str, int]]:
    """The tasks that a Sieve lets pass, and how many it refused for which reason."""
    sieve, kept = Sieve(near), []
    refused: collections.Counter[str] = collections.Counter()
    for task in tasks:
        reason = sieve.refuses(task)
        refused[reason] += bool(reason)
        if not reason:
            kept.append(task)
    return kept, {reason: count for reason, count in refused.items() if count}


def flaky_tests(provider: Provider, task: Task, runs: int) -> dict[str, str]:
    """Tests of a task that do not give the same outcome in `runs` runs: {test: "3 of 5 with the defect"}.

    Every run has a fresh sandbox; half of what is looked at is the defective state, half the fixed one.

    Raises:
      SandboxError: the back end failed.
    """
    tests = [*task.FAIL_TO_PASS, *task.PASS_TO_PASS]
    pristine = provider.files(task.repo)
    start = grading.tested_changes(task, pristine)
    fixed = start | patches.apply_changes(grading.Layered(pristine, start), task.patch)
    found: dict[str, str] = {}
    for state, overlay in (("with the defect", start), ("fixed", fixed)):
        passed: collections.Counter[str] = collections.Counter()
        for _ in range(runs):
            with sandbox(provider, task.repo, overlay, role="grading") as place:
                outcomes = place.run_tests(tests, timeout=task.timeout).outcomes
            passed.update(name for name in tests if outcomes.get(name) in PASSING)
        for name in tests:
            if 0 < passed[name] < runs:
                found.setdefault(name, f"{passed[name]} of {runs} pass {state}")
    return found
