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
      routes: [..., N, k] int32, which experts the router chose for each token, whatever was replayed; None unless asked
        for. No sum: of one batch alone.
    """

    counts: Array
    probabilities: Array
    tokens: Array
    dropped: Array | float = 0.0
    routes: Array | None = None


class Router(nn.Module):
    """gate of a sparse block: chooses experts for each of N tokens."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, valid: Array | None, routes: Array | None = None, with_routes: bool = False
                 ) -> tuple[Array, Array, RouterStatistics]:
        """Routes x [N, D] or [B, T, D]; N below stands for all leading axes.

        Args:
          x: the tokens.
          valid: [N], False for padding.
          routes: [N, k] int32, the experts to go to in place of the most probable ones, weighted by the probabilities
            that this router gives them, so that it learns (routing replay, arXiv 2510.11370); a token whose first is
            negative chooses freely.
          with_routes: whether the statistics are to hold the choice.

        Returns:
          weights [N, k], experts [N, k] int32, and the statistics over tokens with `valid` [N].
        """
        cfg = self.config
        init = nn.with_logical_partitioning(normal_init(cfg), ("embed", "router"))
        kernel = self.param("kernel", init, (x.shape[-1], cfg.num_experts), jnp.dtype(cfg.param_dtype))
        x = widened(x)
        logits = x @ kernel.astype(x.dtype)
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, cfg.num_experts_per_tok)
        experts = chosen
        if routes is not None:
            experts = jnp.where(routes[..., :1] >= 0, routes, chosen)
            weights = jnp.take_along_axis(probabilities, experts, axis=-1)
        if cfg.norm_topk_prob:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        real = jnp.ones(x.shape[:-1], x.dtype) if valid is None else valid.astype(x.dtype)
        counts = jnp.sum(jax.nn.one_hot(experts, cfg.num_experts, dtype=x.dtype), axis=-2)
        summed = lambda values: jnp.tensordot(real, values, axes=real.ndim)
        statistics = RouterStatistics(
            jax.lax.stop_gradient(summed(counts)), summed(probabilities), jnp.sum(real), jnp.zeros((), x.dtype),
            chosen if with_routes else None,
        )
        return weights, experts, statistics
