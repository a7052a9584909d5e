"""Tasks as readers see them: false and unreadable statements, tests, what is given away; and a destructive patch.

    python benchmarks/statements.py --out=bench/statements [--candidates=40] [--sample=25 --docs=docs/tasks.md]

Six source distributions from PyPI that no configuration uses. A statement is false where its program, run again, gives
something else than it says or the same with the fix; unreadable by describe.UNREADABLE. A destructive patch mends the
defect of a humanize task and lets six other public functions of humanize return None: it must not resolve. Seconds
are of all runs of candidates' tests. An interrupted call goes on from its journals. With `--docs`, that many tasks of
three of the repositories, both drawn by a seed, are written into a page between its marks.
"""

import ast
import collections
import pathlib
import random
import re
import statistics
import time

from absl import app, flags

from qcn_jax import files
from qcn_jax.envs import patches
from qcn_jax.envs.sandbox import make_provider
from qcn_jax.envs.sandbox.base import sandbox
from qcn_jax.envs.synthesis import describe, issue, make_tasks, plan, sources
from qcn_jax.envs.tasks import grading, hidden
from qcn_jax.envs.tasks.schema import write_tasks

REPOS = ("geographiclib==2.1", "itsdangerous==2.2.0", "humanize==4.9.0", "mistletoe==1.6.0", "tenacity==9.2.1",
         "num2words==0.5.14")
SHOWN = 3  # repositories on the page
START, END = "<!-- tasks: begin -->", "<!-- tasks: end -->"
_REPOS = flags.DEFINE_list("repos", list(REPOS), "Repositories.")
_OUT = flags.DEFINE_string("out", "bench/statements", "Folder of tasks, journal and summary.")
_CANDIDATES = flags.DEFINE_integer("candidates", 40, "Executed of each repository.", lower_bound=1)
_WORKERS = flags.DEFINE_integer("workers", 1, "Candidates side by side.", lower_bound=1)
_SANDBOX = flags.DEFINE_enum("sandbox", "local", ["auto", "docker", "local"], "Where code runs.")
_SAMPLE = flags.DEFINE_integer("sample", 25, "Tasks on the page.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draw of the page's repositories and tasks.")
_DOCS = flags.DEFINE_string("docs", "", "Page that takes the sample.")


def false(provider, task):
    """What a task's statement says and is not so."""
    programs = issue.programs(task.problem_statement)
    if not programs:
        return ""
    start = grading.tested_changes(task, provider.files(task.repo))
    fixed = {**start, **patches.apply_changes(grading.Layered(provider.files(task.repo), start), task.patch)}
    found = []
    for state in (start, fixed):
        with sandbox(provider, task.repo, state) as place:
            found.append(issue.repeat(place, programs, task.timeout))
    return issue.falsehood(task.problem_statement, *found)


def destructive(provider, task, count=6):
    """A patch that mends a task's defect and empties `count` public functions of other files of the package."""
    pristine = provider.files(task.repo)
    start = {**pristine, **grading.starting_changes(task, pristine)}
    fixed = patches.apply_changes(start, task.patch)
    changed, emptied = dict(fixed), []
    for path in sorted(path for path in pristine if path.startswith("src/") and path.endswith(".py")):
        lines = changed.get(path, pristine[path]).split("\n")
        nodes = [node for node in ast.parse("\n".join(lines)).body if isinstance(node, ast.FunctionDef)]
        for node in reversed(nodes):
            if not node.name.startswith("_") and node.name not in task.problem_statement and len(emptied) < count:
                lines.insert(node.body[0].lineno - 1, " " * node.body[0].col_offset + "return None")
                emptied.append(node.name)
        changed[path] = "\n".join(lines)
    return patches.make_diff({path: start[path] for path in changed}, changed), emptied


def page(tasks):
    """The sample as Markdown."""
    rng = random.Random(_SEED.value)
    shown = rng.sample(_REPOS.value, min(SHOWN, len(_REPOS.value)))
    chosen = [task for task in tasks if task.repo in shown]
    chosen = rng.sample(chosen, min(_SAMPLE.value, len(chosen)))
    lines = [START, ""]
    for number, task in enumerate(sorted(chosen, key=lambda task: (task.repo, task.instance_id)), 1):
        lines += ["<details>", f"<summary>{number}. {task.repo}, {task.kind}: FAIL_TO_PASS {len(task.FAIL_TO_PASS)}, "
                  f"PASS_TO_PASS {len(task.PASS_TO_PASS)}, localisation {task.localisation}</summary>", "",
                  *(f"> {line}".rstrip() for line in task.problem_statement.split("\n")), "", "</details>", ""]
    return "\n".join([*lines, END])


def main(argv):
    """Makes the tasks, counts, prints."""
    del argv
    out = pathlib.Path(_OUT.value)
    settings = plan.Settings(candidates_per_repo=_CANDIDATES.value, statement_characters=1500, tests_may_tell=True,
                             held_out=True)
    tasks, yields, rows, faults = [], {}, collections.defaultdict(list), []
    for name in _REPOS.value:  # each continues from its own journal
        started = time.monotonic()
        made, yields[name] = make_tasks.make_tasks(make_tasks.Request(
            [name], out / name, settings=settings, sandbox=_SANDBOX.value, workers=_WORKERS.value))
        tasks, yields[name]["wall_seconds"] = tasks + made, round(time.monotonic() - started, 1)
    write_tasks(out / "tasks.jsonl", tasks)
    with make_provider(_SANDBOX.value, str(files.cache_folder("sandbox"))) as provider:
        for name in _REPOS.value:
            provider.prepare(sources.locate(name))
        for task in tasks:
            wrong, unreadable = false(provider, task), describe.unreadable(task.problem_statement)
            named = issue.names(task.problem_statement, issue.test_names(task.FAIL_TO_PASS))
            rows[task.repo].append((task, bool(wrong), bool(unreadable), named))
            faults += [f"{task.instance_id}: {fault}" for fault in (wrong, unreadable) if fault]
        humanize = [task for task in tasks if task.repo.startswith("humanize")]
        about = next((task for task in humanize if "`clamp`" in task.problem_statement), next(iter(humanize), None))
        if about:
            patch, emptied = destructive(provider, about)
            verdict = grading.Grader(provider, fail_fast=True).grade(about, patch)
            print(f"destructive patch ({about.instance_id}; {', '.join(emptied)} return None): {verdict.outcome}")
    print("| repository | candidates | seconds | tasks | false | unreadable | test named | without PASS_TO_PASS | median PASS_TO_PASS "
          "| with a program | tests hidden | localisation |\n" + "|---" * 12 + "|")
    for name, found in sorted(rows.items()):
        these = [task for task, *_ in found]
        row = yields[name]["repositories"][name]
        print(f"| {name} | {row['candidates']} | {row['candidates'] * row['seconds']:.0f} | {len(found)} | {sum(row[1] for row in found)} | "
              f"{sum(row[2] for row in found)} | {sum(row[3] for row in found)} | "
              f"{sum(not task.PASS_TO_PASS for task in these)} | "
              f"{statistics.median(len(task.PASS_TO_PASS) for task in these):.0f} | "
              f"{sum(bool(issue.programs(task.problem_statement)) for task in these)} | "
              f"{sum(map(hidden.takes_out, these))} | {statistics.mean(task.localisation for task in these):.2f} |")
    outcomes = sum((collections.Counter(found["outcomes"]) for found in yields.values()), collections.Counter())
    print(f"{len(tasks)} tasks with {_WORKERS.value} workers; outcomes: {dict(outcomes)}")
    print("\n".join(faults))
    files.write_json(out / "summary.json", {"repositories": yields, "faults": faults})
    if _DOCS.value:
        path = pathlib.Path(_DOCS.value)
        files.write_text(path, re.sub(f"(?s){re.escape(START)}.*{re.escape(END)}", lambda _: page(tasks),
                                      path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    app.run(main)
