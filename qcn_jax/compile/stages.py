"""The step that each stage compiles, with abstract arguments laid out on a mesh: what `qcn compile` looks at."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from qcn_jax.config import TRAINING, RunConfig, TrainConfig, training_settings
from qcn_jax.errors import UserError
from qcn_jax.model import Qwen3Next
from qcn_jax.pipeline.train import layout, loop, losses, optimizer
from qcn_jax.pipeline.train.divisibility import check_stages
from qcn_jax.pipeline.stages.distill import distill_loss
from qcn_jax.pipeline.train.flops import TokenFlops, token_flops
from qcn_jax.pipeline.rl.learner import policy_loss
from qcn_jax.pipeline.train.update import make_update
from qcn_jax.sharding.parallel import Parallel

@dataclasses.dataclass(frozen=True)
class StageStep:
    """One call of a stage's compiled function.

    Attributes:
      function: jitted, with shardings.
      arguments: abstract.
      kinds: the arguments by what they are, for an account of memory.
      tokens: that pass through the model.
      flops: of the model, per token and forward pass.
      passes: forward passes' worth of FLOPs per token: 3 with gradient, 1 for each further model that judges.
    """

    function: Any
    arguments: tuple[Any, ...]
    kinds: Mapping[str, Any]
    tokens: int
    flops: TokenFlops
    passes: int

    @property
    def model_flops(self) -> float:
        """Of the whole call, without recomputation."""
        return self.tokens * self.passes * self.flops.forward


def stage_step(config: RunConfig, stage: str, parallel: Parallel) -> StageStep:
    """The step of `stage` over the devices of `parallel`.

    Raises:
      UserError: an unknown stage, or sizes that the mesh does not divide.
    """
    if stage not in TRAINING:
        raise UserError(f"--stage={stage}: allowed: {', '.join(TRAINING)}")
    check_stages(config, [stage], parallel)
    settings = training_settings(config, stage)
    if stage in ("midtrain", "sft"):
        return _train_step(config, settings, parallel)
    return _update_step(config, stage, settings, parallel)


def _batch(settings: Any, parallel: Parallel, floats: tuple[str, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    shape, place = (settings.rows, settings.sequence_length), layout.batch_sharding(parallel)
    array = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    return {name: array(jnp.int32) for name in ("tokens", "segment_ids", "positions")} | {
        name: array(jnp.float32) for name in floats}


def _train_step(config: RunConfig, settings: TrainConfig, parallel: Parallel) -> StageStep:
    model = config.model
    update = optimizer.make_optimizer(settings.optimizer, settings.steps)
    shardings = layout.state_shardings(model, parallel, update, settings.optimizer.offload)
    loss_fn = losses.language_model_loss(Qwen3Next(model, parallel=parallel), settings.mtp_coef, settings.mtp_steps)
    function = loop.make_train_step(loss_fn, update, settings.accumulate, shardings, layout.batch_sharding(parallel))
    state, batch = layout.abstract_state(model, update, shardings), _batch(settings, parallel, ("weights",))
    kinds = {"weights": state.params, "optimizer": state.opt_state, "batch": batch}
    flops = token_flops(model, settings.sequence_length, settings.mtp_coef > 0)
    return StageStep(function, (state, batch), kinds, settings.rows * settings.sequence_length, flops, 3)


def _update_step(config: RunConfig, stage: str, settings: Any, parallel: Parallel) -> StageStep:
    model = config.model
    update = optimizer.make_optimizer(settings.optimizer, settings.updates)
    shardings = layout.state_shardings(model, parallel, update, settings.optimizer.offload)
    state = layout.abstract_state(model, update, shardings)
    gradient = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), state.params)
    if stage == "experts":
        loss = policy_loss(model, settings, parallel)
        judges = 1 if settings.kl_coef else 0
        batch = _batch(settings, parallel, ("weights", "advantages", "old_logprobs"))
    else:
        loss = distill_loss(model, settings.loss, parallel)
        judges = 0 if settings.loss == "rejection_sft" else 1
        batch = _batch(settings, parallel, ("weights",))
    judge = state.params if judges else None
    whole = NamedSharding(parallel.mesh, PartitionSpec())
    scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=whole)
    function = make_update(loss, update, shardings, layout.batch_sharding(parallel), judge is not None)
    kinds = {"weights": state.params, "optimizer": state.opt_state, "gradient": gradient, "judge": judge,
             "batch": batch}
    arguments = (state, gradient, batch, scalar(jnp.float32), scalar(jnp.bool_), judge)
    flops = token_flops(model, settings.sequence_length)
    return StageStep(function, arguments, {name: tree for name, tree in kinds.items() if tree is not None},
                     settings.rows * settings.sequence_length, flops, 3 + judges)
