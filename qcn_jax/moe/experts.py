"""Routed SwiGLU experts over chosen tokens: one function, several back ends with the same result.

Axes: N tokens, k experts per token, E experts, D width, F expert width, P rows sorted by expert.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qcn_jax.errors import UserError
from qcn_jax.moe.grouped import ExpertWeights, megablox_swiglu, of_real_rows, ragged_swiglu
from qcn_jax.moe.looped import looped_swiglu
from qcn_jax.moe.permute import gather_tokens, scatter_slots, scatter_tokens, sorted_layout

Array = jax.Array
BACKENDS = ("auto", "blocked", "looped", "ragged", "dense", "megablox")
_SORTED = {"ragged": ragged_swiglu, "megablox": megablox_swiglu}
# Rows of a block, half the mean load of an expert within these limits: high enough to feed a matrix unit, low enough
# that padding each expert costs little.
MIN_BLOCK, MAX_BLOCK = 16, 128
# The same of a loop over blocks, with the whole mean load: on CPU, of 8 layers at 1, 16, 64, 256, 1,024 tokens, loops
# with these took a third to two thirds of the time of any other form.
MIN_LOOPED, MAX_LOOPED = 2, 128


def apply_experts(x: Array, weights: Array, experts: Array, kernels: ExpertWeights, backend: str = "auto") -> Array:
    """sum_j weights[n, j] * expert_{experts[n, j]}(x[n]) for every token.

    Args:
      x: [N, D].
      weights: [N, k] float32 routing weights.
      experts: [N, k] int32, distinct within a token.
      kernels: expert weights in x's dtype.
      backend: "blocked" sorts tokens into blocks of one expert each and multiplies batched blocks; "looped" takes the
        same blocks one after the other, for processors with caches; "ragged" sorts and uses lax.ragged_dot (a native
        kernel on TPU); "megablox" sorts and uses Pallas kernels for TPU, whose weight gradient stays cheap; "dense"
        runs every expert on every token (or, for fewer slots than experts, gathers the chosen experts); "auto" chooses
        by N and JAX's default back end.

    Returns:
      [N, D] in x's dtype.

    Raises:
      UserError: unknown back end, or one that this platform does not have.
    """
    if backend not in BACKENDS:
        raise UserError(f"model.moe: unknown back end {backend!r}; allowed: {', '.join(BACKENDS)}")
    check_platform(backend, jax.default_backend())
    slots, num_experts = experts.size, kernels.gate.shape[0]
    if backend == "auto" and jax.default_backend() == "cpu":
        backend = "looped"
    elif backend == "auto":
        # Few tokens: reading weights dominates, and both dense forms read each weight at most once.
        backend = "dense" if x.shape[0] <= 32 else "blocked"
    weights = weights.astype(x.dtype)
    if backend == "dense":
        run = _gathered if slots < num_experts else _all_experts
        return run(x, weights, experts, kernels)
    if backend in _SORTED:
        return _sorted(x, weights, experts, kernels, _SORTED[backend])
    if backend == "looped":
        smallest = MIN_LOOPED if slots < num_experts else 2 * MIN_LOOPED  # most experts have one row, or more
        height = _block_height(slots / num_experts, smallest, MAX_LOOPED)
        return looped_swiglu(x, weights, sorted_layout(experts, num_experts, height), kernels)
    return _blocked(x, weights, experts, kernels)


def check_platform(backend: str, platform: str) -> None:
    """Raises UserError where `backend` has no form for `platform`."""
    if backend == "megablox" and platform != "tpu":
        raise UserError(f"model.moe: megablox has kernels for TPU only, this is a {platform}; auto chooses for each")


def sorted_experts(rows: Array, weights: Array, sizes: Array, kernels: ExpertWeights, backend: str = "auto") -> Array:
    """weights[r] * expert_of_row_r(rows[r]) for rows sorted by expert.

    Args:
      rows: [R, D]; those beyond the sum of `sizes` hold anything, and so do their results and gradients.
      weights: [R] routing weights.
      sizes: [E] int32, rows of each expert.
      kernels: expert weights in rows' dtype.
      backend: as in `apply_experts`; "auto" is megablox where the program is compiled for TPU, else blocked.
    """
    return _on_platform(backend, lambda run, *args: run(*args), rows, weights, sizes, kernels)


def sorted_experts_vjp(
    rows: Array, weights: Array, sizes: Array, kernels: ExpertWeights, cotangent: Array, backend: str = "auto"
) -> tuple[Array, Array, ExpertWeights]:
    """Gradients of `sorted_experts` with respect to rows, weights and kernels."""

    def pull(run: Callable, rows: Array, weights: Array, sizes: Array, kernels: ExpertWeights, cotangent: Array) -> Any:
        function = lambda rows, weights, kernels: run(rows, weights, sizes, kernels)
        return jax.vjp(function, rows, weights, kernels)[1](cotangent)

    return _on_platform(backend, pull, rows, weights, sizes, kernels, cotangent)


def _on_platform(backend: str, function: Callable, *args: Any) -> Any:
    bound = lambda run: lambda *args: function(run, *args)
    if backend == "auto":  # the platform is known when the program is lowered, not when it is traced
        return jax.lax.platform_dependent(*args, tpu=bound(megablox_swiglu), default=bound(_blocked_rows))
    return bound(_SORTED.get(backend, _blocked_rows))(*args)


def _blocked_rows(rows: Array, weights: Array, sizes: Array, kernels: ExpertWeights) -> Array:
    return of_real_rows(functools.partial(_blocked_sorted, sizes=sizes, kernels=kernels), rows, weights, sizes)


def _blocked_sorted(rows: Array, weights: Array, sizes: Array, kernels: ExpertWeights) -> Array:
    expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows.shape[0]), side="right")
    expert = jnp.minimum(expert, sizes.shape[0] - 1).astype(jnp.int32)  # empty rows are zero in any expert
    return _blocked(rows, weights.astype(rows.dtype)[:, None], expert[:, None], kernels)


def _block_height(rows: float, smallest: int, largest: int) -> int:
    """`rows` rounded down to a power of two, within the limits, which are such powers."""
    height = smallest
    while height < largest and height * 2 <= rows:
        height *= 2
    return height


def _blocked(x: Array, weights: Array, experts: Array, kernels: ExpertWeights) -> Array:
    num_experts = kernels.gate.shape[0]
    height = _block_height(experts.size / num_experts / 2, MIN_BLOCK, MAX_BLOCK)
    layout = sorted_layout(experts, num_experts, height)
    rows = scatter_tokens(x, layout).reshape(*layout.block_expert.shape, -1, x.shape[-1])
    gate, up, down = (kernel[layout.block_expert] for kernel in kernels)
    hidden = jax.nn.silu(rows @ gate) * (rows @ up)
    # A row's weight may act before the linear down projection: F columns instead of D.
    hidden = hidden * scatter_slots(weights, layout).reshape(*rows.shape[:2], 1)
    return gather_tokens((hidden @ down).reshape(-1, x.shape[-1]), layout)


def _sorted(x: Array, weights: Array, experts: Array, kernels: ExpertWeights, swiglu: Callable[..., Array]) -> Array:
    num_experts = kernels.gate.shape[0]
    layout = sorted_layout(experts, num_experts, 1)
    sizes = jnp.bincount(experts.reshape(-1), length=num_experts).astype(jnp.int32)
    return gather_tokens(swiglu(scatter_tokens(x, layout), scatter_slots(weights, layout), sizes, kernels), layout)


def _gathered(x: Array, weights: Array, experts: Array, kernels: ExpertWeights) -> Array:
    gate, up, down = (kernel[experts] for kernel in kernels)  # [N, k, D, F]
    hidden = jax.nn.silu(jnp.einsum("nd,nkdf->nkf", x, gate)) * jnp.einsum("nd,nkdf->nkf", x, up)
    return jnp.einsum("nkf,nkfd->nd", hidden * weights[..., None], down)


def _all_experts(x: Array, weights: Array, experts: Array, kernels: ExpertWeights) -> Array:
    chosen = jax.nn.one_hot(experts, kernels.gate.shape[0], dtype=x.dtype)
    scale = jnp.einsum("nk,nke->en", weights, chosen)
    # One product for each expert: as a single one, XLA on CPU would copy all weights into another order every time.
    rows = jnp.broadcast_to(x, (kernels.gate.shape[0], *x.shape))
    hidden = jax.nn.silu(rows @ kernels.gate) * (rows @ kernels.up)
    return jnp.sum((hidden * scale[..., None]) @ kernels.down, axis=0)
