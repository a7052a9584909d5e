"""SFT's trajectories: the scripted solver's, with and without mistakes, and searches. Workers import it: no JAX."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qcn_jax.agents import collecting
from qcn_jax.agents.scaffolds import SCAFFOLDS, Scaffold
from qcn_jax.agents.trajectory import Trajectory
from qcn_jax.agents.workspace import ProviderRunner, Remembering, TestRunner, open_overlay
from qcn_jax.config import ChatSource, RunConfig, from_config_dict
from qcn_jax.envs.sandbox.base import Provider
from qcn_jax.envs.tasks.schema import PAGES, Task
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.trajectories import TrajectorySource
from qcn_jax.recipes.nano import heuristic, solver
from qcn_jax.recipes.nano.scaffold import NanoScaffold

if TYPE_CHECKING:
    from qcn_jax.pipeline.context import StageContext

MAX_WRONG = 3  # edits on which tests fail, in trajectories that show a recovery


@dataclasses.dataclass(frozen=True)
class Options:
    """What the source's `options` may hold."""

    per_task: int = 2  # trajectories with several turns of a task
    recovery: float = 0.5  # share of trajectories with wrong edits first
    searches: int = 0  # trajectories per task that look for the defect without knowing it, failed edits learned too
    guesses: int = 0  # edits per task sampled from the mid-trained model; recoveries begin with its wrong ones


class Scripted(TrajectorySource):
    """Trajectories of `solver` and `heuristic.search`; the tasks are shown as the configured scaffold shows them."""

    def check(self, config: RunConfig, source: ChatSource, field: str) -> None:
        """See ChatReader."""
        options(source, field)
        scaffold_of(config)
        if source.path:
            raise UserError(f"{field}.path: {source.path!r}; kind {source.kind} acts on the run's tasks and has no use "
                            "for it")

    def collect(
        self, context: "StageContext", source: ChatSource, tasks: Sequence[Task], stopped: Callable[[], bool]
    ) -> list[Trajectory] | None:
        """See TrajectorySource."""
        chosen, scaffold, guessed = options(source), scaffold_of(context.config), {}
        if chosen.guesses:
            from qcn_jax.recipes.nano import guesses

            guessed = guesses.propose(context, scaffold, tasks, chosen.guesses)
        requests = lambda number, task: plan(
            task, number, context.config.seed, chosen, scaffold, context.templates(),
            guessed.get(task.instance_id, ()))
        return collecting.collect(context.root / "sft" / "trajectories.jsonl", tasks, act, requests, context.pool(),
                                  context.log, stopped)


SCRIPTED = Scripted()


def options(source: ChatSource, field: str = "--config.sft.sources") -> Options:
    """Reads the options of a source.

    Raises:
      UserError: one that is unknown, of another type or out of range.
    """
    found = from_config_dict(Options, source.options, f"{field.removeprefix('--')}.options")
    if not 0 <= found.recovery <= 1:
        raise UserError(f"{field}.options.recovery: {found.recovery}; allowed: 0 to 1")
    for name in ("per_task", "searches", "guesses"):
        if getattr(found, name) < 0:
            raise UserError(f"{field}.options.{name}: {getattr(found, name)}; allowed: at least 0")
    if not found.per_task + found.searches:
        raise UserError(f"{field}.options.per_task: 0, as is searches; there would be nothing to learn from")
    return found


def scaffold_of(config: RunConfig) -> NanoScaffold:
    """The configured scaffold; raises UserError for one that the solver cannot play."""
    scaffold = SCAFFOLDS.resolve(config.sft.scaffold, "--config.sft.scaffold")
    if not isinstance(scaffold, NanoScaffold):
        raise UserError(f"--config.sft.scaffold: {config.sft.scaffold!r}; conversations of kind nano play nano's "
                        "tools; name nano, or another kind in --config.sft.sources")
    return scaffold


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


def plan(task: Task, number: int, seed: int, chosen: Options, scaffold: NanoScaffold, templates: Sequence[str],
         guesses: Sequence[tuple[int, str, str]] = ()) -> list[Request]:
    """What is asked of the solver for one task: multi-turn, single-turn, and one tool-call template in turn.

    Args:
      task: whose id, with `seed`, decides which of the trajectories recover.
      number: its place in the list of tasks; templates are taken in turn.
      seed: of the run.
      chosen: how many have tools and test runs, how many of these recover, how many search.
      scaffold: with several turns.
      templates: of the format scaffold; none leaves it out.
      guesses: edits that a model proposed; each multi-turn trajectory takes its wrong edits from them in another order.
    """
    rng = random.Random(f"{seed} {task.instance_id}")
    requests = []
    for index in range(chosen.per_task):
        wrong = rng.randint(1, MAX_WRONG) if rng.random() < chosen.recovery else 0
        ours = rng.sample(list(guesses), len(guesses)) if wrong else []
        requests.append(Request(scaffold, seed + index, wrong, tuple(map(tuple, ours))))
    for index in range(chosen.searches):
        ours = rng.sample(list(guesses), len(guesses)) if index else guesses
        requests.append(Request(scaffold, seed + index, guesses=tuple(map(tuple, ours)), search=True))
    if task.language == PAGES:  # which no other expert acts on
        return requests
    requests.append(Request(scaffold.single(), seed))
    if templates:
        requests.append(Request(scaffold.in_template(templates[number % len(templates)]), seed))
    return requests


def act(provider: Provider, task: Task, requests: Sequence[Request]) -> list[Trajectory]:
    """Runs in a worker: the trajectories of one task that ended with passing tests.

    The same tests on the same files run once, however many trajectories come to that state.
    """
    runner = Remembering(ProviderRunner(provider, task.repo))
    made = (_make(provider, task, request, runner) for request in requests)
    return [trajectory for trajectory in made if trajectory is not None]


def _make(provider: Provider, task: Task, request: Request, runner: TestRunner) -> Trajectory | None:
    scaffold, guesses = request.scaffold, [solver.SpanEdit(*guess) for guess in request.guesses]
    if request.search:
        workspace = open_overlay(task, provider.files(task.repo), runner)
        return heuristic.search(task, scaffold, scaffold.executor(task, workspace), guesses)
    return solver.solve_with(provider, task, scaffold, seed=request.seed, wrong=request.wrong, guesses=guesses,
                             runner=runner)
