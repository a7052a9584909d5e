"""Honest patches, right and wrong: is any called an exploit, and what do verdicts and tasks cost beside an earlier commit?

    git worktree add --detach /tmp/before 396fadd
    python benchmarks/honest_patches.py --out=bench/honest --before=/tmp/before [--tasks=50]

Tasks are made from six source distributions of PyPI, in turns: a defect that a rule puts in, and all tests of the suite.
Both checkouts grade the same patches in turns, each in a process of its own; the earlier one those of every third task:

    gold       the known fix
    rewritten  of every third task: the known fix, its whole file written anew by ast.unparse
    wrong      in turn the known fix with another task's defect, or the defective file written anew, defect and all

Every test that passes on the fixed repository must pass, so that what is right and what is wrong is known. Libraries
that pytest itself imports are graded by this checkout alone: the earlier one cannot run them. At the end both make tasks
by `qcn synthesize` from the same candidates. A run that was killed goes on where it stopped; `--tables` only prints what is there. The exit status is 0 if every right
patch resolves, no wrong one does and none is called an exploit; verdicts that were others before are listed.
"""

import ast
import collections
import math
import pathlib
import statistics
import subprocess
import sys
import time

import _grading_side
import tqdm
from absl import app, flags

from qcn_jax import files
from qcn_jax.envs import patches
from qcn_jax.envs.sandbox import make_provider
from qcn_jax.envs.sandbox.base import sandbox
from qcn_jax.envs.synthesis import plan, sources
from qcn_jax.envs.synthesis.survey import take_survey
from qcn_jax.envs.tasks.grading import Layered, starting_changes
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.errors import UserError
from qcn_jax.journal import Rows

REPOS = ("simpleeval==1.0.8", "h11==0.16.0", "isodate==0.7.2", "schema==0.7.8", "voluptuous==0.16.0", "xmltodict==1.0.4")
NEAR = ("pluggy==1.6.0", "packaging==24.2")
KINDS = {"gold": "resolved", "rewritten": "resolved", "wrong": "unresolved"}  # and what they must be
REWRITTEN = EARLIER = 3  # every so many
# Statements and what agents see decide nothing here; the earlier commit knows one way for both.
NEW_FLAGS = ("--statement=observed", "--nohide_tests")
COLUMNS = ("suspected_exploit", "infrastructure", "patch_failed")
_OUT = flags.DEFINE_string("out", "bench/honest", "Folder of tasks and verdicts.")
_BEFORE = flags.DEFINE_string("before", "", "Checkout of the earlier commit; empty: this one alone.")
_REPOS = flags.DEFINE_list("repos", list(REPOS), "Requirements.")
_NEAR = flags.DEFINE_list("near", list(NEAR), "Requirements of what pytest is made of or extended by.")
_TASKS = flags.DEFINE_integer("tasks", 50, "Of each repository; of those near pytest a fifth.", lower_bound=1)
_MINUTES = flags.DEFINE_float("minutes", 0.0, "After which no task is begun; 0: no limit.", lower_bound=0.0)
_YIELD = flags.DEFINE_integer("yield_candidates", 40, "Candidates of each that both synthesize; 0: none.", lower_bound=0)
_YIELD_REPOS = flags.DEFINE_list("yield_repos", list(REPOS[:2]), "Of these repositories.")
_TABLES = flags.DEFINE_bool("tables", False, "Print the tables of what is there, and grade nothing.")
_SANDBOX = flags.DEFINE_enum("sandbox", "local", ["auto", "docker", "local"], "Where code runs.")
_HERE = pathlib.Path(__file__).resolve().parent


class Side(_grading_side.Side):
    """A checkout of this package, which makes tasks and grades patches in processes of its own."""

    def __init__(self, name, checkout):
        super().__init__(checkout, pathlib.Path(_OUT.value, name), _SANDBOX.value)
        self.name, self.prepared = name, set()

    def synthesize(self, requirement):
        """What `qcn synthesize` says of a repository's first candidates."""
        out = self.folder / f"{requirement}.jsonl"
        if not pathlib.Path(f"{out}.yields.json").exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([sys.executable, "-m", "qcn_jax", "synthesize", f"--repo={requirement}", f"--out={out}",
                            f"--candidates_per_repo={_YIELD.value}", f"--sandbox={_SANDBOX.value}", "--noheld_out",
                            "--workers=1", *(NEW_FLAGS if self.name == "now" else ())],
                           cwd=self.checkout, env=self.environment, stdout=subprocess.DEVNULL, check=True)
        return files.read_json(f"{out}.yields.json")


def rewritten(text):
    """A file as ast.unparse writes it: without comments, other quotes, other line breaks."""
    return ast.unparse(ast.parse(text)) + "\n"


class Source:
    """A repository that gives one task after the other: a rule's defect, and the tests of the suite that it breaks."""

    def __init__(self, provider, requirement, journal):
        self.requirement, self.spec, self._provider, self._journal = requirement, sources.locate(requirement), provider, journal
        survey = take_survey(provider, self.spec)
        self.pristine = provider.files(self.spec.name)
        schedule = plan.Plan(plan.Settings(candidates_per_repo=8 * _TASKS.value, per_function=4))
        schedule.add(self.spec, survey, {path: text for path, text in self.pristine.items() if path.endswith(".py")})
        self._candidates, self.tasks = iter(schedule.next_wave()), []
        self._passing = [*survey.tests, *survey.slow]  # without those that disagree, or whose ids do not last

    def next_task(self):
        """A task that was not there before; None where there are no more."""
        for candidate in self._candidates:
            if candidate.key not in self._journal.known:
                self._journal.add(candidate.key, self._made(candidate))
            if self._journal.known[candidate.key] is not None:
                self.tasks.append(Task.from_json(self._journal.known[candidate.key]))
                return self.tasks[-1]
        return None

    def _made(self, candidate):
        with sandbox(self._provider, self.spec.name, candidate.after_files, role="grading") as place:
            run = place.run_tests(self._passing, 60.0)
        failing = [name for name in self._passing if run.outcomes.get(name) != "passed"]
        if run.status != "ok" or run.tampered or not 0 < len(failing) < len(self._passing):
            return None
        bug = patches.make_diff(candidate.before_files, candidate.after_files)
        return Task(f"{self.spec.name}.{candidate.kind}.{candidate.key[:8]}", self.spec.name, "", patches.reverse(bug), "", "x",
                    tuple(failing), tuple(name for name in self._passing if name not in failing), bug_patch=bug,
                    kind=candidate.kind, path=candidate.path, timeout=60.0).to_json()


def patches_of(number, source):
    """{kind: patch} of a source's task."""
    task, pristine = source.tasks[number], source.pristine
    start = Layered(pristine, starting_changes(task, pristine))
    fixed = patches.apply_changes(start, task.patch)
    right = {**fixed, task.path: rewritten(fixed[task.path])}
    other = next((one for one in source.tasks[number - 1::-1] if number and set(one.FAIL_TO_PASS) & set(task.PASS_TO_PASS)),
                 None)
    if number % 2 and other is not None:
        wrong = {**fixed, **patches.apply_changes(pristine, other.bug_patch)}
    else:
        wrong = {task.path: rewritten(start[task.path])}
    kinds = {"rewritten": right} if number % REWRITTEN == 0 else {}
    return {"gold": task.patch} | {kind: patches.make_diff({path: start.get(path) for path in after}, after)
                                   for kind, after in {**kinds, "wrong": wrong}.items()}


def grade(source, number, sides, verdicts):
    """Has sides grade the patches of a source's task."""
    for kind, patch in patches_of(number, source).items():
        for side in sides if number % 2 else sides[::-1]:
            key = f"{side.name}/{source.requirement}/{number}/{kind}"
            if key not in verdicts.known:
                if source.requirement not in side.prepared:
                    side.ask({"name": source.spec.name, "archive": source.spec.archive})
                    side.prepared.add(source.requirement)
                verdicts.add(key, side.ask({"task": source.tasks[number].to_json(), "patch": patch}))


def table(requirements, side, verdicts):
    """Markdown: what became of a side's patches, and rows that are not as they must be."""
    lines = ["| repository | tasks | gold resolved | rewritten resolved | wrong resolved | "
             + " | ".join(COLUMNS) + " | other |", "|---" * (6 + len(COLUMNS)) + "|"]
    faults, sums = [], collections.Counter()
    for requirement in requirements:
        found = collections.Counter()
        for key, row in verdicts.items():
            name, repo, task, kind = key.split("/")
            if (name, repo) == (side, requirement):
                found[kind, row["outcome"]] += 1
                if row["outcome"] != KINDS[kind]:
                    faults.append(f"{key}: {row['outcome']} {row['caught']} {row['detail'][:200]}")
        by_outcome = collections.Counter()
        for (_, outcome), number in found.items():
            by_outcome[outcome] += number
        cells = [sum(number for (kind, _), number in found.items() if kind == "gold"),
                 *(found[kind, "resolved"] for kind in KINDS), *(by_outcome[name] for name in COLUMNS),
                 found.total() - sum(by_outcome[name] for name in (*COLUMNS, "resolved", "unresolved"))]
        sums.update(dict(enumerate(cells)))
        lines.append(f"| {requirement} | " + " | ".join(map(str, cells)) + " |")
    lines.append("| all | " + " | ".join(str(sums[number]) for number in range(4 + len(COLUMNS) + 1)) + " |")
    return "\n".join(lines), faults


def costs(sides, verdicts):
    """Markdown: seconds of a verdict by kind of patch, and those of this checkout beside the earlier one."""
    lines = ["| seconds of a verdict, median (90 %) | " + " | ".join(KINDS) + " |", "|---" * (1 + len(KINDS)) + "|"]
    known = {key.partition("/")[2] for key in verdicts if key.startswith(f"{sides[-1].name}/")}
    for side in sides:
        cells = []
        for kind in KINDS:
            took = sorted(verdicts[f"{side.name}/{key}"]["seconds"] for key in known if key.endswith(f"/{kind}"))
            cells.append(f"{statistics.median(took):.2f} ({took[int(0.9 * len(took))]:.2f})" if took else "-")
        lines.append(f"| {side.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def yields(sides):
    """Markdown: what became of candidates, and seconds of each, by side."""
    lines = ["| `qcn synthesize` | tasks | candidates | yield | sandbox seconds a candidate | outcomes |", "|---" * 6 + "|"]
    for side in sides:
        found = [side.synthesize(requirement) for requirement in _YIELD_REPOS.value]
        rows = [row for one in found for row in one["kinds"].values()]
        tried, kept = sum(row["candidates"] for row in rows), sum(row["kept"] for row in rows)
        seconds = sum(row["candidates"] * row["seconds"] for row in rows)
        outcomes = sum((collections.Counter(one["outcomes"]) for one in found), collections.Counter())
        lines.append(f"| {side.name} | {kept} | {tried} | {kept / tried:.0%} | {seconds / tried:.2f} | "
                     + ", ".join(f"{name} {number}" for name, number in outcomes.most_common()) + " |")
    return "\n".join(lines)


def run(sides, verdicts, tasks):
    """Makes tasks of all repositories in turns and has them graded, until there are enough or time is over."""
    over = time.monotonic() + 60 * _MINUTES.value if _MINUTES.value else math.inf
    with make_provider(_SANDBOX.value, str(pathlib.Path(_OUT.value, "making").resolve())) as provider:
        known = {}
        for name in (*_REPOS.value, *_NEAR.value):
            try:
                known[name] = Source(provider, name, tasks)
            except UserError as error:
                print(error, file=sys.stderr)
        for number in tqdm.trange(_TASKS.value, desc="tasks of each", file=sys.stderr):
            for name, source in known.items():
                near = name in _NEAR.value
                if time.monotonic() < over and not (near and number >= _TASKS.value // 5) and source.next_task():
                    grade(source, number, sides if not near and number % EARLIER == 0 else sides[:1], verdicts)


def main(argv):
    """Makes tasks, grades, prints the tables."""
    del argv
    sides, out = [Side("now", _HERE.parent)] + ([Side("before", _BEFORE.value)] if _BEFORE.value else []), pathlib.Path(_OUT.value)
    try:
        with Rows(out / "verdicts.jsonl") as verdicts, Rows(out / "tasks.jsonl") as tasks:
            if not _TABLES.value:
                run(sides, verdicts, tasks)
            known = verdicts.known
        text, faults = table([*_REPOS.value, *_NEAR.value], "now", known)
        print(text)
        for side in sides[1:]:
            text, there = table(_REPOS.value, side.name, known)
            print(f"\n{side.name}:\n{text}\n" + "\n".join(there))
        changed = [f"{key}: {row['outcome']}, now {known['now' + key[6:]]['outcome']}" for key, row in known.items()
                   if key.startswith("before/") and row["outcome"] != known.get("now" + key[6:], row)["outcome"]]
        print(f"\nverdicts that are others now: {len(changed)}\n" + "\n".join(changed))
        print(f"\n{costs(sides, known)}\n" + (f"\n{yields(sides)}\n" if _YIELD.value else ""))
    finally:
        for side in sides:
            side.close()
    print("\n".join(faults) or "no verdict is another one than it must be")
    return 1 if faults else 0


if __name__ == "__main__":
    app.run(main)
