"""One defect of a JavaScript or Go repository, to a verified task or the reason why it is none.

The tests run once on the defect. What fails is run again with the calls of the defective function recorded, so that
the run which confirms the outcomes is also the one that tells what was seen; the fixed state is recorded twice for each
function, whichever defects it gets. Statement, hidden and held-out tests are as for Python.
"""

import dataclasses
import hashlib
import random
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax.envs import patches
from qcn_jax.envs.synthesis import describe, heldout, inject, issue, plan, quality, statement, validate
from qcn_jax.envs.synthesis.build import Environment, verifier
from qcn_jax.envs.synthesis.build.container import ROOT, Container
from qcn_jax.envs.synthesis.languages import hiding, programs, record
from qcn_jax.envs.synthesis.statement import Observation
from qcn_jax.envs.tasks.log_parsers import runner_logs
from qcn_jax.envs.tasks.schema import Task

LEAST_SECONDS = 10.0  # for one run of a candidate's tests; otherwise five times what the pristine state needs
SLACK = 3  # times that limit in gradings, which may have a busier machine
LISTED = 8  # failing tests that a statement names
PASSING = ("passed", "xfailed")


@dataclasses.dataclass(frozen=True)
class Place:
    """A repository whose defects are tried.

    `files` are its texts and `expected` the tests that pass on the pristine state, twice. `recorded` keeps what the
    fixed state showed: by path and function, calls that two runs agree on, or None where recording changes outcomes.
    """

    name: str
    environment: Environment
    files: Mapping[str, str]
    expected: tuple[str, ...]
    settings: plan.Settings
    recorded: dict[tuple[str, str, int], list[dict[str, Any]] | None] = dataclasses.field(default_factory=dict)

    @property
    def judge(self) -> verifier.Verifier:
        """What runs the tests of one candidate."""
        recipe = self.environment.recipe
        return verifier.Verifier(recipe.test, recipe.parser, max(LEAST_SECONDS, 5 * self.environment.seconds))


class _Rejected(Exception):
    """The candidate is no task; the text is the outcome."""


def key(place: Place, injection: inject.Injection) -> str:
    """Names a candidate and how it is examined."""
    settings = place.settings
    facts = (place.name, place.environment.image, injection.path, injection.kind, injection.after_source,
             settings.reruns, settings.statement, settings.hide_tests, settings.held_out,
             settings.statement_characters)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:20]


def check(container: Container, place: Place, injection: inject.Injection) -> validate.Verdict:
    """Examines one defect; the container is left as it was."""
    started, outcome, task = time.monotonic(), "kept", None
    try:
        task = _examined(container, place, injection)
    except _Rejected as reason:
        outcome = str(reason)
    finally:
        container.write({injection.path: injection.before_source})
    seconds = round(time.monotonic() - started, 3)
    return validate.Verdict(key(place, injection), place.name, injection.kind, outcome, seconds, 0.0, task)


def _examined(container: Container, place: Place, injection: inject.Injection) -> Task:
    container.write({injection.path: injection.after_source})
    run = verifier.run(container, place.judge)
    failing = [name for name in place.expected if run.outcomes.get(name) not in PASSING]
    if run.timed_out:
        raise _Rejected("timeout")
    if not failing:
        raise _Rejected("survived")
    if len(failing) > validate.MAX_SHARE * len(place.expected) or not any(
            run.outcomes.get(name) == "failed" for name in failing):
        raise _Rejected("broken")  # does not compile or load, or nearly everything fails
    observations, calls = _observed(container, place, injection, run)
    task = _task(container, place, injection, failing, run, observations)
    if place.settings.hide_tests:
        task = _hidden(container, place, injection, task)
    if place.settings.held_out:
        task = _held_out(container, place, injection, task, calls)
    return quality.scored(task, function=injection.qualname)


def _passed(place: Place, run: verifier.Run) -> dict[str, bool]:
    return {name: run.outcomes.get(name) == "passed" for name in place.expected}


def _observed(container: Container, place: Place, injection: inject.Injection, first: verifier.Run
              ) -> tuple[list[Observation], list[dict[str, Any]]]:
    """Calls that ended otherwise than they should, and as they were recorded; further runs agree with the first.

    Raises:
      _Rejected: flaky.
    """
    reruns = place.settings.reruns
    wanted = _fixed_calls(container, place, injection)
    bad = _recorded(container, place, injection, injection.after_source, _passed(place, first)) if wanted else None
    for _ in range(reruns - (bad is not None)):
        container.write({injection.path: injection.after_source})
        if _passed(place, verifier.run(container, place.judge)) != _passed(place, first):
            raise _Rejected("flaky")
    found = list(statement.differing(bad, wanted)) if bad and wanted else []
    return found, [dict(one.call) for one in found]


def _fixed_calls(container: Container, place: Place, injection: inject.Injection) -> list[dict[str, Any]] | None:
    """Calls of the function in the fixed state, marked where two recordings agree; None where it cannot be recorded."""
    function = (injection.path, injection.qualname, injection.function_start_line)
    if function not in place.recorded:
        good = dict.fromkeys(place.expected, True)
        runs = [_recorded(container, place, injection, injection.before_source, good)]
        if runs[0]:
            runs.append(_recorded(container, place, injection, injection.before_source, good))
        first, last = runs[0], runs[-1]
        place.recorded[function] = statement.stable(first, last) if first and last else None
    return place.recorded[function]


def _recorded(container: Container, place: Place, injection: inject.Injection, text: str,
              passed: Mapping[str, bool]) -> list[dict[str, Any]] | None:
    """Calls recorded in one state, where the tests end as they do without the recorder; None otherwise."""
    files = record.recording(place.environment.recipe.language, injection, text)
    if files is None:
        return None
    container.write(files)
    try:
        run = verifier.run(container, place.judge)
        calls = record.calls(container, injection)
    finally:
        container.write({path: None for path in files if path != injection.path} | {injection.path: text})
    return calls if _passed(place, run) == passed else None


def _task(container: Container, place: Place, injection: inject.Injection, failing: Sequence[str], run: verifier.Run,
          observations: Sequence[Observation]) -> Task:
    recipe, limit = place.environment.recipe, place.judge.timeout
    before, after = {injection.path: injection.before_source}, {injection.path: injection.after_source}
    bug, gold = patches.make_diff(before, after), patches.make_diff(after, before)
    if patches.apply_diff(after, gold) != before:
        raise _Rejected("not_fixed")
    said = runner_logs.messages(recipe.parser, run.log)
    shown = sorted(failing, key=lambda name: name not in said)
    text = ""
    if place.settings.statement != "observed":
        text = _issue(container, place, injection, shown, observations)
    if not text or statement.contains_fix(text, gold):
        text = _told(injection, shown, said.get(shown[0], ""), place.settings.statement, observations)
    if statement.contains_fix(text, gold):
        raise _Rejected("statement_tells_fix")
    if describe.unreadable(text):
        raise _Rejected("unreadable")
    content, own = _content(place), key(place, injection)
    state = _state(content, bug)
    return Task(
        instance_id=f"{slug(place.name)}.{content[:8]}.{injection.kind}__{own[:8]}", repo=place.name,
        base_commit=state, patch=gold, test_patch="", problem_statement=text, FAIL_TO_PASS=tuple(failing),
        PASS_TO_PASS=tuple(name for name in place.expected if name not in set(failing)), kind=injection.kind,
        environment_setup_commit=state, image_name=place.environment.image, bug_patch=bug, path=injection.path,
        function=injection.qualname, timeout=SLACK * limit, language=recipe.language, log_parser=recipe.parser,
        eval_script=f"#!/bin/sh\ncd {ROOT}\n{recipe.test}\n")


def _content(place: Place) -> str:
    return hashlib.sha256(repr(sorted(place.files.items())).encode()).hexdigest()


def _state(content: str, bug: str) -> str:
    """Names a starting state."""
    return hashlib.sha256(f"{content}\0{bug}".encode()).hexdigest()[:40]


def _issue(container: Container, place: Place, injection: inject.Injection, failing: Sequence[str],
           observations: Sequence[Observation]) -> str:
    """An issue with a program that was run in both states, or the call in words; "" where none was seen."""
    language, function = place.environment.recipe.language, injection.qualname
    names, rng = _titles(language, failing), random.Random(key(place, injection))
    limit = max(place.settings.statement_characters, statement.SHORT)
    distinct = list({one.arguments: one for one in observations if one.came[0] in ("returned", "raised")}.values())
    pairs = [(one, program) for one in distinct[:issue.MOST_SHOWN] if "." not in function
             for program in programs.of_calls(language, injection.path, [_expression(place, injection, one)], function,
                                              place.files)]
    good, bad = _in_both(container, language, injection, [program for _, program in pairs])
    shown = issue.examples([one for one, _ in pairs], bad, good, names)
    text = issue.write([dataclasses.replace(one, language=language) for one in shown], rng, limit) if shown else ""
    for one in () if text else observations:
        told = issue.from_observation(one, limit)
        if not describe.unreadable(told) and not issue.names(told, names):
            return told
    return text


def _in_both(container: Container, language: str, injection: inject.Injection, wanted: Sequence[str]
             ) -> tuple[list[programs.Result | None], list[programs.Result | None]]:
    """What programs give in the fixed state and with the defect, which is there again in the end."""
    container.write({injection.path: injection.before_source})
    good = programs.run(container, language, wanted)
    container.write({injection.path: injection.after_source})
    return good, programs.run(container, language, wanted)


def _expression(place: Place, injection: inject.Injection, seen: Observation) -> str:
    given = [text for name, text in seen.arguments if name != "self"]
    return programs.call(place.environment.recipe.language, injection.path, injection.qualname, given, place.files)


def _titles(language: str, tests: Sequence[str]) -> list[str]:
    """What a statement must not say of tests; a title of one word may be the function's name."""
    if language == "go":
        return sorted({name.partition("::")[2].partition("/")[0] for name in tests})
    return sorted({part for name in tests for part in name.split(" > ") if " " in part.strip()})


def _told(injection: inject.Injection, failing: Sequence[str], said: str, kind: str,
          observations: Sequence[Observation]) -> str:
    """What was seen, or the first failing test says; who reports an issue knows of no tests and no files."""
    if kind != "observed":
        return f"`{injection.qualname}` does not do what it should" + (f": {said}" if said else ".")
    if observations:
        return statement.write(observations[0], failing, said, statement.FULL)
    text = f"`{injection.qualname}` in {injection.path} does not do what it should."
    text += f" In the test \"{failing[0]}\": {said}." if said else ""
    return text + "\n\nThese tests fail:" + "".join(f"\n- {name}" for name in failing[:LISTED])


def _hidden(container: Container, place: Place, injection: inject.Injection, task: Task) -> Task:
    """The task without the tests that show its defect in its starting state, where the others pass without them.

    Raises:
      _Rejected: cannot_hide.
    """
    for whole in (False, True):
        cut = hiding.without(task.language, task.FAIL_TO_PASS, place.files, whole)
        if cut is None:
            break
        there = {path: place.files[path] for path in cut}
        container.write({injection.path: injection.after_source, **cut})
        try:
            run = verifier.run(container, place.judge)
        finally:
            container.write(there)
        seen = [name for name in task.PASS_TO_PASS if name in run.outcomes]
        gone = set(task.PASS_TO_PASS) - set(seen)
        around = {_around(name) for name in task.FAIL_TO_PASS}
        shown = set(task.FAIL_TO_PASS) & set(run.outcomes) or any(run.outcomes[name] not in PASSING for name in seen)
        if shown or not (None in cut.values() or all(_around(name) in around for name in gone)):
            continue
        bug = patches.make_diff({injection.path: injection.before_source, **there},
                                {injection.path: injection.after_source, **cut})
        state = _state(_content(place), bug)
        return dataclasses.replace(task, bug_patch=bug, test_patch=patches.make_diff(cut, there), base_commit=state,
                                   environment_setup_commit=state)
    raise _Rejected("cannot_hide")


def _around(name: str) -> str:
    """The Go function that a test is part of; of JavaScript's tests the test itself."""
    return name.partition("/")[0] if "::" in name else name


def _held_out(container: Container, place: Place, injection: inject.Injection, task: Task,
              calls: Sequence[Mapping[str, Any]]) -> Task:
    """The task with tests of other calls, as far as they do what they should in both states."""
    language, before, after = task.language, injection.before_source, injection.after_source
    texts = programs.unseen(language, injection.path, injection.qualname, calls, key(place, injection), place.files)
    wanted = programs.of_calls(language, injection.path, texts, injection.qualname, place.files)
    good, bad = _in_both(container, language, injection, wanted)
    pairs = [(a, b) for a, b in zip(good, bad) if a is not None and b is not None]
    telling = [a for a, b in pairs if a != b][:heldout.TESTS]
    heads = {program.split("\n")[0] for program, *_ in telling}
    guards = [a for a, b in pairs if a == b and a[0].split("\n")[0] in heads][:heldout.TESTS]
    made = programs.test_file(language, place.environment.recipe.test, injection.path, [*telling, *guards],
                              place.files) if telling else None
    if made is None:
        return task
    outcomes = []
    try:
        for text in (after, before):
            container.write({injection.path: text, made.path: made.text})
            outcomes.append({name: outcome for name, outcome in verifier.run(container, place.judge).outcomes.items()
                             if name not in place.expected and made.marks in name})
    finally:
        container.write({made.path: None, injection.path: after})
    bad_ones, good_ones = outcomes
    passing = [name for name, outcome in good_ones.items() if outcome in PASSING]
    failing = tuple(name for name in passing if bad_ones.get(name) == "failed")
    if not failing:
        return task
    return dataclasses.replace(
        task, held_out_patch=patches.make_diff({}, {made.path: made.text}), HELD_OUT_FAIL_TO_PASS=failing,
        HELD_OUT_PASS_TO_PASS=tuple(name for name in passing if bad_ones.get(name) in PASSING))


def slug(name: str) -> str:
    """A repository's name as part of ids and file names."""
    return re.sub(r"[^\w.-]+", "_", name)
