"""Whether a mesh divides what it splits: weights, heads, experts, rows and lengths, each by field and number.

Asked before any work by `qcn run` and `qcn compile`; the layers would refuse the same sizes in the midst of tracing.
"""

import itertools
from collections.abc import Iterator, Sequence

from jax.sharding import AbstractMesh

from qcn_jax.config import TRAINING, ModelConfig, RunConfig, training_settings
from qcn_jax.config_phases import midtrain_phases
from qcn_jax.errors import UserError
from qcn_jax.sharding.mesh import AXES, axis_sizes
from qcn_jax.sharding.parallel import Parallel

# Fields of ModelConfig and the logical axes that split them, together; every split dimension of every parameter is a
# multiple of one of them.
_DIMENSIONS = (
    ("vocab_size", "vocab"), ("hidden_size", "embed"), ("hidden_size", "expert_embed"),
    ("num_attention_heads", "activation_heads"), ("num_attention_heads", "activation_heads", "activation_length"),
    ("num_key_value_heads", "kv_heads"),
    ("linear_num_value_heads", "activation_heads"), ("linear_num_key_heads", "activation_heads"),
    ("intermediate_size", "mlp"),
)
_OF_EXPERTS = (
    ("num_experts", "expert"), ("moe_intermediate_size", "mlp"), ("shared_expert_intermediate_size", "mlp"),
)


def check_mesh(config: RunConfig, stages: Sequence[str], devices: int) -> None:
    """Checks `config.mesh` against the devices, and what it splits against it; nothing where no stage trains.

    Args:
      config: has passed config_checks.
      stages: that are to be run.
      devices: how many there are, of all hosts.

    Raises:
      UserError: one line that names the field and both numbers.
    """
    # The control that stage evaluate trains goes by sft's settings.
    asked = {*stages, "sft"} if "evaluate" in stages and config.evaluate.sft_control else stages
    for stage in [stage for stage in TRAINING if stage in asked]:
        for _, phase in midtrain_phases(config) if stage == "midtrain" else [(0, config)]:
            check_stages(phase, [stage], Parallel(AbstractMesh(axis_sizes(phase.mesh, devices), AXES)))


def check_stages(config: RunConfig, stages: Sequence[str], parallel: Parallel) -> None:
    """Checks what the devices of `parallel` share in training stages.

    Raises:
      UserError: see `check_mesh`.
    """
    batches = (line for stage in stages for line in _batch(config, stage, parallel))
    for line in itertools.chain(_model(config.model, parallel), batches):
        raise UserError(line)


def _words(parallel: Parallel, *names: str) -> str:
    axes = " x ".join(f"{axis} {parallel.mesh.shape[axis]}" for axis in parallel.axes(*names))
    return f"{parallel.size(*names)} parts (--config.mesh: {axes})"


def _undivided(parallel: Parallel, what: str, size: int, *names: str) -> Iterator[str]:
    if size % parallel.size(*names):
        yield f"{what}: {size} does not divide by {_words(parallel, *names)}"


def _model(model: ModelConfig, parallel: Parallel) -> Iterator[str]:
    for field, *names in (*_DIMENSIONS, *_OF_EXPERTS) if model.num_experts else _DIMENSIONS:
        yield from _undivided(parallel, f"--config.model.{field}", getattr(model, field), *names)
    # Attention heads of a device are whole groups of a key/value head, or a whole part of one.
    heads = ("activation_heads", "activation_length")
    own = model.num_attention_heads // parallel.size(*heads)
    group = model.num_attention_heads // model.num_key_value_heads
    if own and own % group and group % own:
        yield (f"--config.model.num_key_value_heads: {model.num_key_value_heads} with {group} attention heads each do "
               f"not divide by {_words(parallel, *heads)} of {own} attention heads")


def _batch(config: RunConfig, stage: str, parallel: Parallel) -> Iterator[str]:
    settings, group = training_settings(config, stage), f"--config.{TRAINING[stage]}"
    slices = getattr(settings, "accumulate", 1)
    if settings.rows % (parallel.size("activation_batch") * slices):
        yield (f"{group}.rows: {settings.rows} does not divide by {_words(parallel, 'activation_batch')}"
               + (f" times accumulate, {slices}" if slices > 1 else ""))
    length = settings.sequence_length
    yield from _undivided(parallel, f"{group}.sequence_length", length, "activation_length", "vocab")
    own, taps = length // parallel.size("activation_length"), config.model.linear_conv_kernel_dim
    if parallel.axes("activation_length") and own < taps - 1:
        yield (f"{group}.sequence_length: {length} in {_words(parallel, 'activation_length')} leaves {own} tokens on a "
               f"device; the convolution needs {taps - 1}")
