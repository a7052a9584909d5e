"""Losses of the experts and of their distillation, as plain functions of logits.

Axes: B rows, T positions, D model width, V vocabulary. As everywhere in the pipeline, position t predicts
tokens[t + 1], and every per-position array of a batch (weights, advantages, old log-probabilities) is aligned
with the predicting position.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qcn_jax.config import ExpertsConfig
from qcn_jax.registry import Registry

STD_FLOOR = 1e-6  # a group whose rewards agree has no advantage, not an infinite one
# exp of more is no float32 number, and infinity times the weight 0 of a token that does not count would be NaN. A token
# that counts is never as far off: it was drawn with the probability that the exponent is taken from.
EXPONENT_LIMIT = 80.0


def group_advantages(rewards: Sequence[float], groups: Sequence[int], counted: Sequence[bool], baseline: str = "mean",
                     scale: str = "std") -> np.ndarray:
    """Advantages relative to the other samples of the same prompt; (r - mean) / std by default (Shao et al. 2024).

    Args:
      rewards: [n] of each episode.
      groups: [n] which prompt it answers.
      counted: [n] False for episodes that failed for reasons of infrastructure: they enter no statistics and
        get advantage 0.
      baseline: "mean" of the group, or "leave_one_out", of the other samples (Ahmadian et al. 2024, RLOO), which a
        sample's own reward does not move.
      scale: divided by the group's "std", or "none" (Liu et al. 2025, Dr. GRPO): a prompt that is almost always solved
        then weighs no more than others.

    Returns:
      [n] float64. Groups of one reward get zeros.
    """
    rewards = np.asarray(rewards, np.float64)
    groups, counted = np.asarray(groups), np.asarray(counted, bool)
    advantages = np.zeros(len(rewards))
    for group in np.unique(groups):
        members = (groups == group) & counted
        count = members.sum()
        if count > 1 and (spread := rewards[members].std()) > STD_FLOOR:
            apart = rewards[members] - rewards[members].mean()
            apart *= count / (count - 1) if baseline == "leave_one_out" else 1.0
            advantages[members] = apart / spread if scale == "std" else apart
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


@struct.dataclass
class PolicyTokens:
    """What an objective is told of B rows of T positions.

    Attributes:
      logprobs: [B, T] float32, of the tokens under the policy that is moved.
      old_logprobs: [B, T] float32, under the one that drew them.
      advantages: [B, T] float32.
      counted: [B, T] bool, which positions predict a token that the policy drew and that is learned from.
      episodes: [B, T] int32, which episode of its row a position is of; 0 is padding.
      proximal: [B, T] float32, under the policy before the update; None where no objective asks for it.
    """

    logprobs: jax.Array
    old_logprobs: jax.Array
    advantages: jax.Array
    counted: jax.Array
    episodes: jax.Array
    proximal: jax.Array | None = None

    @property
    def ratio(self) -> jax.Array:
        """[B, T], the new policy's probability over the old one's, bounded to what float32 holds."""
        return jnp.exp(jnp.minimum(self.logprobs - self.old_logprobs, EXPONENT_LIMIT))

    def episode_mean(self, values: jax.Array) -> jax.Array:
        """Of values [B, T], at every position the mean over its episode's counted positions."""
        most = self.episodes.shape[1] + 1
        counted = self.counted.astype(values.dtype)
        total = jax.vmap(lambda x, ids: jax.ops.segment_sum(x, ids, most))
        sums = total(jnp.where(self.counted, values, 0.0), self.episodes)
        counts = total(counted, self.episodes)
        return jnp.take_along_axis(sums / jnp.maximum(counts, 1.0), self.episodes, axis=1)


def clipped(tokens: PolicyTokens, config: ExpertsConfig) -> tuple[jax.Array, jax.Array]:
    """`clipped_policy_loss` with the configuration's bounds (PPO's clip; DAPO's with unlike bounds)."""
    return clipped_policy_loss(
        tokens.logprobs, tokens.old_logprobs, tokens.advantages, config.clip_low, config.clip_high)


def gspo(tokens: PolicyTokens, config: ExpertsConfig) -> tuple[jax.Array, jax.Array]:
    """The clip on a sequence's ratio, the geometric mean of its tokens' (Zheng et al. 2025, eq. 14, GSPO-token).

    Whole sequences are cut off or kept, which routers that send a few tokens elsewhere cannot upset. Bounds are those
    of sequences, some 1e-3. With `average="episode"` it is the paper's mean.
    """
    apart = tokens.logprobs - tokens.old_logprobs
    whole = jax.lax.stop_gradient(tokens.episode_mean(apart))
    # The value of the sequence's ratio, with the gradient of each token's own.
    apart = whole + tokens.logprobs - jax.lax.stop_gradient(tokens.logprobs)
    return clipped_policy_loss(apart, jnp.zeros_like(apart), tokens.advantages, config.clip_low, config.clip_high)


def _weighted(tokens: PolicyTokens, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-w A log p with the ratio's weights w held still, and where they are not the ratio itself."""
    still = jax.lax.stop_gradient(weights)
    return -still * tokens.advantages * tokens.logprobs, jax.lax.stop_gradient(still != tokens.ratio)


def cispo(tokens: PolicyTokens, config: ExpertsConfig) -> tuple[jax.Array, jax.Array]:
    """REINFORCE with clipped importance weights (MiniMax-M1, 2025, eq. 4): no token's gradient is cut off."""
    return _weighted(tokens, jnp.clip(tokens.ratio, 1.0 - config.clip_low, 1.0 + config.clip_high))


def reinforce(tokens: PolicyTokens, config: ExpertsConfig) -> tuple[jax.Array, jax.Array]:
    """Policy gradient with importance weights truncated at `config.ratio_cap`, the least that is right off policy.

    Unbiased without a cap (inf); on policy the gradient of -A log p (Zheng et al. 2025, arXiv 2512.01374, MiniRL).
    """
    return _weighted(tokens, jnp.minimum(tokens.ratio, config.ratio_cap))


def decoupled(tokens: PolicyTokens, config: ExpertsConfig) -> tuple[jax.Array, jax.Array]:
    """The clip on the ratio to the policy before the update, times its ratio to the one that drew the tokens.

    Staleness is corrected by the latter, held still and truncated at `config.ratio_cap`; the clip bounds how far this
    update goes, and not how far earlier ones have gone (Hilton et al. 2022, eq. 6; AReaL, arXiv 2505.24298, eq. 5).
    """
    losses, cut = clipped_policy_loss(
        tokens.logprobs, tokens.proximal, tokens.advantages, config.clip_low, config.clip_high)
    behind = jnp.exp(jnp.minimum(tokens.proximal - tokens.old_logprobs, EXPONENT_LIMIT))
    return jax.lax.stop_gradient(jnp.minimum(behind, config.ratio_cap)) * losses, cut


def kept(tokens: PolicyTokens, config: ExpertsConfig) -> jax.Array:
    """[B, T] bool, which tokens are near enough to the policy that drew them to be learned from.

    `config.ratio_bounds` masks tokens whose ratio lies outside on either side (IcePop, 2025), and
    `config.negative_bound` those of negative advantage in episodes that have become less probable by more than that
    much per token, on average (DeepSeek-V3.2, 2025, off-policy sequence masking). Both off: all.
    """
    near = jnp.ones_like(tokens.counted)
    if config.ratio_bounds:
        low, high = config.ratio_bounds
        near &= (tokens.ratio >= low) & (tokens.ratio <= high)
    if config.negative_bound:
        fallen = tokens.episode_mean(tokens.old_logprobs - tokens.logprobs)
        near &= (tokens.advantages >= 0) | (fallen <= config.negative_bound)
    return jax.lax.stop_gradient(near)


# (PolicyTokens, config.experts) -> (losses [B, T], whether the gradient of a token is cut off or scaled down [B, T])
OBJECTIVES: Registry = Registry("objective", None, {
    name: f"qcn_jax.pipeline.rl.objectives:{name}" for name in ("clipped", "gspo", "cispo", "reinforce", "decoupled")})


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
