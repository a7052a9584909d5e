"""What stands between a DeltaNet layer's two projections as Pallas TPU kernels: the calls behind kernels.mixer.

Short convolution, SiLU, L2 norm of queries and keys, the gated delta rule and the gated RMS norm of its output work on
chunks that lie in VMEM: the projection [T, H * (2 dk + 2 R dv)] is read where it lies, and what is written is the
input of the output projection (in the backward pass the projection's gradient). Nothing is copied, cast, repeated or
laid out anew in HBM. A chunk needs the last rows of the chunk before it for its convolution: the forward pass keeps
them in VMEM, the backward pass, which runs from the last chunk to the first, reads them and keeps
their gradient for that chunk.

Every call reads arrays by name and writes arrays by name; mixer_blocks.Blocks says what each of them is.

`forward` and `backward` are the two passes; `continued` is the first of them from a state and rows that are given, and
also gives the state it ends in. A shard of a sequence whose other shards lie elsewhere needs the state
that it receives, and in the backward pass the gradient of the state that it hands on: `transfer` and `first_gradient`
run through a shard ahead of each pass and write no more than what these follow from.

Axes: B batch, T tokens (whole chunks), H key heads, R value heads per key head, N chunks, C chunk, dk/dv widths;
W = 2 dk + R dv convolved channels of a key head.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from qcn_jax.layers.kernels import chunk as chunk_math
from qcn_jax.layers.kernels.convolution import SUBLANES, convolution_gradients, convolved, tap_masks
from qcn_jax.layers.kernels.mixer_blocks import Arrays, Blocks, Sizes
from qcn_jax.layers.norm import L2_EPS

Array = jax.Array
FORWARD_HEADS, BACKWARD_HEADS = 2, 2  # key heads of one program


def forward(sizes: Sizes, save: bool, interpret: bool, reads: Arrays) -> Arrays:
    """The forward pass.

    Reads qkvz, kernel, rows, weight; of a shard also before, state and the inverses that `transfer` wrote.

    Returns:
      out; if `save` also states and, where they were not read, inverses.
    """
    dtype = reads["qkvz"].dtype
    saved = [name for name in ("states", "inverses") if save and name not in reads]
    blocks = Blocks(sizes, reads["rows"], FORWARD_HEADS)
    return blocks.run(_forward_kernel, "forward", reads, dict.fromkeys(["out", *saved], dtype), "state", interpret)


def continued(sizes: Sizes, interpret: bool, reads: Arrays) -> Arrays:
    """The forward pass of sequences that go on.

    Reads qkvz, kernel, rows, weight, before and state; returns out and final, the state behind the last token.
    """
    blocks = Blocks(sizes, reads["rows"], FORWARD_HEADS)
    writes = {"out": reads["qkvz"].dtype, "final": jnp.float32}
    return blocks.run(_forward_kernel, "continued", reads, writes, "state", interpret)


def transfer(sizes: Sizes, interpret: bool, reads: Arrays) -> Arrays:
    """What a shard does to the state that it receives: S -> carried S + added.

    The columns of a state evolve apart: beside the values from a zero state run dk columns without values from the
    identity, and end as `carried`. Reads qkvz, kernel, rows, before; returns transfer and inverses.
    """
    blocks = Blocks(sizes, reads["rows"], FORWARD_HEADS)
    writes = {"transfer": jnp.float32, "inverses": reads["qkvz"].dtype}
    return blocks.run(_transfer_kernel, "transfer", reads, writes, "transfer", interpret)


def backward(sizes: Sizes, interpret: bool, reads: Arrays) -> Arrays:
    """The backward pass.

    Reads qkvz, kernel, rows, weight, states, inverses, d_out; of a shard also before and d_state.

    Returns:
      d_qkvz; d_kernel of every sequence; d_rows; d_weight, to be summed over all but its lanes; of a shard also
      d_before.
    """
    writes = {"d_qkvz": reads["qkvz"].dtype, **dict.fromkeys(["d_kernel", "d_rows", "d_weight"], jnp.float32)}
    if "before" in reads:
        writes["d_before"] = jnp.float32
    blocks = Blocks(sizes, reads["rows"], BACKWARD_HEADS, reverse=True)
    return blocks.run(_backward_kernel, "backward", reads | {"halo": reads["qkvz"]}, writes, "state", interpret)


def first_gradient(sizes: Sizes, interpret: bool, reads: Arrays) -> Array:
    """Gradient of the state that a shard receives, as far as its own outputs give it: [B, H, dk, R * dv] float32.

    Reads what `backward` of a shard reads, but d_state.
    """
    blocks = Blocks(sizes, reads["rows"], BACKWARD_HEADS, reverse=True)
    reads = reads | {"halo": reads["qkvz"]}
    writes = {"d_state": jnp.float32}
    return blocks.run(_first_gradient_kernel, "first_gradient", reads, writes, "state", interpret)["d_state"]


def _silu_key(x: Array, scale: float) -> Array:
    x = x * jax.lax.logistic(x)
    return x * (jax.lax.rsqrt(jnp.sum(x * x, axis=1, keepdims=True) + L2_EPS) * scale)


def _activations(sizes: Sizes) -> list[Callable[[Array], Array]]:
    """What follows the convolution, for q, k and every value head."""
    query = lambda x: _silu_key(x, sizes.key_dim**-0.5)
    key = lambda x: _silu_key(x, 1.0)
    return [query, key] + [lambda x: x * jax.lax.logistic(x)] * sizes.repeats


def _gated_norm(o: Array, z: Array, weight: Array, eps: float) -> Array:
    o = o * jax.lax.rsqrt(jnp.mean(o * o, axis=1, keepdims=True) + eps)
    return o * weight * (z * jax.lax.logistic(z))


def _moved(piece: slice, offset: int) -> slice:
    return slice(piece.start + offset, piece.stop + offset)


def _masks(gates: Array, sizes: Sizes) -> list[Array]:
    return tap_masks(chunk_math.columns(gates[3 * sizes.repeats :])[:, :1], sizes.taps)


def _sorted(pieces: list[Array], repeats: int) -> tuple[list[Array], list[Array], list[Array]]:
    """[q, k, v, .. of one key head, q, k, v, .. of the next, ..] -> all q, all k, all v."""
    each = 2 + repeats
    return pieces[::each], pieces[1::each], [x for i, x in enumerate(pieces) if i % each >= 2]


def _values(heads: int, sizes: Sizes) -> list[tuple[int, int]]:
    """Key head and place in it of every value head."""
    return [divmod(i, sizes.repeats) for i in range(heads * sizes.repeats)]


def _start(reads: dict, state_ref, halo_ref, sizes: Sizes) -> None:
    """What the first chunk receives: zeros, or what a shard does."""
    state_ref[...] = reads["state"][0] if "state" in reads else jnp.zeros_like(state_ref)
    if "before" not in reads:
        halo_ref[...] = jnp.zeros_like(halo_ref)
        return
    for h in range(state_ref.shape[0]):
        channels = slice(h * sizes.width, h * sizes.width + sizes.mixed)
        halo_ref[:, h * sizes.mixed : (h + 1) * sizes.mixed] = reads["before"][0, :, channels]


def _advance(reads: dict, rows: list[Array], halo_ref, sizes: Sizes, dtype: jnp.dtype) -> tuple:
    """q, k and v of a chunk for chunk_math.solve; leaves the chunk's last rows in halo_ref."""
    inputs = []
    for h, gates in enumerate(rows):
        masks = _masks(gates, sizes)
        for piece, activation in zip(sizes.pieces, _activations(sizes)):
            x = reads["qkvz"][0, :, _moved(piece, h * sizes.width)].astype(jnp.float32)
            lanes = _moved(piece, h * sizes.mixed)
            y = convolved(halo_ref[:, lanes], x, reads["kernel"][:, lanes], masks)
            halo_ref[:, lanes] = x[-SUBLANES:]
            inputs.append(activation(y).astype(dtype))
    return _sorted(inputs, sizes.repeats)


def _forward_kernel(reads: dict, writes: dict, state_ref, halo_ref, *, sizes: Sizes, interpret: bool):
    @pl.when(pl.program_id(2) == 0)
    def _():
        _start(reads, state_ref, halo_ref, sizes)

    qkvz_ref, out_ref = reads["qkvz"], writes["out"]
    dot = chunk_math.Products(qkvz_ref.dtype, interpret)
    heads = state_ref.shape[0]
    rows, values = [reads["rows"][0, h, 0] for h in range(heads)], _values(heads, sizes)
    q, k, v = _advance(reads, rows, halo_ref, sizes, dot.dtype)
    state = [state_ref[h, :, sizes.part(r)] for h, r in values]
    known = [reads["inverses"][0, h, 0, r] for h, r in values] if "inverses" in reads else None
    solved = chunk_math.solve(q, k, v, rows, state, dot, known)
    for i, (o, after) in enumerate(zip(solved.out(dot), solved.after(dot))):
        h, r = values[i]
        part = sizes.part(r)
        if "states" in writes:
            writes["states"][0, h, 0, :, part] = state[i].astype(writes["states"].dtype)
        if "inverses" in writes:
            writes["inverses"][0, h, 0, r] = solved.inverse[i].astype(writes["inverses"].dtype)
        z = qkvz_ref[0, :, _moved(part, h * sizes.width + sizes.mixed)].astype(jnp.float32)
        out_ref[0, :, sizes.part(i)] = _gated_norm(o, z, reads["weight"][...], sizes.eps).astype(out_ref.dtype)
        state_ref[h, :, part] = after
    if "final" in writes:

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            writes["final"][0] = state_ref[...]


def _transfer_kernel(reads: dict, writes: dict, state_ref, halo_ref, *, sizes: Sizes, interpret: bool):
    heads, (key_dim, value_dim) = state_ref.shape[0], (sizes.key_dim, sizes.value_dim)
    values, width = _values(heads, sizes), value_dim + key_dim
    part = lambda r: slice(r * width, (r + 1) * width)

    @pl.when(pl.program_id(2) == 0)
    def _():
        _start(reads, state_ref, halo_ref, sizes)
        row, lane = (jax.lax.broadcasted_iota(jnp.int32, (key_dim, width), axis) for axis in (0, 1))
        for h, r in values:
            state_ref[h, :, part(r)] = jnp.where(lane == value_dim + row, 1.0, 0.0)

    dot = chunk_math.Products(reads["qkvz"].dtype, interpret)
    rows = [reads["rows"][0, h, 0] for h in range(heads)]
    q, k, v = _advance(reads, rows, halo_ref, sizes, dot.dtype)
    v = [jnp.concatenate([x, jnp.zeros((x.shape[0], key_dim), x.dtype)], axis=1) for x in v]
    solved = chunk_math.solve(q, k, v, rows, [state_ref[h, :, part(r)] for h, r in values], dot)
    for (h, r), inverse, after in zip(values, solved.inverse, solved.after(dot)):
        writes["inverses"][0, h, 0, r] = inverse.astype(writes["inverses"].dtype)
        state_ref[h, :, part(r)] = after

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        writes["transfer"][0] = state_ref[...]


@dataclasses.dataclass(frozen=True)
class _Replay:
    """A chunk of the forward pass, computed again for its gradients.

    Attributes: dot; solved; rows, gates of key heads. Per key head and piece (q, k, each v): convolutions, the
    convolution's inputs (halo, x, masks) with their lanes in the projection and among convolved channels; pullbacks of
    the activations. Per value head: d_out [C, dv], d_z [C, dv] and d_weight [1, dv].
    """

    dot: chunk_math.Products
    solved: chunk_math.Solved
    rows: list[Array]
    convolutions: list[tuple]
    pullbacks: list[Callable]
    norms: list[tuple[Array, Array, Array]]

    @classmethod
    def of(cls, reads: dict, heads: int, sizes: Sizes, interpret: bool) -> "_Replay":
        dot = chunk_math.Products(reads["qkvz"].dtype, interpret)
        first = pl.program_id(2) == pl.num_programs(2) - 1  # chunks run from the last to the first
        rows, convolutions, inputs, pullbacks = [reads["rows"][0, h, 0] for h in range(heads)], [], [], []
        for h in range(heads):
            masks = _masks(rows[h], sizes)
            for piece, activation in zip(sizes.pieces, _activations(sizes)):
                channels, lanes = _moved(piece, h * sizes.width), _moved(piece, h * sizes.mixed)
                x = reads["qkvz"][0, :, channels].astype(jnp.float32)
                halo = reads["halo"][0, :, channels].astype(jnp.float32)[-SUBLANES:]
                halo = jnp.where(first, reads["before"][0, :, channels] if "before" in reads else 0.0, halo)
                y, pullback = jax.vjp(activation, convolved(halo, x, reads["kernel"][:, lanes], masks))
                inputs.append(y.astype(dot.dtype))
                pullbacks.append(pullback)
                convolutions.append((halo, x, masks, channels, lanes))
        values = _values(heads, sizes)
        solved = chunk_math.solve(
            *_sorted(inputs, sizes.repeats), rows, [reads["states"][0, h, 0, :, sizes.part(r)] for h, r in values],
            dot, [reads["inverses"][0, h, 0, r] for h, r in values])
        norms, norm = [], functools.partial(_gated_norm, eps=sizes.eps)
        for i, (o, (h, r)) in enumerate(zip(solved.out(dot), values)):
            z = reads["qkvz"][0, :, cls.gate(h, r, sizes)].astype(jnp.float32)
            _, pullback = jax.vjp(norm, o, z, reads["weight"][...])
            norms.append(pullback(reads["d_out"][0, :, sizes.part(i)].astype(jnp.float32)))
        return cls(dot, solved, rows, convolutions, pullbacks, norms)

    @staticmethod
    def gate(h: int, r: int, sizes: Sizes) -> slice:
        """Lanes of z of a value head in the projection."""
        return _moved(sizes.part(r), h * sizes.width + sizes.mixed)

    def gradients(self, state_ref, sizes: Sizes) -> tuple:
        """dq, dk, dv, d_rows of chunk_math.backward; turns the gradient of the state after the chunk, in state_ref,
        into that of the state before it."""
        values = _values(len(self.rows), sizes)
        *gradients, d_state = chunk_math.backward(
            self.solved, self.rows[0].shape[0], [d_out for d_out, _, _ in self.norms],
            [state_ref[h, :, sizes.part(r)] for h, r in values], self.dot)
        for (h, r), value in zip(values, d_state):
            state_ref[h, :, sizes.part(r)] = value
        return tuple(gradients)


def _backward_kernel(reads: dict, writes: dict, state_ref, from_next_ref, *, sizes: Sizes, interpret: bool):
    d_qkvz_ref, d_kernel_ref, d_weight_ref = (writes[name] for name in ("d_qkvz", "d_kernel", "d_weight"))

    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref in (d_kernel_ref, d_weight_ref, from_next_ref):
            ref[...] = jnp.zeros_like(ref)
        state_ref[...] = reads["d_state"][0] if "d_state" in reads else jnp.zeros_like(state_ref)

    heads, repeats = state_ref.shape[0], sizes.repeats
    replay = _Replay.of(reads, heads, sizes, interpret)
    d_weights = jnp.zeros((1, sizes.value_dim), jnp.float32)
    for (h, r), (_, d_z, d_weight) in zip(_values(heads, sizes), replay.norms):
        d_qkvz_ref[0, :, replay.gate(h, r, sizes)] = d_z.astype(d_qkvz_ref.dtype)
        d_weights = d_weights + d_weight
    d_weight_ref[0, 0, :1] = d_weight_ref[0, 0, :1] + d_weights
    dq, dk, dv, d_rows = replay.gradients(state_ref, sizes)
    d_inputs = []
    for h in range(heads):
        writes["d_rows"][0, h, 0] = d_rows[h]
        d_inputs += [dq[h], dk[h], *dv[h * repeats : (h + 1) * repeats]]
    for (halo, x, masks, channels, lanes), pullback, d_input in zip(replay.convolutions, replay.pullbacks, d_inputs):
        d_halo, dx, d_kernel = convolution_gradients(
            pullback(d_input)[0], halo, x, reads["kernel"][:, lanes], masks)
        # The last rows also receive the gradient from the next chunk.
        dx = jnp.concatenate([dx[:-SUBLANES], dx[-SUBLANES:] + from_next_ref[:, lanes]])
        from_next_ref[:, lanes] = d_halo
        d_kernel_ref[0, :, lanes] = d_kernel_ref[0, :, lanes] + d_kernel
        d_qkvz_ref[0, :, channels] = dx.astype(d_qkvz_ref.dtype)
    if "d_before" in writes:

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            writes["d_before"][0] = from_next_ref[...]


def _first_gradient_kernel(reads: dict, writes: dict, state_ref, from_next_ref, *, sizes: Sizes, interpret: bool):
    del from_next_ref

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = jnp.zeros_like(state_ref)

    _Replay.of(reads, state_ref.shape[0], sizes, interpret).gradients(state_ref, sizes)  # what else it gives is dropped

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        writes["d_state"][0] = state_ref[...]
