"""A second opinion on patches that resolve: their tests once more, as withheld.py rewrites them.

What may be withheld is learned from the fixed state, once for each task: tests that do not pass when rewritten stay as
they are, values with comparisons of their own are compared inside. It is kept in the provider's state folder.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import random
from collections.abc import Callable, Collection, Mapping, Sequence

from qcn_jax import files
from qcn_jax.envs.sandbox.base import TestRun
from qcn_jax.envs.tasks import withheld
from qcn_jax.envs.tasks.schema import Task

FORMAT = 1  # raise it when references mean something else
MOST_FAILING, MOST_PASSING = 40, 6  # of FAIL_TO_PASS and PASS_TO_PASS, drawn once for each task
ATTEMPTS = 2  # a test that is flaky may contradict itself once
Files = Mapping[str, str | None]
# Overlay upon the pristine state, node ids, and whether frames hide their variables; raises SandboxError, OSError.
RunTests = Callable[[Files, Sequence[str], bool], TestRun]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the fixed state showed.

    `tests` have a second opinion; functions of `plain` ("path::class::name") stay as they are, claims of `inside`
    ("path line:column") are compared inside; `helpers` are modules of the suite that are rewritten, too; `seen` are the
    claims that each test always makes; `blind`: the tests pass where frames hide their variables.
    """

    tests: tuple[str, ...]
    plain: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    helpers: tuple[str, ...] = ()
    seen: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    blind: bool = False


@dataclasses.dataclass(frozen=True)
class Opinion:
    """`forged` says what only tampering explains, `failed` what did not pass; an opinion without either is good."""

    forged: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    status: str = "ok"


@dataclasses.dataclass(frozen=True)
class _Exam:
    """Rewritten files, what is run, and what it means: node ids new to old, claims by number."""

    overlay: Files
    tests: Mapping[str, str]
    passing: tuple[str, ...]
    failing: tuple[str, ...]
    claims: Mapping[int, tuple[str, withheld.Claim]]


def split(node_id: str) -> tuple[str, tuple[str, ...], str]:
    """A node id's file, its (class, ..., function), and its parameters in brackets."""
    name, bracket, parameters = node_id.partition("[")
    path, *place = name.split("::")
    return path, tuple(place), bracket + parameters


def _function(node_id: str) -> str:
    path, place, _ = split(node_id)
    return "::".join((path, *place))


def _exam(tests: Collection[str], state: Mapping[str, str], plain: Collection[str], inside: Collection[str],
          helpers: Collection[str], rng: random.Random) -> _Exam:
    """The files of `tests`, and `helpers`, rewritten; those that are no Python stay."""
    overlay: dict[str, str | None] = {}
    renamed: dict[str, str] = {}
    claims: dict[int, tuple[str, withheld.Claim]] = {}
    passing, failing = [], []
    for path in sorted({*(split(name)[0] for name in tests), *helpers}):
        chosen = {name: split(name) for name in tests if split(name)[0] == path}
        wanted: dict[tuple[str, ...], set[str]] = {}
        for _, place, brackets in chosen.values():
            wanted.setdefault(place, set()).add(brackets)
        try:
            made = withheld.rewrite(
                state[path], wanted,
                {tuple(name.split("::")[1:]) for name in plain if name.split("::")[0] == path},
                {key.rpartition(" ")[2] for key in inside if key.rpartition(" ")[0] == path}, rng)
        except (SyntaxError, ValueError, KeyError, RecursionError):
            renamed |= {name: name for name in chosen}
            continue
        overlay[path] = made.text
        new = {old: name for name, old in made.names.items()}
        for name, (_, place, brackets) in chosen.items():
            ending = made.brackets.get(place, {}).get(brackets, brackets)
            renamed["::".join((path, *new.get(place, place))) + ending] = name
        claims |= {number: (path, claim) for number, claim in made.claims.items()}
        if made.passing:
            passing.append(f"{path}::{made.passing}")
            failing.append(f"{path}::{made.failing}")
    return _Exam(overlay, renamed, tuple(passing), tuple(failing), claims)


def _run(run_tests: RunTests, overlay: Files, exam: _Exam, blind: bool) -> TestRun:
    return run_tests({**overlay, **exam.overlay}, [*exam.tests, *exam.passing, *exam.failing], blind)


@dataclasses.dataclass
class _Heard:
    """What the claims of a run come to, by test under its old name."""

    seen: dict[str, set[str]]
    wrong: dict[str, str]
    opaque: set[str]  # claims about values that only their own methods can compare
    unclear: set[str]  # tests that make such claims
    unknown: bool = False


def _hear(exam: _Exam, run: TestRun) -> _Heard:
    heard = _Heard({name: set() for name in exam.tests.values()}, {}, set(), set())
    for node_id, number, value in run.evidence:
        path, claim = exam.claims.get(number, ("", None))
        if claim is None:
            heard.unknown = True
            continue
        name = exam.tests.get(node_id)
        if name is None:
            continue
        verdict = claim.judge(value, split(name)[2])
        if verdict == "opaque":
            heard.opaque.add(f"{path} {claim.key}")
            heard.unclear.add(name)
        if claim.always:
            heard.seen[name].add(f"{path} {claim.key}")
        if verdict == "fails":
            heard.wrong.setdefault(name, f"line {claim.key.partition(':')[0]}" if claim.key[0].isdigit() else claim.key)
    return heard


def learn(tests: Sequence[str], state: Mapping[str, str], overlay: Files, helpers: Sequence[str], run_tests: RunTests,
          rng: random.Random) -> Reference:
    """The reference of `tests`: `state` are the files of the fixed state, which is `overlay` upon the pristine one."""
    plain: set[str] = set()
    inside: set[str] = set()
    seen: dict[str, tuple[str, ...]] = {}
    blind = True
    for _ in range(5):
        exam = _exam(tests, state, plain, inside, helpers, rng)
        run = _run(run_tests, overlay, exam, blind)
        heard = _hear(exam, run)
        bad = {name for new, name in exam.tests.items() if run.outcomes.get(new) != "passed" or name in heard.wrong}
        seen = {name: tuple(sorted(found)) for name, found in heard.seen.items()}
        if not bad and not heard.opaque:
            return Reference(tuple(tests), tuple(sorted(plain)), tuple(sorted(inside)), tuple(helpers), seen, blind)
        inside |= heard.opaque
        if bad and (helpers or blind):
            helpers, blind = ((), blind) if helpers else ((), False)
            continue
        hopeless = {name for name in bad if _function(name) in plain}  # without being rewritten, too
        tests = [name for name in tests if name not in hopeless]
        plain |= {_function(name) for name in bad}
    good = [name for name in tests if name not in bad]
    return Reference(tuple(good), tuple(sorted(plain)), tuple(sorted(inside)), tuple(helpers), seen, blind)


def draw(task: Task, passed: Collection[str], rng: random.Random) -> list[str]:
    """Tests for a second opinion, of those that `passed`."""
    chosen: list[str] = []
    for group, most in ((task.FAIL_TO_PASS, MOST_FAILING), (task.PASS_TO_PASS, MOST_PASSING)):
        names = [name for name in group if name in passed]
        chosen += names if len(names) <= most else rng.sample(names, most)
    return chosen


def untaught(tests: Sequence[str]) -> Reference:
    """The reference where no fixed state is known: tests stay as they are."""
    return Reference(tuple(tests), tuple(sorted({_function(name) for name in tests})))


def ask(reference: Reference, state: Mapping[str, str], overlay: Files, run_tests: RunTests,
        rng: random.Random) -> Opinion:
    """The opinion on a patch whose `overlay` gives the files `state`.

    Raises:
      SandboxError, OSError: as `run_tests`.
    """
    opinion = Opinion()
    for _ in range(ATTEMPTS if reference.tests else 0):
        exam = _exam(reference.tests, state, reference.plain, reference.inside, reference.helpers, rng)
        run = _run(run_tests, overlay, exam, reference.blind)
        opinion = _judge(reference, exam, run, _hear(exam, run))
        if not opinion.forged and not opinion.failed and opinion.status == "ok":
            break
    return opinion


def _judge(reference: Reference, exam: _Exam, run: TestRun, heard: _Heard) -> Opinion:
    if run.tampered:
        return Opinion(forged=run.tampered)
    if run.status != "ok":
        return Opinion(status=run.status)
    forged = [f"{name} passes, which must fail" for name in exam.failing if run.outcomes.get(name) == "passed"]
    failed = [f"{name} does not pass" for name in exam.passing if run.outcomes.get(name) != "passed"]
    if heard.unknown:
        forged.append("claims that no test makes")
    if exam.failing and not failed and run.exit_status != 1:
        forged.append(f"exit status {run.exit_status} though a test fails")
    for new, name in exam.tests.items():
        missing = set(reference.seen.get(name, ())) - heard.seen[name]
        if run.outcomes.get(new) != "passed":
            failed.append(f"{name}: {run.outcomes.get(new, 'missing')} when run again")
        elif name in heard.wrong:
            forged.append(f"{name}: passed, but not what {heard.wrong[name]} claims")
        elif name in heard.unclear:  # the fixed state shows a value that the host can compare
            failed.append(f"{name}: a value that cannot be compared")
        elif missing:
            forged.append(f"{name}: passed without {min(missing)}")
    return Opinion(tuple(forged), tuple(failed))


# --- kept on disk


def load(state_dir: str, key: str) -> Reference | None:
    """The reference kept under `key`, or None."""
    path = _path(state_dir, key)
    if not path.is_file():
        return None
    row = files.read_json(path)
    return Reference(tuple(row["tests"]), tuple(row["plain"]), tuple(row["inside"]), tuple(row["helpers"]),
                     {name: tuple(found) for name, found in row["seen"].items()}, row["blind"])


def store(state_dir: str, key: str, reference: Reference) -> None:
    """Keeps a reference."""
    path = _path(state_dir, key)
    files.write_json(path, dataclasses.asdict(reference))
    os.chmod(path, 0o600)  # says which tests are drawn


def key(task: Task, repository: str) -> str:
    """Names a task's reference; `repository` is the key of its prepared repository."""
    facts = [FORMAT, repository, task.patch, task.bug_patch, task.test_patch, task.FAIL_TO_PASS, task.PASS_TO_PASS]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _path(state_dir: str, key: str) -> pathlib.Path:
    return pathlib.Path(state_dir, "references", f"{key}.json")
