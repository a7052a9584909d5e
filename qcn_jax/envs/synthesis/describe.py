"""What a task's statement tells: one wording for each `--statement`, and what makes a statement useless."""

import dataclasses
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qcn_jax.chat import endpoint
from qcn_jax.envs.sandbox.base import Sandbox
from qcn_jax.envs.synthesis import issue as issues
from qcn_jax.envs.synthesis import statement
from qcn_jax.envs.synthesis.statement import Observation

WORDINGS = ("issue", "observed", "endpoint")
TIMEOUT = 10.0  # seconds for the programs of an issue
# What nobody can read, or what holds in one process alone.
UNREADABLE = {
    "address": re.compile(r"\b0x[0-9a-f]{7,}\b|\b0x(?![0-9A-Za-z])"),
    "bare representation": re.compile(
        r"<(?:[\w.]+ object\b|[^<>]* at 0x|(?:function|built-in|module|generator|class) )"),
    "digits left out": re.compile(r"\d#|#\d|\.#"),
    "clock": re.compile(r"(?<![\d.])1[6-9]\d{8}(?:\.\d+)?(?![\d.])"),
    "length": re.compile(rf"(?s).{{{statement.LONGEST + 1},}}"),
}


class NotTold(Exception):
    """No statement can be made; the text is the outcome."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a candidate: runs of every defect (of one test each) in both states, and failing tests.

    `fixed_files` are the changed files without the defect, `seed` draws words, `characters` bound the statement. With
    `tests_may_tell` what tests say may stand for a call, and with `only`, (path, function), other calls are not told.
    """

    buggy: Sequence[Mapping[str, Any]]
    fixed: Sequence[Mapping[str, Any]]
    failing: Sequence[str]
    fixed_files: Mapping[str, str]
    seed: str
    characters: int
    tests_may_tell: bool = False
    only: tuple[str, str] | None = None

    def differing(self, number: int) -> list[Observation]:
        """Calls of one defect's runs that ended otherwise than they should, and may be told."""
        found = statement.differing(self.buggy[number]["calls"], self.fixed[number]["calls"])
        return [one for one in found if self.only in (None, (one.path, one.function))]


@dataclasses.dataclass(frozen=True)
class Description:
    """A statement, and the first call that it tells of."""

    text: str
    observation: Observation | None = None


Wording = Callable[[Facts, Sandbox], Description]


def unreadable(text: str) -> str:
    """Which of UNREADABLE a statement is; "" for none."""
    return next((name for name, pattern in UNREADABLE.items() if pattern.search(text)), "")


def described(facts: Facts, wording: Wording, sandbox: Sandbox, gold: str,
              words: endpoint.Endpoint | None = None) -> Description:
    """The statement in one of the wordings, or in a model's words of it.

    Raises:
      NotTold: unobserved, statement_tells_fix or unreadable.
    """
    found = wording(facts, sandbox)
    if statement.contains_fix(found.text, gold):  # the tests' own words may quote the line
        quiet = dataclasses.replace(facts, buggy=[{**run, "messages": {}} for run in facts.buggy])
        found = wording(quiet, sandbox)
    if statement.contains_fix(found.text, gold):
        raise NotTold("statement_tells_fix")
    if words:
        function = found.observation.function if found.observation else ""
        found = dataclasses.replace(found, text=statement.worded(found.text, function, gold, words))
    if unreadable(found.text):
        raise NotTold("unreadable")
    return found


def observed(facts: Facts, sandbox: Sandbox) -> Description:
    """The innermost call that misbehaved, in one line, and failing tests."""
    del sandbox
    observations: list[Observation] = []
    texts = []
    limit = facts.characters // len(facts.buggy)
    for number, run in enumerate(facts.buggy):
        observation = next(iter(facts.differing(number)), None)
        told = observation is not None and observation not in observations
        if not told and not facts.tests_may_tell:
            raise NotTold("unobserved")
        named = (facts.failing if len(facts.buggy) == 1
                 else [name for name in run["outcomes"] if name in set(facts.failing)])
        ordered = [run["test"], *(name for name in named if name != run["test"])]
        message = run["messages"].get(run["test"], "")
        if observation is not None and told:
            observations.append(observation)
            texts.append(statement.write(observation, ordered, message, limit))
        else:
            texts.append(statement.from_tests(ordered, message, limit))
    return Description("\n\n".join(texts), observations[0] if observations else None)


def issue(facts: Facts, sandbox: Sandbox) -> Description:
    """What a user would report, without a word of tests (issue.py)."""
    rng, tests = random.Random(facts.seed), issues.test_names(facts.failing)
    wanted = [issues.calls(facts.differing(number)) for number in range(len(facts.buggy))]
    together = [one for group in wanted for one in group]
    sandbox.reset()
    bad = issues.run(sandbox, together, TIMEOUT)
    for path, text in facts.fixed_files.items():
        sandbox.write(path, text)
    good = issues.run(sandbox, together, TIMEOUT)
    sandbox.reset()
    texts: dict[str, Observation | None] = {}
    limit, start = facts.characters // len(facts.buggy), 0
    for number, group in enumerate(wanted):
        end = start + len(group)
        shown = issues.examples(group, bad[start:end], good[start:end], tests)
        text, start = issues.write(shown, rng, limit) if shown else "", end
        if text:
            texts.setdefault(text, shown[0].observation)
            continue
        for one in facts.differing(number):
            text = issues.from_observation(one, limit)
            if not unreadable(text) and not issues.names(text, tests):
                texts.setdefault(text, one)
                break
        else:
            run = facts.buggy[number]
            message = run["messages"].get(run["test"], "") if facts.tests_may_tell else ""
            text = issues.from_message(message, limit, sandbox.read)
            if issues.names(text, tests):
                text = issues.from_message(message, limit)
            if not text or issues.names(text, tests):
                raise NotTold("unobserved")
            texts.setdefault(text, None)
    return Description("\n\n".join(texts), next((one for one in texts.values() if one), None))
