"""Dispatch by all-to-all of fixed size: every device keeps room for C slots per expert; slots beyond it are dropped.

The shapes are static and the products dense batches, which suits compilers that know neither ragged exchange nor
grouped products. What is dropped contributes nothing to its token's output, and is counted.
"""

import jax
import jax.numpy as jnp

from qcn_jax.moe.dispatch.slots import buffer_rows, exclusive_cumsum, sort_slots, take

Array = jax.Array


class Capacity:
    """Plan of one dispatch; see moe.dispatch.dispatch.Form."""

    rounds = 1

    def __init__(
        self, experts: Array, num_experts: int, axes: tuple[str, ...], all_axes: tuple[str, ...], buffer: float
    ) -> None:
        del all_axes
        tokens, self._choices = experts.shape
        self._axes, self._experts = axes, num_experts
        self._room = room = buffer_rows(experts.size / num_experts, buffer, tokens)
        flat = experts.reshape(-1)
        order, row, counts = sort_slots(flat, num_experts)
        begin = exclusive_cumsum(counts)
        rank = row - take(begin, flat)  # within the expert
        kept = (flat < num_experts) & (rank < room)
        self._row = jnp.where(kept, flat * room + rank, num_experts * room)  # place of each slot, or out of bounds
        place = jnp.arange(room)
        filled = place < jnp.minimum(counts, room)[:, None]
        source = take(order, (begin[:, None] + place).reshape(-1))
        self._source = jnp.where(filled.reshape(-1), source, experts.size)  # slot in each place
        self._counts = jnp.minimum(counts, room)
        self.dropped = jnp.sum(counts - self._counts).astype(jnp.float32)

    def send(self, x: Array) -> Array:
        """x [N, ...] of tokens -> [E / devices, devices * C, ...] of this device's experts."""
        return self._to_experts(take(x, self._source // self._choices))

    def send_slots(self, w: Array) -> Array:
        """w [N, k] -> [E / devices, devices * C]."""
        return self._to_experts(take(w.reshape(-1), self._source))

    def fetch(self, places: Array, step: int) -> Array:
        """The rows of the only round."""
        return places

    def sizes(self, step: int) -> None:
        """Every expert has the same number of rows."""
        return None

    def store(self, places: Array, rows: Array, step: int) -> Array:
        """The results of the only round."""
        return rows

    def collect(self, places: Array) -> Array:
        """[E / devices, devices * C, D] -> [N, D]: the sum of each token's slots."""
        rows = take(self._to_tokens(places), self._row)
        return jnp.sum(rows.reshape(-1, self._choices, rows.shape[-1]), axis=1)

    def collect_slots(self, places: Array) -> Array:
        """[E / devices, devices * C] -> [N, k]."""
        return take(self._to_tokens(places), self._row).reshape(-1, self._choices)

    def _to_experts(self, x: Array) -> Array:
        x = x.reshape(self._experts, self._room, *x.shape[1:])
        return jax.lax.all_to_all(x, self._axes, 0, 1, tiled=True)

    def _to_tokens(self, x: Array) -> Array:
        x = jax.lax.all_to_all(x, self._axes, 1, 0, tiled=True)
        return x.reshape(self._experts * self._room, *x.shape[2:])
