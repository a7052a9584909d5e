"""SwiGLU of rows that are already sorted by expert, by grouped matrix products.

Axes: R rows, E experts, D width, F expert width. Rows of expert 0 come first; rows beyond the sum of the group
sizes belong to no expert; they may hold anything (NaN too), and so may what comes out for them and their gradients.
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
    run = lambda rows, weights: _swiglu(lambda a, kernel: jax.lax.ragged_dot(a, kernel, sizes), rows, weights, kernels)
    return of_real_rows(run, rows, weights, sizes)


def of_real_rows(run: Callable[[Array, Array], Array], rows: Array, weights: Array, sizes: Array) -> Array:
    """`run(rows, weights)` [R, D] where neither what rows of no expert hold nor their cotangents touch anything."""
    real = jnp.arange(rows.shape[0]) < jnp.sum(sizes)
    out = run(jnp.where(real[:, None], rows, 0), jnp.where(real, weights, 0))
    return jnp.where(real[:, None], out, 0)


def megablox_swiglu(
    rows: Array, weights: Array, sizes: Array, kernels: ExpertWeights, interpret: bool = False
) -> Array:
    """As `ragged_swiglu`, by JAX's Pallas kernels for TPU, which do no work for other experts in any gradient.

    `interpret` runs the kernels in Python, for tests elsewhere.
    """
    count = rows.shape[0]
    padding = -count % _LEAST_ROWS
    rows, weights = jnp.pad(rows, ((0, padding), (0, 0))), jnp.pad(weights, (0, padding))
    # The kernels leave rows of no group unwritten, keep rows apart otherwise, and mask them in weights' gradients.
    product = lambda a, kernel: gmm(a, kernel, sizes, a.dtype, _tiling, None, None, False, interpret)
    # One product for gate and up: rows are read once, and their gradient is one array instead of a sum of two.
    gate, up = jnp.split(product(rows, jnp.concatenate([kernels.gate, kernels.up], axis=2)), 2, axis=1)
    return product(_hidden(gate, up, weights), kernels.down)[:count]


def _swiglu(product: Callable[[Array, Array], Array], rows: Array, weights: Array, kernels: ExpertWeights) -> Array:
    return product(_hidden(product(rows, kernels.gate), product(rows, kernels.up), weights), kernels.down)


def _hidden(gate: Array, up: Array, weights: Array) -> Array:
    """[R, F]. A row's weight may act before the linear down projection: F columns instead of D."""
    return jax.nn.silu(gate) * up * weights.astype(gate.dtype)[:, None]


def _tiling(m: int, k: int, n: int) -> tuple[int, int, int]:
    """Tile of the kernel for [m, k] times [k, n]: rows must divide, columns need not."""
    rows = _TILE[0]
    while m % rows:
        rows //= 2
    return rows, min(k, _TILE[1]), min(n, _TILE[2])
