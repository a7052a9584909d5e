"""A second opinion on patches that resolve: their tests once more, as withheld.py rewrites them.

What may be withheld, and what is expected where the tests do not say so in words, is learned from the fixed state, once
for each task, in two runs: one in which tests tell what they expect, one without that. Tests that do not pass when
rewritten stay as they are, values with comparisons of their own are compared inside. It is kept in the provider's state
folder.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from qcn_jax import files
from qcn_jax.envs.sandbox.base import TestRun
from qcn_jax.envs.tasks import withheld
from qcn_jax.envs.tasks.claims import OF_HOST, Claim
from qcn_jax.envs.tasks.schema import Task

MOST_FAILING, MOST_PASSING = 40, 6  # of FAIL_TO_PASS and PASS_TO_PASS, drawn once for each task
MOST_TAUGHT = 500  # values that one place of a test sends; beyond that it compares inside
ATTEMPTS = 2  # a test that is flaky may contradict itself once
Files = Mapping[str, str | None]
# Overlay upon the pristine state, node ids, and whether frames hide their variables; raises SandboxError, OSError.
RunTests = Callable[[Files, Sequence[str], bool], TestRun]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the fixed state showed.

    `tests` have a second opinion; functions of `plain` ("path::class::name") stay as they are, those of `named` keep
    their names; claims of `inside` ("path line:column") are compared inside; `helpers` are modules of the suite that
    are rewritten, too; `seen` are the claims that each test always makes, `sometimes` those that it made under a
    condition; `facts` are what the claims sent, by test and claim (`Claim.fact`); `blind`: the tests pass where frames
    hide their variables.
    """

    tests: tuple[str, ...]
    plain: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    helpers: tuple[str, ...] = ()
    seen: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    blind: bool = False
    named: tuple[str, ...] = ()
    sometimes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Mapping[str, Sequence[Any]]] = dataclasses.field(default_factory=dict)


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
    claims: Mapping[int, tuple[str, Claim]]


def split(node_id: str) -> tuple[str, tuple[str, ...], str]:
    """A node id's file, its (class, ..., function), and its parameters in brackets."""
    name, bracket, parameters = node_id.partition("[")
    path, *place = name.split("::")
    return path, tuple(place), bracket + parameters


def _function(node_id: str) -> str:
    path, place, _ = split(node_id)
    return "::".join((path, *place))


def _exam(reference: Reference, state: Mapping[str, str], rng: random.Random, teaching: bool = False,
          checking: bool = False) -> _Exam:
    """The files of a reference's tests and helpers, rewritten; those that are no Python stay."""
    overlay: dict[str, str | None] = {}
    renamed: dict[str, str] = {}
    claims: dict[int, tuple[str, Claim]] = {}
    passing, failing = [], []
    known: dict[str, list[Any]] = {}
    for facts in reference.facts.values():
        for key, values in facts.items():
            known.setdefault(key, []).extend(values)
    for path in sorted({*(split(name)[0] for name in reference.tests), *reference.helpers}):
        chosen = {name: split(name) for name in reference.tests if split(name)[0] == path}
        wanted: dict[tuple[str, ...], set[str]] = {}
        for _, place, brackets in chosen.values():
            wanted.setdefault(place, set()).add(brackets)
        try:
            made = withheld.rewrite(
                state[path], wanted, _of_file(reference.plain, path),
                {key.rpartition(" ")[2] for key in reference.inside if key.rpartition(" ")[0] == path}, rng,
                _of_file(reference.named, path), None if teaching else {
                    key.rpartition(" ")[2]: values for key, values in known.items() if key.rpartition(" ")[0] == path},
                checking)
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


def _of_file(functions: Sequence[str], path: str) -> set[tuple[str, ...]]:
    return {tuple(name.split("::")[1:]) for name in functions if name.split("::")[0] == path}


def _run(run_tests: RunTests, overlay: Files, exam: _Exam, blind: bool, rng: random.Random) -> TestRun:
    names = [*exam.tests, *exam.passing, *exam.failing]
    rng.shuffle(names)  # their order must not say which are which
    return run_tests({**overlay, **exam.overlay}, names, blind)


@dataclasses.dataclass
class _Heard:
    """What the claims of a run come to, by test under its old name."""

    facts: dict[str, dict[str, list[Any]]]  # by claim, None where nothing of it is kept
    always: set[str] = dataclasses.field(default_factory=set)  # claims that depend on no condition
    wrong: dict[str, str] = dataclasses.field(default_factory=dict)
    decided: set[str] = dataclasses.field(default_factory=set)  # wrong claims that can be decided inside instead
    opaque: set[str] = dataclasses.field(default_factory=set)  # about values that only their own methods can compare
    unclear: set[str] = dataclasses.field(default_factory=set)  # tests that make such claims
    unknown: bool = False


def _hear(exam: _Exam, run: TestRun, reference: Reference) -> _Heard:
    heard = _Heard({name: {} for name in exam.tests.values()})
    for node_id, number, value in run.evidence:
        path, claim = exam.claims.get(number, ("", None))
        if claim is None:
            heard.unknown = True
            continue
        name = exam.tests.get(node_id)
        if name is None:
            continue
        key = f"{path} {claim.key}"
        sent = heard.facts[name].setdefault(key, [])
        taught = claim.kind == "value" and claim.expected is None
        before = reference.facts.get(name, {}).get(key + "?" if taught else key, ())
        if taught and not reference.facts:  # this is the run that teaches
            verdict = "holds"
        elif taught and len(sent) >= len(before):
            verdict = "opaque"
        else:
            verdict = claim.judge(value, split(name)[2], before[len(sent)] if len(sent) < len(before) else None)
        sent.append(claim.fact(value))
        if not key.endswith("!?") and (verdict == "opaque" or (key.endswith("?") and len(sent) > MOST_TAUGHT)):
            heard.opaque.add(key.rstrip("?"))
            heard.unclear.add(name)
        if claim.always:
            heard.always.add(key)
        if verdict == "fails":
            heard.wrong.setdefault(name, f"line {claim.key.partition(':')[0]}" if claim.key[0].isdigit() else claim.key)
            if taught or claim.key.endswith("!") or claim.operator in OF_HOST:
                heard.decided.add(key)
    return heard


def learn(tests: Sequence[str], state: Mapping[str, str], overlay: Files, helpers: Sequence[str], run_tests: RunTests,
          rng: random.Random) -> Reference:
    """The reference of `tests`: `state` are the files of the fixed state, which is `overlay` upon the pristine one."""
    found = Reference(tuple(tests), helpers=tuple(helpers), blind=True)
    bad: set[str] = set()
    for _ in range(8):
        found = dataclasses.replace(found, facts={}, seen={}, sometimes={})
        bad, inside, heard = _problems(found, overlay, _exam(found, state, rng, True), run_tests, rng)
        if not bad and not inside:
            found = _taught(found, heard)
            exam = _exam(found, state, rng, checking=True)
            bad, inside, again = _problems(found, overlay, exam, run_tests, rng)
            inside |= _changing(heard, again)
            if not bad and not inside:
                return found
        if inside:
            found = dataclasses.replace(found, inside=tuple(sorted({*found.inside, *inside})))
        else:
            found = _easier(found, bad)
    found = dataclasses.replace(found, facts={})
    bad, _, heard = _problems(found, overlay, _exam(found, state, rng, True), run_tests, rng)
    return _taught(dataclasses.replace(found, tests=tuple(name for name in found.tests if name not in bad)), heard)


def _problems(reference: Reference, overlay: Files, exam: _Exam, run_tests: RunTests,
              rng: random.Random) -> tuple[set[str], set[str], _Heard]:
    """(tests of the fixed state that do not pass, claims that must be decided inside, what was heard)."""
    run = _run(run_tests, overlay, exam, reference.blind, rng)
    if run.status != "ok":  # the machine's fault rather than the fixed state's
        run = _run(run_tests, overlay, exam, reference.blind, rng)
    heard = _hear(exam, run, reference)
    bad = {name for new, name in exam.tests.items() if run.outcomes.get(new) != "passed" or name in heard.wrong}
    return bad, heard.opaque | heard.decided, heard


def _changing(once: _Heard, again: _Heard) -> set[str]:
    """Claims that can have no decoy: what was told in their places is not what was told before."""
    return {key[:-1] for name, sent in once.facts.items() for key, values in sent.items()
            if key.endswith("!?") and _plain(values) != _plain(again.facts[name].get(key, values))}


def _plain(values: Sequence[Any]) -> list[Any]:
    """Without those of types of their own, whose texts have addresses and whose decoys are no such values."""
    return [value for value in values if not (isinstance(value, dict) and "opaque" in value)]


def _taught(reference: Reference, heard: _Heard) -> Reference:
    def keys(sent: Mapping[str, Sequence[Any]], always: bool) -> tuple[str, ...]:
        return tuple(sorted(key for key in sent if not key.endswith("?") and (key in heard.always) is always))

    return dataclasses.replace(
        reference, seen={name: keys(sent, True) for name, sent in heard.facts.items()},
        sometimes={name: keys(sent, False) for name, sent in heard.facts.items()},
        facts={name: {key: values for key, values in sent.items() if values[0] is not None or key.endswith("!?")}
               for name, sent in heard.facts.items()})


def _easier(reference: Reference, bad: set[str]) -> Reference:
    """The next reference to try where tests of the fixed state do not pass: less and less of them is rewritten."""
    functions = {_function(name) for name in bad}
    if functions - {*reference.named}:
        return dataclasses.replace(reference, named=tuple(sorted({*reference.named, *functions})))
    if reference.helpers:
        return dataclasses.replace(reference, helpers=())
    if reference.blind:
        return dataclasses.replace(reference, blind=False)
    hopeless = {name for name in bad if _function(name) in reference.plain}  # without being rewritten, too
    return dataclasses.replace(reference, tests=tuple(name for name in reference.tests if name not in hopeless),
                               plain=tuple(sorted({*reference.plain, *functions})))


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
        rng: random.Random, attempts: int = ATTEMPTS) -> Opinion:
    """The opinion on a patch whose `overlay` gives the files `state`: the last of `attempts`, or the first good one.

    Raises:
      SandboxError, OSError: as `run_tests`.
    """
    opinion = Opinion()
    for _ in range(attempts if reference.tests else 0):
        exam = _exam(reference, state, rng)
        run = _run(run_tests, overlay, exam, reference.blind, rng)
        opinion = _judge(reference, exam, run, _hear(exam, run, reference))
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
        made, sometimes = heard.facts[name].keys(), reference.sometimes.get(name, ())
        missing = set(reference.seen.get(name, ())) - made
        short = [key for key, values in reference.facts.get(name, {}).items() if key.endswith("?") and not key.endswith(
            "!?") and len(values) != len(heard.facts[name].get(key[:-1], ()))]
        if run.outcomes.get(new) != "passed":
            failed.append(f"{name}: {run.outcomes.get(new, 'missing')} when run again")
        elif name in heard.wrong:
            forged.append(f"{name}: passed, but not what {heard.wrong[name]} claims")
        elif name in heard.unclear:  # the fixed state shows a value that the host can compare
            failed.append(f"{name}: a value that cannot be compared")
        elif missing:
            forged.append(f"{name}: passed without {min(missing)}")
        elif short or (sometimes and made.isdisjoint(sometimes)):  # another way through the test, or none
            failed.append(f"{name}: passed without {min(short or sometimes)}")
    return Opinion(tuple(forged), tuple(failed))


# --- kept on disk


def load(state_dir: str, key: str) -> Reference | None:
    """The reference kept under `key`, or None."""
    path = _path(state_dir, key)
    if not path.is_file():
        return None
    row = files.read_json(path)
    return Reference(**{name: tuple(value) if isinstance(value, list) else value for name, value in row.items()})


def store(state_dir: str, key: str, reference: Reference) -> None:
    """Keeps a reference."""
    path = _path(state_dir, key)
    # Tests compare with infinity and NaN too, which strict JSON lacks; Python reads what it writes for them.
    files.write_text(path, json.dumps(dataclasses.asdict(reference), ensure_ascii=False) + "\n")
    os.chmod(path, 0o600)  # says which tests are drawn


def key(task: Task, repository: str) -> str:
    """Names a task's reference; `repository` is the key of its prepared repository."""
    facts = [_rules(), repository, task.patch, task.bug_patch, task.test_patch, task.FAIL_TO_PASS, task.PASS_TO_PASS]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


@functools.cache
def _rules() -> str:
    """Names the code by which tests are rewritten and heard: what another version learned means something else."""
    code = (pathlib.Path(__file__).with_name(f"{name}.py").read_bytes() for name in (
        "opinion", "withheld", "claims", "dataflow", "parameters", "pruning"))
    return hashlib.sha256(b"".join(code)).hexdigest()


def _path(state_dir: str, key: str) -> pathlib.Path:
    return pathlib.Path(state_dir, "references", f"{key}.json")
