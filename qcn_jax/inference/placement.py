"""Where an engine's slots lie: on one device, or on every device of a mesh, each with caches of its own.

While a model acts its weights are laid out otherwise than while it learns: experts stand still on as many devices as
divide them, everything else is whole on every device but for what `tensor` splits, and all other axes hold sequences.
A decoded token then moves a few rows between devices, where the layout of training would gather all weights for it.

A part is a device's share of the slots (with a tensor axis, that of the devices along it together). Every process, one
a host, numbers the slots of its own parts from 0, feeds and reads those alone, and calls the engine in step with the
others.

Axes: S slots of a part; an array by slot has parts * S rows over all hosts, of which a host gives and gets its own.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qcn_jax.config import ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.inference.cache import batch_axis
from qcn_jax.layers.cache import Cache
from qcn_jax.model import abstract_params, logical_axes
from qcn_jax.sharding import distributed
from qcn_jax.sharding.parallel import Parallel
from qcn_jax.sharding.rules import AxisRules

Array = jax.Array
_HOLDERS = ("fsdp", "expert", "context")  # mesh axes along which experts may lie


def acting(parallel: Parallel, model: ModelConfig) -> Parallel:
    """`parallel` with the rules by which `model` acts."""
    size = lambda axes: math.prod(parallel.mesh.shape[axis] for axis in axes)
    choices = itertools.chain.from_iterable(itertools.combinations(_HOLDERS, n) for n in range(len(_HOLDERS) + 1))
    holders = max((axes for axes in choices if model.num_experts % size(axes) == 0), key=size)
    rules = AxisRules(embed=(), expert=holders, expert_embed=(), activation_length=(),
                      activation_batch=("data", "fsdp", "expert", "context"))
    return dataclasses.replace(parallel, rules=rules)


class Placement:
    """Slots of an engine on the devices of `parallel` (see `acting`), or on one device.

    Attributes:
      parallel: the mesh with the rules of acting; None is one device.
      parts: over all hosts.
      mine: of them, this host's.
    """

    def __init__(self, parallel: Parallel | None) -> None:
        """Raises UserError where the devices of one part belong to several hosts."""
        self.parallel = parallel
        if parallel is None:
            self.parts = self.mine = 1
            return
        self._rows = PartitionSpec(parallel.axes("activation_batch") or None)
        self.parts = parallel.size("activation_batch")
        hosts: dict[int, set[int]] = {}
        for device, index in self.rows.devices_indices_map((self.parts,)).items():
            hosts.setdefault(index[0].start or 0, set()).add(device.process_index)
        if any(len(processes) > 1 for processes in hosts.values()):
            raise UserError(f"--config.mesh.tensor: {parallel.mesh.shape['tensor']} devices that share sequences "
                            "belong to several hosts; allowed: as many as lie in one")
        # Which of this host's parts lies where among all.
        self._place = {part: number for number, part in enumerate(
            sorted(part for part, processes in hosts.items() if jax.process_index() in processes))}
        self.mine = len(self._place)

    @property
    def rows(self) -> NamedSharding | None:
        """Sharding of arrays by slot; None on one device."""
        return None if self.parallel is None else NamedSharding(self.parallel.mesh, self._rows)

    def put(self, local: np.ndarray) -> Any:
        """This host's rows [mine * S, ...], as its part of an array [parts * S, ...] over all devices."""
        if self.parallel is None:
            return local
        own = len(local) // self.mine

        def rows(index: tuple[slice, ...]) -> np.ndarray:
            first = self._place[(index[0].start or 0) // own] * own
            return local[first : first + own]

        return jax.make_array_from_callback((self.parts * own, *local.shape[1:]), self.rows, rows)

    def get(self, array: Array) -> np.ndarray:
        """This host's rows of an array by slot."""
        if self.parallel is None:
            return np.asarray(array)
        found = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        return np.concatenate([np.asarray(found[start]) for start in sorted(found)])

    def per_part(self, function: Callable, caches: Mapping[str, Cache], in_specs: Sequence[str],
                 out_specs: Sequence[str]) -> Callable:
        """`function` on every part's own rows; specs say which arguments and results are "rows" and which a cache.

        `caches` has, by the names that specs give them, any caches of such structure.
        """
        if self.parallel is None:
            return function
        kinds = {name: self._cache_specs(cache) for name, cache in caches.items()} | {"rows": self._rows}
        results = tuple(kinds[kind] for kind in out_specs)
        return self.parallel.per_device(
            function, tuple(kinds[kind] for kind in in_specs), results[0] if len(results) == 1 else results)

    def cache_shardings(self, cache: Cache) -> Any:
        """Shardings of a cache by slot."""
        if self.parallel is None:
            return None
        return jax.tree.map(lambda spec: NamedSharding(self.parallel.mesh, spec), self._cache_specs(cache),
                            is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))

    def _cache_specs(self, cache: Cache) -> Cache:
        spec = lambda path, _: PartitionSpec(*[None] * batch_axis(path), *self._rows)
        return Cache(self._rows, jax.tree_util.tree_map_with_path(spec, cache.layers))

    def shardings(self, model: ModelConfig, unrolled: bool = False) -> Any:
        """Shardings of `model`'s parameters, stacked or `unrolled`, in the layout of acting; None on one device.

        Raises:
          UserError: a dimension that does not divide by the parts of its axis.
        """
        if self.parallel is None:
            return None

        def place(names: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
            self.parallel.check(leaf.shape, *names)
            return NamedSharding(self.parallel.mesh, self.parallel.spec(*names))

        shapes = abstract_params(model, unrolled)
        return jax.tree.map(place, logical_axes(model, unrolled), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))

    def most(self, *values: int) -> list[int]:
        """The largest of each value over all hosts, all of which must call this."""
        return [max(column) for column in zip(*distributed.gathered("engine", values))]

    def total(self, value: int) -> int:
        """The sum over all hosts, all of which must call this."""
        return sum(row[0] for row in distributed.gathered("engine", [value]))
