"""Several defects at once: tasks that were verified one by one, put together within one file or one module.

A module is a folder of sources. The parts change different functions; each must show by itself beside the others
(validate.py), so that fixing one of them never resolves the task.
"""

import collections
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence

from qcn_jax.envs.synthesis import candidates
from qcn_jax.envs.synthesis.survey import Survey
from qcn_jax.envs.tasks.schema import Task

FILE, MODULE = "combine_file", "combine_module"
LARGEST = 3  # parts of one combination
PART_TESTS = 12  # of each part that are run
_ATTEMPTS = 20  # to find parts that go together, for each combination that is wanted


def combinations(
    kept: Sequence[tuple[candidates.Candidate, Task]], survey: Survey, count: int, seed: int
) -> list[candidates.Candidate]:
    """At most `count` combinations of one repository's verified defects, half of them within one file.

    Args:
      kept: candidates that became tasks, and these.
      survey: of the repository.
      count: upper bound.
      seed: the same one gives the same combinations.
    """
    rng = random.Random(f"{seed}/{survey.repository}/combine")
    by_file: dict[str, list[tuple[candidates.Candidate, Task]]] = collections.defaultdict(list)
    by_module: dict[str, list[tuple[candidates.Candidate, Task]]] = collections.defaultdict(list)
    for candidate, task in kept:
        by_file[candidate.path].append((candidate, task))
        by_module[candidate.path.rpartition("/")[0]].append((candidate, task))
    modules = {name: found for name, found in by_module.items() if len({c.path for c, _ in found}) > 1}
    made: dict[str, candidates.Candidate] = {}
    for kind, groups, share in ((FILE, by_file, count - count // 2), (MODULE, modules, count // 2)):
        for candidate in itertools.islice(_of(kind, groups, survey, rng, share * _ATTEMPTS), share):
            made.setdefault(candidate.key, candidate)
    return list(made.values())


def _of(
    kind: str, groups: Mapping[str, Sequence[tuple[candidates.Candidate, Task]]], survey: Survey,
    rng: random.Random, attempts: int,
) -> Iterator[candidates.Candidate]:
    names = sorted(name for name, found in groups.items() if len(found) > 1)
    for _ in range(attempts if names else 0):
        found = groups[rng.choice(names)]
        parts = rng.sample(found, min(rng.randint(2, LARGEST), len(found)))
        files = {candidate.path for candidate, _ in parts}
        if kind == FILE or len(files) > 1:
            candidate = _join(kind, sorted(parts, key=lambda part: (part[0].path, _span(part[0]))), survey)
            if candidate is not None:
                yield candidate


def _span(candidate: candidates.Candidate) -> tuple[int, int, str]:
    """The characters of `before` that the defect replaces, and by what."""
    before, after = candidate.before, candidate.after
    limit, start = min(len(before), len(after)), 0
    while start < limit and before[start] == after[start]:
        start += 1
    tail = 0
    while tail < limit - start and before[-1 - tail] == after[-1 - tail]:
        tail += 1
    return start, len(before) - tail, after[start : len(after) - tail]


def _join(
    kind: str, parts: Sequence[tuple[candidates.Candidate, Task]], survey: Survey
) -> candidates.Candidate | None:
    """One candidate of several parts in order of their places; None where they touch the same function or text."""
    if len({(candidate.path, candidate.function) for candidate, _ in parts}) < len(parts):
        return None
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    last: dict[str, int] = {}
    for candidate, _ in reversed(parts):  # from the end, so that earlier places stay where they are
        path, (start, end, new) = candidate.path, _span(candidate)
        if end > last.get(path, len(candidate.before)):
            return None
        before[path], last[path] = candidate.before, start
        text = after.get(path, candidate.before)
        after[path] = text[:start] + new + text[end:]
    shown = tuple(tuple((*task.FAIL_TO_PASS, *task.PASS_TO_PASS)[:PART_TESTS]) for _, task in parts)
    tests = tuple(dict.fromkeys(name for names in shown for name in names))
    order = {name: number for number, name in enumerate(survey.tests)}
    known = [name for name in tests if name in order]
    (path, *others), first = before, parts[0][0]
    return candidates.Candidate(
        first.repository, first.archive_sha256, kind, path, ", ".join(c.function for c, _ in parts), before[path],
        after[path], tests=tuple(sorted(known, key=order.__getitem__)), observe=shown[0], sources=first.sources,
        callers=len(known), suite=len(survey.tests), seconds=sum(survey.seconds[order[name]] for name in known),
        strategy="combine", others=tuple((name, before[name], after[name]) for name in others),
        parts=tuple(tuple(name for name in names if name in order) for names in shown), **candidates.suite_of(survey))
