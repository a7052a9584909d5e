"""The gated delta rule: one function, a chunked and a recurrent form.

Per value head, with state S [dk, dv] and S = 0 at the start of every document:
    S <- exp(g_t) S;  S <- S + k_t (beta_t (v_t - k_t^T S))^T;  o_t = q_t^T S.

Axes: B batch, T tokens, H key heads, R value heads per key head, dk/dv their widths, C chunk, N chunks.
Keys and queries are never repeated over R: products with them are shared by the R value heads.
"""

import jax
import jax.numpy as jnp

from qcn_jax.layers.triangular import unit_lower_inverse

Array = jax.Array
# g is split into a multiple of 2^-6, whose cumulative sum is exact in float32 up to 2^18, and a rest below
# 2^-7, so that differences of cumulative decays keep their digits however strong the decay before them was.
_GRID = 64.0


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
      state: [B, H, dk, R, dv] float32, the state before the first token; None is zero.
      segment_ids: [B, T] or None; the state is zeroed at every change of id. `state` belongs to the
        document of the first token.
      form: "chunked" (C tokens at a time) or "recurrent" (one at a time: least work for single tokens).
      chunk_size: C.

    Returns:
      o [B, T, H, R, dv] float32 and the state after the last token.
    """
    batch, length, heads, key_dim = q.shape
    if state is None:
        state = jnp.zeros((batch, heads, key_dim, *v.shape[3:]), jnp.float32)
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
        s = s * decay[:, :, None, :, None]
        delta = beta[..., None] * (v - jnp.einsum("bhk,bhkrv->bhrv", k, s))
        s = s + k[..., None, None] * delta[:, :, None]
        return s, jnp.einsum("bhk,bhkrv->bhrv", q, s)

    tokens = (q, k, v, decay, beta)
    if q.shape[1] == 1:
        state, o = step(state, tuple(x[:, 0] for x in tokens))
        return o[:, None], state
    state, o = jax.lax.scan(step, state, tuple(jnp.moveaxis(x, 1, 0) for x in tokens))
    return jnp.moveaxis(o, 0, 1), state


def _into_chunks(x: Array, count: int, chunk: int) -> Array:
    """[B, T, H, ...] -> [N, B, H, C, ...], zero-padded at the end."""
    pad = [(0, 0), (0, count * chunk - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad).reshape(x.shape[0], count, chunk, *x.shape[2:])
    return jnp.moveaxis(x, (1, 3), (0, 2))


def _segment_masks(segment_ids: Array, count: int, chunk: int) -> tuple[Array, Array, Array, Array]:
    """Which pairs of tokens, and which tokens and the state, belong to one document.

    Returns:
      pair [N, B, 1, 1, C, C], head [N, B, 1, C, 1] (token continues the incoming state's document),
      tail [N, B, 1, C, 1] (token belongs to the outgoing state's), keep [N, B, 1, 1] (the state survives the chunk).
    """
    batch, length = segment_ids.shape
    # Padding continues the last document, so that the final state is that document's.
    ids = jnp.pad(segment_ids, ((0, 0), (0, count * chunk - length)), mode="edge")
    ids = jnp.moveaxis(ids.reshape(batch, count, chunk), 1, 0)
    last = ids[..., -1]
    incoming = jnp.concatenate([ids[:1, :, 0], last[:-1]])
    return (
        (ids[..., :, None] == ids[..., None, :])[:, :, None, None],
        (ids == incoming[..., None])[:, :, None, :, None],
        (ids == last[..., None])[:, :, None, :, None],
        (last == incoming)[:, :, None, None],
    )


def _chunked(
    q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array, segment_ids: Array | None, chunk: int
) -> tuple[Array, Array]:
    batch, length, heads, key_dim = q.shape
    repeats, value_dim = v.shape[3:]
    count = -(-length // chunk)
    q, k, v, g, beta = (_into_chunks(x, count, chunk) for x in (q, k, v, g, beta))  # [N, B, H, C, ...]

    coarse = jax.lax.stop_gradient(jnp.round(g * _GRID) / _GRID)
    coarse, fine = jnp.cumsum(coarse, axis=3), jnp.cumsum(g - coarse, axis=3)  # [N, B, H, C, R]
    across = lambda x: jnp.moveaxis(x, -1, 3)  # [N, B, H, R, C]
    difference = lambda x: across(x)[..., :, None] - across(x)[..., None, :]
    visible = jnp.tril(jnp.ones((chunk, chunk), bool))
    into_chunk, out_of_chunk = coarse + fine, (coarse[..., -1:, :] - coarse) + (fine[..., -1:, :] - fine)
    from_state, to_state = jnp.exp(into_chunk), jnp.exp(out_of_chunk)  # [N, B, H, C, R]
    carry_decay = from_state[..., -1, :]  # [N, B, H, R]
    if segment_ids is not None:
        pair, head, tail, keep = _segment_masks(segment_ids, count, chunk)
        visible = visible & pair
        from_state, to_state, carry_decay = from_state * head, to_state * tail, carry_decay * keep
    # Masked before exp: above the diagonal the difference is positive and may overflow.
    decay = jnp.exp(jnp.where(visible, difference(coarse) + difference(fine), -jnp.inf))  # [N, B, H, R, C, C]

    keys_t = jnp.swapaxes(k, -1, -2)
    strength = across(beta)[..., None]  # [N, B, H, R, C, 1]
    inverse = unit_lower_inverse(strength * (k @ keys_t)[:, :, :, None] * decay)
    attention = (q @ keys_t)[:, :, :, None] * decay
    flat = lambda x: x.reshape(*x.shape[:-2], repeats * value_dim)
    by_head = lambda x: x.reshape(*x.shape[:-1], repeats, value_dim)

    def step(s: Array, xs: tuple[Array, ...]) -> tuple[Array, Array]:
        qk, k_t, v, beta, inverse, attention, from_state, to_state, carry_decay = xs
        read = by_head(qk @ flat(s)) * jnp.tile(from_state, (1, 1, 2, 1))[..., None]  # [B, H, 2C, R, dv]
        read_q, read_k = jnp.split(read, 2, axis=2)
        written = inverse @ jnp.moveaxis(beta[..., None] * (v - read_k), 3, 2)  # [B, H, R, C, dv]
        o = jnp.moveaxis(read_q, 3, 2) + attention @ written
        gain = flat(jnp.moveaxis(written, 2, 3) * to_state[..., None])
        return s * carry_decay[:, :, None, :, None] + by_head(k_t @ gain), o

    xs = (jnp.concatenate([q, k], axis=3), keys_t, v, beta, inverse, attention, from_state, to_state, carry_decay)
    state, o = jax.lax.scan(step, state, xs)  # o [N, B, H, R, C, dv]
    o = jnp.transpose(o, (1, 0, 4, 2, 3, 5)).reshape(batch, count * chunk, heads, repeats, value_dim)
    return o[:, :length], state
