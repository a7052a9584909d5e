"""What one device of each TPU generation has, as published in Google Cloud's TPU documentation.

A device is what `jax.devices()` lists: a chip, or one of the two halves of a tpu7x (Ironwood) chip.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
      hbm: bytes.
      peak_flops: dense, in bfloat16, per second.
      bandwidth: of HBM, bytes per second.
      links: bytes per second that leave the device over all its links to others (half of what is published, which
        counts both directions).
    """

    hbm: float
    peak_flops: float
    bandwidth: float
    links: float


# An exchange takes at least this long, however little it moves: a hop between neighbours on the inter-chip links, as
# "How to Scale Your Model" (Austin et al. 2025, on sharded matrices) has it for v5e; nothing is published for others.
HOP_SECONDS = 1e-6
_GIB = 2**30
# By the generation in a topology's name.
CHIPS = {
    "v4": Chip(32 * _GIB, 275e12, 1228e9, 150e9),
    "v5e": Chip(16 * _GIB, 197e12, 819e9, 200e9),
    "v5p": Chip(95 * _GIB, 459e12, 2765e9, 600e9),
    "v6e": Chip(32 * _GIB, 918e12, 1638e9, 400e9),
    "tpu7x": Chip(96 * _GIB, 1153.5e12, 3690e9, 300e9),
}
# `device_kind` as JAX reports it.
_KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x",
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`; None where it is not in the table (a CPU, a GPU)."""
    name = _KINDS.get(device_kind)
    return CHIPS[name] if name else None
