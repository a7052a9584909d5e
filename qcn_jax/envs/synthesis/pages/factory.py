"""Verified tasks of pages: defects tried in a browser, kept only if its tests tell them from the page as it was.

The counterpart of synthesize.py for repositories with page tests. Statements say what somebody did and what was to be
seen, which is what the first failing test met.
"""

import collections
import dataclasses
import hashlib
import os
import pathlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax.envs import patches
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.sandbox import repository
from qcn_jax.envs.sandbox.base import Provider, sandbox
from qcn_jax.envs.sandbox.repository import RepositorySpec
from qcn_jax.envs.sandbox.runs import TestRun
from qcn_jax.envs.synthesis import plan, quality, synthesize, validate
from qcn_jax.envs.synthesis.inject import Injection
from qcn_jax.envs.synthesis.pages import inject
from qcn_jax.envs.tasks import permissions
from qcn_jax.envs.tasks.schema import PAGES, Task
from qcn_jax.envs.web import page_tests, runtime, vendored
from qcn_jax.envs.web.page_tests import PageTest
from qcn_jax.errors import UserError

STRATEGY = "page"
SECONDS = 600.0  # of all tests of a page; what ends takes far less
DEADLINE = 3600.0
MAX_SHARE = 0.75  # of the tests: a defect that fails more has broken the page as a whole


def is_pages(spec: RepositorySpec) -> bool:
    """Whether a repository is one of pages, by its files of page tests; one that cannot be read is not."""
    try:
        return any(page_tests.is_tests(name) for name in repository.unpack(spec))
    except UserError:
        return False  # what is wrong with it is said when its tests are run


def missing(spec: RepositorySpec, kind: str) -> str:
    """Why pages of a repository cannot be opened, or built, in sandboxes of `kind`; "" where they can."""
    if reason := runtime.missing(kind):
        return reason
    texts = {name: member.data.decode("utf-8", "replace") for name, member in repository.unpack(spec).items()
             if page_tests.is_tests(name)}
    return vendored.missing(spec.modules) if page_tests.builds(page_tests.suites(texts)) else ""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A defect of one repository."""

    repository: str
    injection: Injection

    @property
    def key(self) -> str:
        """Names it in journals and in its task's id."""
        facts = repr((self.repository, self.injection.kind, self.injection.path, self.injection.after_source))
        return hashlib.sha256(facts.encode()).hexdigest()[:8]


def synthesize_pages(pool: EnvPool, specs: Sequence[RepositorySpec], settings: plan.Settings,
                     workdir: str | os.PathLike[str], log: synthesize.Log, label: str = "pages") -> synthesize.Result:
    """Makes verified tasks of pages; resumes from the journal in `workdir`.

    Args:
      pool: runs the candidates.
      specs: repositories with page tests.
      settings: `target`, `kinds` (those of pages.inject), `single_line`, `candidates_per_repo`, `reruns`,
        `hide_tests`, `near_duplicates`, `seed`.
      workdir: of the journal.
      log: takes progress lines.
      label: of the journal.
    """
    queues = []
    for spec, run in zip(specs, [pool.prepare(spec) for spec in specs], strict=True):
        members, baseline = repository.unpack(spec), run.result()
        texts = repository.text_files((name, member.data) for name, member in members.items())
        if fault := _fault(baseline):
            log(f"{spec.name}: {fault}")
        served = {path: texts[path] for path in baseline.served if path in texts}
        queues.append(collections.deque(_chosen(spec.name, served, settings)))
    order = []
    while any(queues):  # repositories in turn
        order += [queue.popleft() for queue in queues if queue]
    sieve, verdicts, kept = quality.Sieve(settings.near_duplicates), [], 0
    with synthesize.Journal(pathlib.Path(workdir) / f"{label}.journal.jsonl") as journal:
        def known(candidate: Candidate) -> str:
            facts = f"{candidate.repository}{candidate.key}{settings.reruns}{settings.hide_tests}"
            return hashlib.sha256(facts.encode()).hexdigest()[:20]

        size = 8 * max(1, settings.target // 40 + 1)
        for at in range(0, len(order), size):
            wave = order[at:at + size]
            missing = [one for one in wave if known(one) not in journal.known]
            fresh = pool.map(lambda one: pool.submit(check, one, settings.reruns, settings.hide_tests,
                                                     repository=one.repository, deadline=DEADLINE), missing)
            for one in wave:
                if known(one) not in journal.known:
                    journal.add(known(one), next(fresh))
                verdict = journal.known[known(one)]
                reason = sieve.refuses(verdict.task) if verdict.task else ""
                verdicts.append(dataclasses.replace(verdict, outcome=reason, task=None) if reason else verdict)
                kept += verdicts[-1].task is not None
            log(f"{label}: {kept}{f' of {settings.target}' if settings.target else ''} verified, {len(verdicts)} "
                "candidates executed")
            if settings.target and kept >= settings.target:
                break
    tasks = [verdict.task for verdict in verdicts if verdict.task is not None]
    return synthesize.Result(tasks[:settings.target or None], verdicts, list(specs), {})


def _fault(baseline: TestRun) -> str:
    """Which tests fail on pages as they are, and why the first does."""
    failed = [name for name, outcome in baseline.outcomes.items() if outcome != "passed"]
    if baseline.status == "ok" and not failed:
        return ""
    first = f": {failed[0]}: {baseline.messages.get(failed[0], '')}" if failed else ""
    return (f"{len(failed)} of {len(baseline.outcomes)} tests fail on the pages as they are"
            f"{f' ({baseline.status})' * (baseline.status != 'ok')}{first}")


def _chosen(name: str, texts: Mapping[str, str], settings: plan.Settings) -> list[Candidate]:
    """Candidates of the files that a repository's pages are made of, kinds in turn."""
    rng = random.Random(f"{settings.seed}/{name}")
    kinds = [kind for kind in settings.kinds if kind in inject.KINDS]
    cells: dict[str, list[Injection]] = collections.defaultdict(list)
    for path, text in sorted(texts.items()):
        if not permissions.page_refusal(path):
            for found in inject.candidates(text, path, kinds, rng):
                if found.single_line or not settings.single_line:
                    cells[found.kind].append(found)
    for cell in cells.values():
        rng.shuffle(cell)
    chosen = []
    while any(cells.values()) and len(chosen) < settings.candidates_per_repo:
        chosen += [Candidate(name, cells[kind].pop()) for kind in sorted(cells) if cells[kind]]
    return chosen[:settings.candidates_per_repo]


def check(provider: Provider, candidate: Candidate, reruns: int, hide_tests: bool) -> validate.Verdict:
    """Tries a defect: some tests must fail that pass on the page as it was, the same ones every time."""
    one, seconds = candidate.injection, 0.0
    prepared = provider.prepared[candidate.repository]
    passing = [name for name, outcome in prepared.baseline.outcomes.items() if outcome == "passed"]
    runs = []
    for _ in range(1 + reruns):
        with sandbox(provider, candidate.repository, {one.path: one.after_source}, role="grading") as place:
            runs.append(place.run_tests(passing, timeout=SECONDS))
        seconds += runs[-1].seconds
        if runs[-1].status != "ok" or "failed" not in runs[-1].outcomes.values():
            break
    failing = [name for name in passing if runs[0].outcomes.get(name) == "failed"]
    outcome = "kept"
    if any(run.status != "ok" for run in runs):
        outcome = next(run.status for run in runs if run.status != "ok")
    elif not failing:
        outcome = "survived"
    elif any(run.outcomes != runs[0].outcomes for run in runs):
        outcome = "unstable"
    elif len(failing) > MAX_SHARE * len(passing):
        outcome = "breaks_the_page"
    task = None
    if outcome == "kept":
        task = _task(candidate, prepared.files, passing, failing, runs[0].messages, hide_tests)
    return validate.Verdict(candidate.key, candidate.repository, one.kind, outcome, round(seconds, 4), 0.0, task)


def _task(candidate: Candidate, files: Mapping[str, str], passing: Sequence[str], failing: Sequence[str],
          messages: Mapping[str, str], hide_tests: bool) -> Task:
    one = candidate.injection
    suites = page_tests.suites(files)
    tests = {f"{path}::{test.name}": test for path, suite in suites.items() for test in suite.tests}
    before, after = {one.path: one.before_source}, {one.path: one.after_source}
    gone: dict[str, str] = {}
    if hide_tests:
        for path in {name.split("::")[0] for name in failing}:
            names = {name.split("::", 1)[1] for name in failing if name.startswith(f"{path}::")}
            gone[path] = page_tests.without(suites[path], names).to_text()
    whole = {path: files[path] for path in gone}
    name = candidate.repository.replace(":", "-").replace("==", "-")
    task = Task(
        instance_id=f"{name}.{STRATEGY}.{one.kind}__{candidate.key}", repo=candidate.repository,
        base_commit=hashlib.sha256(one.after_source.encode()).hexdigest()[:40], patch=patches.make_diff(after, before),
        test_patch=patches.make_diff(gone, whole) if gone else "",
        problem_statement=statement(tests[failing[0]], messages[failing[0]]), FAIL_TO_PASS=tuple(failing),
        PASS_TO_PASS=tuple(one for one in passing if one not in failing), strategy=STRATEGY, kind=one.kind,
        bug_patch=patches.make_diff({**before, **whole}, {**after, **gone}), path=one.path,
        function=one.qualname, timeout=SECONDS, language=PAGES)
    return quality.scored(task)


def statement(test: PageTest, message: str) -> str:
    """What somebody did on a page and then saw, from a failing test and what it says ("step 3: ...")."""
    number, _, seen = message.removeprefix("step ").partition(": ")
    done = [words for step in test.steps[:max(int(number) - 1, 0)] if (words := _action(step))]
    place = f"I opened {test.page} in a window of {test.width} pixels"
    did = f"{place}, then: {'; '.join(done)}." if done else f"{place}."
    return f"{did} Now {seen}.".replace("\n", " ")


def _action(step: Mapping[str, Any]) -> str:
    name = next(iter(step))
    value = step[name]
    if name in ("click", "hover"):
        return f"{name} {target(value)}"
    if name == "type":
        return f"type “{value}” into {target(step['into'])}"
    if name == "select":
        return f"choose “{value}” from {target(step['from'])}"
    return {"press": f"press {value}", "open": f"go to {value}", "resize": f"make the window {value} pixels wide"
            }.get(name, "")


def target(where: Mapping[str, Any]) -> str:
    """An element in words, as the driver says it."""
    if "role" in where:
        return f"{where['role']} “{where.get('name', '')}”"
    return f"field “{where['label']}”" if "label" in where else f"text “{where['text']}”" if "text" in where else \
        f"element {where['css']}"
