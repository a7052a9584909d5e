"""Trajectories of many tasks over the pool of sandboxes, journalled so that a killed run continues.

One job makes all trajectories of one task in a worker process, where no JAX need be. A row of the journal is a task's
result, written when it is complete; half a row, left by a kill, is forgotten.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from qcn_jax.agents.trajectory import Trajectory
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.sandbox.base import Provider
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.journal import Rows

LOG_EVERY = 100  # tasks
_AHEAD = 16  # jobs given to the pool before their results are taken

Job = Callable[[Provider, Task, Any], list[Trajectory]]
"""A module-level function that runs in a worker: (provider, task, request) -> trajectories."""


def collect(path: pathlib.Path, tasks: Sequence[Task], job: Job, requests: Callable[[int, Task], Any], pool: EnvPool,
            log: Callable[[str], None], stopped: Callable[[], bool]) -> list[Trajectory] | None:
    """Trajectories of all tasks, in the order of `tasks` whatever was journalled when.

    Args:
      path: the journal.
      tasks: their repositories must be registered with `pool`.
      job: makes one task's trajectories.
      requests: (number, task) -> what `job` is asked for.
      pool: of environment workers.
      log: takes progress lines.
      stopped: asked after every task; True ends the collection.

    Returns:
      None when stopped. A task whose sandbox failed again and again gives no trajectories and is tried again
      by the next run.
    """
    journal = Rows(path, durable=True)
    missing = [(number, task) for number, task in enumerate(tasks) if task.instance_id not in journal.known]
    if len(missing) < len(tasks):
        log(f"resumes with {len(tasks) - len(missing)} of {len(tasks)} tasks solved before")
    failures = 0
    futures = ((task, pool.submit(_rows, job, task, requests(number, task), repository=task.repo))
               for number, task in missing)
    try:
        ahead: list[tuple[Task, Any]] = []
        for done in range(1, len(missing) + 1):
            while len(ahead) < _AHEAD and (item := next(futures, None)) is not None:
                ahead.append(item)
            task, future = ahead.pop(0)
            try:
                journal.add(task.instance_id, future.result())
            except SandboxError:
                failures += 1
            if done % LOG_EVERY == 0 or done == len(missing):
                count = sum(map(len, journal.known.values()))
                log(f"collecting: {done}/{len(missing)} tasks, {count} trajectories whose tests pass"
                    + (f", {failures} sandbox failures" if failures else ""))
            if stopped():
                pool.cancel_pending()
                return None
    finally:
        journal.close()
    return [Trajectory.from_json(row) for task in tasks for row in journal.known.get(task.instance_id, ())]


def _rows(provider: Provider, job: Job, task: Task, request: Any) -> list[dict[str, Any]]:
    return [trajectory.to_json() for trajectory in job(provider, task, request)]
