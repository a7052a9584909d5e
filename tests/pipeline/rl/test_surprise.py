"""False rewards stand at the head of the list of verdicts that do not fit."""

import numpy as np
import pytest

from qcn_jax.pipeline.rl.records import Outcome, RolloutRecord, Turn
from qcn_jax.pipeline.rl.surprise import features, surprise


def area(scores, planted) -> float:
    """Under the ROC curve: how often a planted one stands before another, ties halved."""
    ours, others = scores[planted][:, None], scores[~planted][None]
    return float(np.mean((ours > others) + 0.5 * (ours == others)))


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_planted_false_verdicts_are_found(noise):
    """Whether an episode was solved shows in one of eight features, in a share of `noise` wrongly."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(800, 8))
    rows[:, 3] = rng.random(800) < 0.4
    solved = (rows[:, 3] == 1) ^ (rng.random(800) < noise)
    planted = rng.random(800) < 0.05
    groups = np.repeat(np.arange(100), 8)
    scores = surprise(rows, solved ^ planted, groups)
    assert area(scores, planted) > (0.99 if noise == 0 else 0.8)
    assert abs(area(surprise(rng.normal(size=(800, 8)), solved, groups), planted) - 0.5) < 0.2  # nothing to go by
    assert np.isfinite(surprise(rows[:1], solved[:1], groups[:1])).all()


def test_features_tell_what_the_others_of_a_group_did():
    def record(prompt, sample, last, solved, failing):
        tokens = np.asarray([5, 6, *last], np.int32)
        sampled = np.asarray([False, False] + [True] * len(last))
        return RolloutRecord(prompt, sample, tokens, sampled, np.full(len(tokens), -1.0, np.float32),
                             (Turn(2, len(tokens), False, True, failing),), Outcome(float(solved), solved, True))

    found = features([record(0, 0, [7, 8], True, False), record(0, 1, [7, 8], False, True), record(0, 2, [9], True, False),
                      record(1, 0, [7, 8], True, False)])
    assert found.shape == (4, 14) and np.isfinite(found).all()
    np.testing.assert_array_equal(found[:, 0], [0, 1, 0, 0])  # the last turn failed
    np.testing.assert_array_equal(found[:, 11], [0.5, 1, 0.5, 0.5])  # of the others of the group, how many were solved
    np.testing.assert_array_equal(found[:, 12:], [[1, 0], [1, 1], [0, 0.5], [0, 0.5]])  # a twin, and what it earned
