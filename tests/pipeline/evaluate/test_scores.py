"""From episode rows to rates: hand-counted examples."""

import pytest

from qcn_jax.pipeline.evaluate import scores as metrics


def _row(name, solved, kind="k", infrastructure=False, turns=3, malformed=0, attempts=1, reason="submitted"):
    return {"instance_id": name, "kind": kind, "solved": solved, "infrastructure": infrastructure, "turns": turns,
            "malformed": malformed, "attempts": attempts, "reason": reason}


ROWS = [
    _row("a", True, "x"), _row("b", True, "x", attempts=3, turns=5), _row("c", False, "y", attempts=4, reason="turn_limit"),
    _row("d", True, "y", attempts=0, malformed=1), _row("e", False, "y", infrastructure=True),
]


def test_greedy_counts_verdicts_only():
    found = metrics.greedy(ROWS)
    assert (found["resolved"], found["attempted"], found["rate"]) == (3, 4, 0.75)
    assert found["kinds"] == {"x": {"resolved": 2, "attempted": 2}, "y": {"resolved": 1, "attempted": 2}}
    assert found["outcomes"] == {"submitted": 3, "turn_limit": 1, "infrastructure": 1}
    assert found["mean_turns"] == 3.5 and found["valid_turns"] == pytest.approx(13 / 14, abs=1e-6)
    assert found["solved"] == {"a": True, "b": True, "c": False, "d": True}


def test_attempts_curve_grows_to_the_resolved_rate():
    curve = metrics.attempts_curve(ROWS[:4])
    assert [(point["attempts"], point["rate"]) for point in curve] == [
        (1, 0.5), (2, 0.5), (3, 0.75), (4, 0.75), (5, 0.75), (6, 0.75)]


def test_nothing_attempted_has_a_rate_of_zero_and_no_knowledge():
    found = metrics.greedy([])
    assert (found["rate"], found["ci95"], found["mean_turns"]) == (0.0, [0.0, 1.0], None)


def test_pass_at_k_averages_over_tasks_with_enough_samples():
    rows = [_row("a", index < 2) for index in range(8)] + [_row("b", False) for _ in range(8)]
    rows += [_row("c", True) for _ in range(4)] + [_row("c", True, infrastructure=True) for _ in range(4)]
    found = metrics.sampled(rows)
    assert found["pass_at_1"] == pytest.approx((0.25 + 0 + 1) / 3, abs=1e-6)
    assert found["pass_at_8"] == 0.5  # c has only four samples
    assert found["pass_at_2"] == pytest.approx((1 - 15 / 28 + 0 + 1) / 3, abs=1e-6)


def test_pass_at_8_of_fewer_samples_is_unknown():
    assert metrics.sampled([_row("a", True)] * 3)["pass_at_8"] is None


def test_format_validity_is_per_turn_and_per_template():
    rows = [_row("a", True, "json", turns=2), _row("b", False, "json", turns=2, malformed=2), _row("c", True, "xml", turns=4)]
    found = metrics.format_validity(rows)
    assert found["format_valid"] == 0.75
    assert found["tool_format"]["by_template"]["json"]["rate"] == 0.5 and found["tool_format"]["by_template"]["xml"]["rate"] == 1.0
    assert found["tool_format"]["resolved"] == 2


def test_comparisons_use_common_tasks_only():
    models = {"expert_swe": {"solved": {str(i): True for i in range(10)}},
              "sft": {"solved": {str(i): i < 4 for i in range(9)}}}
    tests = metrics.comparisons(models)
    assert list(tests) == ["expert_swe_vs_sft_swe"]
    test = tests["expert_swe_vs_sft_swe"]
    assert (test["tasks"], test["only_first"], test["only_second"]) == (9, 5, 0)
    assert test["p_value"] == pytest.approx(2 / 32) and test["difference"] == pytest.approx(5 / 9, abs=1e-6)


def test_sampled_shares_are_compared_task_by_task():
    models = {"expert_swe": {"sampled_solved": {str(i): [6, 8] for i in range(12)} | {"x": [8, 8]}},
              "sft": {"sampled_solved": {str(i): [2 if i else 8, 8] for i in range(12)} | {"y": [0, 8]}}}
    test = metrics.comparisons(models)["expert_swe_vs_sft_swe_sampled"]
    assert (test["tasks"], test["only_first"], test["only_second"]) == (12, 11, 1)
    assert test["difference"] == pytest.approx((11 * 0.5 - 0.25) / 12, abs=1e-6) and 0 < test["p_value"] < 0.01


def test_retention_is_against_the_best_expert_of_each_domain():
    single = {"single_turn": {"rate": 0.2}, "format_valid": 0.0}
    models = {"expert_swe": {"rate": 0.4, **single}, "expert_tool_format": {"rate": 0.5, **single},
              "unified": {"rate": 0.45, "single_turn": {"rate": 0.3}, "format_valid": 0.0}}
    kept = metrics.retention(models)
    assert kept["swe"] == {"unified": 0.45, "expert": 0.5, "best": "expert_tool_format", "kept": 0.9}
    assert kept["single_turn"]["kept"] == 1.5 and kept["tool_format"]["kept"] is None
