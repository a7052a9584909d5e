"""Losses of the experts and of their distillation, as plain functions of logits.

Axes: B rows, T positions, D model width, V vocabulary. As everywhere in the pipeline, position t predicts
tokens[t + 1], and every per-position array of a batch (weights, advantages, old log-probabilities) is aligned
with the predicting position.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qcn_jax.config import ExpertsConfig
from qcn_jax.registry import Registry

STD_FLOOR = 1e-6  # a group whose rewards agree has no advantage, not an infinite one
# exp of more is no float32 number, and infinity times the weight 0 of a token that does not count would be NaN. A token
# that counts is never as far off: it was drawn with the probability that the exponent is taken from.
EXPONENT_LIMIT = 80.0


def group_advantages(rewards: Sequence[float], groups: Sequence[int], counted: Sequence[bool]) -> np.ndarray:
    """Advantages relative to the other samples of the same prompt: (r - mean) / std (GRPO, Shao et al. 2024).

    Args:
      rewards: [n] of each episode.
      groups: [n] which prompt it answers.
      counted: [n] False for episodes that failed for reasons of infrastructure: they enter no statistics and
        get advantage 0.

    Returns:
      [n] float64. Groups of one reward get zeros.
    """
    rewards = np.asarray(rewards, np.float64)
    groups, counted = np.asarray(groups), np.asarray(counted, bool)
    advantages = np.zeros(len(rewards))
    for group in np.unique(groups):
        members = (groups == group) & counted
        if members.sum() > 1 and (spread := rewards[members].std()) > STD_FLOOR:
            advantages[members] = (rewards[members] - rewards[members].mean()) / spread
    return advantages


def token_weights(lengths: Sequence[Sequence[int]], average: str) -> list[np.ndarray]:
    """Weight of every token of each episode, such that a weighted mean over tokens is the average asked for.

    "token" gives all tokens the weight 1 (DAPO, Yu et al. 2025). "episode" is GRPO's average (Shao et al. 2024, eq. 3):
    the mean over a group's episodes of each one's mean over its tokens, and of that the mean over groups; the weight of
    a token of episode i of group g is proportional to 1 / (episodes in g * tokens of i).

    Args:
      lengths: sampled tokens of each episode, by group. Episodes and groups without any say nothing and count nowhere.
      average: "token" or "episode".

    Returns:
      [episodes] float64 for each group, 0 for episodes without tokens. The mean weight of a token is 1.
    """
    groups = [np.asarray(group, np.float64) for group in lengths]
    if average == "token":
        return [np.sign(group) for group in groups]
    tokens, filled = sum(group.sum() for group in groups), sum(group.any() for group in groups)
    inverse = lambda group: np.divide(1.0, group, out=np.zeros_like(group), where=group > 0)
    share = lambda group: inverse(group) / max(np.sign(group).sum(), 1)
    return [share(group) * tokens / max(filled, 1) for group in groups]


def log_softmax(logits: jax.Array) -> jax.Array:
    """Log-probabilities in float32, whatever the logits' dtype; [..., V]."""
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def token_statistics(
    logits: jax.Array, targets: jax.Array, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and entropy of each prediction, under softmax(logits / temperature).

    Args:
      logits: [..., V].
      targets: [...] int32.
      temperature: that the tokens were drawn at; above 0.

    Returns:
      logprobs [...] and entropy [...], float32; no gradient flows through the entropy.
    """
    scores = log_softmax(logits.astype(jnp.float32) / temperature)
    logprobs = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    still = jax.lax.stop_gradient(scores)
    return logprobs, -jnp.sum(jnp.exp(still) * still, axis=-1)


def clipped_policy_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float
) -> tuple[jax.Array, jax.Array]:
    """Per-token clipped surrogate with separate bounds (DAPO, Yu et al. 2025, eq. 8): -min(rA, clip(r)A).

    Args:
      logprobs, old_logprobs, advantages: [...] float32; the old ones as sampled.
      clip_low, clip_high: the ratio counts between 1 - clip_low and 1 + clip_high.

    Returns:
      losses [...] and whether the clip cut the gradient off [...] (bool).
    """
    ratio = jnp.exp(jnp.minimum(logprobs - old_logprobs, EXPONENT_LIMIT))
    plain = ratio * advantages
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
    return -jnp.minimum(plain, clipped), clipped < plain


def clipped(logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, config: ExpertsConfig
            ) -> tuple[jax.Array, jax.Array]:
    """`clipped_policy_loss` as an objective, with the configuration's bounds."""
    return clipped_policy_loss(logprobs, old_logprobs, advantages, config.clip_low, config.clip_high)


# (log-probabilities, old ones, advantages, all [...] float32, config.experts) -> (losses [...], clipped or not [...])
OBJECTIVES: Registry = Registry("objective", None, {"clipped": "qcn_jax.pipeline.rl.objectives:clipped"})


def kl_estimate(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """Schulman's k3 estimate of KL(policy || reference) from sampled tokens; [...], never negative."""
    difference = jnp.minimum(reference - logprobs, EXPONENT_LIMIT)
    return jnp.exp(difference) - difference - 1.0


def reverse_kl(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL(student || teacher) over the whole vocabulary, per token: [..., V] logits twice -> [...]."""
    student, teacher = log_softmax(student), log_softmax(teacher)
    return jnp.sum(jnp.exp(student) * (student - teacher), axis=-1)


def forward_kl(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL(teacher || student) over the whole vocabulary, per token: [..., V] logits twice -> [...]."""
    return reverse_kl(teacher, student)
