"""Routed SwiGLU experts over chosen tokens: one function, three back ends with the same result.

Axes: N tokens, k experts per token, E experts, D width, F expert width, P rows sorted by expert.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qcn_jax.errors import UserError
from qcn_jax.moe.permute import gather_tokens, scatter_slots, scatter_tokens, sorted_layout

Array = jax.Array
BACKENDS = ("auto", "blocked", "ragged", "dense")
# Rows of a block: high enough to feed a matrix unit or BLAS, low enough that padding each expert costs little.
MAX_BLOCK = 128
MIN_BLOCK = 16


class ExpertWeights(NamedTuple):
    """gate, up [E, D, F] and down [E, F, D]."""

    gate: Array
    up: Array
    down: Array


def apply_experts(x: Array, weights: Array, experts: Array, kernels: ExpertWeights, backend: str = "auto") -> Array:
    """sum_j weights[n, j] * expert_{experts[n, j]}(x[n]) for every token.

    Args:
      x: [N, D].
      weights: [N, k] float32 routing weights.
      experts: [N, k] int32, distinct within a token.
      kernels: expert weights in x's dtype.
      backend: "blocked" sorts tokens into blocks of one expert each and multiplies batched blocks; "ragged"
        sorts and uses lax.ragged_dot (a native kernel on TPU); "dense" runs every expert on every token
        (or, for fewer slots than experts, gathers the chosen experts); "auto" chooses by N.

    Returns:
      [N, D] in x's dtype.

    Raises:
      UserError: unknown back end.
    """
    if backend not in BACKENDS:
        raise UserError(f"model.moe: unknown back end {backend!r}; allowed: {', '.join(BACKENDS)}")
    slots, num_experts = experts.size, kernels.gate.shape[0]
    if backend == "auto":
        # Few tokens: reading weights dominates, and both dense forms read each weight at most once.
        backend = "dense" if x.shape[0] <= 32 else "blocked"
    weights = weights.astype(x.dtype)
    if backend == "dense":
        run = _gathered if slots < num_experts else _all_experts
        return run(x, weights, experts, kernels)
    if backend == "ragged":
        return _ragged(x, weights, experts, kernels)
    return _blocked(x, weights, experts, kernels, _block_height(slots, num_experts))


def _block_height(slots: int, num_experts: int) -> int:
    """A power of two near half the mean load of an expert, within the limits."""
    height = MIN_BLOCK
    while height < MAX_BLOCK and height * 2 * num_experts <= slots:
        height *= 2
    return height


def _blocked(x: Array, weights: Array, experts: Array, kernels: ExpertWeights, block: int) -> Array:
    layout = sorted_layout(experts, kernels.gate.shape[0], block)
    rows = scatter_tokens(x, layout).reshape(-1, block, x.shape[-1])
    gate, up, down = (kernel[layout.block_expert] for kernel in kernels)
    hidden = jax.nn.silu(rows @ gate) * (rows @ up)
    # A row's weight may act before the linear down projection: F columns instead of D.
    hidden = hidden * scatter_slots(weights, layout).reshape(-1, block, 1)
    return gather_tokens((hidden @ down).reshape(-1, x.shape[-1]), layout)


def _ragged(x: Array, weights: Array, experts: Array, kernels: ExpertWeights) -> Array:
    num_experts = kernels.gate.shape[0]
    layout = sorted_layout(experts, num_experts, 1)
    rows = scatter_tokens(x, layout)
    # Empty rows lie at the end and belong to no group: ragged_dot leaves them zero.
    sizes = jnp.bincount(experts.reshape(-1), length=num_experts).astype(jnp.int32)
    product = lambda a, kernel: jax.lax.ragged_dot(a, kernel, sizes)
    hidden = jax.nn.silu(product(rows, kernels.gate)) * product(rows, kernels.up)
    hidden = hidden * scatter_slots(weights, layout)[:, None]
    return gather_tokens(product(hidden, kernels.down), layout)


def _gathered(x: Array, weights: Array, experts: Array, kernels: ExpertWeights) -> Array:
    gate, up, down = (kernel[experts] for kernel in kernels)  # [N, k, D, F]
    hidden = jax.nn.silu(jnp.einsum("nd,nkdf->nkf", x, gate)) * jnp.einsum("nd,nkdf->nkf", x, up)
    return jnp.einsum("nkf,nkfd->nd", hidden * weights[..., None], down)


def _all_experts(x: Array, weights: Array, experts: Array, kernels: ExpertWeights) -> Array:
    chosen = jax.nn.one_hot(experts, kernels.gate.shape[0], dtype=x.dtype)
    scale = jnp.einsum("nk,nke->en", weights, chosen)
    hidden = jax.nn.silu(jnp.einsum("nd,edf->enf", x, kernels.gate)) * jnp.einsum("nd,edf->enf", x, kernels.up)
    return jnp.einsum("enf,efd->nd", hidden * scale[..., None], kernels.down)
