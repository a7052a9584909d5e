"""Which candidates are executed, in which order: kinds balanced, repositories in turn, the same on every run.

Candidates are taken in waves. A wave is chosen from what earlier waves gave and not from which job ended first,
so that any number of workers, and a run resumed from its journal, choose the same ones.
"""

import collections
import dataclasses
import heapq
import math
import random
from collections.abc import Iterable, Mapping, Sequence

from qcn_jax.chat import endpoint
from qcn_jax.envs.sandbox.repository import RepositorySpec
from qcn_jax.envs.synthesis import candidates, inject, quality, validate
from qcn_jax.envs.synthesis.inject import rewrite
from qcn_jax.envs.synthesis.survey import Survey, callers
from qcn_jax.envs.tasks import permissions

WAVE = 192  # candidates of one wave; bounds what is executed beyond the target


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides about the tasks of one split.

    `target` verified tasks are wanted (0: as many as there are); `candidates_per_repo` bounds executions and
    `per_function` keeps one function from filling the set. `rules` are inject.KINDS, or `kinds` of them; `model` makes
    defects too, of so many functions of each repository, and words the statements where `statement`, one of
    describe.WORDINGS, is endpoint. Beyond the target, `combined_per_repo` combinations of verified defects are tried.
    `pass_to_pass` and `hide_tests`: as in validate.Options. Tasks of one file whose changes are alike to
    `near_duplicates` are kept once; above 1 all are kept.
    """

    target: int = 0
    kinds: tuple[str, ...] = ()
    single_line: bool = False
    max_function_lines: int | None = None
    candidates_per_repo: int = 400
    per_function: int = 8
    timeout: float = 10.0
    reruns: int = 1
    statement_characters: int = 220
    at_fault: bool = False
    held_out: bool = False
    tests_may_tell: bool = False
    combined_per_repo: int = 0
    rules: bool = True
    model: endpoint.Endpoint | None = None
    judged: bool = False
    rewrites_per_repo: int = 20
    statement: str = "issue"
    hide_tests: bool = True
    pass_to_pass: int = 0
    near_duplicates: float = quality.NEAR
    seed: int = 0

    @property
    def options(self) -> validate.Options:
        """How each candidate is examined."""
        words, wording = (self.model, "issue") if self.statement == "endpoint" else (None, self.statement)
        return validate.Options(self.timeout, self.reruns, self.statement_characters, self.at_fault, self.held_out,
                                words, self.tests_may_tell, self.pass_to_pass, wording, self.hide_tests)


@dataclasses.dataclass
class _Repository:
    spec: RepositorySpec
    survey: Survey
    cells: dict[str, list[inject.Injection]]  # by kind; the next one last
    taken: int = 0


class Plan:
    """Hands out waves of candidates and learns from their verdicts."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.kinds = (settings.kinds or tuple(inject.KINDS) if settings.rules else ()) + (
            rewrite.KINDS if settings.model and settings.rewrites_per_repo else ())
        self._repositories: list[_Repository] = []
        self._per_function: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self._taken: collections.Counter[tuple[str, str]] = collections.Counter()  # by kind and repository
        self.tried: collections.Counter[str] = collections.Counter()
        self.kept: collections.Counter[str] = collections.Counter()
        self._exhausted: set[str] = set()

    def add(self, spec: RepositorySpec, survey: Survey, files: Mapping[str, str]) -> int:
        """Finds the candidates of a repository; returns how many there are."""
        cells: dict[str, list[inject.Injection]] = collections.defaultdict(list)
        seen: set[tuple[str, int, int, str]] = set()
        tests = {name.split("::")[0] for name in survey.tests}
        for path in sorted({name.split("::")[0] for name in survey.callers}):
            if not permissions.allowed(path, files, tests):
                continue  # a fix of it would not be graded
            rng = random.Random(f"{self.settings.seed}/{spec.name}/{path}")
            found = self._injections(files.get(path, ""), path, survey, rng)
            called = {name for name in {i.qualname for i in found} if callers(survey, path, name)}
            for injection in found:
                place = (path, injection.start, injection.end, injection.new)
                wanted = injection.qualname in called and place not in seen
                if wanted and (injection.single_line or not self.settings.single_line):
                    seen.add(place)
                    cells[injection.kind].append(injection)
        for kind, injections in cells.items():
            random.Random(f"{self.settings.seed}/{spec.name}/{kind}").shuffle(injections)
        self._repositories.append(_Repository(spec, survey, dict(cells)))
        return sum(map(len, cells.values()))

    def _injections(
        self, text: str, path: str, survey: Survey, rng: random.Random
    ) -> list[inject.Injection]:
        """Defects of one file by rules and by the model."""
        found: list[inject.Injection] = []
        if self.settings.rules:
            found += inject.candidates(text, path, self.settings.kinds or None, self.settings.max_function_lines, rng)
        if self.settings.model and self.settings.rewrites_per_repo:
            names = {name.split("::")[1] for name in survey.callers if name.startswith(f"{path}::")}
            share = math.ceil(self.settings.rewrites_per_repo * len(names) / max(len(survey.callers), 1))
            found += rewrite.candidates(text, path, self.settings.model, seed=self.settings.seed, limit=share,
                                        among=names)
        return found

    def next_wave(self) -> list[candidates.Candidate]:
        """The next candidates to execute; empty when the target is met or nothing is left."""
        wave: list[candidates.Candidate] = []
        level = self._level()
        heap = [(float(self.kept[kind]), number, kind) for number, kind in enumerate(self.kinds)
                if self.kept[kind] < level and kind not in self._exhausted and not self._poor(kind)]
        heapq.heapify(heap)
        while heap and len(wave) < WAVE:
            expected, number, kind = heapq.heappop(heap)
            candidate = self._take(kind)
            if candidate is None:
                self._exhausted.add(kind)
                continue
            wave.append(candidate)
            expected += (self.kept[kind] + 2) / (self.tried[kind] + 3)  # before any is tried: two in three
            if expected < level:
                heapq.heappush(heap, (expected, number, kind))
        if not wave and self._level() > level:
            return self.next_wave()  # kinds ran dry just now: the others have to give more
        return wave

    def _level(self) -> float:
        """How many tasks of each kind are wanted: kinds that have run dry leave their share to the others."""
        if not self.settings.target:
            return math.inf
        dry = [self.kept[kind] for kind in self.kinds if kind in self._exhausted or self._poor(kind)]
        level = 0
        while len(dry) < len(self.kinds) and (
            sum(min(kept, level) for kept in dry) + level * (len(self.kinds) - len(dry)) < self.settings.target
        ):
            level += 1
        return level

    def _poor(self, kind: str) -> bool:
        """Whether so few candidates of a kind become tasks that trying more is waste."""
        return bool(self.settings.target) and self.tried[kind] >= 30 and self.kept[kind] < 0.1 * self.tried[kind]

    def record(self, verdicts: Iterable[validate.Verdict]) -> None:
        """Takes note of a wave's verdicts."""
        for verdict in verdicts:
            self.tried[verdict.kind] += 1
            self.kept[verdict.kind] += verdict.task is not None

    def _take(self, kind: str) -> candidates.Candidate | None:
        """The next candidate of a kind, from the repository that has given the fewest of it."""
        limit = self.settings.candidates_per_repo
        while True:
            able = [r for r in self._repositories if r.cells.get(kind) and r.taken < limit]
            if not able:
                return None
            chosen = min(able, key=lambda r: self._taken[kind, r.spec.name])
            injection = chosen.cells[kind].pop()
            function = (chosen.spec.name, injection.path, injection.qualname)
            if self._per_function[function] >= self.settings.per_function:
                continue
            rng = random.Random(f"{self.settings.seed}/{function}/{injection.start}/{kind}")
            candidate = candidates.make_candidate(injection, chosen.spec, chosen.survey, rng)
            if candidate is not None:
                self._per_function[function] += 1
                self._taken[kind, chosen.spec.name] += 1
                chosen.taken += 1
                return candidate


def balanced(verdicts: Sequence[validate.Verdict], target: int) -> list[validate.Verdict]:
    """At most `target` kept verdicts, kinds as equal as they can be, earlier ones first; 0 means all."""
    cells: dict[str, list[validate.Verdict]] = collections.defaultdict(list)
    for verdict in verdicts:
        if verdict.task is not None:
            cells[verdict.kind].append(verdict)
    total = sum(map(len, cells.values()))
    quota = dict.fromkeys(cells, 0)
    for _ in range(min(target or total, total)):
        kind = min((kind for kind in cells if quota[kind] < len(cells[kind])), key=lambda kind: quota[kind])
        quota[kind] += 1
    chosen = {verdict.key for kind, found in cells.items() for verdict in found[: quota[kind]]}
    return [verdict for verdict in verdicts if verdict.key in chosen]
