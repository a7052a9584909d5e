"""From repositories to verified tasks: survey, plan, execute in the pool, keep a journal, count yields."""

import collections
import dataclasses
import hashlib
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from qcn_jax import files
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.sandbox import repository
from qcn_jax.envs.sandbox.repository import RepositorySpec
from qcn_jax.envs.synthesis import candidates, causes, combine, plan, quality, validate
from qcn_jax.envs.synthesis.survey import Survey, take_survey
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.errors import UserError
from qcn_jax.journal import Rows

SURVEY_SECONDS = 60.0
_LOG_EVERY = 5.0  # seconds between progress lines
Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Result:
    """Verified tasks and how they came about."""

    tasks: list[Task]
    verdicts: list[validate.Verdict]
    repositories: list[RepositorySpec]  # those that could be used
    skipped: dict[str, str]  # repository: why it could not

    def yields(self) -> dict[str, dict[str, Any]]:
        """By kind: candidates executed, kept, share, seconds and processor seconds per candidate."""
        return _table(self.verdicts, lambda verdict: verdict.kind)

    def repository_yields(self) -> dict[str, dict[str, Any]]:
        """The same by repository."""
        return _table(self.verdicts, lambda verdict: verdict.repository)

    def outcomes(self) -> dict[str, int]:
        """How many candidates were kept, and why the others were not."""
        return dict(collections.Counter(verdict.outcome for verdict in self.verdicts).most_common())


def _table(
    verdicts: Sequence[validate.Verdict], group: Callable[[validate.Verdict], str]
) -> dict[str, dict[str, Any]]:
    cells: dict[str, list[validate.Verdict]] = collections.defaultdict(list)
    for verdict in verdicts:
        cells[group(verdict)].append(verdict)
    table = {}
    for name, found in sorted(cells.items()):
        kept = sum(verdict.task is not None for verdict in found)
        table[name] = {
            "candidates": len(found),
            "kept": kept,
            "yield": round(kept / len(found), 4),
            "seconds": round(sum(verdict.seconds for verdict in found) / len(found), 4),
            "cpu_seconds": round(sum(verdict.cpu for verdict in found) / len(found), 4),
        }
    return table


class Journal(Rows):
    """Verdicts by key."""

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        self.known = {key: validate.Verdict.from_json(row) for key, row in self.known.items()}

    def add(self, key: str, value: validate.Verdict) -> None:
        """Appends one verdict."""
        super().add(key, value.to_json())
        self.known[key] = value


def survey_all(
    pool: EnvPool, specs: Sequence[RepositorySpec], folder: pathlib.Path, log: Log
) -> tuple[dict[str, Survey], dict[str, str]]:
    """Surveys by repository, kept in `folder` between runs, and why the others could not be used."""
    surveys: dict[str, Survey] = {}
    skipped: dict[str, str] = {}
    pool.register(specs)

    def one(spec: RepositorySpec) -> Any:
        return spec, (None if path(spec).exists() else pool.submit(
            take_survey, spec, SURVEY_SECONDS, repository=spec.name, deadline=900.0))

    def path(spec: RepositorySpec) -> pathlib.Path:
        state = hashlib.sha256(repr(spec).encode()).hexdigest()[:12]
        return folder / f"{spec.name}.{state}.json"

    for spec, future in [one(spec) for spec in specs]:
        try:
            if future is None:
                surveys[spec.name] = Survey.from_json(files.read_json(path(spec)))
                continue
            found = surveys[spec.name] = future.result()
        except Exception as error:  # whatever is wrong with one repository, the others are none the worse
            skipped[spec.name] = str(error) if isinstance(error, UserError) else (
                f"{spec.name}: {type(error).__name__}: {error}")
            log(f"left out: {skipped[spec.name]}")
            continue
        files.write_json(path(spec), dataclasses.asdict(found))
        left_out = ""
        if found.failing + found.unstable:
            left_out = f", {found.failing} failing and {found.unstable} unstable left out"
        log(f"{spec.name}: {len(found.tests)} passing tests{left_out}; they call {len(found.callers)} functions"
            + (f" ({found.note})" if found.note else ""))
    return surveys, skipped


def synthesize(
    pool: EnvPool,
    specs: Sequence[RepositorySpec],
    settings: plan.Settings,
    workdir: str | os.PathLike[str],
    log: Log,
    label: str = "tasks",
) -> Result:
    """Makes verified tasks; resumes from the journal in `workdir` where there is one.

    Raises:
      UserError: no repository can be used, or `workdir` cannot be written.
    """
    workdir = pathlib.Path(workdir)
    surveys, skipped = survey_all(pool, specs, workdir / "surveys", log)
    usable = [spec for spec in specs if spec.name in surveys]
    if not usable:
        raise UserError(f"{label}: no repository can be used: {'; '.join(skipped.values())}")
    schedule = plan.Plan(settings)
    nothing: dict[str, str] = {}
    for spec in usable:
        members = repository.unpack(spec)
        texts = repository.text_files((name, member.data) for name, member in members.items())
        sources = {path: text for path, text in texts.items() if path.endswith(".py")}
        survey = surveys[spec.name]
        if not schedule.add(spec, survey, sources):
            called = {name.split("::")[0] for name in survey.callers}
            paths = [name.removeprefix("repo/") for name in members]
            nothing[spec.name] = causes.of_no_candidate(called, paths, sources)
    verdicts: list[validate.Verdict] = []
    sieve = quality.Sieve(settings.near_duplicates)
    tried: dict[str, candidates.Candidate] = {}
    with Journal(workdir / f"{label}.journal.jsonl") as journal:
        said = time.monotonic()

        def execute(wave: list[candidates.Candidate]) -> list[validate.Verdict]:
            nonlocal said
            start = len(verdicts)
            for verdict in _execute(pool, wave, settings, journal):
                reason = sieve.refuses(verdict.task) if verdict.task else ""
                verdicts.append(dataclasses.replace(verdict, outcome=reason, task=None) if reason else verdict)
                if time.monotonic() - said > _LOG_EVERY:
                    said = time.monotonic()
                    log(_progress(label, verdicts, settings.target))
            return verdicts[start:]

        while wave := schedule.next_wave():
            tried.update({candidate.key: candidate for candidate in wave})
            schedule.record(execute(wave))
        single = plan.balanced(verdicts, settings.target)
        if settings.combined_per_repo:
            for survey in surveys.values():
                parts = [(tried[v.key], v.task) for v in single if v.repository == survey.repository and v.task]
                execute(combine.combinations(parts, survey, settings.combined_per_repo, settings.seed))
    log(_progress(label, verdicts, settings.target))
    skipped |= {name: f"{name}: {reason}" for name, reason in _without_tasks(usable, verdicts, nothing).items()}
    for spec in usable:
        found = [verdict for verdict in verdicts if verdict.repository == spec.name]
        kept = sum(verdict.task is not None for verdict in found)
        log(skipped.get(spec.name) or f"{spec.name}: {kept} of {len(found)} candidates became tasks")
    joined = [verdict for verdict in verdicts if verdict.key not in tried]
    return Result([verdict.task for verdict in [*single, *joined] if verdict.task], verdicts, usable, skipped)


def _without_tasks(specs: Iterable[RepositorySpec], verdicts: Iterable[validate.Verdict], nothing: Mapping[str, str]
                   ) -> dict[str, str]:
    """By repository that gave no task, why: no candidate (`nothing` says why), or what became of them."""
    found: dict[str, collections.Counter[str]] = {spec.name: collections.Counter() for spec in specs}
    for verdict in verdicts:
        found[verdict.repository][verdict.outcome] += 1
    reasons = {}
    for name, outcomes in found.items():
        if not outcomes:
            reasons[name] = f"no candidate: {nothing.get(name, 'the others gave as many tasks as were asked for')}"
        elif not outcomes["kept"]:
            words = ", ".join(f"{outcome} {count}" for outcome, count in outcomes.most_common())
            reasons[name] = f"none of {outcomes.total()} candidates became a task: {words}"
    return reasons


def _execute(
    pool: EnvPool, wave: Iterable[candidates.Candidate], settings: plan.Settings, journal: Journal
) -> Iterator[validate.Verdict]:
    """Verdicts in the order of `wave`: known ones from the journal, the others from the pool."""
    options = settings.options

    def key(candidate: candidates.Candidate) -> str:
        return hashlib.sha256(f"{candidate.key}{options}".encode()).hexdigest()[:20]

    wave = list(wave)
    missing = [candidate for candidate in wave if key(candidate) not in journal.known]

    def submit(candidate: candidates.Candidate) -> Any:
        return pool.submit(validate.check, candidate, options, repository=candidate.repository)

    fresh = pool.map(submit, missing)
    for candidate in wave:
        if key(candidate) not in journal.known:
            journal.add(key(candidate), next(fresh))
        yield journal.known[key(candidate)]


def _progress(label: str, verdicts: Sequence[validate.Verdict], target: int) -> str:
    kept = sum(verdict.task is not None for verdict in verdicts)
    wanted = f" of {target}" if target else ""
    return f"{label}: {kept}{wanted} verified, {len(verdicts)} candidates executed"
