"""Where training state and batches lie on a mesh."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from qcn_jax.config import ModelConfig
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


def copied(tree: Any) -> Any:
    """Copies of a tree of arrays, each where its original is."""
    return jax.jit(lambda tree: jax.tree.map(jax.numpy.copy, tree))(tree)


def mesh_of(state: TrainState) -> dict[str, Any]:
    """{"devices": n, "axes": {axis: size}} that the state really lies on, for a stage's results; no axes of one."""
    shardings = {leaf.sharding for leaf in jax.tree.leaves(state.params)}
    axes = {axis: size for sharding in shardings if isinstance(sharding, NamedSharding)
            for axis, size in sharding.mesh.shape.items() if size > 1}
    return {"devices": max(len(sharding.device_set) for sharding in shardings), "axes": axes}


def batch_sharding(parallel: Parallel, dimensions: int = 3) -> NamedSharding:
    """Of [slices, rows, T, ...] arrays, or with one dimension of [slices] arrays, which every device holds."""
    if dimensions == 1:
        return NamedSharding(parallel.mesh, PartitionSpec())
    return NamedSharding(parallel.mesh, parallel.spec(None, "activation_batch", "activation_length"))


def place_batch(parallel: Parallel | None, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts a batch on the devices.

    Args:
      parallel: the mesh; None is one device.
      arrays: [slices, rows, T, ...] or [slices], the same in every process; each sends its own devices' part.
    """
    if parallel is None:
        return jax.device_put(dict(arrays))
    return {name: jax.make_array_from_callback(array.shape, batch_sharding(parallel, array.ndim), array.__getitem__)
            for name, array in arrays.items()}
