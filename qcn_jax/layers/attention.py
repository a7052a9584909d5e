"""Gated grouped-query attention with partial rotary embedding and q/k norms.

Axes: B batch, T query length, S key length, K key/value heads, R query heads per key/value head, H head dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qcn_jax.config import ModelConfig
from qcn_jax.layers.context import TokenContext
from qcn_jax.layers.dense import dense
from qcn_jax.layers.norm import RMSNorm
from qcn_jax.layers.rotary import apply_rotary

Array = jax.Array
MASKED = -1e30  # finite, so that a row without any visible key stays free of NaN
QUERY_BLOCK = 256  # queries handled together; keys after a block's end are never touched


def init_attention_cache(config: ModelConfig, batch: int, max_length: int) -> dict[str, Array]:
    """Empty keys and values [B, K, max_length, H] in the activation dtype."""
    shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
    return {name: jnp.zeros(shape, jnp.dtype(config.dtype)) for name in ("k", "v")}


def _attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Softmax attention of q [B, T, K, R, H] over k, v [B, K, S, H] where mask [B | 1, T, S]."""
    logits = jnp.einsum("btkrh,bksh->bkrts", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(mask[:, None, None], logits * q.shape[-1] ** -0.5, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bkrts,bksh->btkrh", weights, v)


def causal_attention(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
    """Attention to earlier tokens of the same document.

    Args:
      q: [B, T, K, R, H].
      k, v: [B, K, T, H].
      segment_ids: [B, T] or None (one document).

    Returns:
      [B, T, K, R, H].
    """
    length = q.shape[1]
    out = []
    for begin in range(0, length, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, length)
        mask = jnp.arange(begin, end)[None, :, None] >= jnp.arange(end)[None, None, :]
        if segment_ids is not None:
            mask &= segment_ids[:, begin:end, None] == segment_ids[:, None, :end]
        out.append(_attend(q[:, begin:end], k[:, :, :end], v[:, :, :end], mask))
    return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)


def cached_attention(
    q: Array, k: Array, v: Array, cache: dict[str, Array], context: TokenContext
) -> tuple[Array, dict[str, Array]]:
    """Appends k, v [B, K, T, H] at each sequence's length and attends to all that is then cached.

    Padding beyond `context.lengths` is not written.
    """
    batch, length = q.shape[:2]
    capacity = cache["k"].shape[2]
    query = context.start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]  # [B, T]
    slot = query if context.valid is None else jnp.where(context.valid, query, capacity)
    rows = jnp.arange(batch)[:, None]
    write = lambda old, new: old.at[rows, :, slot].set(jnp.swapaxes(new, 1, 2), mode="drop")
    cache = {"k": write(cache["k"], k), "v": write(cache["v"], v)}
    limit = context.key_limit or capacity
    mask = jnp.arange(limit, dtype=jnp.int32)[None, None] <= query[..., None]
    return _attend(q, cache["k"][:, :, :limit], cache["v"][:, :, :limit], mask), cache


class GatedAttention(nn.Module):
    """self_attn of a full-attention layer: x [B, T, D] -> [B, T, D]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, context: TokenContext, cache: Any = None) -> tuple[Array, Any]:
        cfg = self.config
        heads, kv_heads, dim = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        batch, length, _ = x.shape
        # Per head [query | gate], as in the published checkpoints.
        q = dense(cfg, heads * dim * 2, ("embed", "heads"), "q_proj")(x).reshape(batch, length, heads, 2 * dim)
        q, gate = jnp.split(q, 2, axis=-1)
        k = dense(cfg, kv_heads * dim, ("embed", "kv_heads"), "k_proj")(x).reshape(batch, length, kv_heads, dim)
        v = dense(cfg, kv_heads * dim, ("embed", "kv_heads"), "v_proj")(x).reshape(batch, length, kv_heads, dim)
        norm = lambda name: RMSNorm(cfg.rms_norm_eps, "head_dim", jnp.dtype(cfg.param_dtype), name=name)
        q = apply_rotary(norm("q_norm")(q), context.cos, context.sin)
        k = apply_rotary(norm("k_norm")(k), context.cos, context.sin)
        q = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        if cache is None:
            y = causal_attention(q, k, v, context.segment_ids)
        else:
            y, cache = cached_attention(q, k, v, cache, context)
        y = y.reshape(batch, length, heads, dim) * jax.nn.sigmoid(gate)
        out = dense(cfg, cfg.hidden_size, ("heads", "embed"), "o_proj")
        return out(y.reshape(batch, length, heads * dim)), cache
