"""Tokens sorted by expert into blocks of equal height, and back, by gathers in both directions of autodiff.

Axes: N tokens, k experts per token, E experts, P padded rows, D width. A slot is one choice of one token
(token * k + choice). Each expert's rows start at a multiple of the block height, so every block belongs to
one expert.
"""

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array


@struct.dataclass
class Layout:
    """Where each token slot goes.

    Attributes:
      row: [N, k] int32, row of each slot.
      source: [P] int32, slot of each row, N * k for empty rows.
      block_expert: [P / block] int32, expert of each block.
      used: [] int32, blocks that hold rows; they come first.
    """

    row: Array
    source: Array
    block_expert: Array
    used: Array

    @property
    def token(self) -> Array:
        """[P] int32, token of each row, N for empty rows."""
        return self.source // self.row.shape[1]


def sorted_layout(experts: Array, num_experts: int, block: int) -> Layout:
    """Layout of `experts` [N, k] in blocks of `block` rows, as few as hold any routing."""
    slots = experts.size
    count = (slots + min(slots, num_experts) * (block - 1)) // block
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=num_experts)
    blocks = -(-sizes // block)
    last_block = jnp.cumsum(blocks)
    begin = (last_block - blocks) * block  # first row of each expert
    shift = begin - (jnp.cumsum(sizes) - sizes)  # row minus rank in sorted order
    row_of_rank = jnp.arange(slots, dtype=jnp.int32) + shift[flat[order]].astype(jnp.int32)
    source = jnp.full(count * block, slots, jnp.int32).at[row_of_rank].set(order.astype(jnp.int32), unique_indices=True)
    row = jnp.zeros(slots, jnp.int32).at[order].set(row_of_rank, unique_indices=True)
    block_expert = jnp.searchsorted(last_block, jnp.arange(count), side="right")
    block_expert = jnp.minimum(block_expert, num_experts - 1).astype(jnp.int32)
    return Layout(row.reshape(experts.shape), source, block_expert, last_block[-1].astype(jnp.int32))


def rows_or_zero(x: Array, index: Array) -> Array:
    """x[index] with zeros where index is out of bounds."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def scatter_tokens(x: Array, layout: Layout) -> Array:
    """x [N, D] -> [P, D] in sorted rows, empty rows zero."""
    return rows_or_zero(x, layout.token)


def _scatter_forward(x: Array, layout: Layout) -> tuple[Array, Layout]:
    return scatter_tokens(x, layout), layout


def _scatter_backward(layout: Layout, cotangent: Array) -> tuple[Array, None]:
    return gather_tokens(cotangent, layout), None


@jax.custom_vjp
def gather_tokens(y: Array, layout: Layout) -> Array:
    """y [P, D] -> [N, D]: each token's rows summed."""
    return jnp.sum(y[layout.row], axis=1)


def _gather_forward(y: Array, layout: Layout) -> tuple[Array, Layout]:
    return gather_tokens(y, layout), layout


def _gather_backward(layout: Layout, cotangent: Array) -> tuple[Array, None]:
    return scatter_tokens(cotangent, layout), None


@jax.custom_vjp
def scatter_slots(w: Array, layout: Layout) -> Array:
    """w [N, k] -> [P], empty rows zero."""
    return rows_or_zero(w.reshape(-1), layout.source)


def _slots_forward(w: Array, layout: Layout) -> tuple[Array, Layout]:
    return scatter_slots(w, layout), layout


def _slots_backward(layout: Layout, cotangent: Array) -> tuple[Array, None]:
    return cotangent[layout.row], None


scatter_tokens.defvjp(_scatter_forward, _scatter_backward)
gather_tokens.defvjp(_gather_forward, _gather_backward)
scatter_slots.defvjp(_slots_forward, _slots_backward)
