"""What stands between a DeltaNet layer's two projections as one Pallas TPU kernel per pass.

Short convolution, SiLU, L2 norm of queries and keys, the gated delta rule and the gated RMS norm of its output work on
chunks that lie in VMEM: the projection [T, H * (2 dk + 2 R dv)] is read where it lies, and what is written is the
input of the output projection (in the backward pass the projection's gradient). Nothing is copied, cast, repeated or
laid out anew in HBM. A chunk needs the last rows of the chunk before it for its convolution: the forward pass keeps
them in VMEM, the backward pass, which runs from the last chunk to the first, reads them and keeps what its own
gradient owes them.

Axes: B batch, T tokens, H key heads, R value heads per key head, N chunks, C chunk, dk/dv widths; W = 2 dk + R dv
convolved channels of a key head.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qcn_jax.layers.kernels import chunk as chunk_math
from qcn_jax.layers.kernels.delta_rule import PARAMS, gate_rows, group_size, on_platform
from qcn_jax.layers.norm import L2_EPS

Array = jax.Array
FORWARD_HEADS, BACKWARD_HEADS = 2, 2  # key heads of one program
_SUBLANES = 8
_HALO = 16  # rows read before a chunk: a whole tile of any dtype, at least taps - 1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes: heads H, repeats R, key_dim dk, value_dim dv, chunk C, taps of the convolution, eps of the norm."""

    heads: int
    repeats: int
    key_dim: int
    value_dim: int
    chunk: int
    taps: int
    eps: float

    @property
    def mixed(self) -> int:
        """W, convolved channels of a key head."""
        return 2 * self.key_dim + self.repeats * self.value_dim

    @property
    def width(self) -> int:
        """Channels of a key head in the projection: [q | k | v of R heads | z of R heads]."""
        return self.mixed + self.repeats * self.value_dim

    @property
    def pieces(self) -> list[slice]:
        """Channels of q, k and every value head within a key head."""
        ends = [0, self.key_dim, 2 * self.key_dim]
        ends += [ends[-1] + self.value_dim * (r + 1) for r in range(self.repeats)]
        return [slice(a, b) for a, b in zip(ends, ends[1:])]

    def part(self, i: int) -> slice:
        """Lanes of value head i among value heads side by side."""
        return slice(i * self.value_dim, (i + 1) * self.value_dim)


def delta_net(
    qkvz: Array, kernel: Array, g: Array, beta: Array, weight: Array, segment_ids: Array | None,
    *, eps: float, chunk_size: int, key_dim: int,
) -> Array:
    """convolution -> SiLU -> L2 norms -> gated delta rule from a zero state -> gated RMS norm.

    Args:
      qkvz: [B, T, H * (W + R dv)], channels of a key head [q | k | v of R heads | z of R heads].
      kernel: [taps, H, W], the convolution; the last tap is the token itself; at most 8 taps.
      g, beta: [B, T, H, R] float32, as of layers.delta_rule.gated_delta_rule.
      weight: [dv], of the norm.
      segment_ids: [B, T] or None; a change of id starts a document.
      eps: of the norm.
      chunk_size: C, a power of two from 16 on (on a TPU best 128).
      key_dim: dk.

    Returns:
      [B, T, H * R * dv] in qkvz's dtype.
    """
    batch, length, channels = qkvz.shape
    heads, repeats = g.shape[2:]
    sizes = Sizes(heads, repeats, key_dim, weight.shape[0], chunk_size, kernel.shape[0], eps)
    if channels != heads * sizes.width or kernel.shape[1:] != (heads, sizes.mixed) or sizes.taps > _SUBLANES:
        raise ValueError(f"qkvz {qkvz.shape} and kernel {kernel.shape} do not fit {sizes}")
    rows = gate_rows(g, beta, segment_ids, chunk_size, position_limit=sizes.taps - 1)
    kernel = kernel.astype(jnp.float32).reshape(sizes.taps, heads * sizes.mixed)
    kernel = jnp.pad(kernel, ((0, _SUBLANES - sizes.taps), (0, 0)))
    padded = jnp.pad(qkvz, ((0, 0), (0, -length % chunk_size), (0, 0)))
    # Rounded as the weight of the layer's XLA form is.
    weight = weight.astype(qkvz.dtype).astype(jnp.float32)[None]
    return _mixer(padded, kernel, rows, weight, sizes)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _mixer(qkvz: Array, kernel: Array, rows: Array, weight: Array, sizes: Sizes) -> Array:
    """qkvz [B, T, H * width]; kernel [8, H * W]; rows [B, H, N, *, C]; weight [1, dv] -> [B, T, H * R * dv]."""
    return on_platform(_forward_call, sizes, False)(qkvz, kernel, rows, weight)[0]


def _mixer_forward(
    qkvz: Array, kernel: Array, rows: Array, weight: Array, sizes: Sizes
) -> tuple[Array, tuple[Array, ...]]:
    out, states, inverses = on_platform(_forward_call, sizes, True)(qkvz, kernel, rows, weight)
    return out, (qkvz, kernel, rows, weight, states, inverses)


def _mixer_backward(sizes: Sizes, residuals: tuple[Array, ...], cotangent: Array) -> tuple[Array, ...]:
    d_qkvz, d_kernel, d_rows, d_weight = on_platform(_backward_call, sizes)(*residuals, cotangent)
    return d_qkvz, jnp.sum(d_kernel, axis=0), d_rows, jnp.sum(d_weight[:, :, 0], axis=(0, 1))[None]


_mixer.defvjp(_mixer_forward, _mixer_backward)


class _Blocks:
    """Grid and block specifications; `reverse` runs the chunks from the last to the first."""

    def __init__(self, sizes: Sizes, rows: Array, limit: int, reverse: bool):
        self.sizes = sizes
        self.batch, self.heads, self.chunks, self.gates, self.chunk = rows.shape
        self.group = group_size(self.heads, limit)
        self.grid = (self.batch, self.heads // self.group, self.chunks)
        self.turn = (lambda n: self.chunks - 1 - n) if reverse else (lambda n: n)

    def tokens(self, width: int) -> pl.BlockSpec:
        """Of [B, T, H * width]."""
        return pl.BlockSpec((1, self.chunk, self.group * width), lambda b, h, n: (b, self.turn(n), h))

    def halo(self, width: int) -> pl.BlockSpec:
        """The rows before the chunk, of [B, T, H * width]; before the first chunk its own (to be ignored)."""
        before = lambda n: jnp.maximum(self.turn(n) * (self.chunk // _HALO) - 1, 0)
        return pl.BlockSpec((1, _HALO, self.group * width), lambda b, h, n: (b, before(n), h))

    def per_chunk(self, *tail: int) -> pl.BlockSpec:
        """Of [B, H, N, *tail]."""
        return pl.BlockSpec((1, self.group, 1, *tail), lambda b, h, n: (b, h, self.turn(n), *[0] * len(tail)))

    def kernel(self) -> pl.BlockSpec:
        """Of [8, H * W]."""
        return pl.BlockSpec((_SUBLANES, self.group * self.sizes.mixed), lambda b, h, n: (0, h))

    def weight(self) -> pl.BlockSpec:
        """Of [1, dv]."""
        return pl.BlockSpec((1, self.sizes.value_dim), lambda b, h, n: (0, 0))

    def state_shape(self) -> tuple[int, int]:
        return self.sizes.key_dim, self.sizes.repeats * self.sizes.value_dim

    def inverse_shape(self) -> tuple[int, int, int]:
        return self.sizes.repeats, self.chunk, self.chunk


def _forward_call(
    sizes: Sizes, save: bool, interpret: bool, qkvz: Array, kernel: Array, rows: Array, weight: Array
) -> list[Array]:
    blocks = _Blocks(sizes, rows, FORWARD_HEADS, reverse=False)
    shape, values = jax.ShapeDtypeStruct, sizes.repeats * sizes.value_dim
    out_shape, out_specs = [shape((*qkvz.shape[:2], sizes.heads * values), qkvz.dtype)], [blocks.tokens(values)]
    if save:
        for tail in (blocks.state_shape(), blocks.inverse_shape()):
            out_shape.append(shape((blocks.batch, blocks.heads, blocks.chunks, *tail), qkvz.dtype))
            out_specs.append(blocks.per_chunk(*tail))
    return pl.pallas_call(
        functools.partial(_forward_kernel, sizes=sizes, interpret=interpret), grid=blocks.grid,
        in_specs=[blocks.tokens(sizes.width), blocks.kernel(), blocks.per_chunk(blocks.gates, blocks.chunk),
                  blocks.weight()],
        out_specs=out_specs, out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((blocks.group, *blocks.state_shape()), jnp.float32),
                        pltpu.VMEM((_SUBLANES, blocks.group * sizes.mixed), jnp.float32)],
        compiler_params=PARAMS, interpret=interpret, name="delta_net_forward",
    )(qkvz, kernel, rows, weight)


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


def _tap_masks(rows: Array, sizes: Sizes) -> list[Array]:
    """For 0 .. taps - 1 tokens back: [C, 1], 1 where that token is of the same document."""
    position = chunk_math.columns(rows[3 * sizes.repeats :])[:, :1]
    return [(position >= back).astype(jnp.float32) for back in range(sizes.taps)]


def _shifted(halo: Array, x: Array, back: int) -> Array:
    """x [C, *] `back` rows earlier, with halo [8, *] before it."""
    if back == 0:
        return x
    return pltpu.roll(jnp.concatenate([halo, x]), back, 0)[_SUBLANES:]


def _convolved(halo: Array, x: Array, kernel: Array, masks: list[Array]) -> Array:
    """Depthwise causal convolution: x [C, *], halo [8, *] before it, kernel [8, *] (taps, then zeros)."""
    taps = len(masks)
    out = x * kernel[taps - 1 : taps]
    for back in range(1, taps):
        out = out + _shifted(halo, x, back) * masks[back] * kernel[taps - 1 - back : taps - back]
    return out


def _convolution_gradients(
    d_out: Array, halo: Array, x: Array, kernel: Array, masks: list[Array]
) -> tuple[Array, Array, Array]:
    """Gradients of `_convolved`: d_halo [8, *], dx [C, *], d_kernel [8, *]."""
    taps, (size, width) = len(masks), x.shape
    extended = jnp.zeros((_SUBLANES + size, width), jnp.float32)
    zeros, d_taps = jnp.zeros((_SUBLANES, width), jnp.float32), []
    for back in range(taps):
        masked = d_out * masks[back] if back else d_out
        d_taps.append(jnp.sum(masked * _shifted(halo, x, back), axis=0, keepdims=True))
        earlier = jnp.concatenate([zeros, masked * kernel[taps - 1 - back : taps - back]])
        extended = extended + (pltpu.roll(earlier, _SUBLANES + size - back, 0) if back else earlier)
    line = jax.lax.broadcasted_iota(jnp.int32, (_SUBLANES, width), 0)
    d_kernel = zeros
    for back, d_tap in enumerate(d_taps):
        d_kernel = jnp.where(line == taps - 1 - back, d_tap, d_kernel)
    return extended[:_SUBLANES], extended[_SUBLANES:], d_kernel


def _moved(piece: slice, offset: int) -> slice:
    return slice(piece.start + offset, piece.stop + offset)


def _forward_kernel(qkvz_ref, kernel_ref, rows_ref, weight_ref, out_ref, *rest, sizes: Sizes, interpret: bool):
    saved, (state_ref, halo_ref) = rest[:-2], rest[-2:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = jnp.zeros_like(state_ref)
        halo_ref[...] = jnp.zeros_like(halo_ref)

    dot = chunk_math.Products(qkvz_ref.dtype, interpret)
    heads, repeats = state_ref.shape[0], sizes.repeats
    inputs, rows = [], [rows_ref[0, h, 0] for h in range(heads)]
    for h in range(heads):
        masks = _tap_masks(rows[h], sizes)
        for piece, activation in zip(sizes.pieces, _activations(sizes)):
            x = qkvz_ref[0, :, _moved(piece, h * sizes.width)].astype(jnp.float32)
            lanes = _moved(piece, h * sizes.mixed)
            y = _convolved(halo_ref[:, lanes], x, kernel_ref[:, lanes], masks)
            halo_ref[:, lanes] = x[-_SUBLANES:]
            inputs.append(activation(y).astype(dot.dtype))
    q, k, v = _sorted(inputs, repeats)
    state = [state_ref[h, :, sizes.part(r)] for h in range(heads) for r in range(repeats)]
    solved = chunk_math.solve(q, k, v, rows, state, dot)
    for i, (o, after) in enumerate(zip(solved.out(dot), solved.after(dot))):
        h, r = divmod(i, repeats)
        part = sizes.part(r)
        if saved:
            saved[0][0, h, 0, :, part] = state[i].astype(saved[0].dtype)
            saved[1][0, h, 0, r] = solved.inverse[i].astype(saved[1].dtype)
        z = qkvz_ref[0, :, _moved(part, h * sizes.width + sizes.mixed)].astype(jnp.float32)
        out_ref[0, :, sizes.part(i)] = _gated_norm(o, z, weight_ref[...], sizes.eps).astype(out_ref.dtype)
        state_ref[h, :, part] = after


def _sorted(pieces: list[Array], repeats: int) -> tuple[list[Array], list[Array], list[Array]]:
    """[q, k, v, .. of one key head, q, k, v, .. of the next, ..] -> all q, all k, all v."""
    each = 2 + repeats
    return pieces[::each], pieces[1::each], [x for i, x in enumerate(pieces) if i % each >= 2]


def _backward_call(
    sizes: Sizes, interpret: bool, qkvz: Array, kernel: Array, rows: Array, weight: Array, states: Array,
    inverses: Array, d_out: Array,
) -> list[Array]:
    blocks = _Blocks(sizes, rows, BACKWARD_HEADS, reverse=True)
    shape, values = jax.ShapeDtypeStruct, sizes.repeats * sizes.value_dim
    gates = blocks.per_chunk(blocks.gates, blocks.chunk)
    return pl.pallas_call(
        functools.partial(_backward_kernel, sizes=sizes, interpret=interpret), grid=blocks.grid,
        in_specs=[blocks.tokens(sizes.width), blocks.halo(sizes.width), blocks.kernel(), gates, blocks.weight(),
                  blocks.per_chunk(*blocks.state_shape()), blocks.per_chunk(*blocks.inverse_shape()),
                  blocks.tokens(values)],
        out_specs=[
            blocks.tokens(sizes.width),
            pl.BlockSpec((1, _SUBLANES, blocks.group * sizes.mixed), lambda b, h, n: (b, 0, h)), gates,
            pl.BlockSpec((1, 1, _SUBLANES, sizes.value_dim), lambda b, h, n: (b, h, 0, 0)),
        ],
        out_shape=[
            shape(qkvz.shape, qkvz.dtype), shape((blocks.batch, *kernel.shape), jnp.float32),
            shape(rows.shape, jnp.float32),
            shape((blocks.batch, blocks.grid[1], _SUBLANES, sizes.value_dim), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((blocks.group, *blocks.state_shape()), jnp.float32),
                        pltpu.VMEM((_SUBLANES, blocks.group * sizes.mixed), jnp.float32)],
        compiler_params=PARAMS, interpret=interpret, name="delta_net_backward",
    )(qkvz, qkvz, kernel, rows, weight, states, inverses, d_out)


def _backward_kernel(
    qkvz_ref, before_ref, kernel_ref, rows_ref, weight_ref, states_ref, inverses_ref, d_out_ref,
    d_qkvz_ref, d_kernel_ref, d_rows_ref, d_weight_ref, d_state_ref, owed_ref, *, sizes: Sizes, interpret: bool,
):
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        for ref in (d_kernel_ref, d_weight_ref, d_state_ref, owed_ref):
            ref[...] = jnp.zeros_like(ref)

    dot = chunk_math.Products(qkvz_ref.dtype, interpret)
    has_before = jnp.where(n == pl.num_programs(2) - 1, 0.0, 1.0)
    heads, repeats = d_state_ref.shape[0], sizes.repeats
    values = [divmod(i, repeats) for i in range(heads * repeats)]
    rows, convolutions, inputs, pullbacks = [rows_ref[0, h, 0] for h in range(heads)], [], [], []
    for h in range(heads):
        masks = _tap_masks(rows[h], sizes)
        for piece, activation in zip(sizes.pieces, _activations(sizes)):
            channels, lanes = _moved(piece, h * sizes.width), _moved(piece, h * sizes.mixed)
            x = qkvz_ref[0, :, channels].astype(jnp.float32)
            halo = before_ref[0, :, channels].astype(jnp.float32)[-_SUBLANES:] * has_before
            y, pullback = jax.vjp(activation, _convolved(halo, x, kernel_ref[:, lanes], masks))
            inputs.append(y.astype(dot.dtype))
            pullbacks.append(pullback)
            convolutions.append((halo, x, masks, channels, lanes))
    q, k, v = _sorted(inputs, repeats)
    solved = chunk_math.solve(
        q, k, v, rows, [states_ref[0, h, 0, :, sizes.part(r)] for h, r in values], dot,
        [inverses_ref[0, h, 0, r] for h, r in values])
    d_o, norm = [], functools.partial(_gated_norm, eps=sizes.eps)
    d_weights = jnp.zeros((1, sizes.value_dim), jnp.float32)
    for i, o in enumerate(solved.out(dot)):
        h, r = values[i]
        channels = _moved(sizes.part(r), h * sizes.width + sizes.mixed)
        _, pullback = jax.vjp(norm, o, qkvz_ref[0, :, channels].astype(jnp.float32), weight_ref[...])
        d_r, d_z, d_weight = pullback(d_out_ref[0, :, sizes.part(i)].astype(jnp.float32))
        d_o.append(d_r)
        d_qkvz_ref[0, :, channels] = d_z.astype(d_qkvz_ref.dtype)
        d_weights = d_weights + d_weight
    d_weight_ref[0, 0, :1] = d_weight_ref[0, 0, :1] + d_weights
    dq, dk, dv, d_rows, d_state = chunk_math.backward(
        solved, rows[0].shape[0], d_o, [d_state_ref[h, :, sizes.part(r)] for h, r in values], dot)
    for i, (h, r) in enumerate(values):
        d_state_ref[h, :, sizes.part(r)] = d_state[i]
    d_inputs = []
    for h in range(heads):
        d_rows_ref[0, h, 0] = d_rows[h]
        d_inputs += [dq[h], dk[h], *dv[h * repeats : (h + 1) * repeats]]
    for (halo, x, masks, channels, lanes), pullback, d_input in zip(convolutions, pullbacks, d_inputs):
        d_halo, dx, d_kernel = _convolution_gradients(pullback(d_input)[0], halo, x, kernel_ref[:, lanes], masks)
        # The last rows also receive what the chunk after this one owes them.
        dx = jnp.concatenate([dx[:-_SUBLANES], dx[-_SUBLANES:] + owed_ref[:, lanes]])
        owed_ref[:, lanes] = d_halo
        d_kernel_ref[0, :, lanes] = d_kernel_ref[0, :, lanes] + d_kernel
        d_qkvz_ref[0, :, channels] = dx.astype(d_qkvz_ref.dtype)
