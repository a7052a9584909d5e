"""The gated delta rule: one function; a chunked and a recurrent form, and Pallas kernels (layers.kernels.delta_rule).

Per value head, with state S [dk, dv] and S = 0 at the start of every document:
    S <- exp(g_t) S;  S <- S + k_t (beta_t (v_t - k_t^T S))^T;  o_t = q_t^T S.

The chunked form writes the C updates of a chunk as one unit lower triangular system. Groups of chunks are
scanned, and a group's matrices are recomputed in the backward pass: what is kept is one state per group. Only a
sequence of few groups is unrolled and keeps all.

Axes: B batch, T tokens, H key heads, R value heads per key head, dk/dv their widths, C chunk, N chunks of a group.
Keys and queries are never repeated over R: products with them are shared by the R value heads.
"""

import functools

import jax
import jax.numpy as jnp

from qcn_jax.layers.products import accumulator
from qcn_jax.layers.triangular import unit_lower_inverse

Array = jax.Array
# g is split into a multiple of 2^-6, whose cumulative sum is exact in float32 up to 2^18, and a rest below
# 2^-7, so that differences of cumulative decays keep their digits however strong the decay before them was.
_GRID = 64.0
# exp() of less is zero, in float64 too. Bounded so, the g of 256 tokens add up to no more than 2^18.
_STRONGEST = -1024.0
# Chunks of a group: their matrices are formed side by side; more is more parallel and takes more memory.
_GROUP = 8
# So many groups are unrolled: a scan copies all it reads and writes, a fifth of forward and backward on CPU, and
# recomputation adds as much.
_UNROLLED = 4


def gated_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    state: Array | None = None,
    segment_ids: Array | None = None,
    form: str = "chunked",
    chunk_size: int = 64,
) -> tuple[Array, Array]:
    """Runs the rule over T tokens.

    Args:
      q, k: [B, T, H, dk], already normalised (and q scaled).
      v: [B, T, H, R, dv].
      g: [B, T, H, R] log decay, <= 0; float32, or float64 where the others are.
      beta: [B, T, H, R] write strength, likewise. beta = g = 0 makes a token inert: that is how padding passes.
      state: [B, H, R, dk, dv], likewise, the state before the first token; None is zero.
      segment_ids: [B, T] or None; the state is zeroed at every change of id. `state` belongs to the
        document of the first token.
      form: "chunked" (C tokens at a time), "recurrent" (one at a time: least work for single tokens) or "pallas"
        (chunked, as TPU or NVIDIA GPU kernels whose products take operands of v's dtype).
      chunk_size: C.

    Returns:
      o [B, T, H, R, dv] in g's dtype and the state after the last token.
    """
    batch, length, heads, key_dim = q.shape
    wide = accumulator(v.dtype, g.dtype)
    if state is None:
        state = jnp.zeros((batch, heads, v.shape[3], key_dim, v.shape[4]), wide)
    if form == "pallas" and length > 1:
        from qcn_jax.layers.kernels.delta_rule import delta_rule  # Pallas takes a while to import

        return delta_rule(q, k, v, g, beta, state, segment_ids, chunk_size)
    q, k, v, g, beta = (x.astype(wide) for x in (q, k, v, g, beta))
    if form == "recurrent" or length == 1:
        return _recurrent(q, k, v, g, beta, state, segment_ids)
    return _chunked(q, k, v, g, beta, state, segment_ids, chunk_size)


def _recurrent(
    q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array, segment_ids: Array | None
) -> tuple[Array, Array]:
    decay = jnp.exp(g)
    if segment_ids is not None:
        same = jnp.pad(segment_ids[:, 1:] == segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        decay = decay * same[..., None, None]

    def step(s: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        """Both products are taken with the old state, so that the large array is read twice and written once."""
        q, k, v, decay, beta = token
        # A copy for each value head, or XLA would put the state into another order for one product over all.
        rows = jnp.broadcast_to(jnp.stack([k, q], axis=2)[:, :, None], (*s.shape[:3], 2, s.shape[3]))
        read = (rows @ s) * decay[..., None, None]  # [B, H, R, 2, dv]
        delta = beta[..., None] * (v - read[..., 0, :])
        o = read[..., 1, :] + jnp.sum(q * k, axis=-1)[..., None, None] * delta
        return s * decay[..., None, None] + k[:, :, None, :, None] * delta[..., None, :], o

    tokens = (q, k, v, decay, beta)
    if q.shape[1] == 1:
        state, o = step(state, tuple(x[:, 0] for x in tokens))
        return o[:, None], state
    state, o = jax.lax.scan(step, state, tuple(jnp.moveaxis(x, 1, 0) for x in tokens))
    return jnp.moveaxis(o, 0, 1), state


def _chunked(
    q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array, segment_ids: Array | None, chunk: int
) -> tuple[Array, Array]:
    batch, length = q.shape[:2]
    chunks = -(-length // chunk)
    groups = -(-chunks // _GROUP)
    group = -(-chunks // groups) * chunk  # tokens of a group
    padding = groups * group - length
    # Padding continues the last document, so that the final state is that document's.
    pad = lambda x, mode: jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), mode=mode)
    xs = [pad(x, "constant") for x in (q, k, v, g, beta)]
    if segment_ids is not None:
        changed = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        ids = pad(jnp.cumsum(changed, axis=1, dtype=jnp.int32), "edge")  # an id may come again
        before = jnp.concatenate([ids[:, :1], ids[:, group - 1 : -1 : group]], axis=1)  # [B, groups]
        xs += [ids, before]
    step = functools.partial(_group, chunk=chunk)
    if groups <= _UNROLLED:
        # Its gradient is a concatenation; that of slices would be a sum of padded arrays.
        parts, out = [jax.lax.split(x, [x.shape[1] // groups] * groups, axis=1) for x in xs], []
        for part in zip(*parts):
            state, o = step(state, part)
            out.append(o)
        return jnp.concatenate(out, axis=1)[:, :length], state
    # [B, T, ...] -> [groups, B, group, ...]
    split = lambda x: jnp.moveaxis(x.reshape(batch, groups, -1, *x.shape[2:]), 1, 0)
    state, o = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), state, [split(x) for x in xs])
    o = jnp.moveaxis(o, 0, 1)
    return o.reshape(batch, groups * group, *o.shape[3:])[:, :length], state


def _segment_masks(ids: Array, incoming: Array, chunk: int) -> tuple[Array, Array, Array, Array]:
    """Which pairs of tokens, and which tokens and the state, belong to one document.

    Args:
      ids: [B, N * C] segment ids of a group.
      incoming: [B, 1], the id of the token before them.
      chunk: C.

    Returns:
      pair [N, B, 1, 1, C, C]; head [N, B, 1, C, 1], token continues the incoming state's document; tail
      [N, B, 1, C, 1], token belongs to the outgoing state's; keep [N, B, 1, 1], the state survives the chunk.
    """
    ids = jnp.moveaxis(ids.reshape(ids.shape[0], -1, chunk), 1, 0)
    last = ids[..., -1]
    before = jnp.concatenate([incoming.T, last[:-1]])
    return (
        (ids[..., :, None] == ids[..., None, :])[:, :, None, None],
        (ids == before[..., None])[:, :, None, :, None],
        (ids == last[..., None])[:, :, None, :, None],
        (last == before)[:, :, None, None],
    )


def _group(state: Array, xs: tuple[Array, ...], chunk: int) -> tuple[Array, Array]:
    """N chunks: (state, (q, k, v, g, beta [B, N * C, H, ...] and perhaps ids [B, N * C], the id before them [B, 1]))
    -> (state, o [B, N * C, H, R, dv])."""
    tokens, segments = xs[:5], xs[5:]
    # [B, N * C, H, ...] -> [N, B, H, C, ...]
    split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), (1, 3), (0, 2))
    q, k, v, g, beta = map(split, tokens)
    masks = _segment_masks(*segments, chunk) if segments else None
    pair_decay, from_state, to_state, carry_decay = _decays(g, masks)

    keys_t = jnp.swapaxes(k, -1, -2)
    by_head = lambda x: jnp.moveaxis(x, -1, 3)  # [N, B, H, C, R] -> [N, B, H, R, C]
    beta, from_state, to_state = by_head(beta), by_head(from_state), by_head(to_state)
    inverse = unit_lower_inverse(beta[..., None] * (k @ keys_t)[:, :, :, None] * pair_decay)
    attention = (q @ keys_t)[:, :, :, None] * pair_decay
    # A chunk writes U - W S for an incoming state S. The R systems of a key head share its keys.
    scaled = inverse * beta[..., None, :]
    wanted = scaled @ jnp.moveaxis(v, 4, 3)  # U [N, B, H, R, C, dv]
    known = scaled * from_state[..., None, :]
    known = (known.reshape(*k.shape[:3], -1, chunk) @ k).reshape(*known.shape[:-1], -1)  # W [N, B, H, R, C, dk]
    asked = q[:, :, :, None] * from_state[..., None]
    write_keys = k[:, :, :, None] * to_state[..., None]
    written, answered, state = _run_chunks(
        wanted, jnp.concatenate([known, asked], axis=-2), write_keys, carry_decay, state)
    o = answered + attention @ written  # [N, B, H, R, C, dv]
    o = jnp.transpose(o, (1, 0, 4, 2, 3, 5))
    return state, o.reshape(o.shape[0], -1, *o.shape[3:])


@jax.custom_vjp
def _run_chunks(
    wanted: Array, known_asked: Array, write_keys: Array, carry: Array, state: Array
) -> tuple[Array, Array, Array]:
    """The sequential part: S_n+1 = carry_n S_n + write_keys_n^T (wanted_n - known_n S_n).

    Args:
      wanted: [N, B, H, R, C, dv].
      known_asked: [N, B, H, R, 2 C, dk], known and the queries, whose products with the state are one.
      write_keys: [N, B, H, R, C, dk].
      carry: [N, B, H, R].
      state: [B, H, R, dk, dv], S_0.

    Returns:
      what each chunk writes, wanted_n - known_n S_n, and asked_n S_n, both [N, B, H, R, C, dv], and S_N.
    """
    return _run_forward(wanted, known_asked, write_keys, carry, state)[0]


def _run_forward(
    wanted: Array, known_asked: Array, write_keys: Array, carry: Array, state: Array
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    chunk = wanted.shape[-2]

    def step(s: Array, xs: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        wanted, known_asked, write_keys, carry = xs
        read = known_asked @ s
        written = wanted - read[..., :chunk, :]
        after = carry[..., None, None] * s + jnp.swapaxes(write_keys, -1, -2) @ written
        return after, (written, read[..., chunk:, :], s)

    state, (written, answered, states) = jax.lax.scan(step, state, (wanted, known_asked, write_keys, carry))
    return (written, answered, state), (known_asked, write_keys, carry, states, written)


def _run_backward(residuals: tuple[Array, ...], cotangents: tuple[Array, ...]) -> tuple[Array, ...]:
    """Only two products are sequential here too; the others take all chunks at once."""
    known_asked, write_keys, carry, states, written = residuals
    d_written, d_answered, d_final = cotangents

    def step(d_next: Array, xs: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        known_asked, write_keys, carry, d_written, d_answered = xs
        d_written = d_written + write_keys @ d_next
        d_read = jnp.concatenate([-d_written, d_answered], axis=-2)
        d_state = carry[..., None, None] * d_next + jnp.swapaxes(known_asked, -1, -2) @ d_read
        return d_state, (d_next, d_read)

    xs = (known_asked, write_keys, carry, d_written, d_answered)
    d_state, (d_next, d_read) = jax.lax.scan(step, d_final, xs, reverse=True)
    d_known_asked = d_read @ jnp.swapaxes(states, -1, -2)
    d_keys = written @ jnp.swapaxes(d_next, -1, -2)
    d_carry = jnp.einsum("...kv,...kv->...", states, d_next)
    return -d_read[..., : written.shape[-2], :], d_known_asked, d_keys, d_carry, d_state


_run_chunks.defvjp(_run_forward, _run_backward)


@jax.custom_vjp
def _decays(g: Array, masks: tuple[Array, ...] | None) -> tuple[Array, Array, Array, Array]:
    """Decay factors of log decays g [N, B, H, C, R], zero across documents.

    Returns:
      pair [N, B, H, R, C, C] from token j to token i >= j; from_state [N, B, H, C, R] from the incoming state to
      a token; to_state [N, B, H, C, R] from a token to the outgoing state; carry [N, B, H, R] of the state itself.
    """
    g = jnp.maximum(g, _STRONGEST)
    coarse = jnp.round(g * _GRID) / _GRID
    coarse, fine = jnp.cumsum(coarse, axis=3), jnp.cumsum(g - coarse, axis=3)
    from_state = jnp.exp(coarse + fine)
    to_state = jnp.exp((coarse[..., -1:, :] - coarse) + (fine[..., -1:, :] - fine))
    carry = from_state[..., -1, :]
    visible = jnp.tril(jnp.ones((g.shape[3], g.shape[3]), bool))
    if masks is not None:
        pair, head, tail, keep = masks
        visible = visible & pair
        from_state, to_state, carry = from_state * head, to_state * tail, carry * keep
    coarse, fine = jnp.moveaxis(coarse, -1, 3), jnp.moveaxis(fine, -1, 3)
    difference = lambda x: x[..., :, None] - x[..., None, :]
    # Masked before exp: above the diagonal the difference is positive and may overflow.
    pair_decay = jnp.exp(jnp.where(visible, difference(coarse) + difference(fine), -jnp.inf))
    return pair_decay, from_state, to_state, carry


def _decays_forward(g: Array, masks: tuple[Array, ...] | None) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    factors = _decays(g, masks)
    return factors, factors


def _decays_backward(factors: tuple[Array, ...], cotangents: tuple[Array, ...]) -> tuple[Array, None]:
    """Every factor is the exponential of a sum of g over an interval; g_t's gradient sums those that contain t.

    By way of the cumulative sums it would be a difference between all pairs' sums, in which those that do not
    contain t cancel but for their rounding: with strong decays that was a thousandth of A_log's gradient.
    """
    pair, from_state, to_state, carry = (factor * cotangent for factor, cotangent in zip(factors, cotangents))
    size = pair.shape[-1]
    before = jnp.triu(jnp.ones((size, size), pair.dtype), 1)  # [j, t]: j < t
    # To token i from all before t, of which t <= i are kept.
    from_before = jnp.tril(jnp.matmul(pair, before, precision=jax.lax.Precision.HIGHEST))
    sooner = jnp.cumsum(to_state, axis=3) - to_state
    later = jax.lax.cumsum(from_state, axis=3, reverse=True)
    return jnp.moveaxis(jnp.sum(from_before, axis=-2), 3, -1) + sooner + later + carry[..., None, :], None


_decays.defvjp(_decays_forward, _decays_backward)
