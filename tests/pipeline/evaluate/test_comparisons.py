"""What models' numbers say together: hand-counted examples."""

import pytest

from qcn_jax.pipeline.evaluate import comparisons
from qcn_jax.pipeline.experts import experts_of

EXPERTS = experts_of(["swe", "single_turn", "tool_format"])


def test_comparisons_use_common_tasks_only():
    models = {"expert_swe": {"solved": {str(i): True for i in range(10)}},
              "sft": {"solved": {str(i): i < 4 for i in range(9)}}}
    tests = comparisons.comparisons(models, EXPERTS)
    assert list(tests) == ["expert_swe_vs_sft_swe"]
    named = comparisons.comparisons(models | {"guesser": models["sft"]}, EXPERTS, "guesser")
    assert list(named) == ["expert_swe_vs_sft_swe", "expert_swe_vs_guesser_swe"]
    test = tests["expert_swe_vs_sft_swe"]
    assert (test["tasks"], test["only_first"], test["only_second"]) == (9, 5, 0)
    assert test["p_value"] == pytest.approx(2 / 32) and test["difference"] == pytest.approx(5 / 9, abs=1e-6)


def test_sampled_shares_are_compared_task_by_task():
    models = {"expert_swe": {"sampled_solved": {str(i): [6, 8] for i in range(12)} | {"x": [8, 8]}},
              "sft": {"sampled_solved": {str(i): [2 if i else 8, 8] for i in range(12)} | {"y": [0, 8]}}}
    test = comparisons.comparisons(models, EXPERTS)["expert_swe_vs_sft_swe_sampled"]
    assert (test["tasks"], test["only_first"], test["only_second"]) == (12, 11, 1)
    assert test["difference"] == pytest.approx((11 * 0.5 - 0.25) / 12, abs=1e-6) and 0 < test["p_value"] < 0.01


def test_retention_is_against_the_best_expert_of_each_domain():
    single = {"single_turn": {"rate": 0.2}, "format_valid": 0.0}
    models = {"expert_swe": {"rate": 0.4, **single}, "expert_tool_format": {"rate": 0.5, **single},
              "unified": {"rate": 0.45, "single_turn": {"rate": 0.3}, "format_valid": 0.0}}
    kept = comparisons.retention(models, EXPERTS)
    assert kept["swe"] == {"unified": 0.45, "expert": 0.5, "best": "expert_tool_format", "kept": 0.9}
    assert kept["single_turn"]["kept"] == 1.5 and kept["tool_format"]["kept"] is None
