"""Attention to a cache as a Pallas TPU kernel that reads no more of it than each sequence holds.

A program takes queries of one sequence and one key/value head through their keys, block after block, the next block on
its way from HBM while one is worked on; softmax is online, so that no scores are kept. Decoding's single tokens and
prefill's chunks are the same program, and so are caches in blocks. On anything but a TPU it runs in Pallas'
interpreter: exact and slow.

Axes: B batch, K key/value heads, R query heads per key/value head, T queries, S keys of a row of the cache, n rows of a
sequence, H head dim; Q = T * R rows, of which those of a token lie together.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qcn_jax.layers.attention import MIN_KEYS
from qcn_jax.layers.kernels.delta_rule import on_platform

Array = jax.Array
MAX_KEYS = 512  # read at a time: 256 KiB of bfloat16 at head dim 256, long against what it takes to ask HBM for it
MAX_ROWS = 512  # of queries in one program
_LANES = 128
_MASKED = -1e30  # finite, as in layers.flash


def keys_of_a_block(size: int, rows: int = 1) -> int:
    """How many keys are read at a time from a cache of `rows` rows of `size` a sequence: several rows, or part of one.

    Raises:
      ValueError: none of the sizes divides it.
    """
    fits = [keys for keys in range(MIN_KEYS, MAX_KEYS + 1, MIN_KEYS) if size % keys == 0]
    if not fits:
        raise ValueError(f"a cache of {size} tokens a row: must be a multiple of {MIN_KEYS}")
    return size * max(1, min(MAX_KEYS // size, rows)) if size <= MAX_KEYS else fits[-1]


def cached_attention(q: Array, k: Array, v: Array, start: Array, added: Array, tables: Array) -> Array:
    """Attention of a chunk of every sequence to all that it holds, the chunk included.

    Args:
      q: [B, K, R, T, H].
      k, v: [N, K, S, H], the cache, the chunk's own keys and values already in it.
      start: [B] int32, tokens before the chunk; query t sees keys up to start + t.
      added: [B] int32, how many of the T tokens are real; no key beyond start + added is read but for its block.
      tables: [B, n] int32, the rows of the cache that each sequence fills one after the other.

    Returns:
      [B, K, R, T, H] in v's dtype; of no meaning at padding, but finite where the sequence's keys and values are.

    Raises:
      ValueError: see `keys_of_a_block`.
    """
    batch, kv_heads, repeats, length, dim = q.shape
    block = keys_of_a_block(k.shape[2], tables.shape[1])
    rows = jnp.swapaxes(q, 2, 3).reshape(batch, kv_heads, length * repeats, dim)
    size = min(MAX_ROWS, -(-rows.shape[2] // MIN_KEYS) * MIN_KEYS)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % size), (0, 0))).astype(v.dtype)
    out = on_platform(_call, size, block, repeats)(start, added, tables, rows, k, v)[:, :, : length * repeats]
    return jnp.swapaxes(out.reshape(batch, kv_heads, length, repeats, dim), 2, 3)


def _call(size: int, block: int, repeats: int, interpret: bool, start: Array, added: Array, tables: Array, rows: Array,
          k: Array, v: Array) -> Array:
    batch, kv_heads, count, dim = rows.shape
    tile = pl.BlockSpec((1, 1, size, dim), lambda b, h, n, *_: (b, h, n, 0))
    whole = pl.BlockSpec(memory_space=pl.ANY)
    kernel = functools.partial(_kernel, block=block, repeats=repeats)
    return pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct(rows.shape, v.dtype), interpret=interpret, name="cached_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3, grid=(batch, kv_heads, count // size), in_specs=[tile, whole, whole],
            out_specs=tile,
            scratch_shapes=[
                pltpu.VMEM((2, 2, block, dim), v.dtype), pltpu.SemaphoreType.DMA((2, 2)),
                *[pltpu.VMEM((size, width), jnp.float32) for width in (_LANES, _LANES, dim)]]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )(start.astype(jnp.int32), added.astype(jnp.int32), tables.astype(jnp.int32), rows, k, v)


def _kernel(start_ref, added_ref, tables_ref, q_ref, k_ref, v_ref, out_ref, buffer, arrived, largest, total, summed, *,
            block: int, repeats: int):
    b, h, n = (pl.program_id(axis) for axis in range(3))
    size, dim = q_ref.shape[2:]
    start, count = start_ref[b], tables_ref.shape[1]
    length = k_ref.shape[2]  # of a row of the cache
    piece = min(block, length)
    first_token = n * size // repeats
    # Tokens up to the last that these rows may see; at least one block is read, whose first key all may see.
    seen = start + jnp.minimum(added_ref[b], ((n + 1) * size + repeats - 1) // repeats)
    # Rows that are all padding read that block alone.
    needed = jnp.where(first_token < added_ref[b], jnp.maximum(1, (seen + block - 1) // block), 1)
    needed = jnp.minimum(needed, -(-length * count // block))

    def copies(i):
        slot = jax.lax.rem(i, 2)
        made = []
        for at in range(0, block, piece):
            first = i * block + at
            row = tables_ref[b, jnp.minimum(first // length, count - 1)]  # what lies behind the last is masked
            made += [pltpu.make_async_copy(ref.at[row, h, pl.ds(first % length, piece)],
                                           buffer.at[which, slot, pl.ds(at, piece)], arrived.at[which, slot])
                     for which, ref in enumerate((k_ref, v_ref))]
        return made

    def begin(i):
        for copy in copies(i):
            copy.start()

    begin(0)
    largest[...] = jnp.full_like(largest, _MASKED)
    total[...] = jnp.zeros_like(total)
    summed[...] = jnp.zeros_like(summed)
    precision = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
    dot = functools.partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    def step(i, _):
        @pl.when(i + 1 < needed)
        def _():
            begin(i + 1)

        for copy in copies(i):
            copy.wait()
        slot = jax.lax.rem(i, 2)

        @pl.when(i + 1 == needed)  # behind the sequence's tokens may be another's, and zero times NaN is NaN
        def _():
            key = jax.lax.broadcasted_iota(jnp.int32, buffer.shape[2:], 0)
            held = i * block + key < start + added_ref[b]
            buffer[1, slot] = jnp.where(held, buffer[1, slot].astype(jnp.float32), 0.0).astype(buffer.dtype)

        k, v = buffer[0, slot], buffer[1, slot]
        scores = dot(q_ref[0, 0], k, (((1,), (1,)), ((), ()))) * dim**-0.5
        row, key = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
        last = jnp.minimum(start + (n * size + row) // repeats, start + added_ref[b] - 1)
        visible = i * block + key <= last
        scores = jnp.where(visible, scores, _MASKED)
        before = largest[:, :1]
        now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights, kept = jnp.exp(scores - now), jnp.exp(before - now)
        largest[...] = jnp.broadcast_to(now, largest.shape)
        total[...] = total[...] * kept + jnp.sum(weights, axis=1, keepdims=True)
        summed[...] = summed[...] * kept + dot(weights.astype(v.dtype), v, (((1,), (0,)), ((), ())))
        return 0

    jax.lax.fori_loop(0, needed, step, 0)
    out_ref[0, 0] = (summed[...] / total[:, :1]).astype(out_ref.dtype)
