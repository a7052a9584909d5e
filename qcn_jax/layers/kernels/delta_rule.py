"""The gated delta rule as Pallas TPU kernels, forward and backward, behind layers.delta_rule.gated_delta_rule.

The grid runs over sequences, groups of key heads and, in order, chunks; the state (in the backward pass its
gradient) stays in VMEM from chunk to chunk. Queries, keys and values are read as [T, heads * width] with heads side by
side in the lanes, so that a block is a plain slice. For the backward pass the forward pass writes each chunk's
incoming state and triangular inverse in the dtype of the operands: reading them back costs a fraction of computing
them again. NVIDIA GPUs run delta_rule_gpu.py instead; elsewhere the kernels run in Pallas' interpreter: exact and slow.

Axes: B batch, T tokens, H key heads, R value heads per key head, N chunks, C chunk, dk/dv widths.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qcn_jax.layers.kernels import chunk as chunk_math
from qcn_jax.layers.kernels import delta_rule_gpu

Array = jax.Array
_GRID, _STRONGEST = 64.0, -128.0  # see layers.delta_rule; exp() of less is zero in float32, and resets add to the sums
_SUBLANES = 8
FORWARD_HEADS, BACKWARD_HEADS = 4, 2  # key heads of one program: independent work that hides the chain of a chunk
_VMEM_BYTES = 64 * 2**20


def delta_rule(
    q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array, segment_ids: Array | None, chunk_size: int
) -> tuple[Array, Array]:
    """The rule by kernels; arguments and results as of layers.delta_rule.gated_delta_rule.

    Products take bfloat16 operands where v is bfloat16, else float32 at full precision; o is rounded to v's dtype.
    chunk_size must be a power of two, at least 16 (on a TPU best 128, on a GPU at most 64).
    """
    batch, length, heads, key_dim = q.shape
    repeats, value_dim = v.shape[3:]
    dtype = jnp.bfloat16 if v.dtype == jnp.bfloat16 else jnp.float32
    padding = -length % chunk_size
    flat = lambda x: jnp.pad(x.astype(dtype).reshape(batch, length, -1), ((0, 0), (0, padding), (0, 0)))
    rows = gate_rows(g, beta, segment_ids, chunk_size)
    joined = jnp.swapaxes(state.astype(jnp.float32), 2, 3).reshape(batch, heads, key_dim, repeats * value_dim)
    o, final = _rule(flat(q), flat(k), flat(v), rows, joined, repeats)
    o = o[:, :length].reshape(batch, length, heads, repeats, value_dim).astype(jnp.float32)
    return o, jnp.swapaxes(final.reshape(batch, heads, key_dim, repeats, value_dim), 2, 3)


def gate_rows(
    g: Array, beta: Array, segment_ids: Array | None, chunk_size: int, position_limit: int | None = None,
    ids_before: Array | None = None,
) -> Array:
    """Gates with tokens in the lanes, [B, H, N, rows, C] float32; rows are [coarse G | fine G | beta] of R each.

    G, the cumulative log decay inside a chunk, comes as a part that is exact and a small rest, so that differences
    keep their digits however strong the decay before them was. Tokens that pad the last chunk are inert.
    With `position_limit` one more row follows: how many tokens of the same document come before the token, at most
    that many. `ids_before` [B, position_limit] are the ids of tokens before the first.
    """
    batch, length, heads, repeats = g.shape
    g = jnp.maximum(g, _STRONGEST)
    coarse = jax.lax.stop_gradient(jnp.round(g * _GRID) / _GRID)
    fine = g - coarse
    if segment_ids is not None:
        starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        coarse = coarse - chunk_math.RESET * starts[..., None, None]
    padding = -length % chunk_size
    split = lambda x: jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).reshape(
        batch, -1, chunk_size, heads, repeats)
    rows = jnp.stack([split(coarse), split(fine), split(beta)], axis=4)  # [B, N, C, H, 3, R]
    rows = jnp.transpose(rows, (0, 3, 1, 4, 5, 2))  # [B, H, N, 3, R, C]
    before = jnp.triu(jnp.ones((chunk_size, chunk_size), jnp.float32))
    summed = jnp.einsum("...c,cd->...d", rows[:, :, :, :2], before, precision=jax.lax.Precision.HIGHEST)
    rows = jnp.concatenate([summed, rows[:, :, :, 2:]], axis=3).reshape(batch, heads, -1, 3 * repeats, chunk_size)
    if position_limit is not None:
        position = _positions(batch, length, segment_ids, position_limit, ids_before)
        position = jnp.pad(position, ((0, 0), (0, padding))).reshape(batch, 1, -1, 1, chunk_size)
        position = jnp.broadcast_to(position, (*rows.shape[:3], 1, chunk_size))
        rows = jnp.concatenate([rows, position.astype(jnp.float32)], axis=3)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, -rows.shape[3] % _SUBLANES), (0, 0)))


def _positions(
    batch: int, length: int, segment_ids: Array | None, limit: int, ids_before: Array | None
) -> Array:
    """[B, T]: tokens of the same document before each token, at most `limit`; see `gate_rows`."""
    count, same = jnp.zeros((batch, length), jnp.int32), True
    ids = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
    if ids_before is not None:
        ids = jnp.concatenate([ids_before, ids], axis=1)
    for back in range(1, min(limit, ids.shape[1] - 1) + 1):
        # Of one document with the token `back` before, and with all tokens between.
        same = same & jnp.pad(ids[:, back:] == ids[:, :-back], ((0, 0), (back, 0)))[:, -length:]
        count = count + same
    return count


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _rule(q: Array, k: Array, v: Array, rows: Array, state: Array, repeats: int) -> tuple[Array, Array]:
    """q, k [B, T, H * dk]; v [B, T, H * R * dv]; rows [B, H, N, *, C]; state [B, H, dk, R * dv] -> (o, final)."""
    return on_platform(_forward_call, repeats, False, cuda=delta_rule_gpu.forward)(q, k, v, rows, state)


def _rule_forward(
    q: Array, k: Array, v: Array, rows: Array, state: Array, repeats: int
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    run = on_platform(_forward_call, repeats, True, cuda=delta_rule_gpu.forward)
    o, final, states, inverses = run(q, k, v, rows, state)
    return (o, final), (q, k, v, rows, states, inverses)


def _rule_backward(repeats: int, residuals: tuple[Array, ...], cotangents: tuple[Array, Array]) -> tuple[Array, ...]:
    return tuple(on_platform(_backward_call, repeats, cuda=delta_rule_gpu.backward)(*residuals, *cotangents))


_rule.defvjp(_rule_forward, _rule_backward)


def on_platform(call, *static, cuda=None):
    """`call` compiled for a TPU, `cuda` of the same arguments for an NVIDIA GPU, `call` interpreted elsewhere."""
    platforms = {"tpu": functools.partial(call, *static, False)}
    if cuda is not None:
        platforms["cuda"] = functools.partial(cuda, *static, False)
    return lambda *arrays: jax.lax.platform_dependent(
        *arrays, **platforms, default=functools.partial(call, *static, True))


def group_size(heads: int, limit: int) -> int:
    return max(size for size in range(1, limit + 1) if heads % size == 0)


class _Shapes:
    """Sizes and block specifications of a call; `reverse` runs the chunks from the last to the first."""

    def __init__(self, q: Array, v: Array, rows: Array, repeats: int, limit: int, reverse: bool):
        self.batch, self.heads, self.chunks, self.gates, self.size = rows.shape
        self.repeats = repeats
        self.key_dim, self.value_dim = q.shape[2] // self.heads, v.shape[2] // self.heads // repeats
        self.group = group_size(self.heads, limit)
        self.grid = (self.batch, self.heads // self.group, self.chunks)
        self.turn = (lambda n: self.chunks - 1 - n) if reverse else (lambda n: n)

    def tokens(self, width: int) -> pl.BlockSpec:
        """Of [B, T, H * width]."""
        return pl.BlockSpec((1, self.size, self.group * width), lambda b, h, n: (b, self.turn(n), h))

    def per_chunk(self, *tail: int) -> pl.BlockSpec:
        """Of [B, H, N, *tail]."""
        index = lambda b, h, n: (b, h, self.turn(n), *[0] * len(tail))
        return pl.BlockSpec((1, self.group, 1, *tail), index)

    def state(self) -> pl.BlockSpec:
        """Of [B, H, dk, R * dv], one block for all chunks."""
        return pl.BlockSpec((1, self.group, self.key_dim, self.repeats * self.value_dim), lambda b, h, n: (b, h, 0, 0))

    def scratch(self) -> list:
        return [pltpu.VMEM((self.group, self.key_dim, self.repeats * self.value_dim), jnp.float32)]


PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES)


def _forward_call(
    repeats: int, save: bool, interpret: bool, q: Array, k: Array, v: Array, rows: Array, state: Array
) -> list[Array]:
    s = _Shapes(q, v, rows, repeats, FORWARD_HEADS, reverse=False)
    shape = jax.ShapeDtypeStruct
    out_shape, out_specs = [shape(v.shape, v.dtype), shape(state.shape, jnp.float32)], [
        s.tokens(repeats * s.value_dim), s.state()]
    if save:
        per_chunk = (s.batch, s.heads, s.chunks)
        out_shape += [shape((*per_chunk, *state.shape[2:]), q.dtype),
                      shape((*per_chunk, repeats, s.size, s.size), q.dtype)]
        out_specs += [s.per_chunk(*state.shape[2:]), s.per_chunk(repeats, s.size, s.size)]
    kernel = functools.partial(_forward_kernel, repeats=repeats, interpret=interpret)
    return pl.pallas_call(
        kernel, grid=s.grid,
        in_specs=[s.tokens(s.key_dim), s.tokens(s.key_dim), s.tokens(repeats * s.value_dim),
                  s.per_chunk(s.gates, s.size), s.state()],
        out_specs=out_specs, out_shape=out_shape, scratch_shapes=s.scratch(), compiler_params=PARAMS,
        interpret=interpret, name="gated_delta_rule_forward",
    )(q, k, v, rows, state)


def _lanes(state: tuple[int, int, int], repeats: int) -> tuple[list[slice], list[tuple[int, slice, slice]]]:
    """Lanes of the key heads of a block; per value head its key head, its lanes in the state and among all values.

    `state` is the state's shape [heads, dk, R * dv].
    """
    heads, key_dim, width = state
    value_dim = width // repeats
    span = lambda i, size: slice(i * size, (i + 1) * size)
    values = [(h, span(r, value_dim), span(h * repeats + r, value_dim)) for h in range(heads) for r in range(repeats)]
    return [span(h, key_dim) for h in range(heads)], values


def _forward_kernel(q_ref, k_ref, v_ref, rows_ref, first_ref, o_ref, final_ref, *rest, repeats: int, interpret: bool):
    saved, state_ref = rest[:-1], rest[-1]
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        state_ref[...] = first_ref[0]

    dot = chunk_math.Products(q_ref.dtype, interpret)
    heads, values = _lanes(state_ref.shape, repeats)
    state = [state_ref[h, :, lanes] for h, lanes, _ in values]
    solved = chunk_math.solve(
        [q_ref[0, :, lanes] for lanes in heads], [k_ref[0, :, lanes] for lanes in heads],
        [v_ref[0, :, lanes] for _, _, lanes in values], [rows_ref[0, h, 0] for h in range(len(heads))], state, dot)
    for r, (out, after) in enumerate(zip(solved.out(dot), solved.after(dot))):
        h, inner, outer = values[r]
        if saved:
            saved[0][0, h, 0, :, inner] = state[r].astype(saved[0].dtype)
            saved[1][0, h, 0, r % repeats] = solved.inverse[r].astype(saved[1].dtype)
        o_ref[0, :, outer] = out.astype(o_ref.dtype)
        state_ref[h, :, inner] = after

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        final_ref[0] = state_ref[...]


def _backward_call(
    repeats: int, interpret: bool, q: Array, k: Array, v: Array, rows: Array, states: Array, inverses: Array,
    d_out: Array, d_final: Array,
) -> list[Array]:
    s = _Shapes(q, v, rows, repeats, BACKWARD_HEADS, reverse=True)
    shape = jax.ShapeDtypeStruct
    keys, values, gates = s.tokens(s.key_dim), s.tokens(repeats * s.value_dim), s.per_chunk(s.gates, s.size)
    return pl.pallas_call(
        functools.partial(_backward_kernel, repeats=repeats, interpret=interpret), grid=s.grid,
        in_specs=[keys, keys, values, gates, s.per_chunk(*states.shape[3:]), s.per_chunk(*inverses.shape[3:]),
                  values, s.state()],
        out_specs=[keys, keys, values, gates, s.state()],
        out_shape=[shape(q.shape, q.dtype), shape(k.shape, k.dtype), shape(v.shape, v.dtype),
                   shape(rows.shape, jnp.float32), shape(d_final.shape, jnp.float32)],
        scratch_shapes=s.scratch(), compiler_params=PARAMS, interpret=interpret, name="gated_delta_rule_backward",
    )(q, k, v, rows, states, inverses, d_out.astype(v.dtype), d_final)


def _backward_kernel(
    q_ref, k_ref, v_ref, rows_ref, states_ref, inverses_ref, d_out_ref, d_final_ref,
    dq_ref, dk_ref, dv_ref, d_rows_ref, d_first_ref, d_state_ref, *, repeats: int, interpret: bool,
):
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        d_state_ref[...] = d_final_ref[0]

    dot = chunk_math.Products(q_ref.dtype, interpret)
    heads, values = _lanes(d_state_ref.shape, repeats)
    solved = chunk_math.solve(
        [q_ref[0, :, lanes] for lanes in heads], [k_ref[0, :, lanes] for lanes in heads],
        [v_ref[0, :, outer] for _, _, outer in values], [rows_ref[0, h, 0] for h in range(len(heads))],
        [states_ref[0, h, 0, :, inner] for h, inner, _ in values], dot,
        [inverses_ref[0, h, 0, r % repeats] for r, (h, _, _) in enumerate(values)])
    dq, dk, dv, d_rows, d_state = chunk_math.backward(
        solved, rows_ref.shape[3], [d_out_ref[0, :, outer].astype(jnp.float32) for _, _, outer in values],
        [d_state_ref[h, :, inner] for h, inner, _ in values], dot)
    for h, lanes in enumerate(heads):
        dq_ref[0, :, lanes], dk_ref[0, :, lanes] = dq[h].astype(dq_ref.dtype), dk[h].astype(dk_ref.dtype)
        d_rows_ref[0, h, 0] = d_rows[h]
    for r, (h, inner, outer) in enumerate(values):
        dv_ref[0, :, outer] = dv[r].astype(dv_ref.dtype)
        d_state_ref[h, :, inner] = d_state[r]

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        d_first_ref[0] = d_state_ref[...]
