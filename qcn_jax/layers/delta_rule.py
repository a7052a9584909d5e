"""The gated delta rule: one function; a chunked and a recurrent form, and Pallas kernels (layers.kernels.delta_rule).

Per value head, with state S [dk, dv] and S = 0 at the start of every document:
    S <- exp(g_t) S;  S <- S + k_t (beta_t (v_t - k_t^T S))^T;  o_t = q_t^T S.

The chunked form writes the C updates of a chunk as one unit lower triangular system. Groups of chunks are
scanned, and a group's matrices are recomputed in the backward pass: what is kept is one state per group.

Axes: B batch, T tokens, H key heads, R value heads per key head, dk/dv their widths, C chunk, N chunks of a group.
Keys and queries are never repeated over R: products with them are shared by the R value heads.
"""

import functools

import jax
import jax.numpy as jnp

from qcn_jax.layers.triangular import unit_lower_inverse

Array = jax.Array
# g is split into a multiple of 2^-6, whose cumulative sum is exact in float32 up to 2^18, and a rest below
# 2^-7, so that differences of cumulative decays keep their digits however strong the decay before them was.
_GRID = 64.0
# Chunks of a group: their matrices are formed side by side; more is more parallel and takes more memory.
_GROUP = 8


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
      g: [B, T, H, R] float32 log decay, <= 0.
      beta: [B, T, H, R] float32 write strength. beta = g = 0 makes a token inert: that is how padding passes.
      state: [B, H, R, dk, dv] float32, the state before the first token; None is zero.
      segment_ids: [B, T] or None; the state is zeroed at every change of id. `state` belongs to the
        document of the first token.
      form: "chunked" (C tokens at a time), "recurrent" (one at a time: least work for single tokens) or "pallas"
        (chunked, as TPU kernels whose products take operands of v's dtype).
      chunk_size: C.

    Returns:
      o [B, T, H, R, dv] float32 and the state after the last token.
    """
    batch, length, heads, key_dim = q.shape
    if state is None:
        state = jnp.zeros((batch, heads, v.shape[3], key_dim, v.shape[4]), jnp.float32)
    if form == "pallas" and length > 1:
        from qcn_jax.layers.kernels.delta_rule import delta_rule  # Pallas takes a while to import

        return delta_rule(q, k, v, g, beta, state, segment_ids, chunk_size)
    q, k, v, g, beta = (x.astype(jnp.float32) for x in (q, k, v, g, beta))
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
        q, k, v, decay, beta = token
        s = s * decay[..., None, None]
        delta = beta[..., None] * (v - jnp.einsum("bhk,bhrkv->bhrv", k, s))
        s = s + k[:, :, None, :, None] * delta[..., None, :]
        return s, jnp.einsum("bhk,bhrkv->bhrv", q, s)

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

    def split(x: Array, mode: str = "constant") -> Array:
        """[B, T, ...] -> [groups, B, group, ...]"""
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), mode=mode)
        return jnp.moveaxis(x.reshape(batch, groups, group, *x.shape[2:]), 1, 0)

    segments = None
    if segment_ids is not None:
        # Padding continues the last document, so that the final state is that document's.
        ids = split(segment_ids, "edge")
        segments = (ids, jnp.concatenate([ids[:1, :, 0], ids[:-1, :, -1]]))
    step = jax.checkpoint(functools.partial(_group, chunk=chunk), prevent_cse=False)
    xs = (*(split(x) for x in (q, k, v, g, beta)), segments)
    if groups == 1:
        state, o = step(state, jax.tree.map(lambda x: x[0], xs))
        return o[:, :length], state
    state, o = jax.lax.scan(step, state, xs)
    o = jnp.moveaxis(o, 0, 1)
    return o.reshape(batch, groups * group, *o.shape[3:])[:, :length], state


def _segment_masks(ids: Array, incoming: Array, chunk: int) -> tuple[Array, Array, Array, Array]:
    """Which pairs of tokens, and which tokens and the state, belong to one document.

    Args:
      ids: [B, N * C] segment ids of a group.
      incoming: [B], the id of the token before them.
      chunk: C.

    Returns:
      pair [N, B, 1, 1, C, C]; head [N, B, 1, C, 1], token continues the incoming state's document; tail
      [N, B, 1, C, 1], token belongs to the outgoing state's; keep [N, B, 1, 1], the state survives the chunk.
    """
    ids = jnp.moveaxis(ids.reshape(ids.shape[0], -1, chunk), 1, 0)
    last = ids[..., -1]
    before = jnp.concatenate([incoming[None], last[:-1]])
    return (
        (ids[..., :, None] == ids[..., None, :])[:, :, None, None],
        (ids == before[..., None])[:, :, None, :, None],
        (ids == last[..., None])[:, :, None, :, None],
        (last == before)[:, :, None, None],
    )


def _group(state: Array, xs: tuple, chunk: int) -> tuple[Array, Array]:
    """N chunks: (state, (q, k, v, g, beta [B, N * C, H, ...], segments)) -> (state, o [B, N * C, H, R, dv])."""
    *tokens, segments = xs
    # [B, N * C, H, ...] -> [N, B, H, C, ...]
    split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), (1, 3), (0, 2))
    q, k, v, g, beta = map(split, tokens)
    masks = None if segments is None else _segment_masks(*segments, chunk)
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
    write_keys = k[:, :, :, None] * to_state[..., None]
    states, written, state = _run_chunks(wanted, known, write_keys, carry_decay, state)
    o = (q[:, :, :, None] * from_state[..., None]) @ states + attention @ written  # [N, B, H, R, C, dv]
    o = jnp.transpose(o, (1, 0, 4, 2, 3, 5))
    return state, o.reshape(o.shape[0], -1, *o.shape[3:])


@jax.custom_vjp
def _run_chunks(wanted: Array, known: Array, write_keys: Array, carry: Array, state: Array) -> tuple[Array, ...]:
    """The sequential part: S_n+1 = carry_n S_n + write_keys_n^T (wanted_n - known_n S_n).

    Args:
      wanted: [N, B, H, R, C, dv]. known, write_keys: [N, B, H, R, C, dk]. carry: [N, B, H, R].
      state: [B, H, R, dk, dv], S_0.

    Returns:
      S_0 .. S_N-1 [N, B, H, R, dk, dv], what each chunk writes [N, B, H, R, C, dv], and S_N.
    """

    def step(s: Array, xs: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        wanted, known, write_keys, carry = xs
        written = wanted - known @ s
        return carry[..., None, None] * s + jnp.swapaxes(write_keys, -1, -2) @ written, (s, written)

    state, (states, written) = jax.lax.scan(step, state, (wanted, known, write_keys, carry))
    return states, written, state


def _run_forward(*inputs: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    states, written, state = _run_chunks(*inputs)
    _, known, write_keys, carry, _ = inputs
    return (states, written, state), (known, write_keys, carry, states, written)


def _run_backward(residuals: tuple[Array, ...], cotangents: tuple[Array, ...]) -> tuple[Array, ...]:
    """Only two products are sequential here too; the others take all chunks at once."""
    known, write_keys, carry, states, written = residuals
    d_states, d_written, d_final = cotangents

    def step(d_next: Array, xs: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        known, write_keys, carry, d_state, d_written = xs
        d_written = d_written + write_keys @ d_next
        d_state = d_state + carry[..., None, None] * d_next - jnp.swapaxes(known, -1, -2) @ d_written
        return d_state, (d_next, d_written)

    xs = (known, write_keys, carry, d_states, d_written)
    d_state, (d_next, d_written) = jax.lax.scan(step, d_final, xs, reverse=True)
    d_known = -d_written @ jnp.swapaxes(states, -1, -2)
    d_keys = written @ jnp.swapaxes(d_next, -1, -2)
    d_carry = jnp.einsum("...kv,...kv->...", states, d_next)
    return d_written, d_known, d_keys, d_carry, d_state


_run_chunks.defvjp(_run_forward, _run_backward)


@jax.custom_vjp
def _decays(g: Array, masks: tuple[Array, ...] | None) -> tuple[Array, Array, Array, Array]:
    """Decay factors of log decays g [N, B, H, C, R], zero across documents.

    Returns:
      pair [N, B, H, R, C, C] from token j to token i >= j; from_state [N, B, H, C, R] from the incoming state to
      a token; to_state [N, B, H, C, R] from a token to the outgoing state; carry [N, B, H, R] of the state itself.
    """
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
