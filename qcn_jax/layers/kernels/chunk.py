"""Mathematics of one chunk of the gated delta rule on values that lie in VMEM, forward and backward.

One key head with its R value heads, C tokens. With G the cumulative log decay of a value head inside the chunk,
D_ij = exp(G_i - G_j) for i >= j, P = (Q K^T) D and A = strictly lower (beta_i (K K^T) D):
    (I + A) W = beta (V - exp(G) (K S));  O = exp(G) (Q S) + P W;  S <- exp(G_C) S + K^T (exp(G_C - G) W).
The triangular inverse needs no state, so that the sequential chain is three products. Products with K, Q and S are
shared by the R value heads; keys are never repeated.

A document starts with an empty state: its first token's log decay is lowered by RESET, whose exponential is zero in
float32, and every mask follows from the decays.

Axes: C tokens of a chunk, R value heads of the key head, dk/dv widths. Products take operands of `Products.dtype`
and accumulate in float32; decays, gates and the state are float32.
"""

import dataclasses

import jax
import jax.numpy as jnp

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
    padded = -count % 128
    if padded:
        rows = jnp.concatenate([rows, jnp.zeros((padded, rows.shape[1]), rows.dtype)])
    return rows.T


def unit_lower_inverse(a: Array) -> Array:
    """(I + a)^-1 [C, C] float32 of strictly lower a (zero elsewhere); C a power of two, at least 16.

    Diagonal blocks of 16 by substitution, all of them side by side in the lanes; then merged in pairs by products:
    inv([[L1, 0], [M, L2]]) = [[T1, 0], [-T2 M T1, T2]]. See layers.triangular for why nothing faster is taken.
    """
    size = a.shape[0]
    row, lane = _iota((size, size), 0), _iota((size, size), 1)
    inverse = _substituted(a)
    blocks = jnp.concatenate([inverse] * (size // BASE)) if size > BASE else inverse
    inverse = jnp.where(row // BASE == lane // BASE, blocks, 0.0)
    step = BASE
    exact = lambda x, y: jnp.dot(x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    while step < size:
        below = (row // (2 * step) == lane // (2 * step)) & (row // step % 2 == 1) & (lane // step % 2 == 0)
        m = jnp.where(below, a, 0.0)
        second = jnp.concatenate([inverse[i : i + step] for i in range(step, size, 2 * step)])
        merged = exact(exact(second, m), inverse)
        pieces = []
        for pair, i in enumerate(range(0, size, 2 * step)):
            pieces += [inverse[i : i + step], inverse[i + step : i + 2 * step] - merged[pair * step : (pair + 1) * step]]
        inverse = jnp.concatenate(pieces)
        step *= 2
    return inverse


def _substituted(a: Array) -> Array:
    """Inverses of the diagonal blocks of I + a: [16, C], block b in lanes 16 b and up."""
    size = a.shape[0]
    lane = _iota((_HALF, size), 1)
    halves = []  # rows 0..7 and 8..15 of every block
    for half in range(0, BASE, _HALF):
        packed = a[half : half + _HALF]
        for block in range(1, size // BASE):
            start = block * BASE + half
            packed = jnp.where(lane // BASE == block, a[start : start + _HALF], packed)
        halves.append(packed)
    row, column = _iota((_HALF, size), 0), lane % BASE
    inverse = [jnp.where(row + half == column, 1.0, 0.0) for half in range(0, BASE, _HALF)]
    for j in range(BASE - 1):
        solved = inverse[j // _HALF][j % _HALF : j % _HALF + 1]
        for half in range(j // _HALF, 2):
            factor = jnp.take_along_axis(halves[half], lane - column + j, axis=1)
            inverse[half] = inverse[half] - factor * solved
    return jnp.concatenate(inverse)


@dataclasses.dataclass(frozen=True)
class Gates:
    """Gates of the R value heads of one key head, from their rows [>= 3 R, C] (see `delta_rule.gate_rows`).

    Attributes: coarse, fine (two parts of G), beta, from_state = exp(G), to_state = exp(G_C - G), each a list over R
    of columns [C, 1]; pair: list of D [C, C].
    """

    beta: list[Array]
    from_state: list[Array]
    to_state: list[Array]
    pair: list[Array]

    @classmethod
    def of(cls, rows: Array, repeats: int) -> "Gates":
        size = rows.shape[1]
        coarse, fine, beta = (rows[i * repeats : (i + 1) * repeats] for i in range(3))
        from_state = jnp.exp(coarse + fine)
        to_state = jnp.exp((coarse[:, size - 1 :] - coarse) + (fine[:, size - 1 :] - fine))
        cols = columns(jnp.concatenate([coarse, fine, beta, from_state, to_state]))
        column = lambda kind, r: cols[:, kind * repeats + r : kind * repeats + r + 1]
        visible = _iota((size, size), 0) >= _iota((size, size), 1)
        pair = []
        for r in range(repeats):
            difference = (column(0, r) - coarse[r : r + 1]) + (column(1, r) - fine[r : r + 1])
            # Masked before exp: above the diagonal the difference is positive and may overflow.
            pair.append(jnp.exp(jnp.where(visible, difference, -jnp.inf)))
        return cls(*([column(kind, r) for r in range(repeats)] for kind in (2, 3, 4)), pair)

    def carry(self, r: int) -> Array:
        """exp(G_C) [1, 1], the decay of the state itself."""
        return self.from_state[r][-1:]


def _strictly_lower(x: Array) -> Array:
    return jnp.where(_iota(x.shape, 0) > _iota(x.shape, 1), x, 0.0)


def forward(
    q: Array, k: Array, v: list[Array], rows: Array, state: list[Array], dot: Products
) -> tuple[list[Array], list[Array], list[Array]]:
    """One chunk.

    Args:
      q, k: [C, dk]. v: R times [C, dv]. rows: [>= 3 R, C] gates. state: R times [dk, dv] float32.

    Returns:
      o, R times [C, dv]; the next state, R times [dk, dv]; inverses, R times [C, C]; all float32.
    """
    size, repeats = q.shape[0], len(v)
    gates = Gates.of(rows, repeats)
    kk, qk = dot(k, k, NT), dot(q, k, NT)
    inverse = [unit_lower_inverse(_strictly_lower(gates.beta[r] * kk * gates.pair[r])) for r in range(repeats)]
    both = jnp.concatenate([k, q])
    out, after = [], []
    for r in range(repeats):
        seen = dot(both, state[r])
        wanted = gates.beta[r] * (v[r].astype(jnp.float32) - gates.from_state[r] * seen[:size])
        written = dot(inverse[r], wanted)
        out.append(gates.from_state[r] * seen[size:] + dot(qk * gates.pair[r], written))
        after.append(gates.carry(r) * state[r] + dot(k, gates.to_state[r] * written, TN))
    return out, after, inverse


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
    q: Array, k: Array, v: list[Array], rows: Array, state: list[Array], inverse: list[Array],
    d_out: list[Array], d_after: list[Array], dot: Products,
) -> tuple[Array, Array, list[Array], Array, list[Array]]:
    """Gradients of one chunk, given those of its outputs and of the state after it.

    With W = (I + A)^-1 wanted, d_wanted = (I + A)^-T d_W and d_A = -d_wanted W^T: the inverse is not differentiated.

    Args:
      q, k, v, rows, state: as in `forward`. inverse: R times [C, C], from it.
      d_out: R times [C, dv]. d_after: R times [dk, dv] float32.

    Returns:
      dq, dk [C, dk]; dv, R times [C, dv]; gradient rows [rows, C] of fine and beta, zero elsewhere; d_state, R
      times [dk, dv]; all float32.
    """
    size, repeats = q.shape[0], len(v)
    gates = Gates.of(rows, repeats)
    kk, qk = dot(k, k, NT), dot(q, k, NT)
    both = jnp.concatenate([k, q])
    dkk, dqk = jnp.zeros_like(kk), jnp.zeros_like(qk)
    d_both, dk = jnp.zeros(both.shape, jnp.float32), jnp.zeros(k.shape, jnp.float32)
    dv, d_state, d_decay, d_beta, d_decay_rows = [], [], [], [], []
    last = _iota((size, 1), 0) == size - 1
    for r in range(repeats):
        beta, pair = gates.beta[r], gates.pair[r]
        seen = dot(both, state[r])
        seen_k, seen_q = gates.from_state[r] * seen[:size], gates.from_state[r] * seen[size:]
        error = v[r].astype(jnp.float32) - seen_k
        written = dot(inverse[r], beta * error)
        grad = d_out[r].astype(jnp.float32)

        d_stored = gates.to_state[r] * dot(k, d_after[r])  # of W, through the state
        d_written = d_stored + dot(qk * pair, grad, TN)
        d_wanted = dot(inverse[r], d_written, TN)
        d_error = beta * d_wanted
        d_a = -_strictly_lower(dot(d_wanted, written, NT)) * pair
        d_p = dot(grad, written, NT) * pair
        dqk, dkk = dqk + d_p, dkk + beta * d_a
        d_seen = jnp.concatenate([-gates.from_state[r] * d_error, gates.from_state[r] * grad])
        d_both = d_both + dot(d_seen, state[r], NT)
        dk = dk + dot(gates.to_state[r] * written, d_after[r], NT)
        dv.append(d_error)
        d_state.append(gates.carry(r) * d_after[r] + dot(both, d_seen, TN))

        stored = d_stored * written
        d_carry = gates.carry(r) * _total(state[r] * d_after[r]) + _total(stored)
        a_part, pairs = d_a * kk, d_p * qk
        pairs = pairs + beta * a_part
        d_beta.append(_row_sums(d_wanted * error, a_part))
        sums = _row_sums(grad * seen_q - d_error * seen_k - stored, pairs)
        d_decay.append(sums + jnp.where(last, d_carry, 0.0))
        d_decay_rows.append(jnp.sum(pairs, axis=0, keepdims=True))
    mixed = dot(jnp.concatenate([dqk, dkk]), k)
    dq = d_both[size:] + mixed[:size]
    dk = dk + d_both[:size] + mixed[size:] + dot(jnp.concatenate([dqk, dkk]), jnp.concatenate([q, k]), TN)
    return dq, dk, dv, _gradient_rows(d_decay, d_decay_rows, d_beta, rows.shape[0]), d_state


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
