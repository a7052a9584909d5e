"""Intervals and tests for resolved rates. No scipy: each formula is short and tested against enumeration."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class PairedTest:
    """Two models on the same tasks: how often only one of them resolves, and the two-sided exact p-value."""

    only_first: int
    only_second: int
    difference: float  # rate of the first minus rate of the second
    p_value: float


def wilson_interval(successes: int, attempts: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; (0, 1) where nothing was attempted.

    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference".

    Raises:
      ValueError: `successes` is not between 0 and `attempts`.
    """
    if not 0 <= successes <= attempts:
        raise ValueError(f"successes must be between 0 and {attempts}, got {successes}")
    if attempts == 0:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / attempts
    centre = rate + z * z / (2 * attempts)
    half = z * math.sqrt(rate * (1 - rate) / attempts + z * z / (4 * attempts * attempts))
    scale = 1 + z * z / attempts
    # At 0 and at `attempts` the exact end is 0 or 1, which rounding misses by 1e-17.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == attempts else (centre + half) / scale
    return low, high


def paired_test(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """Exact McNemar test: among tasks that only one model resolves, each model is as likely as the other.

    Args:
      first, second: for the same tasks in the same order, whether each model resolved them.

    Raises:
      ValueError: the two have different lengths or are empty.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"paired outcomes must be equally many and not none, got {len(first)} and {len(second)}")
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    return PairedTest(only_first, only_second, (only_first - only_second) / len(first),
                      sign_test(only_first, only_second))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of `wins` against `losses` under a fair coin; 1 where there are neither."""
    trials = wins + losses
    tail = sum(math.comb(trials, i) for i in range(min(wins, losses) + 1))
    return min(1.0, float(2 * tail / 2**trials))


def sign_flip_test(differences: Sequence[float], resamples: int = 20_000, seed: int = 0) -> float:
    """Two-sided p-value of a mean difference over pairs: without an effect each one's sign is a coin's.

    The permutation test of Fisher (1935), "The design of experiments", section 21, over random flips; the smallest
    p-value is 1 / (resamples + 1).

    Raises:
      ValueError: `differences` is empty.
    """
    if not len(differences):
        raise ValueError("a test of no differences")
    values = np.asarray(differences, np.float64)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (resamples, len(values)))
    extreme = np.abs(signs @ values) >= abs(values.sum()) - 1e-9
    return float((1 + extreme.sum()) / (1 + resamples))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several, by Holm's step-down method.

    Source: Holm (1979), "A simple sequentially rejective multiple test procedure".
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that `k` of the `samples` drawn without replacement hold at least one that is correct.

    The unbiased estimator of Chen et al. (2021), "Evaluating large language models trained on code".

    Raises:
      ValueError: not 1 <= k <= samples, or not 0 <= correct <= samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"need 1 <= k <= samples and 0 <= correct <= samples, got {k=} {samples=} {correct=}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def kept_of_gain(start: Sequence[float], gained: Sequence[float], now: Sequence[float], confidence: float = 0.95,
                 resamples: int = 10_000, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """The share of a gain that is kept, (now - start) / (gained - start) of means over tasks, and its interval.

    Percentile bootstrap over tasks, the three results of a task together. A draw of tasks in which nothing is gained
    says nothing of the share, and counts as the least in the lower end and as the most in the upper: an end may be
    infinite.

    Args:
      start, gained, now: [tasks] results of each task, in the same order.

    Raises:
      ValueError: they differ in length, or nothing is gained.
    """
    values = np.asarray([start, gained, now], np.float64)  # ValueError where lengths differ
    before, best, after = values.mean(axis=1) if values.ndim == 2 and values.size else (0.0, 0.0, 0.0)
    if not best > before:
        raise ValueError("nothing is gained")
    draws = np.random.default_rng(seed).integers(0, values.shape[1], (resamples, values.shape[1]))
    before_, best_, after_ = (row[draws].mean(axis=1) for row in values)
    some = best_ > before_
    share = (after_ - before_) / np.where(some, best_ - before_, 1.0)
    low = np.quantile(np.where(some, share, -np.inf), (1 - confidence) / 2, method="lower")
    high = np.quantile(np.where(some, share, np.inf), (1 + confidence) / 2, method="higher")
    return float((after - before) / (best - before)), (float(low), float(high))


def bootstrap_interval(values: Sequence[float], confidence: float = 0.95, resamples: int = 2000,
                       seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, for means that are not plain proportions.

    Raises:
      ValueError: `values` is empty.
    """
    if not len(values):
        raise ValueError("a bootstrap of no values")
    array = np.asarray(values, np.float64)
    draws = np.random.default_rng(seed).integers(0, len(array), (resamples, len(array)))
    low, high = np.quantile(array[draws].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
