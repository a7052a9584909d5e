"""Slots of the decoding cache: taken, put and reset by index, whatever the layout of its layers."""

from typing import Any

import jax
import jax.numpy as jnp

from qcn_jax.layers.cache import Cache

Array = jax.Array


def batch_axis(path: tuple[Any, ...]) -> int:
    """Position of the sequence axis, which the leading layer axes of a stacked entry push back."""
    names = [entry.key for entry in path]
    if names[0] == "blocks":
        return 2 if names[1] == "linear" else 1
    return 1 if names[0] == "tail" else 0


def _map(function: Any, *trees: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(batch_axis(path), *leaves), *trees)


def cache_take(cache: Cache, indices: Array) -> Cache:
    """The sequences `indices` [M] of a cache, in that order; repeating an index forks a sequence."""
    take = lambda axis, x: jnp.take(x, indices, axis=axis)
    return Cache(cache.length[indices], _map(take, cache.layers))


def states(cache: Cache) -> Cache:
    """`cache` without keys and values: what is of a sequence's last token alone."""

    def kept(layers: dict[str, Any]) -> dict[str, Any]:
        inner = {name: kept(part) if isinstance(part, dict) else part
                 for name, part in layers.items() if name not in ("k", "v")}
        return {name: part for name, part in inner.items() if not isinstance(part, dict) or part}

    return Cache(cache.length, kept(cache.layers))


def with_states(cache: Cache, update: Cache) -> Cache:
    """`cache` with what `update`, of `states`' structure, holds in place of its own."""
    merged = lambda old, new: old | {
        name: merged(old[name], part) if isinstance(part, dict) else part for name, part in new.items()}
    return Cache(update.length, merged(cache.layers, update.layers))


def cache_put(cache: Cache, indices: Array, update: Cache) -> Cache:
    """`cache` with its sequences `indices` [M] replaced by those of `update`; an index out of bounds is skipped."""

    def put(axis: int, x: Array, new: Array) -> Array:
        return x.at[(slice(None),) * axis + (indices,)].set(new, mode="drop")

    length = cache.length.at[indices].set(update.length, mode="drop")
    return Cache(length, _map(put, cache.layers, update.layers))


def clear_rows(cache: Cache, indices: Array, fresh: Array) -> Cache:
    """An unrolled model's `cache` with no keys and values in its rows indices[p] where fresh[p]; see `cache_reset`.

    One row is written after the other, in place: no more is moved than there is to clear.
    """
    chosen, count = indices[jnp.argsort(~fresh, stable=True)], jnp.sum(fresh)

    def clear(path: tuple[Any, ...], x: Array) -> Array:
        if path[-1].key not in ("k", "v"):
            return x
        empty = jnp.zeros((1, *x.shape[1:]), x.dtype)
        put = lambda p, x: jax.lax.dynamic_update_slice_in_dim(x, empty, chosen[p], axis=0)
        return jax.lax.fori_loop(0, count, put, x)

    return Cache(cache.length, jax.tree_util.tree_map_with_path(clear, cache.layers))


def cache_reset(cache: Cache, reset: Array) -> Cache:
    """`cache` with the sequences where `reset` [B] is True empty again.

    Keys and values are cleared as well: attention multiplies what lies beyond a sequence's length by zero, and zero
    times a NaN that an earlier sequence left there is NaN.
    """

    def clear(axis: int, x: Array) -> Array:
        return jnp.where(reset.reshape((1,) * axis + (-1,) + (1,) * (x.ndim - axis - 1)), jnp.zeros((), x.dtype), x)

    return Cache(jnp.where(reset, 0, cache.length), _map(clear, cache.layers))
