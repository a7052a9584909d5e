"""Baselines: what plays the models' episodes without being one, so that every rate can be read beside it."""

import abc
import dataclasses

from qcn_jax.agents.episode import Episode
from qcn_jax.agents.scaffolds import Scaffold
from qcn_jax.config import RunConfig
from qcn_jax.registry import Registry


@dataclasses.dataclass(frozen=True)
class Baseline(abc.ABC):
    """Plays an episode by rules.

    Attributes:
      name: key of its numbers.
      title: in the report.
    """

    name: str
    title: str

    @abc.abstractmethod
    def check(self, scaffold: Scaffold) -> None:
        """Raises UserError where it cannot play episodes of `scaffold`."""

    @abc.abstractmethod
    def play(self, episode: Episode) -> None:
        """Plays `episode` to its end."""


BASELINES = Registry("baseline", Baseline, {
    "heuristic": "qcn_jax.recipes.nano.heuristic:HEURISTIC", "solver": "qcn_jax.recipes.nano.solver:SCRIPTED"})


def baseline_of(config: RunConfig) -> Baseline | None:
    """The baseline that `config.evaluate.baseline` names, if any.

    Raises:
      UserError: there is none of that name.
    """
    name = config.evaluate.baseline
    return None if not name else BASELINES.resolve(name, "--config.evaluate.baseline")
