"""Which training tasks teach by imitation and which by reward: two sets that share no function."""

import hashlib
from collections.abc import Iterable

from qcn_jax.envs.tasks.schema import Task

SFT_SHARE = 0.5  # of the functions


def split_tasks(tasks: Iterable[Task], seed: int) -> tuple[list[Task], list[Task]]:
    """(tasks for SFT, tasks for RL and distillation), each in the given order.

    The report keeps SFT and RL prompts disjoint. Tasks of one function go to the same side, or RL would meet
    functions whose repair SFT has shown. The side depends on the function and the seed alone.
    """
    imitation, reward = [], []
    for task in tasks:
        name = f"{seed} {task.repo} {task.path} {task.function or task.instance_id}"
        fraction = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
        (imitation if fraction < SFT_SHARE else reward).append(task)
    return imitation, reward
