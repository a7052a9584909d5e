"""Attention to a cache by the TPU kernel, in Pallas' interpreter, against plain attention with a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.layers.flash import attend
from qcn_jax.layers.kernels.cached_attention import cached_attention, keys_of_a_block


@pytest.mark.parametrize("repeats, tokens, capacity, dim", [(8, 1, 192, 32), (4, 5, 64, 32), (2, 300, 1024, 16)],
                         ids=["decoding", "a piece", "a chunk of several blocks of queries and keys"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 4])
def test_equals_plain_attention(repeats, tokens, capacity, dim, dtype, rows):
    """Sequences of one row of the cache, or of four that lie anywhere in it."""
    batch, kv_heads, held = 3, 2, np.array([4, 0, 3], np.int32)
    rng = np.random.default_rng(tokens)
    array = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    q, k, v = array(batch, kv_heads, repeats, tokens, dim), *(array(5, kv_heads, capacity, dim) for _ in "kv")
    added = np.array([tokens, tokens // 2, tokens], np.int32)
    start = np.array([capacity - tokens, 7, 0], np.int32)
    # What lies in blocks that a sequence does not reach is not even read.
    block = keys_of_a_block(capacity // rows, rows)
    ends = -(-np.maximum(start + added, 1) // block) * block
    for row in range(5):
        end = ends[held.tolist().index(row)] if row in held else 0
        unread = (np.arange(capacity) >= end)[:, None]
        k, v = (x.at[row].set(jnp.where(unread, jnp.nan, x[row])) for x in (k, v))
    places = rng.permutation(5 * rows).reshape(5, rows)
    cut = lambda x: jnp.zeros((5 * rows, kv_heads, capacity // rows, dim), dtype).at[places].set(
        jnp.moveaxis(x.reshape(5, kv_heads, rows, -1, dim), 1, 2))
    found = jax.jit(cached_attention)(q, cut(k), cut(v), start, added, places[held])
    assert found.dtype == v.dtype and bool(jnp.isfinite(found).all())
    exact = lambda x: jnp.asarray(jnp.nan_to_num(x), jnp.float32)
    mask = np.arange(capacity)[None, :, None] <= (start[:, None] + np.arange(tokens))[:, None]
    expected = attend(exact(q), exact(k)[held], exact(v)[held], jnp.asarray(mask))[0]
    for row, real in enumerate(added):
        ours, theirs = (np.asarray(x[row, :, :, :real], np.float64) for x in (found, expected))
        # bfloat16 rounds weights and the result: each to 2^-9 of what it is.
        assert np.abs(ours - theirs).max(initial=0) < (2e-6 if dtype == "float32" else 2e-2)


def test_a_cache_of_no_whole_blocks_is_refused():
    with pytest.raises(ValueError, match="a cache of 100 tokens a row: must be a multiple of 16"):
        keys_of_a_block(100)
