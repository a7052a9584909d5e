"""Trajectories of the scripted solver over the pool of sandboxes, journalled so that a killed run continues.

One job makes all trajectories of one task in a worker process (this module imports no JAX for its sake). A row of
the journal is a task's result, written when it is complete; half a row, left by a kill, is forgotten.
"""

import dataclasses
import pathlib
import random
from collections.abc import Callable, Sequence
from typing import Any

from qcn_jax.recipes.nano import heuristic, solver
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.sandbox.base import Provider
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.agents.scaffolds import Scaffold
from qcn_jax.agents.trajectory import Trajectory
from qcn_jax.recipes.nano.scaffold import NANO
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.agents.workspace import ProviderRunner, Remembering, TestRunner, open_overlay
from qcn_jax.journal import Rows

MAX_WRONG = 3  # edits that the tests refute, in trajectories that show a recovery
LOG_EVERY = 100  # tasks


@dataclasses.dataclass(frozen=True)
class Request:
    """One trajectory wanted: how the task is presented, how many wrong edits come first, whose guesses they may be.

    guesses: (line, old, new) of edits, see `solver.solve`.
    search: the trajectory looks for the defect (`heuristic.search`) instead of knowing it.
    """

    scaffold: Scaffold
    seed: int
    wrong: int = 0
    guesses: tuple[tuple[int, str, str], ...] = ()
    search: bool = False


def plan(task: Task, number: int, seed: int, multi_turn: int, recovery: float, templates: Sequence[str],
         guesses: Sequence[tuple[int, str, str]] = (), searches: int = 0) -> list[Request]:
    """What is asked of the solver for one task: multi-turn, single-turn, and one tool-call template in turn.

    Args:
      task: whose id, with `seed`, decides which of the trajectories recover.
      number: its place in the list of tasks; templates are taken in turn.
      multi_turn: trajectories with tools and test runs.
      recovery: share of those with wrong edits first.
      templates: of the format scaffold; none leaves it out.
      guesses: edits that a model proposed; each multi-turn trajectory takes its wrong edits from them in another order.
      searches: trajectories that look for the defect, each trying the guesses in another order.
    """
    rng = random.Random(f"{seed} {task.instance_id}")
    requests = []
    for index in range(multi_turn):
        wrong = rng.randint(1, MAX_WRONG) if rng.random() < recovery else 0
        ours = rng.sample(list(guesses), len(guesses)) if wrong else []
        requests.append(Request(NANO, seed + index, wrong, tuple(map(tuple, ours))))
    for index in range(searches):
        ours = rng.sample(list(guesses), len(guesses)) if index else guesses
        requests.append(Request(NANO, seed + index, guesses=tuple(map(tuple, ours)), search=True))
    requests.append(Request(NANO.single(), seed))
    if templates:
        requests.append(Request(NANO.in_template(templates[number % len(templates)]), seed))
    return requests


def act(provider: Provider, task: Task, requests: Sequence[Request]) -> list[dict[str, Any]]:
    """Runs in a worker: the trajectories of one task that ended with passing tests, as JSON-ready rows.

    The same tests on the same files run once, however many trajectories come to that state.
    """
    runner = Remembering(ProviderRunner(provider, task.repo))
    made = (_make(provider, task, request, runner) for request in requests)
    return [trajectory.to_json() for trajectory in made if trajectory is not None]


def _make(provider: Provider, task: Task, request: Request, runner: TestRunner) -> Trajectory | None:
    scaffold, guesses = request.scaffold, [solver.SpanEdit(*guess) for guess in request.guesses]
    if request.search:
        workspace = open_overlay(task, provider.files(task.repo), runner)
        return heuristic.search(task, scaffold.executor(task, workspace), guesses)
    return solver.solve_with(provider, task, scaffold, seed=request.seed, wrong=request.wrong, guesses=guesses,
                             runner=runner)


def collect(path: pathlib.Path, tasks: Sequence[Task], requests: Callable[[int, Task], list[Request]], pool: EnvPool,
            log: Callable[[str], None], stopped: Callable[[], bool]) -> list[Trajectory] | None:
    """Trajectories of all tasks, in the order of `tasks` whatever was journalled when.

    Args:
      path: the journal.
      tasks: their repositories must be registered with `pool`.
      requests: (number, task) -> what is wanted of it.
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
    futures = ((task, pool.submit(act, task, requests(number, task), repository=task.repo))
               for number, task in missing)
    try:
        ahead: list[tuple[Task, Any]] = []
        for done in range(1, len(missing) + 1):
            while len(ahead) < 16 and (item := next(futures, None)) is not None:
                ahead.append(item)
            task, future = ahead.pop(0)
            try:
                journal.add(task.instance_id, future.result())
            except SandboxError:
                failures += 1
            if done % LOG_EVERY == 0 or done == len(missing):
                count = sum(map(len, journal.known.values()))
                log(f"solver: {done}/{len(missing)} tasks, {count} trajectories whose tests pass"
                    + (f", {failures} sandbox failures" if failures else ""))
            if stopped():
                pool.cancel_pending()
                return None
    finally:
        journal.close()
    return [Trajectory.from_json(row) for task in tasks
            for row in journal.known.get(task.instance_id, ())]
