"""What a form of running a model said of tokens, and how far from it a reference's logits are.

Axes: n tokens of a sequence, m of them scored, V vocabulary, L layers, k experts a token.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qcn_jax.inference.sampling import Sampling

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Drawn:
    """How tokens were drawn.

    Attributes:
      sampling: with one filter (top_k, top_p or min_p) at most.
      seed: of the random stream.
      logprobs: [m], under what drew them; None where nobody said.
      drawable: [V] bool, or None for all.
      prompt: tokens of the sequence that were not generated, for penalties.
    """

    sampling: Sampling
    seed: int
    logprobs: Array | None = None
    drawable: Array | None = None
    prompt: int = 0


@dataclasses.dataclass(frozen=True)
class Scored:
    """Log-probabilities [m] of tokens[start:] of a sequence.

    Attributes:
      routes: each token's experts [n, L, k], where these are kept.
      params: the weights, where they are not the model's.
      drawn: how the tokens were chosen, where a form did that.
    """

    tokens: list[int]
    start: int
    logprobs: Array
    routes: Array | None = None
    params: Any = None
    drawn: Drawn | None = None


def log_softmax(logits: Array) -> Array:
    """Of [..., V], in float64."""
    logits = np.asarray(logits, np.float64)
    peak = logits.max(-1, keepdims=True)
    return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))


def scores(logits: Any, targets: Sequence[int]) -> Array:
    """Log-probabilities of `targets` under logits [m, V]."""
    return log_softmax(logits)[np.arange(len(targets)), list(targets)]


def apart(one: Scored, logits: Array, bound: float) -> float:
    """How far `one` is from the reference's logits [n - 1, V], in nats; infinity where it cannot have come of them."""
    if one.routes is not None and len(one.routes) != len(one.tokens):
        return np.inf
    # A token's log-probability is of the pass over the one before it.
    tokens, logits = one.tokens[one.start :], np.asarray(logits[one.start - 1 :], np.float64)
    found = np.abs(one.logprobs - scores(logits, tokens))
    worst = [float(np.where(np.isnan(found), np.inf, found).max(initial=0.0))]
    for i in range(len(tokens) if one.drawn is not None else 0):
        worst.append(_draw_apart(one, one.start + i, logits[i], bound))
    return max(worst)


def _draw_apart(one: Scored, at: int, logits: Array, bound: float) -> float:
    """What token `at`, and the log-probability under which it was drawn, are from what logits [V] draw.

    A draw is repeated with its own noise: the token must be the best but for rounding, and be among those that the
    filter leaves but for rounding at its edge.
    """
    drawn, token = one.drawn, one.tokens[at]
    sampling, heat = drawn.sampling, drawn.sampling.temperature or 1.0
    scaled = _adjusted(logits, sampling, one.tokens[: drawn.prompt], one.tokens[drawn.prompt : at]) / heat
    worst = 0.0
    if drawn.logprobs is not None:
        under = scaled if sampling.temperature else logits
        worst = abs(float(drawn.logprobs[at - one.start]) - log_softmax(under)[token]) * min(1.0, heat)
    if drawn.drawable is not None:
        scaled = np.where(drawn.drawable, scaled, -np.inf)
    kept, sure = _filtered(scaled, sampling, 2 * bound / heat)
    if not kept[token] or np.isnan(worst):
        return np.inf
    if sampling.temperature:
        key = jax.random.fold_in(jax.random.key(np.uint32(drawn.seed)), at)
        scaled = scaled + np.asarray(jax.random.gumbel(key, scaled.shape, np.float32))
    short = np.where(sure, scaled, -np.inf).max() - scaled[token]
    return float(max(worst, short * min(1.0, heat) / 2))  # both of them may have been rounded


def _adjusted(logits: Array, sampling: Sampling, prompt: Sequence[int], made: Sequence[int]) -> Array:
    """Logits [V] with penalties and biases, written anew: the repetition penalty first."""
    logits, counts = logits.copy(), np.bincount(np.asarray(made, np.int64), minlength=len(logits))
    said = counts > 0
    both = said.copy()
    both[list(prompt)] = True
    by = np.where(logits > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
    logits = np.where(both, logits * by, logits)
    logits -= sampling.frequency_penalty * counts + sampling.presence_penalty * said
    for id_, amount in sampling.logit_bias:
        logits[id_] += amount
    return logits


def _filtered(scaled: Array, sampling: Sampling, slack: float) -> tuple[Array, Array]:
    """Which tokens [V] a filter may have left, and which it surely has; both but for draws without randomness."""
    everything = scaled > -np.inf
    if sampling.min_p and sampling.temperature:
        floor = scaled.max() + np.log(sampling.min_p)
        return scaled >= floor - slack, scaled > floor + slack
    ranked = -np.sort(-scaled)
    if 0 < sampling.top_k < everything.sum() and sampling.temperature:
        return scaled >= ranked[sampling.top_k - 1] - slack, scaled > ranked[sampling.top_k] + slack
    if sampling.top_p < 1 and sampling.temperature:
        mass = np.exp(log_softmax(ranked))
        before = np.empty_like(mass)
        before[np.argsort(-scaled, kind="stable")] = np.cumsum(mass) - mass
        return everything & (before < sampling.top_p + slack), everything & (before < sampling.top_p - slack)
    return everything, everything
