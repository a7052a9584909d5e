"""What a configuration comes to: the sources of a stage, and the run's settings in each phase of mid-training."""

import dataclasses

from qcn_jax.config import ChatSource, MeshConfig, MidtrainConfig, RunConfig, SftConfig, TextSource
from qcn_jax.config_dicts import from_config_dict, typed
from qcn_jax.errors import UserError


def sources_of(stage: MidtrainConfig) -> dict[str, TextSource]:
    """The sources of mid-training by name: `data` alone where it is given, else `sources`."""
    return {"data": TextSource(path=stage.data)} if stage.data else dict(stage.sources)


def chats_of(stage: SftConfig) -> dict[str, ChatSource]:
    """The sources of SFT by name: `data` alone where it is given, else `sources`."""
    return {"data": ChatSource(path=stage.data)} if stage.data else dict(stage.sources)


def has_data(config: RunConfig, stage: str) -> bool:
    """Whether a configuration has something to learn from in midtrain or sft; without, a run may do without them."""
    return bool(getattr(config, stage).data or getattr(config, stage).sources)


def source_field(config: RunConfig, stage: str, name: str) -> str:
    """The flag that gives the source called `name` of a stage, midtrain or sft."""
    return f"--config.{stage}.data" if getattr(config, stage).data else f"--config.{stage}.sources.{name}"


def midtrain_phases(config: RunConfig) -> list[tuple[int, RunConfig]]:
    """(last step, the run's configuration as it is in that phase, without phases) of every phase of mid-training.

    Steps count from the stage's beginning, and `midtrain.train.steps` stays that of the whole stage, over which the
    learning rate falls.

    Raises:
      UserError: a phase overrides what is no field of the mesh, or the share of no source.
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
        own = typed(dict[str, float], phase.shares, f"{name}.shares")
        sources = sources_of(stage)
        for source, share in own.items():
            if source not in sources:
                raise UserError(f"--{name}.shares.{source}: there is no such source; allowed: {', '.join(sources)}")
            sources[source] = dataclasses.replace(sources[source], share=share)
        train = dataclasses.replace(stage.train, **shape)
        midtrain = dataclasses.replace(stage, phases=(), train=train, sources=sources, data="")
        found.append((last, dataclasses.replace(config, mesh=mesh, midtrain=midtrain)))
    return found


def used_sources(config: RunConfig) -> list[str]:
    """The sources of mid-training that have a share in some phase, in order."""
    phases = [sources_of(phase.midtrain) for _, phase in midtrain_phases(config)]
    return [name for name in phases[0] if any(sources[name].share > 0 for sources in phases)]


def of_phase(config: RunConfig, stage: str, phase: int) -> RunConfig:
    """The run's configuration as it is in a phase of `stage`, from 1; only mid-training may have several.

    Raises:
      UserError: there is no such phase.
    """
    phases = midtrain_phases(config) if stage == "midtrain" else [(0, config)]
    if phase > len(phases):
        raise UserError(f"--phase={phase}: stage {stage} has {len(phases)}")
    return phases[phase - 1][1]

