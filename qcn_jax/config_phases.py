"""Phases of mid-training: the run's configuration as it is in each of them."""

import dataclasses

from qcn_jax.config import MeshConfig, RunConfig, from_config_dict
from qcn_jax.errors import UserError


def midtrain_phases(config: RunConfig) -> list[tuple[int, RunConfig]]:
    """(last step, the run's configuration as it is in that phase, without phases) of every phase of mid-training.

    Steps count from the stage's beginning, and `midtrain.train.steps` stays that of the whole stage, over which the
    learning rate falls.

    Raises:
      UserError: a phase overrides what is no field of the mesh, or no share.
    """
    stage, found, last = config.midtrain, [], 0
    if not stage.phases:
        return [(stage.train.steps, config)]
    for number, phase in enumerate(stage.phases):
        last += phase.steps
        name = f"config.midtrain.phases[{number}]"  # as in an override
        shape = {field: getattr(phase, field) for field in ("sequence_length", "rows", "accumulate")}
        shape = {field: value for field, value in shape.items() if value}
        mesh = from_config_dict(MeshConfig, {**dataclasses.asdict(config.mesh), **phase.mesh}, f"{name}.mesh")
        own = from_config_dict(_Shares, phase.shares, f"{name}.shares")
        shares = {field: value for field, value in dataclasses.asdict(own).items() if field in phase.shares}
        midtrain = dataclasses.replace(stage, phases=(), train=dataclasses.replace(stage.train, **shape), **shares)
        found.append((last, dataclasses.replace(config, mesh=mesh, midtrain=midtrain)))
    return found


def of_phase(config: RunConfig, stage: str, phase: int) -> RunConfig:
    """The run's configuration as it is in a phase of `stage`, from 1; only mid-training may have several.

    Raises:
      UserError: there is no such phase.
    """
    phases = midtrain_phases(config) if stage == "midtrain" else [(0, config)]
    if phase > len(phases):
        raise UserError(f"--phase={phase}: stage {stage} has {len(phases)}")
    return phases[phase - 1][1]


@dataclasses.dataclass(frozen=True)
class _Shares:
    repository: float = 0.0
    fim: float = 0.0
    edits: float = 0.0
