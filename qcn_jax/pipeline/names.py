"""Whether the things that a configuration names fit each other; asked before any work (config_checks)."""

from qcn_jax.agents.scaffolds import SCAFFOLDS
from qcn_jax.config import RunConfig
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.trajectories import TRAJECTORIES
from qcn_jax.pipeline.evaluate.baseline import baseline_of
from qcn_jax.pipeline.experts import experts_of


def check_experts(config: RunConfig) -> None:
    """Raises UserError for names of experts that do not go together."""
    experts_of(config.experts.names)


def check_trajectories(config: RunConfig) -> None:
    """Raises UserError for options, or a scaffold, that the source of trajectories has no use for."""
    TRAJECTORIES.resolve(config.sft.trajectories, "--config.sft.trajectories").check(config)


def check_scaffold(config: RunConfig, stage: str) -> None:
    """Raises UserError where an expert cannot present tasks by the scaffold of `stage`, or rollouts cannot run it."""
    name, field = getattr(config, stage).scaffold, f"--config.{stage}.scaffold"
    scaffold = SCAFFOLDS.resolve(name, field)
    if scaffold.has_shell:
        raise UserError(f"{field}: {name!r}; runs shell commands, and rollouts hold no live sandbox for them yet; "
                        "allowed: a scaffold without a shell, such as nano")
    for expert in experts_of(config.experts.names):
        try:
            expert.present(scaffold)
        except UserError as error:
            raise UserError(f"{field}: {name!r}; {error}, which expert {expert.name} asks for") from error


def check_baseline(config: RunConfig) -> None:
    """Raises UserError where the baseline cannot play what the experts are evaluated on."""
    baseline, name = baseline_of(config), config.evaluate.baseline
    if baseline is not None:
        try:
            baseline.check(SCAFFOLDS.resolve(config.evaluate.scaffold, "--config.evaluate.scaffold"))
        except UserError as error:
            line = f"--config.evaluate.baseline: {name!r}; {error}; leave it empty, or name another"
            raise UserError(line) from error
