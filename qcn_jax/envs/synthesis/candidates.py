"""Candidates: one defect of one repository each, and the tests that are run for it."""

import dataclasses
import hashlib
import random
from collections.abc import Sequence
from typing import Any

from qcn_jax.envs.sandbox.repository import RepositorySpec
from qcn_jax.envs.synthesis import inject
from qcn_jax.envs.synthesis.survey import Survey, callers

MAX_TESTS = 40  # that are run first for one candidate


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One defect of one repository, with the tests that decide about it."""

    repository: str
    archive_sha256: str
    kind: str
    path: str
    function: str
    before: str = dataclasses.field(repr=False)
    after: str = dataclasses.field(repr=False)
    tests: tuple[str, ...] = dataclasses.field(repr=False)
    observe: tuple[str, ...] = dataclasses.field(repr=False)  # tests in order of preference for the statement
    sources: tuple[str, ...] = dataclasses.field(repr=False)
    callers: int = 0  # tests that call the function, of which `tests` is a sample
    suite: int = 0
    seconds: float = 0.0  # of `tests` on the pristine state
    strategy: str = "inject"
    # Further files, as (path, before, after).
    others: tuple[tuple[str, str, str], ...] = dataclasses.field(default=(), repr=False)
    parts: tuple[tuple[str, ...], ...] = dataclasses.field(default=(), repr=False)  # of several defects: tests of each
    everything: tuple[str, ...] = dataclasses.field(default=(), repr=False)  # all tests of the suite that pass
    slow: frozenset[str] = dataclasses.field(default=frozenset(), repr=False)  # of these: or they wait
    suite_seconds: float = 0.0  # of all of them, on the pristine state

    @property
    def before_files(self) -> dict[str, str]:
        """The changed files without the defect."""
        return {self.path: self.before, **{path: before for path, before, _ in self.others}}

    @property
    def after_files(self) -> dict[str, str]:
        """The changed files with the defect."""
        return {self.path: self.after, **{path: after for path, _, after in self.others}}

    @property
    def key(self) -> str:
        """Names the candidate by repository and content."""
        others = [text for path, _, after in self.others for text in (path, after)]
        text = "\0".join((self.repository, self.path, self.kind, self.function, self.after, *others))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_candidate(
    injection: inject.Injection, spec: RepositorySpec, known: Survey, rng: random.Random
) -> Candidate | None:
    """Chooses the tests for an injected defect: a sample of those that call the function; None if none does."""
    calling = callers(known, injection.path, injection.qualname)
    if not calling:
        return None
    waiting = {*known.waiting}  # which would make every verdict wait; a whole suite has them all the same
    quick = [number for number in calling if known.tests[number] not in waiting]
    usable = quick or calling
    chosen = sorted(usable if len(usable) <= MAX_TESTS else rng.sample(usable, MAX_TESTS))
    simple = sorted(chosen, key=lambda number: (known.breadth[number], number))
    return Candidate(
        known.repository,
        spec.sha256,
        injection.kind,
        injection.path,
        injection.qualname,
        injection.before_source,
        injection.after_source,
        tuple(known.tests[number] for number in chosen),
        tuple(known.tests[number] for number in simple),
        tuple(sorted({name.split("::")[0] for name in known.callers})),
        len(calling),
        len(known.tests),
        sum(known.seconds[number] for number in chosen),
        **suite_of(known),
    )


def suite_of(known: Survey) -> dict[str, Any]:
    """What a candidate says of its repository's whole suite."""
    return {"everything": (*known.tests, *known.slow), "slow": frozenset((*known.slow, *known.waiting)),
            "suite_seconds": known.suite_seconds}


def spread(names: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """A sample of tests, stratified over their files: one of each as far as `count` reaches, then in proportion."""
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(name.split("::")[0], []).append(name)
    ranked = []
    for found in files.values():
        first = rng.random() - 1  # below all others; which file comes first is drawn
        order = rng.sample(found, len(found))
        ranked += [((number + 0.5) / len(found) if number else first, name) for number, name in enumerate(order)]
    chosen = {name for _, name in sorted(ranked)[:count]}
    return [name for name in names if name in chosen]
