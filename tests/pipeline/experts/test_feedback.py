"""Told and fresh attempts: hand-counted episodes."""

import pytest

from qcn_jax.pipeline.experts.feedback import feedback


def _row(name, runs, solved=None, failing=0, repeated=0, infrastructure=False):
    return {"instance_id": name, "solved": runs[-1] if solved is None else solved, "infrastructure": infrastructure,
            "runs": runs, "failing": failing, "repeated": repeated}


SAMPLED = [_row("a", [False, True], failing=1), _row("a", [True]), _row("a", [False, False, False], failing=3, repeated=1),
           _row("b", [False, False], failing=2), _row("b", [False, True], failing=1)]


def test_told_attempts_stand_beside_those_of_other_episodes_on_the_same_task():
    found = feedback([], SAMPLED)["sampled"]
    assert (found["episodes"], found["first_failed"]) == (5, 4)
    # Of a: told (1, 0), fresh of the two others each (1/2, 1/2). Of b: told (0, 1), fresh (0, 0).
    assert found["next"] == pytest.approx({"told": 0.5, "fresh": 0.25, "ratio": 2.0, "p_value": found["next"]["p_value"]})
    # As many fresh ones: one of a's two is right half the time, two of them always.
    assert (found["equal"]["told"], found["equal"]["fresh"]) == (0.5, pytest.approx((0.5 + 1) / 4))
    assert found["repeated"] == pytest.approx(1 / 3, abs=1e-6)  # of the failing turns behind an episode's first one
    assert found["gain"] == pytest.approx(2 / 5)


def test_greedy_episodes_are_compared_with_sampled_first_attempts():
    greedy = [_row("a", [False, True], failing=1), _row("b", [False], failing=1), _row("c", [True]),
              _row("d", [], solved=True), _row("e", [False], infrastructure=True)]
    found = feedback(greedy, SAMPLED)["greedy"]
    assert (found["episodes"], found["first_failed"], found["gain"]) == (4, 2, 0.25)
    assert (found["next"]["told"], found["next"]["fresh"]) == (0.5, pytest.approx(1 / 6, abs=1e-6))  # b gave up
    assert found["repeated"] is None


def test_without_samples_there_is_nothing_to_compare_with():
    found = feedback([_row("a", [False, True], failing=1)], [])
    assert found["sampled"] is None and found["greedy"]["next"] is None and found["greedy"]["gain"] == 1.0
    assert feedback([], SAMPLED[:1])["sampled"]["next"] is None  # nobody is compared with itself
