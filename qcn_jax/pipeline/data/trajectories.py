"""Conversations that are made of the run's tasks, by somebody who acts on them."""

import abc
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from qcn_jax.agents.trajectory import Trajectory
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.readers import ChatReader, Conversation
from qcn_jax.pipeline.data.readers.published import weighted
from qcn_jax.pipeline.data.splits import split_tasks
from qcn_jax.pipeline.data.texts import Findings

if TYPE_CHECKING:
    from qcn_jax.config import ChatSource
    from qcn_jax.pipeline.context import StageContext


class TrajectorySource(ChatReader):
    """Makes verified conversations on training tasks, with the scaffold of `config.sft` and the source's options."""

    sandbox = True

    @abc.abstractmethod
    def collect(
        self, context: "StageContext", source: "ChatSource", tasks: Sequence[Task], stopped: Callable[[], bool]
    ) -> list[Trajectory] | None:
        """Trajectories of `tasks`, the same for the same configuration, resumed from what a killed run left.

        `agents.collecting.collect` does that for a source that can say what one task gives.

        Args:
          context: of stage `sft`.
          source: its settings.
          tasks: of the imitation side; the pool of `context` has their repositories.
          stopped: asked now and then; True ends the collection.

        Returns:
          None when stopped.
        """

    def read(self, context: "StageContext", source: "ChatSource", findings: Findings, stopped: Callable[[], bool]
             ) -> Iterator[Conversation]:
        """See ChatReader.

        Raises:
          UserError: there is no trajectory at all.
        """
        tasks, _ = split_tasks(context.tasks("train"), context.config.seed)
        tasks = [task for task in tasks if not task.eval_script]  # those are run in images, where no rules act
        context.pool().register(context.repositories().values())
        found = self.collect(context, source, tasks, stopped)
        if found == []:
            raise UserError(f"stage sft: no trajectory of {len(tasks)} training tasks; see "
                            f"{context.root / 'tasks' / 'train.jsonl'}")
        for trajectory in found or ():
            findings.read += 1
            yield conversation(trajectory)


def conversation(trajectory: Trajectory) -> Conversation:
    """A trajectory as a conversation in which turns that ended in failing tests have no weight.

    They are part of what the model reads: it learns to recover from mistakes, not to make them. Where nobody had told
    of the defect (`search`) the failed edits are the search, and count.
    """
    messages = weighted(trajectory.messages, () if trajectory.search else trajectory.failed)
    labels = (trajectory.scaffold.split(":")[0], *(["recovery"] if trajectory.wrong_edits else []))
    return Conversation(tuple(messages), trajectory.tools, trajectory.task_id, labels)
