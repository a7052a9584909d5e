"""A stage's model, loss and optimizer as one compiled step over one mesh: what a stage runs and `qcn compile` compiles.

Every training stage has one function `make_trainer(config, parallel)` that builds it. The stage feeds it arrays,
`qcn compile` looks at `Trainer.abstract()`; neither builds a step of its own.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qcn_jax.config import MeshConfig, ModelConfig, OptimizerConfig
from qcn_jax.errors import UserError
from qcn_jax.pipeline.train import diagnosis, layout, loop, optimizer
from qcn_jax.pipeline.train import step as steps_of
from qcn_jax.pipeline.train.flops import TokenFlops, token_flops
from qcn_jax.pipeline.train.step import SECTION, Batch, BatchShape, DeriveFn, LossFn, TrainState, WholeFn, make_step
from qcn_jax.sharding import distributed
from qcn_jax.sharding.mesh import make_parallel
from qcn_jax.sharding.parallel import Parallel


@dataclasses.dataclass(frozen=True)
class Trainer:
    """One step and all that it is made of.

    Attributes:
      model: the architecture.
      loss: see train.step.LossFn.
      optimizer, schedule: the update rule and its learning rate by step.
      shape: of a batch.
      parallel: the mesh; None is one device.
      shardings: of the state; None on one device.
      frozen: how many trees of frozen parameters `step` takes.
      flops: of the model, per token and forward pass.
      step: the jitted (state, batch, frozen) -> (state, metrics), see train.step.make_step.
    """

    model: ModelConfig
    loss: LossFn
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    shape: BatchShape
    parallel: Parallel | None
    shardings: TrainState | None
    frozen: int
    flops: TokenFlops
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]

    @classmethod
    def build(cls, model: ModelConfig, loss: LossFn, rule: OptimizerConfig, steps: int, shape: BatchShape,
              parallel: Parallel | None, *, field: str, frozen: int = 0, mtp: bool = False,
              whole: WholeFn | None = None, derive: DeriveFn = dict) -> "Trainer":
        """Builds the step; nothing is compiled before its first use.

        Args:
          model, loss, shape, parallel, frozen: see the attributes.
          rule: the optimizer's settings.
          steps: optimizer steps, over which the learning rate falls.
          field: of the configuration, that errors about rows name.
          mtp: whether the loss takes the multi-token-prediction block too.
          whole, derive: see train.step.make_step.

        Raises:
          UserError: rows that do not divide by the mesh, or an unknown optimizer.
        """
        update = optimizer.make_optimizer(rule, steps)
        shardings, batch = None, None
        if parallel is not None:
            if shape.rows % (parts := parallel.size("activation_batch")):
                axes = " x ".join(parallel.axes("activation_batch"))
                raise UserError(f"--config.{field}.rows: {shape.rows} rows of a slice do not divide by the {parts} "
                                f"parts of --config.mesh ({axes})")
            shardings = layout.state_shardings(model, parallel, update, rule.offload)
            batch = {name: layout.batch_sharding(parallel, len(size)) for name, (size, _) in shape.arrays().items()}
        step = make_step(loss, update, shape, shardings, batch, frozen, whole, derive)
        flops = token_flops(model, shape.length, mtp)
        rate = optimizer.schedule(rule, steps)
        return cls(model, loss, update, rate, shape, parallel, shardings, frozen, flops, step)

    @property
    def passes(self) -> int:
        """Forward passes' worth of FLOPs per token: 3 with gradient, 1 for frozen parameters that judge."""
        return 3 + min(self.frozen, 1)

    @property
    def gradient(self) -> Callable[[Any, Batch, tuple[Any, ...]], tuple[Any, dict[str, jax.Array]]]:
        """(params, batch, frozen) -> (gradient, metrics) of what `step` moves by; not jitted. Without `whole`."""
        return steps_of.make_gradient(self.loss, self.shape, self.shardings)

    @property
    def param_shardings(self) -> Any:
        """Where parameters lie; None on one device."""
        return None if self.shardings is None else self.shardings.params

    def create(self, params: Any) -> TrainState:
        """Returns a fresh state; the first step donates `params`, which every process gives alike."""
        if self.shardings is None:
            return TrainState.create(params, self.optimizer)
        return layout.place_state(params, self.optimizer, self.shardings)

    def place_params(self, params: Any) -> Any:
        """Returns parameters laid out as the state's, to be given as frozen ones."""
        if self.shardings is None:
            return jax.tree.map(jnp.asarray, params)
        return jax.device_put(params, self.shardings.params)

    def place(self, arrays: Mapping[str, np.ndarray], sections: Sequence[int] = ()) -> Batch:
        """Puts a batch on the devices; every process is given the same rows and sends those of its devices.

        Args:
          arrays: [n, T, ...], by slice and row; fewer than the shape's where that is padded.
          sections: of the slices that `arrays` fill, where the shape has sections.
        """
        padded = {name: _filled(array, self.shape.slices * self.shape.rows).reshape(
            self.shape.slices, self.shape.rows, *array.shape[1:]) for name, array in arrays.items()}
        if self.shape.sections:
            padded[SECTION] = _filled(np.asarray(sections, np.int32), self.shape.slices)
        return layout.place_batch(self.parallel, padded)

    def abstract(self) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct], tuple[Any, ...]]:
        """Returns the step's arguments as ShapeDtypeStructs: state, batch, frozen parameters; allocates nothing."""
        state = self._abstract_state()
        where = lambda size: None if self.parallel is None else layout.batch_sharding(self.parallel, len(size))
        batch = {name: jax.ShapeDtypeStruct(size, dtype, sharding=where(size))
                 for name, (size, dtype) in self.shape.arrays().items()}
        return state, batch, (state.params,) * self.frozen

    def _abstract_state(self) -> TrainState:
        state = layout.abstract_state(self.model, self.optimizer, self.shardings)
        if self.parallel is not None:
            return state
        here = jax.sharding.SingleDeviceSharding(distributed.first_device())
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), state)

    def run(self, directory: pathlib.Path, params: Any, feed: loop.Feed, steps: int, settings: Any, *,
            log: Callable[[str], None], line: Callable[[Mapping[str, Any]], str] = loop.progress,
            frozen: tuple[Any, ...] = (), first: int = 0) -> loop.LoopResult:
        """Trains for `steps` steps of the loop, or resumes from `directory`'s checkpoint.

        Args:
          directory, feed, log, line, first: see train.loop.
          params: the initial parameters; donated. None where a checkpoint must be there.
          settings: checkpoint_every, log_every, keep and nonfinite, of a stage's configuration.
          frozen: trees that the step is given beside each batch.

        Raises:
          UserError: see train.loop.
        """
        state = self._abstract_state() if params is None else self.create(params)
        step = distributed.met(self.step)
        return loop.loop(
            directory, state, lambda state, batch: step(state, batch, frozen), feed, steps, log=log,
            line=line, schedule=self.schedule, first=first,
            explain=diagnosis.explain(self.model, self.loss, self.parallel, frozen),
            options=loop.LoopOptions(settings.checkpoint_every, settings.log_every, settings.keep, settings.nonfinite,
                                     self.passes * self.flops.forward))


def _filled(array: np.ndarray, count: int) -> np.ndarray:
    """`array` with zeros behind, `count` entries in all."""
    if len(array) == count:
        return array
    return np.concatenate([array, np.zeros((count - len(array), *array.shape[1:]), array.dtype)])


def mesh_here(config: MeshConfig) -> Parallel | None:
    """Returns the mesh over all devices there are; None on a single device.

    Raises:
      UserError: a mesh that does not fit the devices.
    """
    parallel = make_parallel(config)
    return parallel if parallel.mesh.size > 1 else None
