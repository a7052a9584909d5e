"""Seconds of a verdict by how many tests PASS_TO_PASS holds: callers of the defective function, a sample, all.

    git worktree add --detach /tmp/before 396fadd
    python benchmarks/verdict_seconds.py [--repos=tabulate==0.10.0,webob==1.8.11] [--each=4] [--before=/tmp/before]

For each task, one worker and one verdict after the other: the gold patch (resolved), a patch that changes nothing that
matters (unresolved, by its first failing test), and a patch that mends the defect and empties another function of the
file (unresolved, by tests that do not call the defective function). Verdicts stop at the first failure, as rewards do.
The first verdict of a task, in which a second opinion is learned, is told apart. With --before an earlier commit, which knew
callers alone, grades the same patches in turns with these; the last lines are how many times its seconds the sample's
are: the median over all tasks for each kind, and the sums where half of the patches are right and half useless.
"""

import ast
import dataclasses
import pathlib
import random
import statistics
import tempfile
import time

import _grading_side
from absl import app, flags

from qcn_jax.envs import patches
from qcn_jax.envs.sandbox import make_provider
from qcn_jax.envs.synthesis import candidates, plan, sources, validate
from qcn_jax.envs.synthesis.survey import take_survey
from qcn_jax.envs.tasks import grading
from qcn_jax.recipes.nano import repositories

REPOS = ("tabulate==0.10.0", "boltons==26.2.0", "webob==1.8.11", "ijson==3.6.0", "marko==2.2.4")
_REPOS = flags.DEFINE_list("repos", list(REPOS), "Requirements of configs/nano.py's repositories.")
_EACH = flags.DEFINE_integer("each", 4, "Tasks of each.", lower_bound=1)
_SAMPLE = flags.DEFINE_integer("sample", 40, "Tests of the sample.", lower_bound=1)
_BEFORE = flags.DEFINE_string("before", "", "Checkout of an earlier commit; empty: none.")
_SANDBOX = flags.DEFINE_enum("sandbox", "local", ["auto", "docker", "local"], "Where code runs.")


def tasks(provider, name):
    """(task, tests that call its function) of a repository."""
    (pinned,) = repositories.pinned(name)
    spec = sources.locate(pinned)
    survey = take_survey(provider, spec)
    schedule = plan.Plan(plan.Settings(candidates_per_repo=12 * _EACH.value))
    texts = {path: text for path, text in provider.files(spec.name).items() if path.endswith(".py")}
    schedule.add(spec, survey, texts)
    options, found = validate.Options(tests_may_tell=True), 0
    for candidate in schedule.next_wave():
        task = validate.check(provider, candidate, options).task
        if task is not None:
            yield candidate, task
            found += 1
            if found == _EACH.value:
                return


def with_fewer(candidate, task, count):
    """The task with its callers and `count` others in PASS_TO_PASS, drawn as synthesis draws them; None: all."""
    own = set(candidate.tests)
    rest = [name for name in task.PASS_TO_PASS if name not in own]
    if count is not None:
        rest = candidates.spread([name for name in rest if name not in candidate.slow], count, random.Random(0))
    return dataclasses.replace(task, PASS_TO_PASS=tuple(name for name in task.PASS_TO_PASS if name in own or name in rest))


def patches_of(candidate):
    """Right, useless and destructive ones."""
    start, right = candidate.after_files, candidate.before
    broken = right
    for node in ast.walk(ast.parse(right)):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.name not in candidate.function:
            lines = right.split("\n")
            lines.insert(node.body[0].lineno - 1, " " * node.body[0].col_offset + "return None")
            broken = "\n".join(lines)
            break
    return {"resolved": patches.make_diff(start, {candidate.path: right}),
            "useless": patches.make_diff(start, {candidate.path: start[candidate.path] + "\n# nothing\n"}),
            "destructive": patches.make_diff(start, {candidate.path: broken})}


def main(argv):
    """Prints a table."""
    del argv
    sample = f"{_SAMPLE.value} others"
    variants, shares = {"callers": 0, sample: _SAMPLE.value, "all": None}, []
    if _BEFORE.value:
        variants = {"before": 0} | variants
    print(f"{'repository':<18}{'PASS_TO_PASS':<14}{'tests':>6}{'learned':>9}{'resolved':>10}{'useless':>9}{'destructive':>13}")
    for name in _REPOS.value:
        rows = {variant: [] for variant in variants}
        with tempfile.TemporaryDirectory() as folder, make_provider(_SANDBOX.value, folder) as provider:
            grader = grading.Grader(provider, fail_fast=True)
            side = _grading_side.Side(_BEFORE.value or ".", pathlib.Path(folder, "before"), _SANDBOX.value, "fail_fast")
            if _BEFORE.value:
                spec = sources.locate(repositories.pinned(name)[0])
                side.ask({"name": spec.name, "archive": spec.archive})
            for candidate, task in tasks(provider, name):
                for variant, count in variants.items():
                    less = with_fewer(candidate, task, count)
                    took, outcomes = {}, {}
                    for kind, patch in [("learned", patches_of(candidate)["resolved"]), *patches_of(candidate).items()]:
                        started = time.monotonic()
                        outcomes[kind] = side.ask({"task": less.to_json(), "patch": patch})["outcome"] if (
                            variant == "before") else grader.grade(less, patch).outcome
                        took[kind] = time.monotonic() - started
                    rows[variant].append((len(less.PASS_TO_PASS), took, outcomes))
            side.close()
        if _BEFORE.value:
            shares += [{kind: (now[kind], before[kind]) for kind in now} for (_, now, _), (_, before, _) in zip(
                rows[sample], rows["before"], strict=True)]
        for variant, found in rows.items():
            cells = "".join(f"{statistics.median(took[kind] for _, took, _ in found):>{width}.2f}" for kind, width in
                            (("learned", 9), ("resolved", 10), ("useless", 9), ("destructive", 13)))
            ends = {kind: sum(outcomes[kind] == "resolved" for *_, outcomes in found) for kind in found[0][2]}
            print(f"{name:<18}{variant:<14}{statistics.median(count for count, *_ in found):>6.0f}{cells}"
                  f"   resolved of {len(found)}: {ends['resolved']}, {ends['useless']}, {ends['destructive']}", flush=True)
    if shares:
        print(f"{sample}, times the seconds before: " + ", ".join(
            f"{kind} {statistics.median(share[kind][0] / share[kind][1] for share in shares):.2f}" for kind in shares[0]))
        now, before = (sum(share[kind][side] for share in shares for kind in ("resolved", "useless")) for side in (0, 1))
        print(f"half of them right, half useless, seconds of all tasks together: {now:.2f} / {before:.2f} = {now / before:.2f}")


if __name__ == "__main__":
    app.run(main)
