"""The decoding cache: one pytree for all layers.

Layer entries follow the parameter tree: {"blocks": {"linear", "full"}, "tail"} stacked over layers, or, for an
unrolled model, {"blocks_0": {"linear_0", ..., "full"}, ..., "tail_0", ...} without leading axes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qcn_jax.config import ModelConfig
from qcn_jax.layers.attention import init_attention_cache
from qcn_jax.layers.gated_delta_net import init_delta_net_cache

Array = jax.Array


@struct.dataclass
class Cache:
    """State of B sequences.

    Attributes:
      length: [B] int32, tokens held by each sequence.
      layers: per layer keys and values [..., N, K, size, H], or every sequence's window and recurrent state.
    """

    length: Array
    layers: Any


def init_cache(config: ModelConfig, batch: int, size: int, unrolled: bool = False, rows: int | None = None) -> Cache:
    """An empty cache for `batch` sequences.

    Args:
      config: the model's.
      batch: B.
      size: tokens of a row of keys and values.
      unrolled: of a model whose layers stand apart.
      rows: N, of keys and values, which `TokenContext.tables` deals out; None is one for each sequence.
    """
    interval = config.full_attention_interval
    blocks, rest = divmod(config.num_hidden_layers, interval)
    linear = init_delta_net_cache(config, batch)
    full = init_attention_cache(config, batch if rows is None else rows, size)
    # A fresh array for every layer: shared ones could not be donated.
    copies = lambda tree, *leading: jax.tree.map(lambda x: jnp.zeros((*leading, *x.shape), x.dtype), tree)
    layers: dict[str, Any] = {}
    if unrolled:
        for block in range(blocks):
            layers[f"blocks_{block}"] = {f"linear_{i}": copies(linear) for i in range(interval - 1)}
            layers[f"blocks_{block}"]["full"] = copies(full)
        layers |= {f"tail_{i}": copies(linear) for i in range(rest)}
    else:
        if blocks:
            layers["blocks"] = {"full": copies(full, blocks)}
            if interval > 1:
                layers["blocks"]["linear"] = copies(linear, blocks, interval - 1)
        if rest:
            layers["tail"] = copies(linear, rest)
    return Cache(jnp.zeros(batch, jnp.int32), layers)
