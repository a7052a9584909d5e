"""Where training state and batches lie on a mesh, and how a process's rows become its part of a batch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from qcn_jax.config import ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.model import abstract_params, logical_axes
from qcn_jax.pipeline.train.optimizer import state_like
from qcn_jax.pipeline.train.step import TrainState
from qcn_jax.sharding.parallel import Parallel

HOST_MEMORY = "pinned_host"


def param_shardings(config: ModelConfig, parallel: Parallel | None) -> Any:
    """NamedSharding of every parameter; None where there is no mesh."""
    if parallel is None:
        return None
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
    """A fresh state laid out by `shardings`.

    Args:
      params: laid out so already (and donated), or arrays of any kind that are the same in every process.
    """
    params = jax.device_put(params, shardings.params)
    create = lambda params: TrainState(jax.numpy.zeros((), jax.numpy.int32), params, optimizer.init(params))
    return jax.jit(create, out_shardings=shardings, donate_argnums=0)(params)


def on_one_device(tree: Any) -> Any:
    """Copies of a tree of arrays on this process's first device, gathered where they are split."""
    return jax.device_put(tree, jax.local_devices()[0])


def mesh_of(state: TrainState) -> dict[str, Any]:
    """{"devices": n, "axes": {axis: size}} that the state really lies on, for a stage's results; no axes of one."""
    shardings = {leaf.sharding for leaf in jax.tree.leaves(state.params)}
    axes = {axis: size for sharding in shardings if isinstance(sharding, NamedSharding)
            for axis, size in sharding.mesh.shape.items() if size > 1}
    return {"devices": max(len(sharding.device_set) for sharding in shardings), "axes": axes}


def batch_sharding(parallel: Parallel, dimensions: int = 3) -> NamedSharding:
    """Of [slices, rows, T] arrays, or with one dimension of [slices] arrays, which every device holds."""
    if dimensions == 1:
        return NamedSharding(parallel.mesh, PartitionSpec())
    return NamedSharding(parallel.mesh, parallel.spec(None, "activation_batch", "activation_length"))


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows of a batch this process brings, and how they become a global batch of [slices, rows, T] arrays.

    Processes that hold different columns of the same rows read the same documents and keep their own columns.

    Attributes:
      parallel: the mesh; None is one device, which reads all rows.
      total: rows of a slice.
      slices: of a batch.
      shard: (index, count) for data.loader: which of the groups of processes that read different documents.
      first: this process's parts of a slice's rows, in order, and where each begins among the rows that it reads.
    """

    parallel: Parallel | None
    total: int
    slices: int = 1
    shard: tuple[int, int] = (0, 1)
    first: Mapping[int, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, parallel: Parallel | None, total: int, slices: int = 1, field: str = "*.train") -> "Rows":
        """Finds this process's rows.

        Raises:
          UserError: the rows of a slice do not divide, or processes' rows overlap in part; the line names `field`.
        """
        if parallel is None:
            return cls(None, total, slices)
        where, parts = _row_parts(parallel), parallel.size("activation_batch")
        if total % parts:
            raise UserError(f"--config.{field}.rows: {total} rows of a slice do not divide by the {parts} parts of "
                            f"--config.mesh ({' x '.join(parallel.axes('activation_batch'))})")
        held: dict[int, set[int]] = {}
        for device, part in where.items():
            held.setdefault(device.process_index, set()).add(part)
        groups = sorted({tuple(sorted(rows)) for rows in held.values()})
        if sum(map(len, groups)) != parts:
            raise UserError("--config.mesh: some processes share some of their rows, but not all; choose axes whose "
                            "product is a multiple of a process's devices")
        # A process without a device of the mesh (a topology that is not here) brings none.
        mine = tuple(sorted(held.get(jax.process_index(), groups[0])))
        size = total // parts
        shard = (groups.index(mine), len(groups))
        return cls(parallel, total, slices, shard, {part: i * size for i, part in enumerate(mine)})

    @property
    def count(self) -> int:
        """Rows that this process reads for a batch, those of all slices."""
        return self.slices * self.total // self.shard[1]

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Returns global [slices, total, T] arrays.

        Args:
          batch: [n, T] this process's rows, by slice; zeros are added up to `count`.
        """
        arrays = {name: self._slices(np.asarray(array)) for name, array in batch.items()}
        if self.parallel is None:
            return jax.device_put(arrays)
        sharding, size = batch_sharding(self.parallel), self.total // self.parallel.size("activation_batch")

        def globally(array: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                begin = self.first[(index[1].start or 0) // size]
                return array[:, begin : begin + size, index[2]]

            return jax.make_array_from_callback((self.slices, self.total, array.shape[2]), sharding, part)

        return {name: globally(array) for name, array in arrays.items()}

    def _slices(self, array: np.ndarray) -> np.ndarray:
        """[n, T] as [slices, rows of this process, T], with zeros behind."""
        if len(array) < self.count:
            array = np.concatenate([array, np.zeros((self.count - len(array), array.shape[1]), array.dtype)])
        return array.reshape(self.slices, -1, array.shape[1])


def _row_parts(parallel: Parallel) -> dict[jax.Device, int]:
    """Which part of a batch's rows each device holds."""
    sharding = NamedSharding(parallel.mesh, parallel.spec("activation_batch"))
    index = sharding.devices_indices_map((parallel.size("activation_batch"),))
    return {device: rows[0].start or 0 for device, rows in index.items()}
