"""What every layer must know about the tokens it is given, computed once per forward pass."""

import jax
import jax.numpy as jnp
from flax import struct

from qcn_jax.sharding.parallel import Parallel

Array = jax.Array


@struct.dataclass
class TokenContext:
    """Positions, documents and cache bookkeeping of a [B, T] batch.

    Attributes:
      cos, sin: [B, T, rotary_dim / 2] float32, the rotary angles of each token.
      segment_ids: [B, T] int32 or None, `document_ids`: no two documents of a row share one; 0 is padding.
      valid: [B, T] bool or None (all real); False marks padding.
      start: [B] int32 or None; with a cache, how many tokens each sequence held before this call.
      lengths: [B] int32 or None; with a cache, how many of the T tokens are real.
      key_limit: with a cache, attention reads its first `key_limit` slots only (None: all).
      parallel: the devices over which the batch is spread; None is one device.
      with_routes: whether router statistics hold which experts each router chose.
      tables: [B, n] int32 or None; with a cache, the rows of its keys and values that each sequence fills one after the
        other (None: each has one, its own). A number beyond all rows is none.
    """

    cos: Array
    sin: Array
    segment_ids: Array | None = None
    valid: Array | None = None
    start: Array | None = None
    lengths: Array | None = None
    key_limit: int | None = struct.field(pytree_node=False, default=None)
    parallel: Parallel | None = struct.field(pytree_node=False, default=None)
    with_routes: bool = struct.field(pytree_node=False, default=False)
    tables: Array | None = None

    @property
    def whole_parallel(self) -> Parallel | None:
        """`parallel` of whole sequences; None with a cache, because decoding is left to the compiler."""
        return self.parallel if self.start is None else None


def document_ids(segment_ids: Array) -> Array:
    """Numbers the documents of each row from 1: [B, T] int32, 0 where segment_ids [B, T] are, which is padding.

    Every change of id starts a document; an id that comes again after another one is not the same document.
    """
    changed = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jnp.where(segment_ids == 0, 0, jnp.cumsum(changed, axis=1, dtype=jnp.int32))


def segment_positions(segment_ids: Array) -> Array:
    """Position of each token within its document: [B, T] int32, 0 at every change of id."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    changed = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(changed, index, 0), axis=1)
