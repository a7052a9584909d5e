"""Where training state and batches lie on a mesh, and how a process's rows become its part of a batch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from qcn_jax.config import ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.model import abstract_params, logical_axes
from qcn_jax.pipeline.train.optimizer import state_like
from qcn_jax.pipeline.train.loop import TrainState
from qcn_jax.sharding.parallel import Parallel

HOST_MEMORY = "pinned_host"


def param_shardings(config: ModelConfig, parallel: Parallel) -> Any:
    """NamedSharding of every parameter."""
    place = lambda names: NamedSharding(parallel.mesh, parallel.spec(*names))
    return jax.tree.map(place, logical_axes(config), is_leaf=lambda leaf: isinstance(leaf, tuple))


def state_shardings(
    config: ModelConfig, parallel: Parallel, optimizer: optax.GradientTransformation, offload: bool = False
) -> TrainState:
    """NamedSharding of every leaf of the training state: moments lie as their parameters do.

    Args:
      offload: the moments (and a master copy) in host memory.
    """
    params = param_shardings(config, parallel)
    replicated = NamedSharding(parallel.mesh, PartitionSpec())
    kept = jax.tree.map(lambda s: s.with_memory_kind(HOST_MEMORY), params) if offload else params
    opt_state = state_like(optimizer, abstract_params(config), kept, replicated)
    return TrainState(replicated, params, opt_state)


def abstract_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, shardings: TrainState | None = None
) -> TrainState:
    """The training state as ShapeDtypeStructs, with shardings if given; allocates nothing."""
    params = abstract_params(config)
    shapes = jax.eval_shape(lambda params: TrainState(np.int32(0), params, optimizer.init(params)), params)
    if shardings is None:
        return shapes
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def place_state(params: Any, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """A fresh state laid out by `shardings`; every process gives the same `params` (arrays of any kind)."""
    params = jax.device_put(params, shardings.params)
    create = lambda params: TrainState(jax.numpy.zeros((), jax.numpy.int32), params, optimizer.init(params))
    return jax.jit(create, out_shardings=shardings, donate_argnums=0)(params)


def on_host(tree: Any) -> Any:
    """Whole numpy arrays of a tree of arrays that may be spread over processes; every process must call this."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), tree)


def batch_sharding(parallel: Parallel) -> NamedSharding:
    """Of [rows, T] arrays."""
    return NamedSharding(parallel.mesh, parallel.spec("activation_batch", "activation_length"))


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows of a batch of `total` this process reads, and how they become a global batch.

    Processes that hold different columns of the same rows read the same documents and keep their own columns.

    Attributes:
      parallel: the mesh; None is one device, which reads all rows.
      shard: (index, count) for data.loader: which of the groups of processes that read different documents.
      first: this process's parts of the rows, in order, and where each begins among the rows that it reads.
    """

    parallel: Parallel | None
    total: int
    shard: tuple[int, int] = (0, 1)
    first: Mapping[int, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, parallel: Parallel | None, total: int) -> "Rows":
        """Raises UserError where the rows do not divide, or processes' rows overlap in part."""
        if parallel is None:
            return cls(None, total)
        where, parts = _row_parts(parallel), parallel.size("activation_batch")
        if total % parts:
            raise UserError(f"--config.*.train.rows: {total} rows do not divide by the {parts} parts of --config.mesh "
                            f"({' x '.join(parallel.axes('activation_batch'))})")
        held: dict[int, set[int]] = {}
        for device, part in where.items():
            held.setdefault(device.process_index, set()).add(part)
        groups = sorted({tuple(sorted(rows)) for rows in held.values()})
        if sum(map(len, groups)) != parts:
            raise UserError("--config.mesh: some processes share some of their rows, but not all; choose axes whose "
                            "product is a multiple of a process's devices")
        mine = tuple(sorted(held[jax.process_index()]))
        size = total // parts
        return cls(parallel, total, (groups.index(mine), len(groups)), {part: i * size for i, part in enumerate(mine)})

    @property
    def count(self) -> int:
        """Rows that this process reads."""
        return self.total // self.shard[1]

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Global [total, T] arrays of which `batch` [count, T] are this process's rows."""
        if self.parallel is None:
            return jax.device_put(dict(batch))
        sharding, size = batch_sharding(self.parallel), self.total // self.parallel.size("activation_batch")

        def globally(array: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                begin = self.first[(index[0].start or 0) // size]
                return array[begin : begin + size, index[1]]

            return jax.make_array_from_callback((self.total, *array.shape[1:]), sharding, part)

        return {name: globally(np.asarray(array)) for name, array in batch.items()}


def _row_parts(parallel: Parallel) -> dict[jax.Device, int]:
    """Which part of a batch's rows each device holds."""
    sharding = NamedSharding(parallel.mesh, parallel.spec("activation_batch"))
    index = sharding.devices_indices_map((parallel.size("activation_batch"),))
    return {device: rows[0].start or 0 for device, rows in index.items()}
