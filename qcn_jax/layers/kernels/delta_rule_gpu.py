"""The gated delta rule as Pallas kernels for NVIDIA GPUs (Triton back end): what delta_rule.py runs there.

A GPU runs all programs of a grid at once, so that the state cannot stay from chunk to chunk as it does on a TPU. What
needs no state is computed for all chunks in parallel; only two products a chunk are left to a loop, one program for
each value head and slice of its values. With the names of chunk.py:
    prepare   T = (I + A)^-1, U = T beta V, M = T beta exp(G) K                     per chunk
    scan      W = U - M S;  S <- exp(G_C) S + K^T (exp(G_C - G) W)                  loop
    outputs   O = exp(G) (Q S) + P W                                                per chunk
and backward
    revisit   W and M again, dW = P^T dO, what the chunk's own outputs ask          per chunk
    rescan    dW += exp(G_C - G) (K dS);  dS <- exp(G_C) dS + Q^T exp(G) dO - M^T dW   loop from the last
    finish    all other gradients                                                   per chunk
Residuals are those of the TPU kernels: each chunk's incoming state and T.

Axes: B batch, T tokens, H key heads, R value heads per key head, N chunks, C chunk, dk/dv widths. Inside a kernel C
vectors are one-dimensional, and there is no slicing: parts of a matrix are taken by masks.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from qcn_jax.layers.kernels.chunk import BASE, NT, TN, Products

Array = jax.Array
# Values of a head that one program of a loop keeps: at the 80B model's heads as many programs as an H100 has
# multiprocessors.
_VALUES = 32
_PART = 64  # keys' widths that `finish` takes at a time: all of them would not fit the registers


def _part(width: int, limit: int) -> int:
    return limit if width % limit == 0 else width


class _Call:
    """Sizes, block specifications and launch of one kernel. Grids are (B, N, heads) or, for loops, (B, Hv, slices)."""

    def __init__(self, q: Array, v: Array, rows: Array, repeats: int, interpret: bool):
        self.batch, self.heads, self.chunks, self.gates, self.size = rows.shape
        self.repeats, self.interpret, self.length = repeats, interpret, q.shape[1]
        self.key_dim, self.value_dim = q.shape[2] // self.heads, v.shape[2] // self.heads // repeats
        self.values = _part(self.value_dim, _VALUES)
        self.dtype = q.dtype

    def per_chunk(self, kernel, name: str, warps: int, ins: list, outs: list, arrays: list):
        """One program for each chunk and value head."""
        grid = (self.batch, self.chunks, self.heads * self.repeats)
        return self._call(kernel, name, grid, warps, 2, ins, outs, arrays)

    def loop(self, kernel, name: str, stages: int, ins: list, outs: list, arrays: list):
        """One program for each value head and slice of its values; reads `stages` - 1 chunks ahead."""
        grid = (self.batch, self.heads * self.repeats, self.value_dim // self.values)
        return self._call(kernel, name, grid, 4, stages, ins, outs, arrays)

    def _call(self, kernel, name, grid, warps, stages, ins, outs, arrays):
        dot = Products(self.dtype, self.interpret)
        return pl.pallas_call(
            functools.partial(kernel, repeats=self.repeats, dot=dot), grid=grid, in_specs=ins,
            out_specs=[spec for spec, _ in outs], out_shape=[shape for _, shape in outs],
            compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages), interpret=self.interpret,
            name=f"gated_delta_rule_{name}",
        )(*arrays)

    def tokens(self, width: int, per: int = 1):
        """A chunk's [C, width] of [B, T, heads * width]; `per` value heads share one (R for keys and queries)."""
        return pl.BlockSpec((None, self.size, width), lambda b, n, h: (b, n, h // per))

    def gate(self):
        """A chunk's [rows, C] of [B, H, N, rows, C]."""
        index = lambda b, n, h: (b, h // self.repeats, n, 0, 0)
        return pl.BlockSpec((None, None, None, self.gates, self.size), index)

    def chunk_state(self):
        """A chunk's [dk, dv] of [B, H, N, dk, R * dv]."""
        index = lambda b, n, h: (b, h // self.repeats, n, 0, h % self.repeats)
        return pl.BlockSpec((None, None, None, self.key_dim, self.value_dim), index)

    def inverse(self):
        """A chunk's [C, C] of [B, H, N, R, C, C]."""
        index = lambda b, n, h: (b, h // self.repeats, n, h % self.repeats, 0, 0)
        return pl.BlockSpec((None, None, None, None, self.size, self.size), index)

    def all_tokens(self, width: int, per: int = 1):
        """All chunks' [T, width] of [B, T, heads * width], for loops."""
        return pl.BlockSpec((None, self.length, width), lambda b, h, j: (b, 0, h // per))

    def all_values(self):
        """All chunks' [T, values] of [B, T, Hv * dv], for loops."""
        return pl.BlockSpec((None, self.length, self.values),
                            lambda b, h, j: (b, 0, h * (self.value_dim // self.values) + j))

    def all_gates(self):
        """[N, rows, C], for loops."""
        index = lambda b, h, j: (b, h // self.repeats, 0, 0, 0)
        return pl.BlockSpec((None, None, self.chunks, self.gates, self.size), index)

    def all_states(self):
        """[N, dk, values] of [B, H, N, dk, R * dv], for loops."""
        index = lambda b, h, j: (b, h // self.repeats, 0, 0, self._slice(h, j))
        return pl.BlockSpec((None, None, self.chunks, self.key_dim, self.values), index)

    def state(self):
        """[dk, values] of [B, H, dk, R * dv], for loops."""
        index = lambda b, h, j: (b, h // self.repeats, 0, self._slice(h, j))
        return pl.BlockSpec((None, None, self.key_dim, self.values), index)

    def _slice(self, head, j):
        return (head % self.repeats) * (self.value_dim // self.values) + j

    def shape_of_tokens(self, width: int):
        """[B, T, Hv * width]."""
        shape = (self.batch, self.length, self.heads * self.repeats * width)
        return jax.ShapeDtypeStruct(shape, self.dtype)


def _square_iota(size: int) -> tuple[Array, Array]:
    shape = (size, size)
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0), jax.lax.broadcasted_iota(jnp.int32, shape, 1)


class _Gates:
    """A value head's beta, exp(G), exp(G_C - G) as vectors [C], exp(G_C) and D [C, C]."""

    def __init__(self, row, repeats: int, r):
        """`row(i)` reads gate row i of the chunk; r is the value head among its key head's."""
        coarse, fine, self.beta = row(r), row(repeats + r), row(2 * repeats + r)
        size = coarse.shape[0]
        self._parts = coarse, fine
        last = jax.lax.broadcasted_iota(jnp.int32, (size,), 0) == size - 1
        final = lambda x: jnp.sum(jnp.where(last, x, 0.0))
        self.last, self.from_state = last, jnp.exp(coarse + fine)
        self.to_state = jnp.exp((final(coarse) - coarse) + (final(fine) - fine))
        self.carry = jnp.exp(final(coarse) + final(fine))

    def pair(self) -> Array:
        coarse, fine = self._parts
        row, column = _square_iota(coarse.shape[0])
        difference = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
        # Masked before exp: above the diagonal the difference is positive and may overflow.
        return jnp.exp(jnp.where(row >= column, difference, -jnp.inf))


def _sums(x: Array) -> Array:
    return jnp.sum(x, axis=1)


def _strictly_lower(x: Array) -> Array:
    row, column = _square_iota(x.shape[0])
    return jnp.where(row > column, x, 0.0)


def _precise(a: Array, b: Array, dot: Products) -> Array:
    """a @ b of 16-bit significands by three products of bfloat16, or exact products."""
    if dot.dtype != jnp.bfloat16:
        return dot(a, b)
    upper = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
    return dot(a, b) + (dot(a, b - upper(b)) + dot(a - upper(a), b))


def unit_lower_inverse(a: Array, dot: Products) -> Array:
    """(I + a)^-1 float32 of a strictly lower matrix a [C, C], as chunk.unit_lower_inverses computes it."""
    size = a.shape[0]
    row, column = _square_iota(size)
    diagonal = row // BASE == column // BASE
    blocks = jnp.where(diagonal, a, 0.0)

    def substitute(j: int, x: Array) -> Array:
        """Row j of every diagonal block is solved, and subtracted from the rows below it."""
        factor = jnp.sum(jnp.where(column % BASE == j, blocks, 0.0), axis=1)
        solved = jnp.sum(jnp.where(row % BASE == j, x, 0.0), axis=0)
        return x - jnp.where(diagonal, factor[:, None] * solved[None, :], 0.0)

    x = jax.lax.fori_loop(0, BASE - 1, substitute, jnp.where(row == column, 1.0, 0.0))
    step = BASE
    while step < size:
        below = (row // step == column // step + 1) & (column // step % 2 == 0)
        x = x - _precise(_precise(x, jnp.where(below, a, 0.0), dot), x, dot)
        step *= 2
    return x


def forward(
    repeats: int, save: bool, interpret: bool, q: Array, k: Array, v: Array, rows: Array, state: Array
) -> tuple[Array, ...]:
    """As delta_rule._forward_call: q, k [B, T, H * dk], v [B, T, H * R * dv], rows [B, H, N, *, C], state
    [B, H, dk, R * dv] -> o, final state and with `save` states [B, H, N, dk, R * dv], inverses [B, H, N, R, C, C].

    C, dk and dv must be powers of two, at least 16; C at most 64, or a program would not find room.
    """
    c = _Call(q, v, rows, repeats, interpret)
    keys, values = c.tokens(c.key_dim, repeats), c.tokens(c.value_dim)
    by_chunk = (c.batch, c.heads, c.chunks)
    inverse_shape = jax.ShapeDtypeStruct((*by_chunk, repeats, c.size, c.size), c.dtype)
    states_shape = jax.ShapeDtypeStruct((*by_chunk, c.key_dim, repeats * c.value_dim), c.dtype)
    inverses, wanted, known = c.per_chunk(
        _prepare, "prepare", 2, [keys, values, c.gate()],
        [(c.inverse(), inverse_shape), (values, c.shape_of_tokens(c.value_dim)),
         (c.tokens(c.key_dim), c.shape_of_tokens(c.key_dim))], [k, v, rows])
    states, written, final = c.loop(
        _scan, "scan", 4,
        [c.all_tokens(c.key_dim, repeats), c.all_tokens(c.key_dim), c.all_values(), c.all_gates(), c.state()],
        [(c.all_states(), states_shape), (c.all_values(), c.shape_of_tokens(c.value_dim)),
         (c.state(), jax.ShapeDtypeStruct(state.shape, jnp.float32))], [k, known, wanted, rows, state])
    [o] = c.per_chunk(
        _outputs, "outputs", 4, [keys, keys, values, c.gate(), c.chunk_state()],
        [(values, c.shape_of_tokens(c.value_dim))], [q, k, written, rows, states])
    return (o, final, states, inverses) if save else (o, final)


def backward(
    repeats: int, interpret: bool, q: Array, k: Array, v: Array, rows: Array, states: Array, inverses: Array,
    d_out: Array, d_final: Array,
) -> tuple[Array, ...]:
    """As delta_rule._backward_call: gradients of q, k, v, rows and state."""
    c = _Call(q, v, rows, repeats, interpret)
    d_out = d_out.astype(v.dtype)
    keys, values, state = c.tokens(c.key_dim, repeats), c.tokens(c.value_dim), c.chunk_state()
    of_values, of_keys = (values, c.shape_of_tokens(c.value_dim)), (c.tokens(c.key_dim), c.shape_of_tokens(c.key_dim))
    of_gates = (
        pl.BlockSpec((None, None, None, None, c.size), lambda b, n, h: (b, h // repeats, n, h % repeats, 0)),
        jax.ShapeDtypeStruct((*rows.shape[:3], repeats, c.size), jnp.float32))
    written, known, d_written, dq, d_pair, d_decay = c.per_chunk(
        _revisit, "revisit", 4, [keys, keys, values, c.gate(), state, c.inverse(), values],
        [of_values, of_keys, of_values, of_keys, (c.inverse(), inverses), of_gates],
        [q, k, v, rows, states, inverses, d_out])
    all_keys = c.all_tokens(c.key_dim, repeats)
    d_states, d_written, d_first = c.loop(
        _rescan, "rescan", 3,
        [all_keys, all_keys, c.all_tokens(c.key_dim), c.all_values(), c.all_values(), c.all_gates(), c.state()],
        [(c.all_states(), jax.ShapeDtypeStruct(states.shape, c.dtype)), (c.all_values(), of_values[1]),
         (c.state(), jax.ShapeDtypeStruct(d_final.shape, jnp.float32))],
        [q, k, known, d_out, d_written, rows, d_final])
    dk, dv, d_fine, d_beta = c.per_chunk(
        _finish, "finish", 4,
        [keys, keys, values, c.gate(), state, c.inverse(), values, c.inverse(), of_gates[0], values, state],
        [of_keys, of_values, of_gates, of_gates],
        [q, k, v, rows, states, inverses, written, d_pair, d_decay, d_written, d_states])
    # A key head's gradient is the sum over its value heads.
    total = lambda x: jnp.sum(x.reshape(*x.shape[:2], c.heads, repeats, -1), axis=3, dtype=jnp.float32)
    dq, dk = (total(x).reshape(q.shape).astype(q.dtype) for x in (dq, dk))
    pad = jnp.zeros((*rows.shape[:3], c.gates - 3 * repeats, c.size), jnp.float32)
    # Coarse rows are constants.
    return dq, dk, dv, jnp.concatenate([jnp.zeros_like(d_fine), d_fine, d_beta, pad], axis=3), d_first


def _value_head(repeats: int) -> Array:
    """Which of its key head's value heads a program of the grid (B, N, Hv) has."""
    return pl.program_id(2) % repeats


def _prepare(k_ref, v_ref, rows_ref, inverse_ref, wanted_ref, known_ref, *, repeats: int, dot: Products):
    gates = _Gates(lambda i: rows_ref[i, :], repeats, _value_head(repeats))
    k = k_ref[...]
    inverse = unit_lower_inverse(_strictly_lower(gates.beta[:, None] * dot(k, k, NT) * gates.pair()), dot)
    inverse_ref[...] = inverse.astype(inverse_ref.dtype)
    wanted_ref[...] = dot(inverse * gates.beta[None, :], v_ref[...]).astype(wanted_ref.dtype)
    known_ref[...] = dot(inverse * (gates.beta * gates.from_state)[None, :], k).astype(known_ref.dtype)


def _scan(k_ref, known_ref, wanted_ref, rows_ref, first_ref, states_ref, written_ref, final_ref, *, repeats, dot):
    chunks, _, size = rows_ref.shape
    r = pl.program_id(1) % repeats

    def step(n: Array, state: Array) -> Array:
        gates = _Gates(lambda i: rows_ref[n, i, :], repeats, r)
        chunk = pl.ds(n * size, size)
        states_ref[n, :, :] = state.astype(states_ref.dtype)
        written = wanted_ref[chunk, :] - dot(known_ref[chunk, :], state)
        written_ref[chunk, :] = written.astype(written_ref.dtype)
        return gates.carry * state + dot(k_ref[chunk, :], gates.to_state[:, None] * written, TN)

    final_ref[...] = jax.lax.fori_loop(0, chunks, step, first_ref[...])


def _outputs(q_ref, k_ref, written_ref, rows_ref, state_ref, o_ref, *, repeats: int, dot: Products):
    gates = _Gates(lambda i: rows_ref[i, :], repeats, _value_head(repeats))
    q = q_ref[...]
    weighted = dot(q, k_ref[...], NT) * gates.pair()
    o = gates.from_state[:, None] * dot(q, state_ref[...]) + dot(weighted, written_ref[...])
    o_ref[...] = o.astype(o_ref.dtype)


def _revisit(
    q_ref, k_ref, v_ref, rows_ref, state_ref, inverse_ref, d_out_ref,
    written_ref, known_ref, d_written_ref, dq_ref, d_pair_ref, d_decay_ref, *, repeats: int, dot: Products,
):
    """What the gradient needs of the forward pass, and all that depends on the chunk's own outputs alone."""
    gates = _Gates(lambda i: rows_ref[i, :], repeats, _value_head(repeats))
    k, inverse = k_ref[...], inverse_ref[...]
    known_ref[...] = dot(inverse, (gates.beta * gates.from_state)[:, None] * k).astype(known_ref.dtype)
    wanted = gates.beta[:, None] * (v_ref[...] - gates.from_state[:, None] * dot(k, state_ref[...]))
    written = dot(inverse, wanted).astype(written_ref.dtype)
    written_ref[...] = written

    q, d_out, pair = q_ref[...], d_out_ref[...], gates.pair()
    weighted = dot(q, k, NT) * pair
    d_written_ref[...] = dot(weighted, d_out, TN).astype(d_written_ref.dtype)
    d_weighted = dot(d_out, written, NT)
    d_pair = d_weighted * pair
    d_pair_ref[...] = d_pair.astype(d_pair_ref.dtype)
    pairs = d_weighted * weighted
    asked = dot(gates.from_state[:, None] * d_out, state_ref[...], NT)  # dq by way of the state
    dq_ref[...] = (asked + dot(d_pair, k)).astype(dq_ref.dtype)
    d_decay_ref[...] = _sums(q * asked) + _sums(pairs) - jnp.sum(pairs, axis=0)


def _rescan(
    q_ref, k_ref, known_ref, d_out_ref, own_ref, rows_ref, d_final_ref, d_states_ref, d_written_ref, d_first_ref, *,
    repeats: int, dot: Products,
):
    chunks, _, size = rows_ref.shape
    r = pl.program_id(1) % repeats

    def step(i: Array, d_state: Array) -> Array:
        n = chunks - 1 - i
        gates = _Gates(lambda i: rows_ref[n, i, :], repeats, r)
        chunk = pl.ds(n * size, size)
        d_states_ref[n, :, :] = d_state.astype(d_states_ref.dtype)
        d_written = own_ref[chunk, :] + gates.to_state[:, None] * dot(k_ref[chunk, :], d_state)
        d_written_ref[chunk, :] = d_written.astype(d_written_ref.dtype)
        asked = dot(q_ref[chunk, :], gates.from_state[:, None] * d_out_ref[chunk, :], TN)
        return gates.carry * d_state + asked - dot(known_ref[chunk, :], d_written, TN)

    d_first_ref[...] = jax.lax.fori_loop(0, chunks, step, d_final_ref[...])


def _finish(
    q_ref, k_ref, v_ref, rows_ref, state_ref, inverse_ref, written_ref, d_pair_ref, d_decay_ref, d_written_ref,
    d_state_ref, dk_ref, dv_ref, d_fine_ref, d_beta_ref, *, repeats: int, dot: Products,
):
    """What is left: see chunk.backward. Sums over values of a product with S are taken from its product with S^T."""
    gates = _Gates(lambda i: rows_ref[i, :], repeats, _value_head(repeats))
    beta, k, written = gates.beta, k_ref[...], written_ref[...]
    d_wanted = dot(inverse_ref[...], d_written_ref[...], TN)
    dv_ref[...] = (beta[:, None] * d_wanted).astype(dv_ref.dtype)
    d_beta = _sums(d_wanted * v_ref[...])
    d_a = -_strictly_lower(dot(d_wanted, written, NT)) * gates.pair()
    pairs = d_a * dot(k, k, NT)
    d_beta += _sums(pairs)
    pairs = beta[:, None] * pairs
    decay = d_decay_ref[...] + _sums(pairs) - jnp.sum(pairs, axis=0)
    d_a = beta[:, None] * d_a

    step = _part(k.shape[1], _PART)

    def keys(i: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        k_seen, k_stored, d_carry = totals
        part = pl.ds(i * step, step)
        k, state, d_state = k_ref[:, part], state_ref[part, :], d_state_ref[part, :]
        seen = dot(gates.from_state[:, None] * d_wanted, state, NT)
        stored = dot(gates.to_state[:, None] * written, d_state, NT)
        dk = stored - beta[:, None] * seen + dot(d_a, k) + dot(d_a, k, TN) + dot(d_pair_ref[...], q_ref[:, part], TN)
        dk_ref[:, part] = dk.astype(dk_ref.dtype)
        d_carry += jnp.sum(state.astype(jnp.float32) * d_state, axis=0)
        return k_seen + _sums(k * seen), k_stored + _sums(k * stored), d_carry

    totals = jnp.zeros_like(beta), jnp.zeros_like(beta), jnp.zeros(d_wanted.shape[1], jnp.float32)
    k_seen, k_stored, d_carry = jax.lax.fori_loop(0, k.shape[1] // step, keys, totals)
    d_beta_ref[...] = d_beta - k_seen
    d_carry = gates.carry * jnp.sum(d_carry) + jnp.sum(k_stored)
    d_fine_ref[...] = decay - beta * k_seen - k_stored + jnp.where(gates.last, d_carry, 0.0)
