"""Gated grouped-query attention with partial rotary embedding and q/k norms.

Axes as in layers.flash.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qcn_jax.config import ModelConfig
from qcn_jax.layers.context import TokenContext
from qcn_jax.layers.dense import dense
from qcn_jax.layers.flash import attend
from qcn_jax.layers.norm import RMSNorm
from qcn_jax.layers.rotary import apply_rotary
from qcn_jax.layers.sharded import sharded_attention

Array = jax.Array
MIN_KEYS = 16  # of a block that kernels.cached_attention reads


def init_attention_cache(config: ModelConfig, batch: int, max_length: int) -> dict[str, Array]:
    """Empty keys and values [B, K, max_length, H] in the activation dtype."""
    shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
    return {name: jnp.zeros(shape, jnp.dtype(config.dtype)) for name in ("k", "v")}


def cached_attention(
    q: Array, k: Array, v: Array, cache: dict[str, Array], context: TokenContext, form: str = "xla"
) -> tuple[Array, dict[str, Array]]:
    """Appends k, v [B, K, T, H] at each sequence's length; q [B, K, R, T, H] attends to all that is then cached.

    `form` is xla, which reads the first `context.key_limit` tokens of every sequence, or splash, of which a TPU kernel
    reads what each sequence holds where it can read a cache of this size in blocks. Padding beyond `context.lengths`
    is not written. What a sequence gets that outgrows the cache, or the part of it that is read, is NaN. The cache may
    have other sequences besides, see `context.rows`; it is written in place.

    Raises:
      ValueError: T is more than the cache holds.
    """
    batch, length = q.shape[0], q.shape[3]
    capacity = cache["k"].shape[2]
    if length > capacity:
        raise ValueError(f"{length} tokens for a cache of {capacity} a sequence")
    query = context.start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]  # [B, T]
    slot = query if context.valid is None else jnp.where(context.valid, query, capacity)
    rows = jnp.arange(batch, dtype=jnp.int32) if context.rows is None else context.rows
    # Row by row of H: the order of the cache in memory is then the one that the kernel reads.
    place = rows[:, None, None], jnp.arange(k.shape[1])[None, :, None], slot[:, None]
    write = lambda old, new: old.at[place].set(new, mode="drop")
    cache = {"k": write(cache["k"], k), "v": write(cache["v"], v)}
    limit = context.key_limit or capacity
    added = jnp.full(batch, length, jnp.int32) if context.lengths is None else context.lengths
    if form == "splash" and can_read(capacity):
        from qcn_jax.layers.kernels.cached_attention import cached_attention as by_kernel

        y = by_kernel(q, cache["k"], cache["v"], context.start, added, jnp.minimum(rows, len(cache["k"]) - 1))
    else:
        mask = jnp.arange(limit, dtype=jnp.int32)[None, :, None] <= query[:, None]  # [B, S, T]
        read = lambda x: x[:, :, :limit] if context.rows is None else x.at[rows, :, :limit].get(mode="clip")
        y = attend(q, read(cache["k"]), read(cache["v"]), mask)[0]
    outgrown = (context.start + added > limit) & (added > 0)
    return jnp.where(outgrown[:, None, None, None, None], jnp.nan, y), cache


def can_read(capacity: int) -> bool:
    """Whether the kernel can read caches of `capacity` tokens a sequence."""
    return capacity % MIN_KEYS == 0


def _cached_by_part(
    q: Array, k: Array, v: Array, cache: dict[str, Array], context: TokenContext, form: str
) -> tuple[Array, dict[str, Array]]:
    """`cached_attention` of every device's own sequences; the compiler would not see that they do not mix."""
    parallel = context.parallel
    if parallel is None:
        return cached_attention(q, k, v, cache, context, form)

    def local(q: Array, k: Array, v: Array, cache: dict[str, Array], start: Array, *rest: Array | None) -> Any:
        own = context.replace(start=start, lengths=rest[0], valid=rest[1], rows=rest[2], parallel=None)
        return cached_attention(q, k, v, cache, own, form)

    rows = parallel.spec("activation_batch")
    run = parallel.per_device(local, rows, rows)
    return run(q, k, v, cache, context.start, context.lengths, context.valid, context.rows)


class GatedAttention(nn.Module):
    """self_attn of a full-attention layer: x [B, T, D] -> [B, T, D]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, context: TokenContext, cache: Any = None) -> tuple[Array, Any]:
        cfg = self.config
        heads, kv_heads, dim = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        batch, length, _ = x.shape
        project = functools.partial(dense, cfg, parallel=context.whole_parallel)
        # Per head [query | gate], as in the published checkpoints.
        q = project(heads * dim * 2, ("embed", "heads"), "q_proj")(x).reshape(batch, length, heads, 2 * dim)
        q, gate = jnp.split(q, 2, axis=-1)
        k = project(kv_heads * dim, ("embed", "kv_heads"), "k_proj")(x).reshape(batch, length, kv_heads, dim)
        v = project(kv_heads * dim, ("embed", "kv_heads"), "v_proj")(x).reshape(batch, length, kv_heads, dim)
        norm = lambda name: RMSNorm(cfg.rms_norm_eps, "head_dim", jnp.dtype(cfg.param_dtype), name=name)
        q = apply_rotary(norm("q_norm")(q), context.cos, context.sin)
        k = apply_rotary(norm("k_norm")(k), context.cos, context.sin)
        if cache is None:
            y = sharded_attention(q, k, v, context.segment_ids, context.parallel, cfg.attention)
        else:
            q = jnp.moveaxis(q.reshape(batch, length, kv_heads, heads // kv_heads, dim), 1, 3)
            y, cache = _cached_by_part(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), cache, context,
                                       cfg.attention)
            y = jnp.moveaxis(y, 3, 1).reshape(batch, length, heads, dim)
        y = y * jax.nn.sigmoid(gate)
        out = project(cfg.hidden_size, ("heads", "embed"), "o_proj")
        return out(y.reshape(batch, length, heads * dim)), cache
