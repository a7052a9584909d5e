"""Mathematics of one chunk of the gated delta rule on values that lie in VMEM, forward and backward.

A few key heads with their R value heads each, C tokens. With G the cumulative log decay of a value head inside the
chunk, D_ij = exp(G_i - G_j) for i >= j, P = (Q K^T) D and A = strictly lower (beta_i (K K^T) D):
    (I + A) W = beta (V - exp(G) (K S));  O = exp(G) (Q S) + P W;  S <- exp(G_C) S + K^T (exp(G_C - G) W).
The triangular inverse needs no state, so that the sequential chain is three products. Products with K, Q and S are
shared by the R value heads; keys are never repeated.

A document starts with an empty state: its first token's log decay is lowered by RESET, whose exponential is zero in
float32, and every mask follows from the decays.

Axes: C tokens of a chunk, R value heads per key head, dk/dv widths. Lists run over key heads or over value heads (key
head h has value heads h R .. h R + R - 1), and every step is taken for all of them before the next: the compiler keeps
that order, and steps of one head wait for each other. Products take operands of `Products.dtype` and accumulate in
float32; decays, gates and the state are float32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array
RESET = 128.0  # exp(-128) is zero in float32, and chunk_size * RESET stays a small exact number
BASE = 16  # rows of the diagonal blocks that are inverted by substitution
_HALF = 8  # sublanes of a float32 register


@dataclasses.dataclass(frozen=True)
class Products:
    """How matrix products are computed.

    Attributes:
      dtype: operands are cast to it: bfloat16 (one pass of the matrix unit) or float32 (full precision).
      emulated: the host's CPU runs the kernel, which has no bfloat16 product with a float32 result; the operands are
        rounded and then multiplied in float32, which gives the same numbers.
    """

    dtype: jnp.dtype
    emulated: bool

    def __call__(self, a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
        """a and b contracted over one axis each; float32."""
        a, b = a.astype(self.dtype), b.astype(self.dtype)
        if self.emulated:
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        precision = None if self.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
        return jax.lax.dot_general(
            a, b, (((contract[0],), (contract[1],)), ((), ())), precision=precision,
            preferred_element_type=jnp.float32)


NT, TN = (1, 1), (0, 0)  # a @ b^T, a^T @ b


def _iota(shape: tuple[int, int], axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def columns(rows: Array) -> Array:
    """[rows, C] -> [C, 128] or wider: the rows as columns, padded by zeros (whole registers are transposed)."""
    count = rows.shape[0]
    return jnp.concatenate([rows, jnp.zeros((-count % 128, rows.shape[1]), rows.dtype)]).T


def unit_lower_inverses(matrices: list[Array], dot: Products) -> list[Array]:
    """(I + a)^-1 [C, C] float32 of strictly lower matrices a (zero elsewhere); C a power of two, at least 16.

    Diagonal blocks of 16 by substitution, all of them side by side in the lanes; then merged in pairs by products:
    inv([[L1, 0], [M, L2]]) = [[T1, 0], [-T2 M T1, T2]]. See layers.triangular for why nothing faster is taken. Merging
    takes float32 products, or where the inverses will be rounded to bfloat16, products of 16-bit significands.
    """
    size = matrices[0].shape[0]
    row, lane = _iota((size, size), 0), _iota((size, size), 1)
    diagonal = _block(row, BASE) == _block(lane, BASE)
    inverses = [jnp.where(diagonal, jnp.concatenate([x] * (size // BASE)), 0.0) for x in _substituted(matrices)]
    product = _packed_products if dot.dtype == jnp.bfloat16 and size % 128 == 0 else _exact_products
    step = BASE
    while step < size:
        # Block (2 p + 1, 2 p) of every pair p of blocks.
        pair = (_block(row, step) ^ 1 == _block(lane, step)) & (row > lane)
        below = [_every_other(jnp.where(pair, a, 0.0), step, step) for a in matrices]
        first = [_every_other(x, step, 0) for x in inverses]
        second = [_every_other(x, step, step) for x in inverses]
        merged = product(product(second, below, step, True, dot), first, step, False, dot)
        inverses = [_interleaved(a, b - c, step) for a, b, c in zip(first, second, merged)]
        step *= 2
    return inverses


def _interleaved(first: Array, second: Array, step: int) -> Array:
    """Undoes `_every_other`."""
    return jnp.concatenate([x[i : i + step] for i in range(0, first.shape[0], step) for x in (first, second)])


def _every_other(x: Array, step: int, start: int) -> Array:
    """Every other block of `step` rows, from row `start` on."""
    return jnp.concatenate([x[i : i + step] for i in range(start, x.shape[0], 2 * step)])


def _exact_products(xs: list[Array], ys: list[Array], step: int, x_second: bool, dot: Products) -> list[Array]:
    """Products of the pairs' blocks x and y of `step` rows and columns in float32, all [C / 2, C].

    Rows of pair p lie in block p, columns in lanes of its first block, those of x of its second if `x_second`.
    """
    del dot
    zeros = jnp.zeros_like(ys[0])
    exact = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return [exact(x, _interleaved(*((zeros, y) if x_second else (y, zeros)), step)) for x, y in zip(xs, ys)]


def _packed_products(xs: list[Array], ys: list[Array], step: int, x_second: bool, dot: Products) -> list[Array]:
    """As `_exact_products`, of the leading 16 bits of x and y, in one pass of bfloat16 products.

    Every number is the sum of two of bfloat16. Blocks leave half of the lanes empty, which take the second parts: those
    of x meet y in the same sum, those of y give a second column that is added afterwards.
    """
    size = xs[0].shape[1]
    left = [_packed(x, size - step if x_second else step) for x in xs]
    right = [_packed(y, step) for y in ys]
    both = [dot(x, _interleaved(y, y, step)) for x, y in zip(left, right)]
    first = _iota(both[0].shape, 1) & step == 0
    return [jnp.where(first, z + pltpu.roll(z, size - step, 1), 0.0) for z in both]


def _packed(x: Array, shift: int) -> Array:
    """The upper eight bits of x's significand, and the rest rotated by `shift` lanes, as bfloat16."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    upper = jax.lax.bitcast_convert_type(bits & jnp.int32(-(1 << 16)), jnp.float32)
    return (upper + pltpu.roll(x - upper, shift, 1)).astype(jnp.bfloat16)


def _block(index: Array, size: int) -> Array:
    """index // size for a power of two (the kernel compiler's integer division is many instructions)."""
    return index >> (size.bit_length() - 1)


def _substituted(matrices: list[Array]) -> list[Array]:
    """Inverses of the diagonal blocks of I + a: [16, C] each, block b in lanes 16 b and up."""
    size = matrices[0].shape[0]
    row, lane = _iota((_HALF, size), 0), _iota((_HALF, size), 1)
    column = lane & (BASE - 1)
    starts = range(0, BASE, _HALF)  # rows 0..7 and 8..15 of every block
    factors, inverses = [], []
    for a in matrices:
        for half in starts:
            packed = a[half : half + _HALF]
            for block in range(1, size // BASE):
                start = block * BASE + half
                packed = jnp.where(_block(lane, BASE) == block, a[start : start + _HALF], packed)
            factors.append(packed)
            inverses.append(jnp.where(row + half == column, 1.0, 0.0))
    for j in range(BASE - 1):
        for first in range(0, len(inverses), 2):
            solved = inverses[first + j // _HALF][j % _HALF : j % _HALF + 1]
            for half in range(first + j // _HALF, first + 2):
                # Entry j of each row, from the row's own block, in all of the block's lanes.
                factor = jnp.take_along_axis(factors[half], lane - column + j, axis=1, mode="promise_in_bounds")
                inverses[half] = inverses[half] - factor * solved
    return [jnp.concatenate(inverses[i : i + 2]) for i in range(0, len(inverses), 2)]


@dataclasses.dataclass(frozen=True)
class Gates:
    """Gates of value heads; lists of columns [C, 1] and, for `pair` = D, of [C, C].

    Attributes: beta; from_state = exp(G); to_state = exp(G_C - G); pair.
    """

    beta: list[Array]
    from_state: list[Array]
    to_state: list[Array]
    pair: list[Array]

    @classmethod
    def of(cls, rows: list[Array], repeats: int) -> "Gates":
        """From the gate rows [>= 3 R, C] of key heads (see `delta_rule.gate_rows`)."""
        size = rows[0].shape[1]
        kind = lambda i: jnp.concatenate([x[i * repeats : (i + 1) * repeats] for x in rows])
        coarse, fine, beta = kind(0), kind(1), kind(2)
        heads = coarse.shape[0]
        from_state = jnp.exp(coarse + fine)
        to_state = jnp.exp((coarse[:, size - 1 :] - coarse) + (fine[:, size - 1 :] - fine))
        cols = columns(jnp.concatenate([coarse, fine, beta, from_state, to_state]))
        column = lambda i, head: cols[:, i * heads + head : i * heads + head + 1]
        visible = _iota((size, size), 0) >= _iota((size, size), 1)
        pair = []
        for r in range(heads):
            difference = (column(0, r) - coarse[r : r + 1]) + (column(1, r) - fine[r : r + 1])
            # Masked before exp: above the diagonal the difference is positive and may overflow.
            pair.append(jnp.exp(jnp.where(visible, difference, -jnp.inf)))
        return cls(*([column(i, r) for r in range(heads)] for i in (2, 3, 4)), pair)

    def carry(self, r: int) -> Array:
        """exp(G_C) [1, 1], the decay of the state itself."""
        return self.from_state[r][-1:]


def _strictly_lower(x: Array) -> Array:
    return jnp.where(_iota(x.shape, 0) > _iota(x.shape, 1), x, 0.0)


@dataclasses.dataclass(frozen=True)
class Solved:
    """A chunk's values that both passes need.

    Attributes of key heads: both = [k; q] [2 C, dk]; kk, qk [C, C], products of keys with keys and queries. Of value
    heads: gates; inverse [C, C]; seen = exp(G) k S and exp(G) q S; error = v - exp(G) k S; written = W, all [C, dv];
    state [dk, dv].
    """

    gates: Gates
    both: list[Array]
    kk: list[Array]
    qk: list[Array]
    inverse: list[Array]
    seen: list[tuple[Array, Array]]
    error: list[Array]
    written: list[Array]
    state: list[Array]

    def head(self, r: int) -> int:
        """Key head of a value head."""
        return r * len(self.both) // len(self.state)

    def out(self, dot: Products) -> list[Array]:
        """o of the value heads, [C, dv]."""
        weighted = [self.qk[self.head(r)] * pair for r, pair in enumerate(self.gates.pair)]
        return [seen[1] + dot(p, written) for seen, p, written in zip(self.seen, weighted, self.written)]

    def after(self, dot: Products) -> list[Array]:
        """The next states, [dk, dv]."""
        size, gates = self.kk[0].shape[0], self.gates
        stored = [to_state * written for to_state, written in zip(gates.to_state, self.written)]
        return [
            gates.carry(r) * state + dot(self.both[self.head(r)][:size], stored[r], TN)
            for r, state in enumerate(self.state)
        ]


def solve(
    q: list[Array], k: list[Array], v: list[Array], rows: list[Array], state: list[Array], dot: Products,
    inverse: list[Array] | None = None,
) -> Solved:
    """What a chunk writes.

    Args:
      q, k: [C, dk] of key heads. v: [C, dv] of value heads. rows: [>= 3 R, C] gates of key heads.
      state: [dk, dv] float32 of value heads. inverse: [C, C] of value heads, where it is known already.
    """
    size, repeats = q[0].shape[0], len(v) // len(q)
    gates = Gates.of(rows, repeats)
    each = range(len(v))
    kk = [dot(x, x, NT) for x in k]
    if inverse is None:
        scaled = [gates.beta[r] * kk[r // repeats] * gates.pair[r] for r in each]
        inverse = unit_lower_inverses([_strictly_lower(a) for a in scaled], dot)
    qk = [dot(a, b, NT) for a, b in zip(q, k)]
    both = [jnp.concatenate([b, a]) for a, b in zip(q, k)]
    products = [dot(both[r // repeats], state[r]) for r in each]
    seen = [(gates.from_state[r] * products[r][:size], gates.from_state[r] * products[r][size:]) for r in each]
    error = [v[r].astype(jnp.float32) - seen[r][0] for r in each]
    wanted = [gates.beta[r] * error[r] for r in each]
    written = [dot(inverse[r], wanted[r]) for r in each]
    return Solved(gates, both, kk, qk, inverse, seen, error, written, state)


def _row_sums(*parts: Array) -> Array:
    """Sum over the lanes of all parts [C, *]: [C, 1]. Parts of equal width are added before they are reduced."""
    by_width: dict[int, Array] = {}
    for part in parts:
        width = part.shape[1]
        by_width[width] = by_width[width] + part if width in by_width else part
    return sum(jnp.sum(part, axis=1, keepdims=True) for part in by_width.values())


def _total(x: Array) -> Array:
    return jnp.sum(jnp.sum(x, axis=0, keepdims=True), axis=1, keepdims=True)


def backward(
    solved: Solved, rows: int, d_out: list[Array], d_after: list[Array], dot: Products
) -> tuple[list[Array], list[Array], list[Array], list[Array], list[Array]]:
    """Gradients of one chunk, given those of its outputs and of the states after it.

    With W = (I + A)^-1 wanted, d_wanted = (I + A)^-T d_W and d_A = -d_wanted W^T: the inverse is not differentiated.

    Args:
      solved: of the forward pass, recomputed. rows: number of gate rows of a key head.
      d_out: [C, dv] and d_after: [dk, dv] of value heads, float32.

    Returns:
      dq, dk [C, dk] of key heads; dv [C, dv] of value heads; gradient rows [rows, C] of key heads, of fine and beta,
      zero elsewhere; d_state [dk, dv] of value heads; all float32.
    """
    gates, both, kk, qk = solved.gates, solved.both, solved.kk, solved.qk
    size, heads = kk[0].shape[0], range(len(both))
    each, of = range(len(solved.state)), [solved.head(r) for r in range(len(solved.state))]
    own = lambda h: [r for r in each if of[r] == h]
    k = [x[:size] for x in both]
    d_stored = [gates.to_state[r] * dot(k[of[r]], d_after[r]) for r in each]  # of W, through the state
    weighted = [qk[of[r]] * gates.pair[r] for r in each]
    d_written = [d_stored[r] + dot(weighted[r], d_out[r], TN) for r in each]
    d_wanted = [dot(solved.inverse[r], d_written[r], TN) for r in each]
    d_p = [dot(d_out[r], solved.written[r], NT) * gates.pair[r] for r in each]
    d_a = [-_strictly_lower(dot(d_wanted[r], solved.written[r], NT)) * gates.pair[r] for r in each]
    dv = [gates.beta[r] * d_wanted[r] for r in each]
    d_seen = [jnp.concatenate([-gates.from_state[r] * dv[r], gates.from_state[r] * d_out[r]]) for r in each]
    d_state = [gates.carry(r) * d_after[r] + dot(both[of[r]], d_seen[r], TN) for r in each]
    stored = [gates.to_state[r] * solved.written[r] for r in each]

    d_both = [sum(dot(d_seen[r], solved.state[r], NT) for r in own(h)) for h in heads]
    through_state = [sum(dot(stored[r], d_after[r], NT) for r in own(h)) for h in heads]
    d_pairs = [
        jnp.concatenate([sum(gates.beta[r] * d_a[r] for r in own(h)), sum(d_p[r] for r in own(h))]) for h in heads]
    mixed = [dot(d_pairs[h], k[h]) for h in heads]
    dk = [
        d_both[h][:size] + mixed[h][:size] + through_state[h] + dot(d_pairs[h], both[h], TN) for h in heads]
    dq = [d_both[h][size:] + mixed[h][size:] for h in heads]

    d_decay, d_beta, d_decay_rows = [], [], []
    last = _iota((size, 1), 0) == size - 1
    for r in each:
        through = d_stored[r] * solved.written[r]
        d_carry = gates.carry(r) * _total(solved.state[r].astype(jnp.float32) * d_after[r]) + _total(through)
        a_part = d_a[r] * kk[of[r]]
        pairs = d_p[r] * qk[of[r]] + gates.beta[r] * a_part
        d_beta.append(_row_sums(d_wanted[r] * solved.error[r], a_part))
        sums = _row_sums(d_out[r] * solved.seen[r][1] - dv[r] * solved.seen[r][0] - through, pairs)
        d_decay.append(sums + jnp.where(last, d_carry, 0.0))
        d_decay_rows.append(jnp.sum(pairs, axis=0, keepdims=True))
    pick = lambda values, h: [values[r] for r in own(h)]
    d_rows = [_gradient_rows(pick(d_decay, h), pick(d_decay_rows, h), pick(d_beta, h), rows) for h in heads]
    return dq, dk, dv, d_rows, d_state


def _gradient_rows(d_decay: list[Array], d_decay_rows: list[Array], d_beta: list[Array], count: int) -> Array:
    """Columns [C, 1] and rows [1, C] of the R value heads as gate rows [count, C]."""
    repeats, size = len(d_decay), d_decay[0].shape[0]
    lane = _iota((size, 128), 1)
    cols = jnp.zeros((size, 128), jnp.float32)
    for r in range(repeats):
        cols = jnp.where(lane == repeats + r, d_decay[r], cols)
        cols = jnp.where(lane == 2 * repeats + r, d_beta[r], cols)
    rows = cols.T[:count]
    line = _iota((count, size), 0)
    for r in range(repeats):
        rows = rows - jnp.where(line == repeats + r, d_decay_rows[r], 0.0)
    return rows
