"""The device mesh: five named axes, one layout for every stage."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from qcn_jax.config import MeshConfig
from qcn_jax.errors import UserError
from qcn_jax.sharding import distributed
from qcn_jax.sharding.parallel import Parallel
from qcn_jax.sharding.rules import AxisRules

AXES = ("data", "fsdp", "expert", "tensor", "context")


def axis_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Sizes of AXES for `devices` devices; a single -1 in the config takes what the others leave.

    Raises:
      UserError: more than one -1, a size below one, or a product that is not the number of devices.
    """
    given = {axis: getattr(config, axis) for axis in AXES}
    sizes = list(given.values())
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"--config.mesh: sizes must be positive, at most one of them -1, got {given}")
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = devices // rest if devices % rest == 0 else 0
    if math.prod(sizes) != devices:
        raise UserError(f"--config.mesh: {given} does not multiply to {devices} devices")
    return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (all of this process group's by default) laid out along the physical torus."""
    devices = list(distributed.devices() if devices is None else devices)
    sizes = axis_sizes(config, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if sizes[0] % slices:
            raise UserError(f"--config.mesh.data: {sizes[0]} is not a multiple of the {slices} slices")
        inner = (sizes[0] // slices, *sizes[1:])
        outer = (slices, *([1] * (len(sizes) - 1)))
        array = mesh_utils.create_hybrid_device_mesh(inner, outer, devices=devices)
    elif devices[0].platform == "tpu":
        array = mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)
    else:
        array = np.asarray(devices).reshape(sizes)
    return Mesh(array, AXES)


def make_parallel(config: MeshConfig, devices: Sequence[Any] | None = None, rules: AxisRules = AxisRules()) -> Parallel:
    """What `Qwen3Next(config, parallel=...)` takes: a mesh over `devices` and the forms that `config` chooses."""
    return Parallel(make_mesh(config, devices), rules, config.dispatch, config.dispatch_buffer)
