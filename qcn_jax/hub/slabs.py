"""Parameters cut into slabs: pieces that fit in memory, whole on every host, wherever the array's parts lie.

A slab is the same box out of every shard: each device cuts its own, and they are gathered. Nothing but the slab is
ever whole anywhere. (A box in the array's own indices would not do: cutting it out of an axis that is split makes
the compiler gather the whole array first.)
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qcn_jax.hub.layout import Path, Shape, Tensor

Tensors = Mapping[tuple[Path, Shape], Sequence[Tensor]]  # the runs of rows in an array, by leaf and index


@dataclasses.dataclass(frozen=True)
class Slab:
    """The box `start` .. `start + sizes` of every shard of an array.

    Attributes:
      leaf: path of the array in the parameter tree.
      shard: shape of the array's shards.
      counts: of shards along every axis.
      start, sizes: the box, in the indices of a shard.
      stacked: how many leading axes are stacking axes.
      rows: the axis along which published rows lie.
    """

    leaf: Path
    shard: Shape
    counts: Shape
    start: Shape
    sizes: Shape
    stacked: int
    rows: int

    @property
    def shape(self) -> Shape:
        """Of the gathered slab."""
        return tuple(size * count for size, count in zip(self.sizes, self.counts))

    def indices(self) -> Iterator[tuple[Shape, Shape]]:
        """The stacking indices of the tensors in it: where in the gathered slab, and where in the array."""
        for position in np.ndindex(*self.shape[: self.stacked]):
            yield position, tuple(self._index(axis, at) for axis, at in enumerate(position))

    def pieces(self, values: np.ndarray, tensors: Tensors) -> Iterator[tuple[Tensor, int, np.ndarray]]:
        """The tensors' rows in the gathered `values`: (tensor, number of the run's first row, rows as published)."""
        size, whole = self.sizes[self.rows], self.shape[self.rows]
        step = size if size < self.shard[self.rows] else whole  # where none is cut, the shards' rows are neighbours
        ahead = (slice(None),) * (self.rows - self.stacked)
        for position, index in self.indices():
            body = values[position]
            for first in range(0, whole, step):
                start = self._index(self.rows, first)
                for tensor in tensors[self.leaf, index]:
                    low, high = max(start, tensor.column), min(start + step, tensor.column + tensor.shape[0])
                    if low < high:
                        part = body[(*ahead, slice(first + low - start, first + high - start))]
                        yield tensor, low - tensor.column, tensor.body_to_rows(part)

    def _index(self, axis: int, position: int) -> int:
        """Where in the array `position` of the gathered slab lies, along one axis."""
        shard, within = divmod(position, self.sizes[axis])
        return shard * self.shard[axis] + self.start[axis] + within


def cut(array: Any, first: Tensor, limit: int) -> Iterator[Slab]:
    """Slabs of a parameter of at most `limit` bytes when gathered; one row of every shard is the least.

    Args:
      array: a NumPy or JAX array, or what can be indexed with slices and has shape and dtype.
      first: one of the tensors that it holds.
      limit: bytes.
    """
    shape, shard = tuple(array.shape), _shard_shape(array)
    counts = tuple(whole // part for whole, part in zip(shape, shard))
    stacked = len(first.index)
    rows = stacked + (first.kind != "same")
    steps = [1] * stacked + list(shard[stacked:])
    one = np.dtype(array.dtype).itemsize * math.prod(counts[:stacked]) * math.prod(shape[stacked:])
    if one > limit:
        steps[rows] = max(1, shard[rows] * limit // one)
    elif stacked:
        steps[stacked - 1] = min(shard[stacked - 1], limit // one)
    for start in itertools.product(*(range(0, size, step) for size, step in zip(shard, steps))):
        sizes = tuple(min(step, size - at) for step, size, at in zip(steps, shard, start))
        yield Slab(first.leaf, shard, counts, start, sizes, stacked, rows)


def is_split(array: Any) -> bool:
    """Whether an array's parts lie on several devices; its slabs must be gathered, by all of their processes."""
    return isinstance(array, jax.Array) and not array.is_fully_replicated


def fetch(array: Any, slab: Slab, wanted: bool = True) -> np.ndarray | None:
    """The gathered slab on the host; a view where this process has the array whole in its memory.

    Every process of a split array must call this, with the same slab. It returns when the slab has been gathered.

    Args:
      array: that of `cut`.
      slab: one of its slabs.
      wanted: False takes part and gives None.
    """
    if is_split(array):
        whole = _gatherer(array.sharding, slab.sizes)(array, np.asarray(slab.start, np.int32))
        whole.block_until_ready()  # gathered ones must not heap up
        return np.asarray(whole.addressable_data(0)) if wanted else None
    if not wanted:
        return None
    box = tuple(slice(at, at + size) for at, size in zip(slab.start, slab.sizes))
    if not isinstance(array, jax.Array):
        return np.asarray(array[box])
    array = array.addressable_data(0)
    if array.device.platform == "cpu":
        return np.asarray(array)[box]
    return np.asarray(_cutter(slab.sizes)(array, np.asarray(slab.start, np.int32)))


def _shard_shape(array: Any) -> Shape:
    return array.sharding.shard_shape(array.shape) if is_split(array) else tuple(array.shape)


@functools.lru_cache(maxsize=256)
def _cutter(sizes: Shape) -> Any:
    return jax.jit(lambda array, start: jax.lax.dynamic_slice(array, start, sizes))


@functools.lru_cache(maxsize=256)
def _gatherer(sharding: NamedSharding, sizes: Shape) -> Any:
    """(array, start) -> the slab, whole on every device."""

    def gathered(part: jax.Array, start: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice(part, start, sizes)
        for axis, names in enumerate(sharding.spec):
            if names:
                part = jax.lax.all_gather(part, names, axis=axis, tiled=True)
        return part

    return jax.jit(jax.shard_map(gathered, mesh=sharding.mesh, in_specs=(sharding.spec, PartitionSpec()),
                                 out_specs=PartitionSpec(), check_vma=False))
