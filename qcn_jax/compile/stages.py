"""The very step that each training stage runs, with abstract arguments: what `qcn compile` looks at."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from qcn_jax.config import TRAINING, RunConfig
from qcn_jax.errors import UserError
from qcn_jax.pipeline.train.divisibility import check_stages
from qcn_jax.pipeline.train.flops import TokenFlops
from qcn_jax.sharding.parallel import Parallel


@dataclasses.dataclass(frozen=True)
class StageStep:
    """One call of a stage's compiled function.

    Attributes:
      function: jitted, with shardings; the stage runs the same.
      arguments: abstract.
      kinds: the arguments by what they are, for an account of memory.
      tokens: that pass through the model; of a stage whose updates differ in rows, those of one slice.
      flops: of the model, per token and forward pass.
      passes: forward passes' worth of FLOPs per token: 3 with gradient, 1 for a frozen reference or teacher.
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
    trainer = importlib.import_module(f"qcn_jax.pipeline.stages.{stage}").make_trainer(config, parallel)
    state, batch, frozen = trainer.abstract()
    kinds = {"weights": state.params, "optimizer": state.opt_state, "frozen": frozen, "batch": batch}
    shape = trainer.shape
    tokens = shape.rows * shape.length * (1 if shape.padded else shape.slices)
    return StageStep(trainer.step, (state, batch, frozen), {name: tree for name, tree in kinds.items() if tree}, tokens,
                     trainer.flops, trainer.passes)
