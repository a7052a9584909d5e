"""The losses of policies as their papers write them, in float64, and episodes to try them on."""

import jax
import numpy as np

from qcn_jax.config import ExpertsConfig, OptimizerConfig, RolloutConfig
from qcn_jax.model import Qwen3Next
from qcn_jax.pipeline.rl.records import Outcome, RolloutRecord, Turn
from tests.pipeline.micro import MODEL

CONFIG = ExpertsConfig(
    updates=1000, max_staleness=0, prompts=4, group_size=8, rows=4, sequence_length=64, malformed_penalty=0.5, checkpoint_every=2,
    optimizer=OptimizerConfig(learning_rate=2e-2, warmup_steps=0, weight_decay=0.0),
    rollout=RolloutConfig(slots=16, max_length=16, max_new_tokens=4),
)  # fmt: skip


def make_record(prompt: int, opening: list[int], tokens: list[int], logprobs, reward: float, malformed=False):
    n, m = len(opening), len(tokens)
    return RolloutRecord(
        prompt, 0, np.asarray(opening + tokens, np.int32), np.asarray([False] * n + [True] * m),
        np.asarray([0.0] * n + list(logprobs), np.float32), (Turn(n, n + m, malformed, True),),
        Outcome(reward, reward > 0.5, True),
    )  # fmt: skip


def apply(params, tokens):
    """Final hidden states [n, D] of one episode on its own, in float64."""
    padded = np.pad(tokens, (0, 64 - len(tokens)))[None]
    return np.asarray(_hidden(params, padded).hidden[0, : len(tokens)], np.float64)


_hidden = jax.jit(lambda params, tokens: Qwen3Next(MODEL).apply({"params": params}, tokens, with_logits=False))


def published(params, reference, groups, config):
    """Loss and its gradient by the head's kernel, written out in float64: GRPO's nested means, or DAPO's token mean."""
    kernel, fixed = (np.asarray(tree["lm_head"]["kernel"], np.float64) for tree in (params, reference))
    total, slope = 0.0, np.zeros_like(kernel)
    everything = sum(len(record.tokens) - record.turns[0].start for group in groups for record in group)
    for group in groups:
        rewards = np.asarray([record.outcome.reward for record in group])
        for record, advantage in zip(group, (rewards - rewards.mean()) / rewards.std()):
            advantage *= config.negative_weight if advantage < 0 else 1.0
            start, n = record.turns[0].start, len(record.tokens)
            length = n - start
            share = 1 / (len(groups) * len(group) * length) if config.average == "episode" else 1 / everything
            hidden, held = apply(params, record.tokens), apply(reference, record.tokens)
            for t in range(start, n):
                scores = [log_softmax(h[t - 1] @ k / config.rollout.temperature)
                          for h, k in ((hidden, kernel), (held, fixed))]
                logprob, other = (score[record.tokens[t]] for score in scores)
                ratio = np.exp(logprob - record.logprobs[t])
                clipped = np.clip(ratio, 1 - config.clip_low, 1 + config.clip_high) * advantage
                total += share * (-min(ratio * advantage, clipped)
                                  + config.kl_coef * (np.exp(other - logprob) - (other - logprob) - 1))
                by_logprob = 0.0 if clipped < ratio * advantage else -ratio * advantage
                by_logprob += config.kl_coef * (1 - np.exp(other - logprob))
                by_logits = np.eye(MODEL.vocab_size)[record.tokens[t]] - np.exp(scores[0])
                slope += share * by_logprob * np.outer(hidden[t - 1], by_logits) / config.rollout.temperature
    return total, slope


def log_softmax(logits):
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
