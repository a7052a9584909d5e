"""SwiGLU of tokens sorted into blocks of one expert each, one block after the other, for processors with caches.

What a block needs (its rows, one expert's weights) stays in cache through all its products, and no copy of the weights
or of the rows is made for all blocks, which is what batched products over blocks cost.

Axes: N tokens, k experts per token, E experts, D width, F expert width, M blocks, R rows of a block.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qcn_jax.moe.grouped import ExpertWeights
from qcn_jax.moe.permute import Layout, gather_tokens, rows_or_zero, scatter_slots

Array = jax.Array
Residuals = tuple[Array, Array, Layout, ExpertWeights, Array, Array]
_TOGETHER = 2  # blocks of one turn of the loop: what does not depend on each other runs on several threads


def looped_swiglu(x: Array, weights: Array, layout: Layout, kernels: ExpertWeights) -> Array:
    """sum_j weights[n, j] * expert_j(x[n]) [N, D] for x [N, D] and weights [N, k] in x's dtype, placed by `layout`."""
    kernels = jax.tree.map(jnp.asarray, kernels)  # indexed by traced numbers
    blocks = layout.block_expert.shape[0]
    if blocks % _TOGETHER:
        height, missing = layout.source.shape[0] // blocks, -blocks % _TOGETHER
        source = jnp.pad(layout.source, (0, missing * height), constant_values=layout.row.size)
        layout = layout.replace(source=source, block_expert=jnp.pad(layout.block_expert, (0, missing), mode="edge"))
    return _run(jnp.asarray(x), scatter_slots(weights, layout), layout, kernels)


@jax.custom_vjp
def _run(x: Array, weights: Array, layout: Layout, kernels: ExpertWeights) -> Array:
    return _forward(x, weights, layout, kernels)[0]


def _tokens(layout: Layout) -> Array:
    """[M, R] int32: the token of each row, N for empty rows."""
    return layout.token.reshape(layout.block_expert.shape[0], -1)


def _over_blocks(block: Callable[[Array, Any], Any], used: Array, arrays: Any) -> Any:
    """arrays <- block(i, arrays) for every block that holds rows, and at most one further."""

    def turn(i: Array, arrays: Any) -> Any:
        for j in range(_TOGETHER):
            arrays = block(i * _TOGETHER + j, arrays)
        return arrays

    return jax.lax.fori_loop(0, -(-used // _TOGETHER), turn, arrays)


def _forward(x: Array, weights: Array, layout: Layout, kernels: ExpertWeights) -> tuple[Array, Residuals]:
    tokens = _tokens(layout)
    scale = weights.reshape(tokens.shape)

    def block(i: Array, arrays: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        rows = rows_or_zero(x, tokens[i])
        weight = jax.tree.map(lambda kernel: kernel[layout.block_expert[i]], kernels)
        gate, up = rows @ weight.gate, rows @ weight.up
        out = (jax.nn.silu(gate) * up * scale[i][:, None]) @ weight.down
        return tuple(array.at[i].set(value) for array, value in zip(arrays, (out, gate, up)))

    empty = lambda width: jnp.zeros((*tokens.shape, width), x.dtype)
    width = kernels.gate.shape[-1]
    out, gate, up = _over_blocks(block, layout.used, (empty(x.shape[-1]), empty(width), empty(width)))
    return gather_tokens(out.reshape(-1, x.shape[-1]), layout), (x, weights, layout, kernels, gate, up)


def _backward(residuals: Residuals, cotangent: Array) -> tuple[Array, Array, None, ExpertWeights]:
    x, weights, layout, kernels, gates, ups = residuals
    tokens = _tokens(layout)
    scale = weights.reshape(tokens.shape)
    exact = jnp.promote_types(x.dtype, jnp.float32)  # of sums over rows and blocks
    outer = lambda a, b: a.astype(exact).T @ b.astype(exact)

    def block(i: Array, sums: tuple[Array, Array, ExpertWeights]) -> tuple[Array, Array, ExpertWeights]:
        d_rows, d_scale, d_kernels = sums
        expert = layout.block_expert[i]
        weight = jax.tree.map(lambda kernel: kernel[expert], kernels)
        rows, d_out = rows_or_zero(x, tokens[i]), rows_or_zero(cotangent, tokens[i])
        gate, up, share = gates[i], ups[i], scale[i]
        sigmoid = jax.nn.sigmoid(gate)
        silu = gate * sigmoid
        d_hidden = d_out @ weight.down.T
        d_share = jnp.sum((d_hidden * silu * up).astype(exact), axis=-1)
        d_hidden = d_hidden * share[:, None]
        d_gate, d_up = d_hidden * up * (sigmoid + silu * (1 - sigmoid)), d_hidden * silu
        parts = ExpertWeights(outer(rows, d_gate), outer(rows, d_up), outer(silu * up * share[:, None], d_out))
        return (
            d_rows.at[i].set(d_gate @ weight.gate.T + d_up @ weight.up.T),
            d_scale.at[i].set(d_share.astype(d_scale.dtype)),
            jax.tree.map(lambda total, part: total.at[expert].add(part), d_kernels, parts),
        )

    zeros = (jnp.zeros((*tokens.shape, x.shape[-1]), x.dtype), jnp.zeros_like(scale),
             jax.tree.map(lambda kernel: jnp.zeros(kernel.shape, exact), kernels))
    d_rows, d_scale, d_kernels = _over_blocks(block, layout.used, zeros)
    d_kernels = jax.tree.map(lambda total, kernel: total.astype(kernel.dtype), d_kernels, kernels)
    return gather_tokens(d_rows.reshape(-1, x.shape[-1]), layout), d_scale.reshape(weights.shape), None, d_kernels


_run.defvjp(_forward, _backward)
