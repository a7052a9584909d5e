"""From logical axis names to mesh axes: one readable table that refuses collisions."""

import dataclasses
from collections.abc import Sequence

from jax.sharding import PartitionSpec

from qcn_jax.errors import UserError

MeshAxes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Mesh axes for every logical axis of a parameter or an activation; the empty tuple means replicated.

    Parameters are sharded over both `fsdp` and `expert` where they are not experts, because the expert axis is as
    free to hold dense weights as any other; experts themselves live on `expert` and their width on `fsdp`.
    """

    # parameters
    embed: MeshAxes = ("fsdp", "expert", "context")
    vocab: MeshAxes = ("tensor",)
    heads: MeshAxes = ("tensor",)
    kv_heads: MeshAxes = ()
    expert: MeshAxes = ("expert",)
    expert_embed: MeshAxes = ("fsdp", "context")
    mlp: MeshAxes = ("tensor",)
    conv: MeshAxes = ("tensor",)
    head_dim: MeshAxes = ()
    layers: MeshAxes = ()
    norm: MeshAxes = ()
    # activations
    activation_batch: MeshAxes = ("data", "fsdp", "expert")
    activation_length: MeshAxes = ("context",)
    activation_embed: MeshAxes = ()
    activation_heads: MeshAxes = ("tensor",)
    activation_mlp: MeshAxes = ("tensor",)
    activation_vocab: MeshAxes = ("tensor",)

    def spec(self, names: Sequence[str | None]) -> PartitionSpec:
        """The partition spec of an array whose dimensions carry these logical names.

        Raises:
          UserError: a name without a rule, or two dimensions that would be split over one mesh axis.
        """
        used: dict[str, str] = {}
        entries: list[str | MeshAxes | None] = []
        for name in names:
            if name is None:
                entries.append(None)
                continue
            axes = getattr(self, name, None)
            if axes is None:
                allowed = ", ".join(field.name for field in dataclasses.fields(self))
                raise UserError(f"logical axis {name!r} has no rule; known: {allowed}")
            for axis in axes:
                if axis in used:
                    raise UserError(f"axes {used[axis]!r} and {name!r} of {tuple(names)} collide on mesh axis {axis!r}")
                used[axis] = name
            entries.append(axes[0] if len(axes) == 1 else (axes or None))
        return PartitionSpec(*entries)
