"""Causal attention by JAX's splash attention kernels, behind layers.flash.causal_attention's signature.

Key/value heads are shared by their query heads inside the kernel, blocks above the diagonal are never read, and what
is kept for the backward pass is the output and one log-sum-exp per row. On anything but a TPU the kernels run in
Pallas' interpreter: exact and slow.

Axes as in layers.flash: B batch, K key/value heads, R query heads per key/value head, T tokens, H head dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

Array = jax.Array
MAX_BLOCK = 512  # queries and keys handled together: what fits VMEM at head dim 256 on every generation
_LANES = 128


class CausalMask(masks.CausalMask):
    """JAX's causal mask, which computes no block off the diagonal.

    Splash looks at every block of a mask several times as it traces: a million blocks at 262,144 tokens, which took
    minutes.
    """

    def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (range(*part.indices(size)) for part, size in zip(idx, self.shape, strict=True))
        if rows and columns and (rows[-1] < columns[0] or rows[0] >= columns[-1]):
            return _filled((len(rows), len(columns)), rows[0] >= columns[-1])
        return super().__getitem__(idx)


@functools.cache
def _filled(shape: tuple[int, int], value: bool) -> np.ndarray:
    array = np.full(shape, value)
    array.flags.writeable = False
    return array


def causal_attention(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
    """Attention to earlier tokens of the same document.

    Args:
      q: [B, K, R, T, H].
      k, v: [B, K, T, H].
      segment_ids: [B, T] int32 or None (one document).

    Returns:
      [B, K, R, T, H] in v's dtype.
    """
    batch, kv_heads, repeats, length, dim = q.shape
    block = min(MAX_BLOCK, -(-length // _LANES) * _LANES)
    padding = -length % block
    # Tokens that pad the end are later than every real one, so that none attends to them.
    pad = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, padding), (0, 0)])
    q = (q.astype(jnp.float32) * dim**-0.5).astype(v.dtype)
    ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, padding)), mode="edge")
    run = lambda interpret: functools.partial(_attend, block=block, interpret=interpret)
    arrays = (pad(q.reshape(batch, kv_heads * repeats, length, dim)), pad(k), pad(v), ids)
    out = jax.lax.platform_dependent(*arrays, tpu=run(False), default=run(True))
    return out[:, :, :length].reshape(batch, kv_heads, repeats, length, dim).astype(v.dtype)


def _attend(q: Array, k: Array, v: Array, segment_ids: Array | None, *, block: int, interpret: bool) -> Array:
    """q [B, K * R, T, H] already scaled, k, v [B, K, T, H] -> [B, K * R, T, H]; T a multiple of the block."""
    heads, length = q.shape[1:3]
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block)
    mask = masks.MultiHeadMask([CausalMask((length, length))] * heads)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    if segment_ids is None:
        return jax.vmap(kernel)(q, k, v)
    return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, splash.SegmentIds(ids, ids)))(q, k, v, segment_ids)
