"""Dropless dispatch by ragged all-to-all: every slot's row goes to its expert's device, and its result comes back.

Rows arrive sorted by expert (one slice per pair of source and expert), so no second permutation is needed. A device
that is sent more rows than its buffer holds takes them in several rounds: unbalanced routing costs time, never a
token. All devices agree on the number of rounds, because each knows all counts.
"""


import jax
import jax.numpy as jnp

from qcn_jax.moe.dispatch.slots import buffer_rows, exclusive_cumsum, sort_slots, take

Array = jax.Array
Axes = tuple[str, ...]
PIECE = 1024  # elements of a TPU register


def unfilled(shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """A buffer to receive rows: on a TPU whatever lies in memory.

    By the compiler's estimates, filling buffers took as long as all else between the products.
    """
    return jax.lax.platform_dependent(
        tpu=lambda: jax.lax.empty(shape, dtype), default=lambda: jnp.zeros(shape, dtype))


def exchange_slices(
    operand: Array, output: Array, send: Array, sizes: Array, target: Array, received: Array, axes: Axes
) -> Array:
    """jax.lax.ragged_all_to_all, also where XLA has none (everything but TPU and GPU).

    Args:
      operand: [S, ...], slices to send, one or more for each device in order of devices.
      output: [R, ...], returned with the received slices written into it.
      send, sizes: int32, begin and length of each slice in `operand`.
      target: int32, begin of each slice in its receiver's output.
      received: int32, lengths of the slices that arrive, in order of their senders.
      axes: mesh axes along which devices exchange.
    """
    native = lambda *args: jax.lax.ragged_all_to_all(*args, axis_name=axes)

    def emulated(operand: Array, output: Array, send: Array, sizes: Array, target: Array, _: Array) -> Array:
        # Every device sees everything and picks what is meant for it.
        pick = lambda x: jnp.take(
            jax.lax.all_gather(x, axes).reshape(jax.lax.axis_size(axes), jax.lax.axis_size(axes), -1),
            jax.lax.axis_index(axes), axis=1)
        everything = jax.lax.all_gather(operand, axes)
        begin, length, to = pick(send), pick(sizes), pick(target)  # [sender, slice]
        row = jnp.arange(output.shape[0])
        inside = (row >= to[..., None]) & (row < (to + length)[..., None])  # [sender, slice, row]
        sender, piece = jnp.divmod(jnp.argmax(inside.reshape(-1, row.size), axis=0), to.shape[1])
        source = begin[sender, piece] + row - to[sender, piece]
        arrives = jnp.any(inside, axis=(0, 1)).reshape(-1, *[1] * (output.ndim - 1))
        return jnp.where(arrives, everything[sender, jnp.clip(source, 0, operand.shape[0] - 1)], output)

    args = (operand, output, send, sizes, target, received)
    return jax.lax.platform_dependent(*args, cpu=emulated, default=native)


class Ragged:
    """Plan of one dispatch; see moe.dispatch.dispatch.Form."""

    dropped = None

    def __init__(self, experts: Array, num_experts: int, axes: Axes, all_axes: Axes, buffer: float) -> None:
        tokens, self._choices = experts.shape
        self._axes, self._devices = axes, jax.lax.axis_size(axes) if axes else 1
        local = num_experts // self._devices
        self._sorted = sort_slots(experts.reshape(-1), num_experts)
        worst = self._devices * tokens * min(self._choices, local)
        self._rows = buffer_rows(experts.size, buffer if axes else 0, worst)
        if not axes:
            self.rounds, self._sizes = 1, self._sorted.counts
            return
        counts = jax.lax.all_gather(self._sorted.counts, axes)  # [source, E]
        self._begin = exclusive_cumsum(counts).reshape(self._devices, self._devices, local)
        self._counts = counts.reshape(self._devices, self._devices, local)  # [source, target, expert]
        # Place of each slice among all that its target receives: by expert, then by source.
        by_target = jnp.transpose(self._counts, (1, 2, 0)).reshape(self._devices, -1)
        arrival = exclusive_cumsum(by_target).reshape(self._devices, local, self._devices)
        self._arrival = jnp.transpose(arrival, (2, 0, 1))
        self.rounds = 1
        if worst > self._rows:
            needed = -(-jnp.max(jnp.sum(by_target, axis=1)) // self._rows)
            self.rounds = jax.lax.pmax(needed, all_axes)

    def send(self, x: Array) -> Array:
        """x [N, ...] of tokens -> [S, ...] of slots sorted by expert."""
        return self._pad(self._in_pieces(x)[self._sorted.order // self._choices])

    def send_slots(self, w: Array) -> Array:
        """w [N, k] -> [S]."""
        return self._pad(w.reshape(-1)[self._sorted.order])

    def fetch(self, slots: Array, step: int | Array) -> Array:
        """The [R, ...] rows of this device's experts in one round, sorted by expert; empty ones hold anything."""
        if not self._axes:
            return slots
        out = unfilled((self._rows, *slots.shape[1:]), slots.dtype)
        length, here, there = self._window(step)
        me = jax.lax.axis_index(self._axes)
        flat = lambda x: x.reshape(-1)
        rows = exchange_slices(
            slots, out, flat(here[me]), flat(length[me]), flat(there[me]), flat(length[:, me]), self._axes)
        return rows if rows.ndim == 1 else rows.reshape(self._rows, -1)

    def sizes(self, step: int | Array) -> Array:
        """[E / devices] int32: rows of each expert in one round."""
        if not self._axes:
            return self._sizes
        return jnp.sum(self._window(step)[0][:, jax.lax.axis_index(self._axes)], axis=0)

    def store(self, slots: Array, rows: Array, step: int | Array) -> Array:
        """Sends one round's results back into the slots that its rows came from, whose tokens are needed no more."""
        if not self._axes:
            return rows
        length, here, there = self._window(step)
        me = jax.lax.axis_index(self._axes)
        flat = lambda x: x.reshape(-1)
        return exchange_slices(
            self._in_pieces(rows), slots, flat(there[:, me]), flat(length[:, me]), flat(here[:, me]), flat(length[me]),
            self._axes)

    def collect(self, slots: Array) -> Array:
        """[S, D] -> [N, D]: the sum of each token's slots."""
        return jnp.sum(self._by_choice(slots), axis=0)

    def collect_slots(self, slots: Array) -> Array:
        """[S] -> [N, k]."""
        return self._by_choice(slots).T

    def _by_choice(self, slots: Array) -> Array:
        """[S, ...] -> [k, N, ...], zero where a choice is of no expert. (Tokens first, a TPU would pad k to a tile.)"""
        row = self._sorted.row.reshape(-1, self._choices).T
        rows, real = slots[row], row < jnp.sum(self._sorted.counts)
        if rows.ndim == row.ndim:
            return jnp.where(real, rows, 0)
        # The barrier keeps a TPU from adding in the layout of the exchange, which uses an eighth of a register.
        rows = jax.lax.optimization_barrier(rows.reshape(*row.shape, -1))
        return jnp.where(real[..., None], rows, 0)

    def _in_pieces(self, x: Array) -> Array:
        """x [*, D] as [*, D / 1024, 1024] where rows are exchanged: a TPU then keeps a row contiguous in memory.

        It exchanges no other layout, and would copy all slots into this one rather than the tokens they come from.
        """
        if not self._axes or x.ndim == 1 or x.shape[-1] % PIECE:
            return x
        return x.reshape(*x.shape[:-1], -1, PIECE)

    def _pad(self, x: Array) -> Array:
        if self._axes:
            return x
        return take(x, jnp.arange(self._rows))

    def _window(self, step: int | Array) -> tuple[Array, Array, Array]:
        """Of every slice [source, target, expert]: rows sent in this round, their place at source and at target."""
        first = step * self._rows
        low = jnp.clip(first - self._arrival, 0, self._counts)
        high = jnp.clip(first + self._rows - self._arrival, 0, self._counts)
        return high - low, self._begin + low, jnp.clip(self._arrival - first, 0, self._rows)
