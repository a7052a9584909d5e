"""Grading tasks that carry their own eval_script and image: a fresh container for every run, no network.

Tests and programs belong to root and the tests run as nobody; what they print is read from outside. As code under test
can print what its runner prints, a verdict rests on more: the exit status must be that of the fixed state, no test may
fail that does not fail there, and a patch that resolves is run once more with tests under names drawn for that run,
among copies that must fail and that cannot be told from them (canaries.py).
"""

import dataclasses
import functools
import random
import time
from collections.abc import Mapping, Sequence

import docker
import docker.errors

from qcn_jax.envs import patches
from qcn_jax.envs.sandbox.base import TestRun
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.synthesis import heldout, issue
from qcn_jax.envs.synthesis.build import verifier
from qcn_jax.envs.synthesis.build.container import Container
from qcn_jax.envs.synthesis.languages import LANGUAGES, canaries, programs
from qcn_jax.envs.synthesis.verify import MADE, Check
from qcn_jax.envs.tasks import verdicts
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.tasks.verdicts import SUSPECTED_EXPLOIT, Verdict
from qcn_jax.envs.testpaths import is_test_path
from qcn_jax.errors import UserError

ATTEMPTS = 2  # a test that is flaky may contradict itself once
_BAD = ("failed", "error")
Files = Mapping[str, str | None]


@dataclasses.dataclass(frozen=True)
class Fixed:
    """What the fixed state showed: outcomes, exit status, and which renamed tests pass and which of each copy fail.

    `seed` is of the values that copies expect.
    """

    outcomes: Mapping[str, str]
    status: int
    seed: str
    renamed: frozenset[str]
    failing: tuple[frozenset[str], ...]


_SECRET = random.SystemRandom()


def _words() -> list[str]:
    """Words for the tests and for each of their copies, drawn for one run."""
    return [f"Q{_SECRET.getrandbits(40):010x}" for _ in range(2 + canaries.MUTATED)]


def _run(container: Container, task: Task, changes: Files, copies: int = 1) -> tuple[TestRun, int]:
    """The run of a task's tests, each there in so many copies, and its real exit status."""
    container.write(changes)
    done = verifier.run(container, verifier.Verifier(task.eval_script, task.log_parser, copies * task.timeout))
    status = "timeout" if done.timed_out else "ok"
    return TestRun(status, done.outcomes, {}, done.seconds, done.log[-4000:], 0), done.status


def _state(container: Container, diff: str | list[patches.FilePatch]) -> dict[str, str]:
    """The files that a diff names, as they are in the container."""
    parsed = patches.parse(diff) if isinstance(diff, str) else diff
    named = {path for patch in parsed for path in (patch.old, patch.new) if path is not None}
    return container.read(named) if named else {}


def _start(container: Container, task: Task) -> None:
    container.write(patches.apply_changes(_state(container, task.bug_patch), task.bug_patch) if task.bug_patch else {})


def _changed_tests(container: Container, task: Task) -> Files:
    """What a task's test patch makes of its starting state."""
    return patches.apply_changes(_state(container, task.test_patch), task.test_patch) if task.test_patch else {}


def _tests(container: Container, task: Task) -> dict[str, str]:
    """The test files of a task's language, in a container in which the test patch is applied."""
    speaks = LANGUAGES[task.language]
    brought = set(patches.touched(task.test_patch)) if task.test_patch else set()
    return {path: data.decode("utf-8", "replace") for path, data in container.read_all().items()
            if path.endswith(speaks.endings) and "node_modules/" not in path
            and (path in brought or is_test_path(path))}


def _disguised(task: Task, tests: Mapping[str, str], words: Sequence[str], seed: str) -> dict[str, str]:
    made: dict[str, str] = {}
    for path, text in tests.items():
        made |= canaries.disguise(task.language, path, text, words, seed, _SECRET)
    return made


def _heard(task: Task, run: TestRun, word: str) -> dict[str, str]:
    """Outcomes of the tests that carry a word, by their old names."""
    return {name: outcome for new, outcome in run.outcomes.items()
            if (name := canaries.original(task.language, new, word)) is not None}


@functools.lru_cache(maxsize=256)
def _fixed(client: docker.DockerClient, task: Task) -> Fixed:
    """What the fixed state of a task shows, by two runs."""
    expected = {*task.FAIL_TO_PASS, *task.PASS_TO_PASS}
    with _container(client, task) as container:
        _start(container, task)
        gold = patches.apply_changes(_state(container, task.patch), task.patch) if task.patch.strip() else {}
        run, status = _run(container, task, {**gold, **_changed_tests(container, task)})
        tests, words, seed = _tests(container, task), _words(), f"{_SECRET.getrandbits(64):x}"
        again, _ = _run(container, task, _disguised(task, tests, words, seed), len(words))
    renamed = {name for name, outcome in _heard(task, again, words[0]).items() if outcome == "passed"} & expected
    failing = tuple(frozenset(name for name, outcome in _heard(task, again, word).items() if outcome in _BAD)
                    if renamed else frozenset() for word in words[1:])
    return Fixed(run.outcomes, status, seed, frozenset(renamed), failing)


def grade(client: docker.DockerClient, task: Task, patch: str) -> Verdict:
    """The verdict on a patch, in SWE-bench's semantics; what it changes besides sources is left out.

    Raises:
      UserError: the task's image is not here, or it is in no language that is known.
      SandboxError: the engine failed, with the patch and without it.
    """
    started = time.monotonic()
    if task.language not in LANGUAGES:
        raise UserError(f"task {task.instance_id}: field language: expected one of {', '.join(LANGUAGES)}, got "
                        f"{task.language!r}")
    if not patch.strip():
        return Verdict(task.instance_id, "empty_patch")
    try:
        verdict = _examine(client, task, patch)
    except SandboxError:
        with _container(client, task) as container:  # only what fails with the patch alone is the patch's doing
            _start(container, task)
            _run(container, task, {})
        try:
            verdict = _examine(client, task, patch)
        except SandboxError as error:
            verdict = Verdict(task.instance_id, "killed", detail=str(error))
    return dataclasses.replace(verdict, seconds=time.monotonic() - started)


def _examine(client: docker.DockerClient, task: Task, patch: str, again: bool = False) -> Verdict:
    speaks = LANGUAGES[task.language]
    with _container(client, task) as container:
        _start(container, task)
        dropped: dict[str, str] = {}
        try:
            parsed = patches.parse(patch, dropped)
            changes = patches.apply_changes(_state(container, parsed), parsed)
        except patches.PatchError as error:
            return Verdict(task.instance_id, "patch_failed", detail=str(error))
        kept: dict[str, str | None] = {path: text for path, text in changes.items() if speaks.may_change(path)}
        dropped |= dict.fromkeys(sorted(set(changes) - set(kept)), "is no source that a fix may change")
        if not kept:
            return Verdict(task.instance_id, "empty_patch", dropped=dropped)
        kept |= _changed_tests(container, task)
        try:
            container.write(kept)
        except SandboxError as error:
            if not container.alive():
                raise
            return Verdict(task.instance_id, "patch_failed", detail=str(error), dropped=dropped)
        run, status = _run(container, task, {})
    verdict = verdicts.judge(task, run, dropped)
    if not verdict.resolved:
        return verdict
    fixed = _fixed(client, task)
    caught = _differences(run, status, fixed)
    verdict = verdicts.judge(task, run, dropped, fixed=lambda: fixed.outcomes)
    if caught and not again:  # a test that decides nothing may be flaky
        return _examine(client, task, patch, again=True)
    if caught:
        return dataclasses.replace(verdict, outcome="unresolved", caught=caught)
    return _second(client, task, verdict, kept, fixed) if verdict.resolved else verdict


def _differences(run: TestRun, status: int, fixed: Fixed) -> tuple[str, ...]:
    """What a run shows that the fixed state does not."""
    found = [f"fails: {name}" for name, outcome in run.outcomes.items()
             if outcome in _BAD and name not in fixed.outcomes][:10]
    if status != fixed.status:
        found.append(f"exit status {status}, expected {fixed.status}")
    return tuple(found)


def _second(client: docker.DockerClient, task: Task, verdict: Verdict, kept: Files, fixed: Fixed) -> Verdict:
    """The verdict of a run with disguised tests."""
    for _ in range(ATTEMPTS):
        words = _words()
        with _container(client, task) as container:
            _start(container, task)
            container.write(kept)
            changes = _disguised(task, _tests(container, task), words, fixed.seed)
            run, status = _run(container, task, changes, len(words))
        renamed, *copies = (_heard(task, run, word) for word in words)
        expected = [(name, heard.get(name)) for names, heard in zip(fixed.failing, copies) for name in sorted(names)]
        forged = [f"{name} passes in a copy that must fail" for name, outcome in expected if outcome == "passed"]
        failed = [f"{name}: {renamed.get(name, 'missing')} when run again" for name in sorted(fixed.renamed)
                  if renamed.get(name) != "passed"]
        failed += [f"a copy of {name} is missing" for name, outcome in expected if outcome is None]
        if expected and status == 0:
            forged.append("exit status 0 though tests fail")
        if not forged and not failed and run.status == "ok":
            return verdict
        if forged:
            break
    outcome = SUSPECTED_EXPLOIT if forged else "unresolved" if failed else run.status
    return dataclasses.replace(verdict, outcome=outcome,
                               caught=tuple(f"second opinion: {words}" for words in (*forged, *failed)[:10]))


def verify(client: docker.DockerClient, task: Task, reruns: int = 0) -> Check:
    """Gold resolves, nothing does not, held-out tests agree, and the statement is true; with `reruns`, flaky tests are
    named. Raises as `grade`."""
    started = time.monotonic()
    problems, flaky = _problems(client, task, reruns)
    opinion = heldout.second_opinion(task)
    if opinion is not None and not problems:
        problems = [f"held-out tests: {problem}" for problem in _problems(client, opinion, 0)[0]]
    if task.strategy in MADE and not problems and (false := _falsehood(client, task)):
        problems.append(f"the statement is false: {false}")
    return Check(task.instance_id, tuple(problems), round(time.monotonic() - started, 3), flaky)


def _problems(client: docker.DockerClient, task: Task, reruns: int) -> tuple[list[str], dict[str, str]]:
    problems = [] if task.problem_statement.strip() else ["problem_statement is empty"]
    verdict = grade(client, task, task.patch)
    if not verdict.resolved:
        problems.append(f"the gold patch gives {verdict.outcome}")
    with _container(client, task) as container:
        _start(container, task)
        container.write(_changed_tests(container, task))
        runs = [_run(container, task, {})[0] for _ in range(1 + reruns)]
    passing = [name for name in task.FAIL_TO_PASS if runs[0].outcomes.get(name) == "passed"]
    broken = [name for name in task.PASS_TO_PASS if runs[0].outcomes.get(name) == "failed"]
    if passing or not task.FAIL_TO_PASS:
        problems.append(f"without a patch {passing[0]} of FAIL_TO_PASS passes" if passing else "FAIL_TO_PASS is empty")
    if broken:
        problems.append(f"without a patch {broken[0]} of PASS_TO_PASS fails")
    flaky = {}
    for name in (*task.FAIL_TO_PASS, *task.PASS_TO_PASS):
        count = sum(run.outcomes.get(name) == "passed" for run in runs)
        if 0 < count < len(runs):
            flaky[name] = f"{count} of {len(runs)} pass with the defect"
    return problems, flaky


def _falsehood(client: docker.DockerClient, task: Task) -> str:
    """What a statement that was made by rule says and is not so."""
    shown = issue.programs(task.problem_statement, task.language)
    if not shown:
        return ""
    with _container(client, task) as container:
        _start(container, task)
        bad = programs.run(container, task.language, shown)
        container.write(patches.apply_changes(_state(container, task.patch), task.patch))
        good = programs.run(container, task.language, shown)
    return issue.falsehood(task.problem_statement, bad, good, task.language)


def _container(client: docker.DockerClient, task: Task) -> Container:
    try:
        client.images.get(task.image_name)
    except docker.errors.ImageNotFound as error:
        raise UserError(f"task {task.instance_id}: image {task.image_name} is not here; qcn synthesize "
                        "--strategies=build builds it from the repository") from error
    except (docker.errors.DockerException, OSError) as error:
        raise SandboxError(f"the engine does not answer: {str(error).splitlines()[0]}") from error
    return Container(client, task.image_name)
