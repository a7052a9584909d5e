"""Intervals and tests against enumeration of every outcome, and against published values."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcn_jax import statistics


@pytest.mark.parametrize("successes, attempts, low, high", [
    # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method 3.
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
])
def test_wilson_equals_published_values(successes, attempts, low, high):
    assert statistics.wilson_interval(successes, attempts) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 400), st.data())
@settings(max_examples=60, deadline=None)
def test_wilson_ends_are_where_the_score_statistic_is_critical(attempts, data):
    successes = data.draw(st.integers(0, attempts))
    rate = successes / attempts
    for end in statistics.wilson_interval(successes, attempts):
        assert 0 <= end <= 1
        if 0 < end < 1:
            assert abs(rate - end) / math.sqrt(end * (1 - end) / attempts) == pytest.approx(1.959963985, rel=1e-6)


def test_wilson_without_attempts_knows_nothing():
    assert statistics.wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("successes, attempts", [(-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes, attempts):
    with pytest.raises(ValueError):
        statistics.wilson_interval(successes, attempts)


@pytest.mark.parametrize("wins, losses", [(0, 0), (5, 0), (3, 4), (9, 2), (6, 6), (1, 12)])
def test_sign_test_equals_enumeration_of_every_coin_sequence(wins, losses):
    trials = wins + losses
    extreme = sum(abs(2 * sum(flips) - trials) >= abs(wins - losses)
                  for flips in itertools.product((0, 1), repeat=trials))
    assert statistics.sign_test(wins, losses) == pytest.approx(extreme / 2**trials, rel=1e-12)


def test_paired_test_counts_discordant_tasks_only():
    first = [True] * 10 + [False] * 5 + [True] * 9 + [False]
    second = [True] * 10 + [False] * 5 + [False] * 9 + [True]
    test = statistics.paired_test(first, second)
    assert (test.only_first, test.only_second) == (9, 1)
    assert test.difference == pytest.approx(8 / 25)
    assert test.p_value == pytest.approx(2 * (1 + 10) / 2**10)


def test_paired_test_needs_the_same_tasks():
    with pytest.raises(ValueError):
        statistics.paired_test([True], [True, False])


@pytest.mark.parametrize("samples, correct, k", [(8, 0, 8), (8, 1, 8), (8, 3, 1), (8, 3, 4), (6, 6, 2), (5, 2, 3)])
def test_pass_at_k_equals_enumeration_of_every_draw(samples, correct, k):
    outcomes = [True] * correct + [False] * (samples - correct)
    draws = list(itertools.combinations(outcomes, k))
    assert statistics.pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws), rel=1e-12)


def test_pass_at_k_refuses_more_draws_than_samples():
    with pytest.raises(ValueError):
        statistics.pass_at_k(4, 1, 8)


def test_bootstrap_interval_is_close_to_the_exact_one_over_all_resamples():
    values = [0.0, 0.25, 0.5, 1.0, 1.0]
    means = sorted(sum(draw) / 5 for draw in itertools.product(values, repeat=5))
    exact = means[int(0.025 * len(means))], means[int(0.975 * len(means))]
    assert statistics.bootstrap_interval(values, resamples=20_000) == pytest.approx(exact, abs=0.051)


def test_bootstrap_interval_of_constant_values_is_a_point():
    assert statistics.bootstrap_interval([0.5] * 7) == (0.5, 0.5)


def test_sign_flips_equal_enumeration_of_all_signs():
    differences = [0.5, 0.25, -0.125, 0.375, 0.0, 0.5, -0.25, 0.625]
    sums = [sum(sign * x for sign, x in zip(signs, differences, strict=True))
            for signs in itertools.product((-1, 1), repeat=len(differences))]
    exact = sum(abs(total) >= abs(sum(differences)) for total in sums) / len(sums)
    assert statistics.sign_flip_test(differences) == pytest.approx(exact, abs=0.01)
    assert statistics.sign_flip_test([0.0, 0.0]) == 1.0
    with pytest.raises(ValueError, match="no differences"):
        statistics.sign_flip_test([])


def test_what_is_kept_of_a_gain_against_all_resamples():
    """Of five tasks all 3,125 draws, one by one: the interval's ends are their quantiles but for the sampling of draws."""
    start, gained, now = [0.0, 0.25, 0.5, 0.0, 0.25], [1.0, 0.75, 0.5, 0.5, 0.75], [0.5, 0.75, 0.0, 0.25, 0.5]
    share, (low, high) = statistics.kept_of_gain(start, gained, now, confidence=0.8, resamples=40_000)
    assert share == pytest.approx((2.0 - 1.0) / (3.5 - 1.0))
    lows, highs = [], []
    for draw in itertools.product(range(5), repeat=5):
        before, best, after = (sum(values[task] for task in draw) / 5 for values in (start, gained, now))
        lows.append((after - before) / (best - before) if best > before else -math.inf)
        highs.append((after - before) / (best - before) if best > before else math.inf)
    exact = sorted(lows)[round(0.1 * 3125)], sorted(highs)[round(0.9 * 3125)]
    assert (low, high) == pytest.approx(exact, abs=0.03) and low < share < high
    assert statistics.kept_of_gain(start, gained, now) == statistics.kept_of_gain(start, gained, now)


def test_a_share_of_nothing_is_refused_and_of_next_to_nothing_open():
    with pytest.raises(ValueError, match="nothing is gained"):
        statistics.kept_of_gain([1.0, 0.0], [0.0, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError):
        statistics.kept_of_gain([0.0, 0.0], [1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="nothing is gained"):
        statistics.kept_of_gain([], [], [])
    share, ends = statistics.kept_of_gain([0.0, 1.0], [1.0, 1.0], [1.0, 1.0])
    assert share == 1.0 and ends == (-math.inf, math.inf)  # a quarter of the draws hold no task that was gained
