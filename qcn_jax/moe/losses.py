"""Router balance loss, pooled over layers and the global batch."""

import jax
import jax.numpy as jnp

from qcn_jax.moe.router import RouterStatistics

Array = jax.Array


def balance_loss(statistics: RouterStatistics, whole: RouterStatistics | None = None) -> Array:
    """E * sum_e f_e P_e with f_e, P_e over all tokens of all layers: scalar float32, top-k when balanced.

    The published loss (Hugging Face's load_balancing_loss_func) pools layers before the product; a mean of
    per-layer losses is another number. So is a mean of the losses of parts of a batch: f_e P_e of a small batch forces
    every domain to use all experts, that of the global batch does not (Qiu et al. 2025, arXiv 2501.11873).

    Args:
      statistics: of a batch, or of a part of one.
      whole: sums over the batch that `statistics` is a part of. Given, the result is the part's share, and the shares
        of all parts add up to the batch's loss, as do their gradients: f_e has none, and P_e is a sum over tokens.
    """
    whole = statistics if whole is None else whole
    experts = statistics.counts.shape[-1]
    pooled = lambda x: jnp.sum(x.reshape(-1, experts), axis=0)
    total = jnp.maximum(jnp.sum(whole.tokens), 1.0)
    return experts * jnp.sum(pooled(whole.counts) / total * pooled(statistics.probabilities) / total)


def max_violation(statistics: RouterStatistics) -> Array:
    """Largest load of an expert relative to the mean, minus one, per layer: [...] float32; 0 is balanced."""
    mean = jnp.mean(statistics.counts, axis=-1)
    return jnp.max(statistics.counts, axis=-1) / jnp.maximum(mean, 1.0) - 1.0


def overflow(statistics: RouterStatistics) -> Array:
    """Share of all assignments that dispatch dropped, over all layers: scalar float32; 0 unless tokens were lost."""
    return jnp.sum(statistics.dropped) / jnp.maximum(jnp.sum(statistics.counts), 1.0)
