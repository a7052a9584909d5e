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
MIN_KEYS = 16  # that kernels.cached_attention reads at a time


def init_attention_cache(config: ModelConfig, rows: int, size: int) -> dict[str, Array]:
    """Empty keys and values [rows, K, size, H] in the activation dtype; a sequence has one row, or several."""
    shape = (rows, config.num_key_value_heads, size, config.head_dim)
    return {name: jnp.zeros(shape, jnp.dtype(config.dtype)) for name in ("k", "v")}


def cached_attention(
    q: Array, k: Array, v: Array, cache: dict[str, Array], context: TokenContext, form: str = "xla"
) -> tuple[Array, dict[str, Array]]:
    """Appends k, v [B, K, T, H] at each sequence's length; q [B, K, R, T, H] attends to all that is then cached.

    `form` is xla, which reads the first `context.key_limit` tokens of every sequence, or splash, of which a TPU kernel
    reads what each sequence holds where it can read a cache of this size in blocks. Padding beyond `context.lengths`
    is not written. What a sequence gets that outgrows the cache, or the part of it that is read, is NaN. Whatever the
    cache holds behind a sequence's tokens has no effect, be it NaN. The cache may have other sequences besides, and one
    may have several rows of it, see `context.tables`; it is written in place.

    Raises:
      ValueError: T is more than the cache holds.
    """
    batch, length = q.shape[0], q.shape[3]
    size = cache["k"].shape[2]
    tables = jnp.arange(batch, dtype=jnp.int32)[:, None] if context.tables is None else context.tables
    capacity = size * tables.shape[1]
    if length > capacity:
        raise ValueError(f"{length} tokens for a cache of {capacity} a sequence")
    query = context.start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]  # [B, T]
    slot = query if context.valid is None else jnp.where(context.valid, query, capacity)
    row = jnp.take_along_axis(tables, jnp.minimum(slot // size, tables.shape[1] - 1), axis=1)
    row = jnp.where(slot < capacity, row, len(cache["k"]))  # [B, T]
    # Row by row of H: the order of the cache in memory is then the one that the kernel reads.
    place = row[:, None], jnp.arange(k.shape[1])[None, :, None], (slot % size)[:, None]
    write = lambda old, new: old.at[place].set(new, mode="drop")
    cache = {"k": write(cache["k"], k), "v": write(cache["v"], v)}
    limit = context.key_limit or capacity
    added = jnp.full(batch, length, jnp.int32) if context.lengths is None else context.lengths
    if form == "splash" and can_read(size):
        from qcn_jax.layers.kernels.cached_attention import cached_attention as by_kernel

        y = by_kernel(q, cache["k"], cache["v"], context.start, added, jnp.minimum(tables, len(cache["k"]) - 1))
    else:
        key = jnp.arange(limit, dtype=jnp.int32)[None]
        held = key < (context.start + added)[:, None]  # [B, S]
        mask = (key[:, :, None] <= query[:, None]) & held[:, :, None]
        value = jnp.where(held[:, None, :, None], _first(cache["v"], limit, context.tables), 0)  # 0 times NaN is NaN
        y = attend(q, _first(cache["k"], limit, context.tables), value, mask)[0]
    outgrown = (context.start + added > limit) & (added > 0)
    return jnp.where(outgrown[:, None, None, None, None], jnp.nan, y), cache


def _first(cached: Array, limit: int, tables: Array | None) -> Array:
    """The first `limit` keys or values [B, K, limit, H] of every sequence, of rows [N, K, size, H]."""
    size = cached.shape[2]
    if tables is None:
        return cached[:, :, :limit]
    if limit <= size:
        return cached.at[tables[:, 0], :, :limit].get(mode="clip")
    found = cached.at[tables[:, : -(-limit // size)]].get(mode="clip")  # [B, n, K, size, H]
    return jnp.swapaxes(found, 1, 2).reshape(len(tables), cached.shape[1], -1, cached.shape[3])[:, :, :limit]


def can_read(size: int) -> bool:
    """Whether the kernel can read caches of `size` tokens a row."""
    return size % MIN_KEYS == 0


def _cached_by_part(
    q: Array, k: Array, v: Array, cache: dict[str, Array], context: TokenContext, form: str
) -> tuple[Array, dict[str, Array]]:
    """`cached_attention` of every device's own sequences; the compiler would not see that they do not mix."""
    parallel = context.parallel
    if parallel is None:
        return cached_attention(q, k, v, cache, context, form)

    def local(q: Array, k: Array, v: Array, cache: dict[str, Array], start: Array, *rest: Array | None) -> Any:
        own = context.replace(start=start, lengths=rest[0], valid=rest[1], tables=rest[2], parallel=None)
        return cached_attention(q, k, v, cache, own, form)

    rows = parallel.spec("activation_batch")
    run = parallel.per_device(local, rows, rows)
    return run(q, k, v, cache, context.start, context.lengths, context.valid, context.tables)


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
