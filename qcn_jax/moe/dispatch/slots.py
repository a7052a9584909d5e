"""What the forms of dispatch share: slots sorted by expert, and sizes of buffers.

A slot is one choice of one token (token * k + choice). The id `num_experts` stands for no expert (padding).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
# Buffers are multiples of these: a full tile of the grouped product where there is work for it, else a few rows.
_ALIGN, _SMALL = 512, 8


class Sorted(NamedTuple):
    """order [S]: slots in order of their expert. row [S]: place of each slot in it. counts [E]: slots per expert."""

    order: Array
    row: Array
    counts: Array


def sort_slots(flat: Array, num_experts: int) -> Sorted:
    """Slots with experts `flat` [S] sorted by expert, those without one last."""
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    row = jnp.zeros_like(order).at[order].set(jnp.arange(flat.size, dtype=jnp.int32), unique_indices=True)
    counts = jnp.bincount(flat, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    return Sorted(order, row, counts)


def take(x: Array, index: Array) -> Array:
    """x[index] along the first axis, zero where the index is out of bounds."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def exclusive_cumsum(x: Array, axis: int = -1) -> Array:
    """Sum of what comes before each element."""
    return jnp.cumsum(x, axis=axis) - x


def buffer_rows(mean: float, factor: float, worst: int) -> int:
    """Rows of a buffer: `factor` times a balanced load, aligned; `worst` where that is less or the factor is 0."""
    rows = worst if factor == 0 else min(worst, math.ceil(mean * factor))
    align = _ALIGN if rows >= 8 * _ALIGN else _SMALL
    return -(-rows // align) * align
