"""States and blocks of the decoding cache: taken, put and reset by index, whatever the layout of its layers."""

from typing import Any

import jax
import jax.numpy as jnp

from qcn_jax.layers.cache import Cache

Array = jax.Array


def batch_axis(path: tuple[Any, ...]) -> int:
    """Position of the axis of sequences or blocks, which the leading layer axes of a stacked entry push back."""
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


def cache_reset(cache: Cache, reset: Array) -> Cache:
    """`cache` with the sequences where `reset` [B] is True empty again."""

    def clear(axis: int, x: Array) -> Array:
        return jnp.where(reset.reshape((1,) * axis + (-1,) + (1,) * (x.ndim - axis - 1)), jnp.zeros((), x.dtype), x)

    return Cache(jnp.where(reset, 0, cache.length), _map(clear, cache.layers))


def _with_blocks(cache: Cache, change: Any) -> Cache:
    """`cache` with change(axis of blocks, leaf) in place of every leaf of keys and values."""
    of = lambda path, x: change(batch_axis(path), x) if path[-1].key in ("k", "v") else x
    return Cache(cache.length, jax.tree_util.tree_map_with_path(of, cache.layers))


def copy_blocks(cache: Cache, source: Array, target: Array) -> Cache:
    """`cache` with keys and values of blocks source[m] in blocks target[m] too; a target out of bounds is skipped."""

    def copy(axis: int, x: Array) -> Array:
        return x.at[(slice(None),) * axis + (target,)].set(jnp.take(x, source, axis=axis, mode="clip"), mode="drop")

    return _with_blocks(cache, copy)


def read_blocks(cache: Cache, indices: Array) -> Array:
    """Keys and values [M, all layers, K, size, H] of blocks; `write_blocks` takes them."""
    found: list[Array] = []

    def read(axis: int, x: Array) -> Array:
        taken = jnp.moveaxis(jnp.take(x, indices, axis=axis, mode="clip"), axis, 0)
        found.append(taken.reshape(len(indices), -1, *taken.shape[-3:]))
        return x

    _with_blocks(cache, read)
    return jnp.concatenate(found, axis=1)


def write_blocks(cache: Cache, indices: Array, data: Array) -> Cache:
    """`cache` with what `read_blocks` read in blocks `indices` [M]; an index out of bounds is skipped."""
    begun = 0

    def write(axis: int, x: Array) -> Array:
        nonlocal begun
        shape = x.shape[:axis] + x.shape[axis + 1 :]
        count = x.size // x.shape[axis] // (x.shape[-3] * x.shape[-2] * x.shape[-1])
        new = data[:, begun : begun + count].reshape(len(indices), *shape)
        begun += count
        return x.at[(slice(None),) * axis + (indices,)].set(jnp.moveaxis(new, 0, axis), mode="drop")

    return _with_blocks(cache, write)
