"""The single-turn expert: the first answer counts, and execution decides.

It answers problems (envs/problems) of a configuration's files or made here, and edits the function that a task's prompt
shows.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from qcn_jax.agents.scaffolds import Scaffold
from qcn_jax.agents.scaffolds.answer import ANSWER
from qcn_jax.config import ProblemsConfig, RunConfig
from qcn_jax.envs.problems import make, schema
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.errors import UserError
from qcn_jax.pipeline.experts import metrics
from qcn_jax.pipeline.experts.expert import Expert, Prompt


@dataclasses.dataclass(frozen=True)
class SingleTurn(Expert):
    """Presents tasks in the scaffold's single-turn form, and problems as questions.

    Attributes:
      problems: of its split.
      edits: whether it also edits the run's tasks.
    """

    problems: tuple[Task, ...] = ()
    edits: bool = True

    def configured(self, config: RunConfig, split: str) -> "SingleTurn":
        """See Expert.configured."""
        found = problems(config.problems, config.seed, split)
        if not found and not config.problems.edits:
            raise UserError("--config.problems.edits: is off, and there are no problems; give data or made")
        return dataclasses.replace(self, problems=found, edits=config.problems.edits)

    def own_tasks(self) -> Sequence[Task]:
        """See Expert.own_tasks."""
        return self.problems

    def wants_tasks(self, config: RunConfig) -> bool:
        """See Expert.wants_tasks."""
        return config.problems.edits

    def present(self, scaffold: Scaffold, template: str = "") -> Scaffold:
        """See Expert.present."""
        return scaffold.single() if self.edits else ANSWER

    def prompts(self, tasks: Sequence[Task], scaffold: Scaffold, templates: Sequence[str] = (),
                unseen: Sequence[str] = ()) -> list[Prompt]:
        """See Expert.prompts."""
        edits = super().prompts(tasks, scaffold) if self.edits else []
        return [*edits, *(Prompt(self, problem, ANSWER) for problem in self.problems)]

    def metrics(self, rows: Sequence[metrics.Row]) -> dict[str, Any]:
        """See Expert.metrics; with rates by kind."""
        found = super().metrics(rows)
        found[self.name]["kinds"] = metrics.greedy(rows)["kinds"]
        return found


@functools.lru_cache(maxsize=8)
def problems(config: ProblemsConfig, seed: int, split: str) -> tuple[Task, ...]:
    """The problems of a split.

    Raises:
      UserError: a file is missing or malformed, or an id is there twice.
    """
    name = "data" if split == "train" else "heldout_data"
    path = getattr(config, name)
    given = schema.read(path) if path else []
    if path and not given:
        raise UserError(f"--config.problems.{name}={path}: holds no problem")
    rows = make.problems(config.made, seed, config.kinds or schema.KINDS, config.languages, split)
    made = [schema.to_task(row) for row in rows]
    twice = {task.instance_id for task in given} & {task.instance_id for task in made}
    if twice:
        raise UserError(f"--config.problems.{name}={path}: {sorted(twice)[0]} is the id of a problem that is made here")
    return (*given, *made)


SINGLE_TURN = SingleTurn("single_turn", "single-turn expert", column="single-turn")
