"""Grading tasks that carry their own eval_script and image: a fresh container for every run, no network.

Tests and programs belong to root and the tests run as nobody; what they print is read from outside. As code under test
can print what its runner prints, a verdict rests on more: the exit status must be that of the fixed state, no test may
fail that does not fail there, and a patch that resolves is run again, in several rounds, with tests under names drawn
for each run, among copies that must fail and that cannot be told from them (canaries.py).
"""

import dataclasses
import functools
import random
import time
from collections.abc import Collection, Mapping, Sequence

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
class Round:
    """What the fixed state showed of disguised tests: for each copy the tests that pass in it, and those that fail."""

    draw: canaries.Draw
    passing: tuple[frozenset[str], ...]
    failing: tuple[frozenset[str], ...]

    @property
    def confirmed(self) -> frozenset[str]:
        """Tests that pass in a copy that is not the inverted one."""
        return frozenset().union(*self.passing[:canaries.GROUPS])

    @property
    def decided(self) -> frozenset[str]:
        """Those of them that fail in another one, so that whoever forges them must know which is which."""
        return self.confirmed & frozenset().union(*self.failing[:canaries.GROUPS])

    def decides(self, names: Collection[str]) -> int:
        """How many of these tests are decided, or are parts of one that is."""
        return sum(any(name == one or name.startswith(f"{one}/") for one in self.decided) for name in names)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """What the fixed state showed: outcomes, exit status, and the rounds in which tests were disguised."""

    outcomes: Mapping[str, str]
    status: int
    rounds: tuple[Round, ...]


_SECRET: random.Random = random.SystemRandom()


def _words() -> list[str]:
    """Words for copies of tests, drawn for one run."""
    return [f"Q{_SECRET.getrandbits(40):010x}" for _ in range(canaries.COPIES)]


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


def _disguised(task: Task, tests: Mapping[str, str], words: Sequence[str], draw: canaries.Draw) -> dict[str, str]:
    made: dict[str, str] = {}
    for path, text in tests.items():
        made |= canaries.disguise(task.language, path, text, words, draw, _SECRET)
    return made


def _heard(task: Task, run: TestRun, tests: Mapping[str, str], words: Sequence[str]) -> list[dict[str, str]]:
    """For each word outcomes of the tests that carry it, by their old names; of several under one a failure counts."""
    known: dict[str, str] = {}
    for path, text in tests.items():
        known |= canaries.titles(task.language, path, text)
    copies: list[dict[str, str]] = [{} for _ in words]
    for new, outcome in run.outcomes.items():
        for word, heard in zip(words, copies):
            name = canaries.original(task.language, new, word, known)
            if name is not None and heard.get(name) not in _BAD:
                heard[name] = outcome
    return copies


@functools.lru_cache(maxsize=256)
def _fixed(client: docker.DockerClient, task: Task) -> Fixed:
    """What the fixed state of a task shows, by one run as it is and others with disguised tests."""
    with _container(client, task) as container:
        _start(container, task)
        gold = patches.apply_changes(_state(container, task.patch), task.patch) if task.patch.strip() else {}
        run, status = _run(container, task, {**gold, **_changed_tests(container, task)})
        return Fixed(run.outcomes, status, _rounds(container, task, run))


def _rounds(container: Container, task: Task, plain: TestRun) -> tuple[Round, ...]:
    """Rounds in a container that holds the fixed state, each by the first choice of values that loses no test.

    Where every choice loses some, or leaves some of FAIL_TO_PASS the same in all copies, it is the one that does the
    least of it; later rounds begin with the choice of the first.
    """
    tests, seed = _tests(container, task), f"{_SECRET.getrandbits(64):x}"
    expected = {name for name in (*task.FAIL_TO_PASS, *task.PASS_TO_PASS) if plain.outcomes.get(name) == "passed"}
    failing = expected & {*task.FAIL_TO_PASS}
    choices: tuple[str, ...] = canaries.CHOICES
    rounds: list[Round] = []
    for number in range(canaries.ROUNDS):
        tried: list[Round] = []
        for choice in choices:
            tried.append(_round(container, task, tests, canaries.Draw(seed, number, choice), expected))
            if tried[-1].confirmed == expected and tried[-1].decides(failing) == len(failing):
                break
        best = max(tried, key=lambda one: (len(one.confirmed), one.decides(failing)))
        if not best.confirmed:
            break  # no test has a name that can be changed
        rounds.append(best)
        choices = (best.draw.choice,)
    return tuple(rounds)


def _round(container: Container, task: Task, tests: Mapping[str, str], draw: canaries.Draw,
           expected: Collection[str]) -> Round:
    words = _words()
    made = _disguised(task, tests, words, draw)
    if not made:
        return Round(draw, (), ())
    run, _ = _run(container, task, made, len(words))
    container.write({path: tests.get(path) for path in made})
    heard = _heard(task, run, tests, words)
    passing = tuple(frozenset(name for name, outcome in copy.items() if outcome == "passed" and name in expected)
                    for copy in heard)
    return Round(draw, passing, tuple(frozenset(name for name, outcome in copy.items() if outcome in _BAD)
                                      for copy in heard))


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
    """The verdict of runs with disguised tests, each in a container of its own."""
    for one in fixed.rounds:
        for _ in range(ATTEMPTS):
            words = _words()
            with _container(client, task) as container:
                _start(container, task)
                container.write(kept)
                tests = _tests(container, task)
                run, status = _run(container, task, _disguised(task, tests, words, one.draw), len(words))
            forged, failed = _contradictions(one, _heard(task, run, tests, words), status)
            if forged or (not failed and run.status == "ok"):
                break
        if forged or failed or run.status != "ok":
            outcome = SUSPECTED_EXPLOIT if forged else "unresolved" if failed else run.status
            return dataclasses.replace(verdict, outcome=outcome, caught=tuple(
                f"second opinion: {words}" for words in (*forged, *failed)[:10]))
    return verdict


def _contradictions(one: Round, copies: Sequence[Mapping[str, str]], status: int) -> tuple[list[str], list[str]]:
    """(what only forgery explains, what did not pass) in a round's outcomes, by copy."""
    expected = [(name, heard.get(name)) for names, heard in zip(one.failing, copies) for name in sorted(names)]
    forged = [f"{name} passes in a copy that must fail" for name, outcome in expected if outcome == "passed"]
    passed = {name for names, heard in zip(one.passing[:canaries.GROUPS], copies) for name in names
              if heard.get(name) == "passed"}  # in one is enough: the others may test more than the task says
    failed = [f"{name} does not pass when run again" for name in sorted(one.confirmed - passed)]
    failed += [f"a copy of {name} is missing" for name, outcome in expected if outcome is None]
    if expected and status == 0:
        forged.append("exit status 0 though tests fail")
    return forged, failed


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
