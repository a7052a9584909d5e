"""What layers know of the devices they run on: a value handed down with the tokens, never ambient state.

Dense maps and norms are partitioned by the compiler from the shardings of weights and activations. What it would
partition badly (experts, the delta rule, the convolution, attention along a split sequence) and kernels that it
cannot see into run per device, under `Parallel.per_device`, with collectives written out.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from qcn_jax.errors import UserError
from qcn_jax.sharding.rules import AxisRules

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How the model is spread over devices.

    Attributes:
      mesh: devices with the axes of sharding.mesh.AXES.
      rules: mesh axes of every logical axis.
      dispatch: how tokens travel to experts on other devices; see moe.dispatch.
      dispatch_buffer: rows that a device holds for its experts at a time, relative to a balanced load; 0 is room
        for the most unbalanced routing. See moe.dispatch.
    """

    mesh: Mesh | AbstractMesh
    rules: AxisRules = AxisRules()
    dispatch: str = "ragged"
    dispatch_buffer: float = 1.25

    @property
    def platform(self) -> str | None:
        """Of the devices: "tpu", "gpu", "cpu"; None of an abstract mesh."""
        return self.mesh.devices.flat[0].platform if isinstance(self.mesh, Mesh) else None

    def axes(self, *names: str) -> tuple[str, ...]:
        """Mesh axes larger than one over which these logical axes are split, in order."""
        return tuple(axis for name in names for axis in self.rules.axes(name) if self.mesh.shape[axis] > 1)

    def size(self, *names: str) -> int:
        """Number of parts into which these logical axes are split together."""
        size = 1
        for axis in self.axes(*names):
            size *= self.mesh.shape[axis]
        return size

    def spec(self, *names: str | None) -> PartitionSpec:
        """Partition spec of an array with these logical axes; None is a dimension that is not split."""
        return self.rules.spec(names, [axis for axis, size in self.mesh.shape.items() if size > 1])

    def check(self, shape: Sequence[int], *names: str | None) -> None:
        """Raises UserError where a dimension does not divide by the parts of its logical axis."""
        for size, name in zip(shape, names, strict=True):
            if name is not None and size % self.size(name):
                raise UserError(f"--config.mesh: {size} along {name!r} does not divide by the {self.size(name)} parts "
                                f"of mesh axes {', '.join(self.axes(name))}")

    def constrain(self, x: Array, *names: str | None) -> Array:
        """`x` laid out by these logical axes; raises what `check` raises."""
        self.check(x.shape, *names)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(*names)))

    def constrain_tokens(self, x: Array) -> Array:
        """A [B, T, D] activation laid out as it is between layers."""
        return self.constrain(x, "activation_batch", "activation_length", "activation_embed")

    def gathered(self, weight: Array, *names: str) -> Array:
        """`weight` whole along the mesh axes that hold different tokens, put together one mesh axis at a time.

        A TPU's compiler writes one gather over several mesh axes as a sum over devices of mostly zeros, which moves
        twice the bytes. The gradient is left to the compiler: asked for in stages, it would be summed in each.
        """
        split = [list(self.axes(name)) for name in names]
        tokens = self.axes("activation_batch", "activation_length")
        stages = []
        for axes in split:
            while axes and axes[-1] in tokens:  # the last axis holds neighbouring parts
                axes.pop()
                stages.append(NamedSharding(self.mesh, PartitionSpec(*(tuple(left) or None for left in split))))
        return _in_stages(weight, tuple(stages))

    def per_device(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`function` run on every device's own part of its arguments; collectives inside name mesh axes."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _in_stages(x: Array, stages: tuple[NamedSharding, ...]) -> Array:
    """`x` laid out by one sharding after the other; its gradient is held to none of them."""
    for sharding in stages:
        x = jax.lax.with_sharding_constraint(x, sharding)
    return x


_in_stages.defvjp(lambda x, stages: (_in_stages(x, stages), None), lambda stages, _, gradient: (gradient,))
