"""Embedding lookup whose table is split by columns over the devices that hold different tokens.

Token ids are small and the table is not: ids are gathered, every device looks up its own columns of all tokens, and an
all-to-all trades columns for tokens. The table is never gathered, nor is its gradient reduced anywhere but in place.
"""

import jax
import jax.numpy as jnp

from qcn_jax.sharding.parallel import Parallel

Array = jax.Array


def sharded_lookup(table: Array, tokens: Array, parallel: Parallel) -> Array:
    """table [V, D] and tokens [B, T] int32 -> [B, T, D], laid out as parameters, batches and activations are.

    Raises:
      UserError: a dimension that does not divide by the devices it is split over.
    """
    batch = ("activation_batch", "activation_length")
    parallel.check(tokens.shape, *batch)
    columns = parallel.axes("embed")
    rows = tuple(axis for axis in columns if axis in parallel.axes("activation_batch"))
    length = tuple(axis for axis in columns if axis in parallel.axes("activation_length"))
    if columns != rows + length:  # rules of another kind: left to the compiler
        return parallel.constrain_tokens(jnp.take(table, tokens, axis=0))
    vocabulary = parallel.axes("vocab")

    def local(table: Array, tokens: Array) -> Array:
        for axes, dim in ((rows, 0), (length, 1)):
            if axes:
                tokens = jax.lax.all_gather(tokens, axes, axis=dim, tiled=True)
        if vocabulary:
            first = jax.lax.axis_index(vocabulary) * table.shape[0]
            mine = (tokens >= first) & (tokens < first + table.shape[0])
            x = jnp.where(mine[..., None], table[jnp.where(mine, tokens - first, 0)], 0)
            x = jax.lax.psum(x, vocabulary)
        else:
            x = jnp.take(table, tokens, axis=0)
        # Columns are split over rows' axes first, so those of length lie next to each other.
        for axes, dim in ((length, 1), (rows, 0)):
            if axes:
                x = jax.lax.all_to_all(x, axes, dim, 2, tiled=True)
        return x

    specs = (parallel.spec("vocab", "embed"), parallel.spec(*batch))
    return parallel.per_device(local, specs, parallel.spec(*batch, None))(table, tokens)
