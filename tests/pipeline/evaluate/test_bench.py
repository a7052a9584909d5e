"""Choosing tasks and conversations for evaluation."""

import collections
import dataclasses
import types

from qcn_jax.envs.tasks.schema import Task
from qcn_jax.pipeline.evaluate import bench
from qcn_jax.pipeline.experts import experts_of
from qcn_jax.pipeline.stages import evaluate
from qcn_jax.recipes.nano.heuristic import HEURISTIC


def _task(name, kind):
    return Task(name, "r", "", "", "", "", ("t",), (), kind=kind)


TASKS = [_task(f"a{i}", "a") for i in range(30)] + [_task(f"b{i}", "b") for i in range(4)] + [_task("c0", "c")]


def test_kinds_are_balanced_as_far_as_they_go():
    chosen = bench.balanced(TASKS, 13, seed=0)
    assert collections.Counter(task.kind for task in chosen) == {"a": 8, "b": 4, "c": 1}
    assert collections.Counter(task.kind for task in bench.balanced(TASKS, 4, seed=0)) == {"a": 2, "b": 1, "c": 1}
    assert len({task.instance_id for task in chosen}) == 13


def test_choice_depends_on_the_seed_and_not_on_the_order_of_the_file():
    assert bench.balanced(TASKS, 9, seed=3) == bench.balanced(TASKS[::-1], 9, seed=3)
    assert bench.balanced(TASKS, 9, seed=3) != bench.balanced(TASKS, 9, seed=4)
    assert len(bench.balanced(TASKS, 1000, seed=0)) == len(TASKS)


def test_messages_of_parts_become_text():
    parts = [{"type": "text", "text": "a\n"}, {"type": "text", "text": "<|1|>b", "special": True}]
    assert bench.plain_messages([{"role": "user", "content": parts}, {"role": "tool", "content": "ok"}]) \
        == [{"role": "user", "content": "a\n<|1|>b"}, {"role": "tool", "content": "ok"}]


def _measured(solved, turns):
    messages = {task: [{"role": "user", "content": "?"}] + [{"role": "assistant", "content": "!"}] * turns[task]
                for task in solved}
    return {"solved": solved, "messages": messages, "rate": 0.5}


def test_shown_trajectories_hold_gains_recoveries_and_failures():
    expert = _measured({"a": True, "b": True, "c": False}, {"a": 2, "b": 5, "c": 3})
    sft = _measured({"a": True, "b": False, "c": False}, {"a": 2, "b": 4, "c": 3})
    models = {"heuristic": _measured({"a": True}, {"a": 2}), "sft": sft, "expert_swe": expert, "unified": expert}
    fake = types.SimpleNamespace(tasks=[dataclasses.replace(_task(name, "k")) for name in "ab"], experts=experts_of(["swe"]),
                                 own_tasks=lambda: {"c": _task("c", "stdio")})
    shown = evaluate.choose_trajectories(models, fake, HEURISTIC)
    assert (shown[0]["model"], shown[0]["instance_id"]) == ("expert_swe", "b")  # the longest way to a success
    pairs = [(one["model"], one["instance_id"], one["resolved"]) for one in shown]
    assert ("sft", "b", False) in pairs and ("expert_swe", "c", False) in pairs and ("heuristic", "a", True) in pairs
    assert len(set(pairs)) == len(pairs)
    alone = {"base": sft, "expert_swe": expert}  # neither SFT nor distillation was run
    shown = evaluate.choose_trajectories(alone, fake, None, "base")
    assert {(one["model"], one["instance_id"]) for one in shown} >= {("expert_swe", "b"), ("base", "b")}
