"""Causal softmax attention by blocks of queries, with its own backward pass.

Nothing of size T x T is kept for the backward pass: probabilities are recomputed from the row's log-sum-exp.
Keys lie on the major and queries on the minor axis of the logits, so that reductions over keys are vectorised.

Axes: B batch, K key/value heads, R query heads per key/value head, T queries, S keys, H head dim, Q = R * block.
"""

import jax
import jax.numpy as jnp

from qcn_jax.layers.products import accumulator, widened, widened_einsum

Array = jax.Array
MASKED = -1e30  # finite, so that a row without any visible key stays free of NaN
MIN_BLOCK = 128  # queries handled together; keys after a block's end are never touched
MAX_BLOCKS = 8


def masked_logits(q: Array, k: Array, mask: Array) -> Array:
    """Scaled logits [B, K, S, R, T], at least float32, of q [B, K, R, T, H], k [B, K, S, H] and mask [B | 1, S, T]."""
    logits = widened_einsum("bksh,bkrth->bksrt", k, q)
    return jnp.where(mask[:, None, :, None], logits * q.shape[-1] ** -0.5, MASKED)


def attend(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array]:
    """Output [B, K, R, T, H] in v's dtype and log-sum-exp [B, K, R, T] of the rows."""
    logits = masked_logits(q, k, mask)
    largest = jnp.max(logits, axis=2)
    weights = jnp.exp(logits - largest[:, :, None])
    total = jnp.sum(weights, axis=2)
    out = _combine(v, weights.astype(v.dtype)) / total[..., None]
    return out.astype(v.dtype), largest + jnp.log(total)


def _combine(values: Array, weights: Array) -> Array:
    """[B, K, R, T, H] in float32 at least: values [B, K, S, H] summed by weights [B, K, S, R, T].

    The product is formed as [H, R * T], for which the large operand needs no transposition.
    """
    out = widened_einsum("bksh,bksrt->bkhrt", values, weights)
    return jnp.moveaxis(out, 2, -1)


def _blocks(length: int) -> list[tuple[int, int]]:
    size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    return [(begin, min(begin + size, length)) for begin in range(0, length, size)]


def _mask(begin: int, end: int, segment_ids: Array | None) -> Array:
    """[B | 1, end, end - begin]: may query begin + j see key i."""
    mask = jnp.arange(end)[None, :, None] <= jnp.arange(begin, end)[None, None, :]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :end, None] == segment_ids[:, None, begin:end])
    return mask


@jax.custom_vjp
def causal_attention(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
    """Attention to earlier tokens of the same document.

    Args:
      q: [B, K, R, T, H].
      k, v: [B, K, T, H].
      segment_ids: [B, T] int32 or None (one document).

    Returns:
      [B, K, R, T, H] in v's dtype.
    """
    return _forward(q, k, v, segment_ids)[0]


def _forward(q: Array, k: Array, v: Array, segment_ids: Array | None) -> tuple[Array, tuple]:
    parts = [
        attend(q[..., begin:end, :], k[:, :, :end], v[:, :, :end], _mask(begin, end, segment_ids))
        for begin, end in _blocks(q.shape[3])
    ]
    out = jnp.concatenate([part[0] for part in parts], axis=3)
    log_sum = jnp.concatenate([part[1] for part in parts], axis=3)
    return out, (q, k, v, segment_ids, out, log_sum)


def _add_to_first(total: Array, part: Array) -> Array:
    """`total` [B, K, T, H] with `part` [B, K, S, H] added to its first S tokens."""
    size = part.shape[2]
    if size < total.shape[2]:
        return total.at[:, :, :size].add(part)
    # The same with an index that is computed here: that of `.at` would be a constant without elements, which JAX hands
    # to per-device programs as an argument, and on such arguments XLA's CPU compiler of JAX 0.11 dies (signal 11).
    axes = jax.lax.ScatterDimensionNumbers(tuple(range(total.ndim)), (), ())
    return jax.lax.scatter_add(
        total, jnp.zeros(0, jnp.int32), part, axes, indices_are_sorted=True, unique_indices=True)


def _backward(residuals: tuple, cotangent: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, segment_ids, out, log_sum = residuals
    scale = q.shape[-1] ** -0.5
    inner = jnp.sum(widened(cotangent) * widened(out), axis=-1)  # [B, K, R, T]
    dk, dv = (jnp.zeros(x.shape, accumulator(x.dtype)) for x in (k, v))
    dq = []
    for begin, end in _blocks(q.shape[3]):
        rows = lambda x: x[:, :, :, begin:end]
        query, key, value, grad = rows(q), k[:, :, :end], v[:, :, :end], rows(cotangent)
        weights = jnp.exp(masked_logits(query, key, _mask(begin, end, segment_ids)) - rows(log_sum)[:, :, None])
        dweights = widened_einsum("bksh,bkrth->bksrt", value, grad)
        dlogits = (weights * (dweights - rows(inner)[:, :, None]) * scale).astype(q.dtype)
        dq.append(_combine(key, dlogits))
        dk = _add_to_first(dk, widened_einsum("bksrt,bkrth->bksh", dlogits, query))
        dv = _add_to_first(dv, widened_einsum("bksrt,bkrth->bksh", weights.astype(v.dtype), grad))
    return jnp.concatenate(dq, axis=3).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


causal_attention.defvjp(_forward, _backward)
