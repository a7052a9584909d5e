"""Tasks from history: pull requests and commits that fix something and bring tests, by SWE-bench's criteria.

A change of the main line counts where it resolves a linked issue, touches sources and tests, and where, by execution,
some of its tests fail before the fix and pass after it. The issue's text, cleaned, is the statement; without an
issue's text the statement tells which of the change's tests fail, and how.
"""

import collections
import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

from qcn_jax.envs import patches
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.sandbox.repository import RepositorySpec
from qcn_jax.envs.synthesis import quality
from qcn_jax.envs.synthesis.mine import execute, issues
from qcn_jax.envs.synthesis.mine.history import Change, Clone
from qcn_jax.envs.synthesis.mine.split import Split, size, split
from qcn_jax.envs.tasks import permissions, suite
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.errors import UserError
from qcn_jax.journal import Rows

ANCHOR_SPAN = 40  # changes that share one prepared state; the others' files are laid over it
SHORTEST_TEXT = 40  # characters of an issue that can serve as a statement (SWE-bench: 40 words were asked of its users)
_LOG_EVERY = 20  # changes
Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Criteria:
    """Which changes are tried; the defaults are SWE-bench's.

    `need_issue`: a linked issue; `max_lines` bounds the fix; `limit` newest changes are tried (0: all); `timeout` in
    seconds for one run of the change's test files; `reruns` further runs of both states; `setup` and `python_path` as
    of RepositorySpec.
    """

    need_issue: bool = True
    max_lines: int = 1000
    limit: int = 0
    timeout: float = 60.0
    reruns: int = 1
    setup: tuple[str, ...] = ()
    python_path: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Mined:
    """Tasks of one clone; `outcomes` counts all changes of its main line by what became of them.

    `archives` is the folder of the tasks' starting states, for `--repo` of later commands.
    """

    name: str
    tasks: list[Task]
    outcomes: dict[str, int]
    details: dict[str, str]  # by commit: why a change that was executed is no task
    archives: pathlib.Path


@dataclasses.dataclass(frozen=True)
class _Candidate:
    change: Change
    parts: Split
    patch: str = ""
    test_patch: str = ""


def mine(
    pool: EnvPool, source: str | os.PathLike[str], criteria: Criteria, workdir: str | os.PathLike[str], log: Log,
    tracker: str = "",
) -> Mined:
    """Mines a local clone; resumes from the journal in `workdir`.

    Args:
      pool: executes.
      source: the clone.
      criteria: what counts.
      workdir: journal and archives.
      log: takes progress lines.
      tracker: a JSON export of issues and pull requests, `github` for its API, or "" for neither.

    Raises:
      UserError: no clone, a bad export, no token, or a setup that fails.
    """
    clone, workdir = Clone(source), pathlib.Path(workdir)
    archives = workdir / "archives"
    known: issues.Tracker | None = None
    if tracker == "github":
        known = issues.GitHub(clone.owner, clone.name, workdir / "github")
    elif tracker:
        known = issues.Export(tracker)
    outcomes: collections.Counter[str] = collections.Counter()
    details: dict[str, str] = {}
    chosen = _choose(clone, criteria, known, outcomes)
    log(f"{clone.name}: {len(chosen)} of {len(chosen) + outcomes.total()} changes are candidates")
    if criteria.setup and chosen:
        _set_up(pool, clone.archive(chosen[0].change.base, archives), criteria.setup)
    tasks = []
    with Rows(workdir / f"{clone.name}.mined.jsonl") as journal:
        for candidate, finding in _execute(pool, clone, chosen, criteria, archives, journal, log):
            task = _task(clone, candidate, finding, known, archives) if finding.outcome == "kept" else None
            outcome = finding.outcome if task or finding.outcome != "kept" else "statement_tells_fix"
            outcomes[outcome] += 1
            if task is not None:
                if task.instance_id in {known.instance_id for known in tasks}:  # several commits of one pull request
                    task = dataclasses.replace(task, instance_id=_commit_id(clone, candidate.change))
                tasks.append(task)
            else:
                details[candidate.change.commit] = f"{outcome}: {finding.detail}" if finding.detail else outcome
    return Mined(clone.name, tasks, dict(outcomes.most_common()), details, archives)


def _set_up(pool: EnvPool, spec: RepositorySpec, setup: tuple[str, ...]) -> None:
    """Prepares the first state with its `setup`, so that a command that fails ends the run and not every change."""
    try:
        pool.prepare(dataclasses.replace(spec, setup=setup)).result()
    except SandboxError as error:
        raise UserError(f"--setup: {error}") from error


def _choose(
    clone: Clone, criteria: Criteria, known: issues.Tracker | None, outcomes: collections.Counter[str]
) -> list[_Candidate]:
    """Changes worth executing, newest first; the others are counted by reason."""
    chosen: list[_Candidate] = []
    for change in clone.changes():
        linked = _linked(change, known)
        if criteria.limit and len(chosen) >= criteria.limit:
            outcomes["not_tried"] += 1
            continue
        try:
            parts = split(clone, change)
            reason = _unfit(parts, criteria.need_issue and not linked)
            before = {} if reason else clone.text_files(change.base)
        except UserError:  # too large, or objects are missing, which says nothing about other changes
            reason = "unreadable"
        if reason:
            outcomes[reason] += 1
            continue
        fix = {path: text for path, text in parts.fix.items() if permissions.allowed(path, before, set(parts.tests))}
        if len(fix) < len(parts.fix):  # a new file, say, whose place the whole fix explains
            found = suite.find(parts.fix, before)
            fix = {path: text for path, text in parts.fix.items()
                   if permissions.allowed(path, before, set(parts.tests), found)}
        if not fix or len(fix) < len(parts.fix):
            outcomes["not_gradable"] += 1
        elif size(before, fix) > criteria.max_lines:
            outcomes["too_large"] += 1
        elif permissions.forbidden_lines(fix, before):
            outcomes["not_gradable"] += 1
        else:
            patch, test_patch = execute.as_patch(before, fix), execute.as_patch(before, parts.tests)
            chosen.append(_Candidate(dataclasses.replace(change, linked=linked), parts, patch, test_patch))
    return chosen


def _unfit(parts: Split, lacks_issue: bool) -> str:
    """Why a change is not worth executing; "" where it is."""
    has_tests = any(path.endswith(".py") and text is not None for path, text in parts.tests.items())
    return ("no_source_change" if not parts.fix else "no_test_change" if not has_tests
            else "no_linked_issue" if lacks_issue else "binary" if parts.binary else "")


def _linked(change: Change, known: issues.Tracker | None) -> tuple[int, ...]:
    """Issues that a change closes, by its messages and, where they are known, by its pull request's words."""
    linked = dict.fromkeys(change.linked)
    if known is not None:
        pull = known.get(change.number) if change.number else None
        if pull is not None:
            linked |= dict.fromkeys(issues.closing(f"{pull.title}\n{pull.body}"))
        # A number that is a pull request is no issue.
        linked = {number: None for number in linked if (item := known.get(number)) is not None and not item.is_pull}
    linked.pop(change.number, None)
    return tuple(linked)


def _execute(
    pool: EnvPool, clone: Clone, chosen: Sequence[_Candidate], criteria: Criteria, archives: pathlib.Path,
    journal: Rows, log: Log,
) -> Iterator[tuple[_Candidate, execute.Finding]]:
    """(candidate, finding) in order: known findings from the journal, the others from the pool."""
    anchors: dict[str, tuple[RepositorySpec, dict[str, str]]] = {}

    def key(candidate: _Candidate) -> str:
        facts = (candidate.change.commit, candidate.patch, candidate.test_patch, criteria.timeout, criteria.reruns,
                 *criteria.setup, *(criteria.python_path or ()))
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:20]

    def submit(pair: tuple[int, _Candidate]) -> Future:
        number, candidate = pair
        first = number - number % ANCHOR_SPAN
        before = clone.text_files(candidate.change.base)
        place = "src" if any(path.startswith("src/") for path in before) else "."
        name = f"{first}/{place}"
        if name not in anchors:
            anchors.clear()
            spec = dataclasses.replace(clone.archive(candidate.change.base, archives), setup=criteria.setup,
                                       python_path=criteria.python_path)
            pool.register([spec])
            anchors[name] = spec, before
        spec, anchor = anchors[name]
        item = execute.Item(spec.name, key(candidate), execute.difference(anchor, before), candidate.parts.tests,
                            candidate.parts.fix)
        return pool.submit(execute.examine, item, criteria.timeout, criteria.reruns, repository=spec.name,
                           deadline=300.0 + 12 * criteria.timeout)

    missing = [(n, candidate) for n, candidate in enumerate(chosen) if key(candidate) not in journal.known]
    futures = pool.map(lambda pair: _settled(submit(pair)), missing)
    done = 0
    for candidate in chosen:
        name = key(candidate)
        if name not in journal.known:
            found = next(futures)
            if isinstance(found, SandboxError):  # says nothing about the change: tried again by the next run
                finding = execute.Finding(name, "infrastructure", str(found))
            else:
                finding = found
                journal.add(name, dataclasses.asdict(found))
        else:
            finding = execute.Finding.from_json(journal.known[name])
        done += 1
        if done % _LOG_EVERY == 0 or done == len(chosen):
            log(f"{clone.name}: {done} of {len(chosen)} candidates executed")
        yield candidate, finding


def _settled(future: Future) -> Future:
    """A future that gives the SandboxError of `future` instead of raising it, so that one change ends no run."""
    settled: Future = Future()

    def copy(done: Future) -> None:
        if done.cancelled():  # the pool is closing
            settled.cancel()
            return
        error = done.exception()
        if error is None or isinstance(error, SandboxError):
            settled.set_result(done.result() if error is None else error)
        else:
            settled.set_exception(error)

    future.add_done_callback(copy)
    return settled


def _task(
    clone: Clone, candidate: _Candidate, finding: execute.Finding, known: issues.Tracker | None, archives: pathlib.Path
) -> Task | None:
    """The task of a kept change; None where its statement would tell the fix."""
    change = candidate.change
    texts = [item for number in change.linked if known is not None and (item := known.get(number)) is not None]
    body = "\n\n".join(issues.cleaned(f"{item.title}\n\n{item.body}", candidate.patch) for item in texts)
    text = body if len(body) >= SHORTEST_TEXT else observed(change, finding, candidate.patch)
    if not text:
        return None
    spec = clone.archive(change.base, archives)
    name = f"{_project(clone)}-{change.number}" if change.number else _commit_id(clone, change)
    paths = patches.touched(candidate.patch)
    return quality.scored(Task(
        instance_id=name, repo=spec.name, base_commit=change.base, patch=candidate.patch,
        test_patch=candidate.test_patch, problem_statement=text, FAIL_TO_PASS=finding.fail_to_pass,
        PASS_TO_PASS=finding.pass_to_pass, created_at=change.date, version=clone.version(change.base),
        environment_setup_commit=change.base, strategy="mine", kind="pull_request" if change.number else "commit",
        path=paths[0] if len(paths) == 1 else "", timeout=finding.timeout))


def _project(clone: Clone) -> str:
    return f"{clone.owner}__{clone.name}" if clone.owner else clone.name


def _commit_id(clone: Clone, change: Change) -> str:
    return f"{_project(clone)}.{change.commit[:8]}"


def observed(change: Change, finding: execute.Finding, patch: str) -> str:
    """A statement from what was seen: the change's subject without hints at the fix, and its failing tests."""
    title = issues.cleaned(change.title, patch)
    lines = [re.sub(r"^(?:fix(?:e[sd])?|add(?:s|ed)?)\b:?\s*", "", title, flags=re.IGNORECASE), ""] if title else []
    lines.append("These tests of the new behaviour fail:" if len(finding.fail_to_pass) > 1
                 else "This test of the new behaviour fails:")
    for name in finding.fail_to_pass[:8]:
        words = finding.messages.get(name) or finding.messages.get(name.split("::")[0], "")
        lines.append(f"- {name}" + (f": {words.split(' | ')[0]}" if words else ""))
    if len(finding.fail_to_pass) > 8:
        lines.append(f"- and {len(finding.fail_to_pass) - 8} more")
    return issues.cleaned("\n".join(lines), patch)
