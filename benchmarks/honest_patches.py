"""Honest patches, right and wrong: is any called an exploit, and what do verdicts and tasks cost beside an earlier commit?

    git worktree add --detach /tmp/before 396fadd
    python benchmarks/honest_patches.py --out=bench/honest --before=/tmp/before [--tasks=50]

Tasks are made from six source distributions of PyPI by `qcn synthesize`, by this checkout and by the earlier one. On
those of this checkout both grade the same patches, one after the other in turns, each in a process of its own:

    gold       the known fix
    rewritten  of every third task: the known fix, its whole file written anew by ast.unparse
    wrong      in turn the known fix with another task's defect, or the defective file written anew, defect and all

Every test that passes on the fixed repository must pass, so that what is right and what is wrong is known. Libraries
that pytest itself imports, and a plugin of its, follow under this checkout alone: the earlier one cannot run the former.
A run that was killed goes on where it stopped. The exit status is 0 if every right patch resolves and no wrong one does,
none is called an exploit, and no verdict is another one than before.
"""

import ast
import collections
import json
import os
import pathlib
import statistics
import subprocess
import sys

import tqdm
from absl import app, flags

from qcn_jax import files
from qcn_jax.envs import patches
from qcn_jax.envs.sandbox import repository
from qcn_jax.envs.synthesis import sources
from qcn_jax.envs.tasks.grading import Layered, starting_changes
from qcn_jax.envs.tasks.schema import read_tasks
from qcn_jax.journal import Rows

REPOS = ("simpleeval==1.0.8", "h11==0.16.0", "isodate==0.7.2", "schema==0.7.8", "voluptuous==0.16.0", "xmltodict==1.0.4")
NEAR = ("pluggy==1.6.0", "iniconfig==2.0.0", "pytest-mock==3.14.0")
KINDS = {"gold": "resolved", "rewritten": "resolved", "wrong": "unresolved"}  # and what they must be
REWRITTEN = 3
# Statements and what agents see decide nothing here; the earlier commit knows one way for both.
NEW_FLAGS = ("--statement=observed", "--nohide_tests")
COLUMNS = ("suspected_exploit", "infrastructure", "patch_failed")
_OUT = flags.DEFINE_string("out", "bench/honest", "Folder of tasks and verdicts.")
_BEFORE = flags.DEFINE_string("before", "", "Checkout of the earlier commit; empty: this one alone.")
_REPOS = flags.DEFINE_list("repos", list(REPOS), "Requirements.")
_NEAR = flags.DEFINE_list("near", list(NEAR), "Requirements of what pytest is made of or extended by.")
_TASKS = flags.DEFINE_integer("tasks", 50, "Of each repository; of those near pytest a fifth.", lower_bound=1)
_SANDBOX = flags.DEFINE_enum("sandbox", "local", ["auto", "docker", "local"], "Where code runs.")
_HERE = pathlib.Path(__file__).resolve().parent


class Side:
    """A checkout of this package, which makes tasks and grades patches in processes of its own."""

    def __init__(self, name, checkout):
        self.name, self.checkout, self.process = name, pathlib.Path(checkout).resolve(), None
        self.folder = pathlib.Path(_OUT.value, name).resolve()
        self.environment = os.environ | {"PYTHONPATH": str(self.checkout), "XDG_CACHE_HOME": str(self.folder / "cache")}

    def make_tasks(self, requirement, count):
        """Makes `count` tasks of a repository, or finds those made before; returns their file and the yields."""
        out = self.folder / f"{requirement}.jsonl"
        if not pathlib.Path(f"{out}.yields.json").exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([sys.executable, "-m", "qcn_jax", "synthesize", f"--repo={requirement}", f"--out={out}",
                            f"--count={count}", f"--sandbox={_SANDBOX.value}", "--noheld_out", "--workers=1",
                            *(NEW_FLAGS if self.name == "now" else ())],
                           cwd=self.checkout, env=self.environment, stdout=subprocess.DEVNULL, check=True)
        return out, files.read_json(f"{out}.yields.json")

    def ask(self, row):
        """The answer of this side's grader."""
        if self.process is None:
            state = self.folder / "cache" / "qcn_jax" / "sandbox"
            self.process = subprocess.Popen([sys.executable, _HERE / "_grading_side.py", _SANDBOX.value, state],
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environment)
        self.process.stdin.write((json.dumps(row) + "\n").encode())
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        """Ends the grader."""
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def rewritten(text):
    """A file as ast.unparse writes it: without comments, other quotes, other line breaks."""
    return ast.unparse(ast.parse(text)) + "\n"


def patches_of(number, task, tasks, pristine):
    """{kind: patch} of the task at `number`."""
    start = Layered(pristine, starting_changes(task, pristine))
    fixed = patches.apply_changes(start, task.patch)
    right = {**fixed, task.path: rewritten(fixed[task.path])}
    other = next((one for one in tasks[number + 1:] + tasks[:number]
                  if set(one.FAIL_TO_PASS) <= set(task.PASS_TO_PASS)), None)
    if number % 2 and other is not None:
        bug = [file for file in patches.parse(other.bug_patch) if file.path == other.path]
        wrong = {**fixed, **patches.apply_changes(pristine, bug)}
    else:
        wrong = {task.path: rewritten(start[task.path])}
    kinds = {"rewritten": right} if number % REWRITTEN == 0 else {}
    return {"gold": task.patch} | {kind: patches.make_diff({path: start.get(path) for path in after}, after)
                                   for kind, after in {**kinds, "wrong": wrong}.items()}


def grade(requirement, sides, verdicts, count):
    """Has all sides grade the patches of a repository's tasks; returns how many tasks there are."""
    path, _ = sides[0].make_tasks(requirement, count)
    tasks = read_tasks(path)[:count]
    spec = sources.locate(requirement)
    pristine = repository.text_files((name, member.data) for name, member in repository.unpack(spec).items())
    prepared = set()
    for number, task in enumerate(tqdm.tqdm(tasks, desc=requirement, unit="task", file=sys.stderr)):
        for kind, patch in patches_of(number, task, tasks, pristine).items():
            for side in sides if number % 2 else sides[::-1]:
                key = f"{side.name}/{requirement}/{task.instance_id}/{kind}"
                if key not in verdicts.known:
                    if side.name not in prepared:
                        side.ask({"name": spec.name, "archive": spec.archive})
                        prepared.add(side.name)
                    verdicts.add(key, side.ask({"task": task.to_json(), "patch": patch}))
    return len(tasks)


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
    lines = ["| synthesis | tasks | candidates | yield | sandbox seconds a candidate | outcomes |", "|---" * 6 + "|"]
    for side in sides:
        found = [side.make_tasks(requirement, _TASKS.value) for requirement in _REPOS.value]
        rows = [row for _, one in found for row in one["kinds"].values()]
        tried, kept = sum(row["candidates"] for row in rows), sum(row["kept"] for row in rows)
        seconds = sum(row["candidates"] * row["seconds"] for row in rows)
        outcomes = sum((collections.Counter(one["outcomes"]) for _, one in found), collections.Counter())
        made = sum(len(path.read_text(encoding="utf-8").splitlines()) for path, _ in found)
        lines.append(f"| {side.name} | {made} | {tried} | {kept / tried:.0%} | {seconds / tried:.2f} | "
                     + ", ".join(f"{name} {number}" for name, number in outcomes.most_common()) + " |")
    return "\n".join(lines)


def main(argv):
    """Makes tasks, grades, prints the tables."""
    del argv
    sides = [Side("now", _HERE.parent)] + ([Side("before", _BEFORE.value)] if _BEFORE.value else [])
    try:
        with Rows(pathlib.Path(_OUT.value, "verdicts.jsonl")) as verdicts:
            for requirement in _REPOS.value:
                grade(requirement, sides, verdicts, _TASKS.value)
            for requirement in _NEAR.value:
                grade(requirement, sides[:1], verdicts, max(_TASKS.value // 5, 1))
            known = verdicts.known
            text, faults = table([*_REPOS.value, *_NEAR.value], "now", known)
            print(text)
            for side in sides[1:]:
                text, there = table(_REPOS.value, side.name, known)
                print(f"\n{side.name}:\n{text}\n" + "\n".join(there))
            faults += [f"{key}: {row['outcome']}, now {known['now' + key[6:]]['outcome']}" for key, row in known.items()
                       if key.startswith("before/") and row["outcome"] != known["now" + key[6:]]["outcome"]]
            print(f"\n{costs(sides, known)}\n\n{yields(sides)}\n")
    finally:
        for side in sides:
            side.close()
    print("\n".join(faults) or "no verdict is another one than it must be, or than before")
    return 1 if faults else 0


if __name__ == "__main__":
    app.run(main)
