"""SwiGLU of rows that are already sorted by expert, by grouped matrix products.

Axes: R rows, E experts, D width, F expert width. Rows of expert 0 come first; rows beyond the sum of the group
sizes belong to no expert and come out zero.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import gmm

Array = jax.Array
# Largest tile of rows, inner and output columns of the TPU kernel: some 8 MB of VMEM in bfloat16, double buffered.
_TILE = (512, 1024, 1024)
_LEAST_ROWS = 128  # smaller tiles leave a matrix unit idle


class ExpertWeights(NamedTuple):
    """gate, up [E, D, F] and down [E, F, D]."""

    gate: Array
    up: Array
    down: Array


def ragged_swiglu(rows: Array, weights: Array, sizes: Array, kernels: ExpertWeights) -> Array:
    """weights[r] * expert_of_row_r(rows[r]) by lax.ragged_dot, whose weight gradient is dense on most TPUs.

    Args:
      rows: [R, D].
      weights: [R] routing weights.
      sizes: [E] int32, rows of each expert.
      kernels: expert weights in rows' dtype.
    """
    return _swiglu(lambda a, kernel: jax.lax.ragged_dot(a, kernel, sizes), rows, weights, kernels)


def megablox_swiglu(
    rows: Array, weights: Array, sizes: Array, kernels: ExpertWeights, interpret: bool = False
) -> Array:
    """As `ragged_swiglu`, by JAX's Pallas kernels for TPU, which do no work for other experts in any gradient.

    `interpret` runs the kernels in Python, for tests elsewhere.
    """
    count = rows.shape[0]
    padding = -count % _LEAST_ROWS
    rows, weights = jnp.pad(rows, ((0, padding), (0, 0))), jnp.pad(weights, (0, padding))
    # The kernels leave rows of no group unwritten. They are cut off on both sides of every product, so that neither
    # they nor their cotangents, which may be NaN, touch anything.
    real = jnp.arange(count + padding) < jnp.sum(sizes)
    product = lambda a, kernel: jnp.where(
        real[:, None], gmm(a, kernel, sizes, a.dtype, _tiling, None, None, False, interpret), 0)
    out = _swiglu(product, jnp.where(real[:, None], rows, 0), jnp.where(real, weights, 0), kernels)
    return out[:count]


def _swiglu(product: Callable[[Array, Array], Array], rows: Array, weights: Array, kernels: ExpertWeights) -> Array:
    hidden = jax.nn.silu(product(rows, kernels.gate)) * product(rows, kernels.up)
    # A row's weight may act before the linear down projection: F columns instead of D.
    return product(hidden * weights.astype(rows.dtype)[:, None], kernels.down)


def _tiling(m: int, k: int, n: int) -> tuple[int, int, int]:
    """Tile of the kernel for [m, k] times [k, n]: rows must divide, columns need not."""
    rows = _TILE[0]
    while m % rows:
        rows //= 2
    return rows, min(k, _TILE[1]), min(n, _TILE[2])
