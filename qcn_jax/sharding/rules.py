"""From logical axis names to mesh axes: one readable table that refuses collisions."""

import dataclasses
from collections.abc import Collection, Sequence

from jax.sharding import PartitionSpec

from qcn_jax.errors import UserError

MeshAxes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Mesh axes for every logical axis of a parameter or an activation; the empty tuple means replicated.

    Dense weights are split over every axis that holds different tokens, because those axes are free to hold
    weights; experts themselves live on `expert` and the width of each on what is left. A batch's rows are split
    over `expert` too: that axis holds tokens and experts, and dispatch moves tokens along it.
    """

    # parameters
    embed: MeshAxes = ("fsdp", "expert", "context")
    vocab: MeshAxes = ("tensor",)
    heads: MeshAxes = ("tensor",)
    kv_heads: MeshAxes = ()
    mlp: MeshAxes = ("tensor",)
    expert: MeshAxes = ("expert",)
    expert_embed: MeshAxes = ("fsdp", "context")
    # parameters too small to be worth a collective each
    norm: MeshAxes = ()
    head_dim: MeshAxes = ()
    taps: MeshAxes = ()
    conv: MeshAxes = ()
    router: MeshAxes = ()
    shared_gate: MeshAxes = ()
    mtp_in: MeshAxes = ()
    # stacking of scanned layers
    blocks: MeshAxes = ()
    layers: MeshAxes = ()
    # activations
    activation_batch: MeshAxes = ("data", "fsdp", "expert")
    activation_length: MeshAxes = ("context",)
    activation_embed: MeshAxes = ()
    activation_heads: MeshAxes = ("tensor",)
    activation_vocab: MeshAxes = ("tensor",)

    def axes(self, name: str) -> MeshAxes:
        """Mesh axes of one logical axis.

        Raises:
          UserError: a name without a rule.
        """
        axes = getattr(self, name, None)
        if not isinstance(axes, tuple):
            allowed = ", ".join(field.name for field in dataclasses.fields(self))
            raise UserError(f"logical axis {name!r} has no rule; known: {allowed}")
        return axes

    def spec(self, names: Sequence[str | None], within: Collection[str] | None = None) -> PartitionSpec:
        """The partition spec of an array whose dimensions carry these logical names.

        Args:
          names: a logical name, or None for a dimension that is not split, per dimension.
          within: mesh axes that exist (or are larger than one); others are left out. None allows all.

        Raises:
          UserError: a name without a rule, or two dimensions that would be split over one mesh axis.
        """
        used: dict[str, str] = {}
        entries: list[str | MeshAxes | None] = []
        for name in names:
            axes = () if name is None else self.axes(name)
            for axis in axes:
                if axis in used:
                    raise UserError(f"axes {used[axis]!r} and {name!r} of {tuple(names)} collide on mesh axis {axis!r}")
                used[axis] = name
            kept = tuple(axis for axis in axes if within is None or axis in within)
            entries.append(kept[0] if len(kept) == 1 else (kept or None))
        return PartitionSpec(*entries)
