"""Top-k softmax router in float32 at least, and the statistics that balance losses need."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from qcn_jax.config import ModelConfig
from qcn_jax.layers.dense import normal_init
from qcn_jax.layers.products import widened

Array = jax.Array


@struct.dataclass
class RouterStatistics:
    """Sums over the real tokens of a batch, per layer (leading axes) and expert.

    In float32, or float64 where the model is. Sums, not means: those of several batches, layers or devices may be added
    before a loss is formed.

    Attributes:
      counts: [..., E], assignments of tokens to each expert (top-k of them per token); no gradient.
      probabilities: [..., E], summed router probabilities.
      tokens: [...], number of tokens.
      dropped: [...], assignments that found no room on the way to their expert (see moe.dispatch).
    """

    counts: Array
    probabilities: Array
    tokens: Array
    dropped: Array | float = 0.0


class Router(nn.Module):
    """gate of a sparse block: chooses experts for each of N tokens."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, valid: Array | None) -> tuple[Array, Array, RouterStatistics]:
        """Routes x [N, D] or [B, T, D]; N below stands for all leading axes.

        Returns:
          weights [N, k], experts [N, k] int32, and the statistics over tokens with `valid` [N].
        """
        cfg = self.config
        init = nn.with_logical_partitioning(normal_init(cfg), ("embed", "router"))
        kernel = self.param("kernel", init, (x.shape[-1], cfg.num_experts), jnp.dtype(cfg.param_dtype))
        x = widened(x)
        logits = x @ kernel.astype(x.dtype)
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, experts = jax.lax.top_k(probabilities, cfg.num_experts_per_tok)
        if cfg.norm_topk_prob:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        real = jnp.ones(x.shape[:-1], x.dtype) if valid is None else valid.astype(x.dtype)
        chosen = jnp.sum(jax.nn.one_hot(experts, cfg.num_experts, dtype=x.dtype), axis=-2)
        summed = lambda values: jnp.tensordot(real, values, axes=real.ndim)
        statistics = RouterStatistics(
            jax.lax.stop_gradient(summed(chosen)), summed(probabilities), jnp.sum(real), jnp.zeros((), x.dtype)
        )
        return weights, experts, statistics
