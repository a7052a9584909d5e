"""The plan: waves that do not depend on timing, balance of kinds and repositories, bounds."""

import collections
import dataclasses

import pytest

from qcn_jax.envs.sandbox.repository import RepositorySpec
from qcn_jax.envs.synthesis import inject, plan, validate
from qcn_jax.envs.synthesis.survey import Survey
from qcn_jax.envs.tasks.schema import Task
from tests.envs.synthesis.small import SOURCE


def make_plan(settings, names=("a==1", "b==1"), copies=4):
    """A plan over repositories that hold several copies of the small module, all called by one test."""
    made = plan.Plan(settings)
    files = {f"pkg/m{i}.py": SOURCE for i in range(copies)}
    names_called = ("clamp", "mean", "Stack.push", "Stack.pop", "countdown", "unused")
    callers = {f"{path}::{name}": (0,) for path in files for name in names_called}
    for name in names:
        survey = Survey(name, ("tests/t.py::t",), (0.01,), callers, (3,), 0, 0)
        made.add(RepositorySpec(name, ""), survey, files)
    return made


def play(made, keep):
    """Executes a plan with `keep(candidate)` in the place of tests; returns candidates and verdicts."""
    executed, verdicts = [], []
    while wave := made.next_wave():
        found = [
            validate.Verdict(c.key, c.repository, c.kind, "kept" if keep(c) else "survived", 0.1, 0.1,
                             Task(c.key, c.repository, "", "", "", "", (), (), kind=c.kind) if keep(c) else None)
            for c in wave
        ]  # fmt: skip
        made.record(found)
        executed += wave
        verdicts += found
    return executed, verdicts


def test_same_on_every_run_and_seeded():
    runs = [play(make_plan(plan.Settings(target=40, seed=seed)), lambda c: True)[0] for seed in (0, 0, 1)]
    keys = [[c.key for c in run] for run in runs]
    assert keys[0] == keys[1] != keys[2] and len(set(keys[0])) == len(keys[0])


def test_balance():
    """Kinds with a low yield get more candidates; repositories take turns; the target is met exactly."""
    kinds = ("change_constant", "wrong_variable", "flip_comparison")
    settings = plan.Settings(target=24, kinds=kinds, per_function=50)
    executed, verdicts = play(make_plan(settings), lambda c: c.kind != "wrong_variable" or int(c.key, 16) % 3 == 0)
    kept = collections.Counter(v.kind for v in plan.balanced(verdicts, 24))
    tried = collections.Counter(c.kind for c in executed)
    assert sum(kept.values()) == 24 and max(kept.values()) - min(kept.values()) <= 1
    assert tried["wrong_variable"] > 1.5 * tried["flip_comparison"]
    of_kind = collections.Counter(c.repository for c in executed if c.kind == "flip_comparison")
    assert abs(of_kind["a==1"] - of_kind["b==1"]) <= 1


def test_bounds():
    executed, _ = play(make_plan(plan.Settings(candidates_per_repo=30, per_function=4)), lambda c: False)
    assert max(collections.Counter(c.repository for c in executed).values()) == 30
    assert max(collections.Counter((c.repository, c.path, c.function) for c in executed).values()) <= 4
    everything, _ = play(make_plan(plan.Settings(candidates_per_repo=10**6, per_function=10**6)), lambda c: True)
    edits = {(c.repository, c.path, c.after) for c in everything}
    assert len(edits) == len(everything) and all(c.kind in inject.KINDS for c in everything)
    single, _ = play(make_plan(plan.Settings(candidates_per_repo=10**6, single_line=True)), lambda c: True)
    assert 0 < len(single) < len(everything)
    assert all(c.after.count("\n") == c.before.count("\n") for c in single)


def test_balanced_trims_the_most_frequent_kinds():
    rows = [validate.Verdict(str(i), "a", kind, "kept", 0, 0, Task(str(i), *[""] * 5, (), ())) for i, kind in
            enumerate("xxxxxyyz")]  # fmt: skip
    dropped = dataclasses.replace(rows[0], key="no", outcome="survived", task=None)
    assert [v.key for v in plan.balanced([dropped, *rows], 5)] == ["0", "1", "5", "6", "7"]
    assert plan.balanced(rows, 0) == rows


def test_files_that_no_fix_may_touch():
    """Defects are put only where a grader accepts a patch."""
    made = plan.Plan(plan.Settings())
    survey = Survey("a==1", ("t.py::t",), (0.01,), {"setup.py::mean": (0,), "pkg/m.py::mean": (0,)}, (1,), 0, 0)
    files = {"setup.py": SOURCE, "pkg/m.py": SOURCE}
    assert made.add(RepositorySpec("a==1", ""), survey, files) > 0
    assert {c.path for c in made.next_wave()} == {"pkg/m.py"}


@pytest.mark.parametrize("kinds", [("add_not",), ()])
def test_nothing_left(kinds):
    made = plan.Plan(plan.Settings(target=5, kinds=kinds))
    assert made.next_wave() == []


def test_kinds_that_run_dry_leave_their_share_to_the_others():
    """drop_guard has two places in the small module; the target is still met, and no more than it is kept."""
    settings = plan.Settings(target=30, kinds=("break_continue", "drop_guard", "wrong_variable"), per_function=99)
    _, verdicts = play(make_plan(settings, names=("a==1",), copies=1), lambda c: True)
    kept = collections.Counter(v.kind for v in verdicts)
    assert kept["break_continue"] == 0 and 0 < kept["drop_guard"] < 10
    assert len(plan.balanced(verdicts, 30)) == min(30, sum(kept.values())) and kept["wrong_variable"] >= 10
