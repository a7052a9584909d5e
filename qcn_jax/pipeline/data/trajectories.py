"""Where SFT's trajectories come from."""

import abc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qcn_jax.agents.trajectory import Trajectory
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.registry import Registry

if TYPE_CHECKING:
    from qcn_jax.config import RunConfig
    from qcn_jax.pipeline.context import StageContext


class TrajectorySource(abc.ABC):
    """Makes verified conversations on training tasks, with the scaffold and options of `config.sft`."""

    @abc.abstractmethod
    def check(self, config: "RunConfig") -> None:
        """Raises UserError where `config.sft` has an option, a scaffold or a number that it has no use for."""

    @abc.abstractmethod
    def collect(
        self, context: "StageContext", tasks: Sequence[Task], stopped: Callable[[], bool]
    ) -> list[Trajectory] | None:
        """Trajectories of `tasks`, the same for the same configuration, resumed from what a killed run left.

        `agents.collecting.collect` does that for a source that can say what one task gives.

        Args:
          context: of stage `sft`, or of `evaluate`, which trains the control.
          tasks: of the imitation side; the pool of `context` has their repositories.
          stopped: asked now and then; True ends the collection.

        Returns:
          None when stopped.
        """


TRAJECTORIES = Registry("source of trajectories", TrajectorySource,
                        {"nano": "qcn_jax.recipes.nano.trajectories:SCRIPTED"})
