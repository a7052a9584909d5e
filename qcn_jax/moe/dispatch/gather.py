"""Dropless dispatch by all-gather and reduce-scatter: every device sees all tokens and serves its own experts.

Moves more bytes than an all-to-all where there are many devices (each token goes to all of them, not to ten), and
fewer where there are few. A device with more rows than its buffer works through them in several rounds.
"""

import jax
import jax.numpy as jnp

from qcn_jax.moe.dispatch.slots import buffer_rows, exclusive_cumsum, sort_slots, take

Array = jax.Array


class Gather:
    """Plan of one dispatch; see moe.dispatch.dispatch.Form."""

    dropped = None

    def __init__(
        self, experts: Array, num_experts: int, axes: tuple[str, ...], all_axes: tuple[str, ...], buffer: float
    ) -> None:
        del all_axes  # rounds hold no collective, so devices need not agree on their number
        self._axes, self._choices = axes, experts.shape[1]
        local = num_experts // jax.lax.axis_size(axes)
        everyone = jax.lax.all_gather(experts, axes, tiled=True)  # [M, k]
        mine = everyone - jax.lax.axis_index(axes) * local
        mine = jnp.where((mine >= 0) & (mine < local), mine, local).reshape(-1)
        order, _, self._counts = sort_slots(mine, local)
        worst = everyone.shape[0] * min(self._choices, local)
        self._rows = buffer_rows(experts.size, buffer, worst)
        self._total = jnp.sum(self._counts)
        self.rounds = 1 if worst <= self._rows else -(-self._total // self._rows)
        # Whole rounds of slots; those beyond the total point out of bounds.
        padded = jnp.pad(order, (0, self._rows + -order.size % self._rows), constant_values=everyone.size)
        self._order = jnp.where(jnp.arange(padded.size) < self._total, padded, everyone.size)

    def send(self, x: Array) -> tuple[Array, Array]:
        """x [N, ...] of tokens -> [M, ...] of all devices' tokens, and zeros for their results."""
        return self._with_results(jax.lax.all_gather(x, self._axes, tiled=True))

    def send_slots(self, w: Array) -> tuple[Array, Array]:
        """w [N, k] -> [M * k], and zeros for results."""
        return self._with_results(jax.lax.all_gather(w, self._axes, tiled=True).reshape(-1))

    def fetch(self, buffer: tuple[Array, Array], step: int | Array) -> Array:
        """The [R, ...] rows of this device's experts in one round, sorted by expert, empty ones zero."""
        return take(buffer[0], self._source(buffer[0], step))

    def sizes(self, step: int | Array) -> Array:
        """[E / devices] int32: rows of each expert in one round."""
        begin, first = exclusive_cumsum(self._counts), step * self._rows
        within = lambda x: jnp.clip(x - first, 0, self._rows)
        return within(begin + self._counts) - within(begin)

    def store(self, buffer: tuple[Array, Array], rows: Array, step: int | Array) -> tuple[Array, Array]:
        """Adds one round's results to those of their tokens or slots."""
        sent, results = buffer
        return sent, results.at[self._source(sent, step)].add(rows, mode="drop")

    def collect(self, buffer: tuple[Array, Array]) -> Array:
        """[M, D] -> [N, D]: the sum over devices."""
        return jax.lax.psum_scatter(buffer[1], self._axes, tiled=True)

    def collect_slots(self, buffer: tuple[Array, Array]) -> Array:
        """[M * k] -> [N, k]."""
        return jax.lax.psum_scatter(buffer[1].reshape(-1, self._choices), self._axes, tiled=True)

    def _with_results(self, sent: Array) -> tuple[Array, Array]:
        return sent, jnp.zeros_like(sent)

    def _source(self, sent: Array, step: int | Array) -> Array:
        """[R] index of this round's rows among slots or tokens; out of bounds for empty ones."""
        slot = jax.lax.dynamic_slice_in_dim(self._order, step * self._rows, self._rows)
        return slot if sent.ndim == 1 else slot // self._choices
