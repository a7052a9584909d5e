"""What models' numbers say together: hand-counted examples."""

import json

import pytest

from qcn_jax.pipeline.evaluate import comparisons
from qcn_jax.pipeline.experts import experts_of
from qcn_jax.pipeline.report.headroom import headroom_table

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


def test_headroom_is_what_is_kept_of_a_gain_that_was_measured():
    """Twelve tasks of 40 that only the expert solves, eight of which the unified model solves; elsewhere nothing is gained."""
    domain = lambda count: {str(n): n < count for n in range(40)}
    single = lambda count: {"single_turn": {"solved": domain(count)}}
    models = {"sft": {"solved": domain(8), **single(10)}, "expert_swe": {"solved": domain(20)}, "expert_single_turn": single(12),
              "unified": {"solved": domain(16) | {"more": True}, **single(14)}}
    found = comparisons.headroom(models, EXPERTS)
    assert list(found) == ["swe", "single_turn"]
    swe, other = found["swe"], found["single_turn"]
    assert (swe["tasks"], swe["start"], swe["expert"], swe["unified"]) == (40, 0.2, 0.5, 0.4)
    assert swe["p_value"] == pytest.approx(2 / 2**12) and swe["kept"] == pytest.approx(8 / 12, abs=1e-6)
    assert 0.3 < swe["ci95"][0] < 0.5 and 0.8 < swe["ci95"][1] < 1.0 and swe["gain_ci95"][0] > 0.1
    assert other["kept"] is other["ci95"] is None and other["p_value"] == 0.5  # two more are no measured gain
    assert comparisons.headroom(models | {"expert_swe": {"solved": domain(0)}}, EXPERTS)["swe"]["kept"] is None  # it lost
    assert comparisons.headroom({name: models[name] for name in ("sft", "expert_swe")}, EXPERTS) == {}
    assert found == comparisons.headroom(models, EXPERTS)
    json.dumps(found, allow_nan=False)


def test_headroom_of_samples_is_of_shares():
    shares = lambda solved: {"sampled_solved": {str(n): [solved, 8] for n in range(12)}, "solved": {}}
    models = {"base": shares(2), "expert_swe": shares(6), "unified": shares(5)}
    assert comparisons.headroom(models, EXPERTS, "base") == {"swe_sampled": {
        "tasks": 12, "start": 0.25, "expert": 0.75, "unified": 0.625, "gain_ci95": [0.5, 0.5], "p_value": pytest.approx(0.0, abs=1e-3),
        "kept": 0.75, "ci95": [0.75, 0.75]}}
    page = headroom_table(comparisons.headroom(models, EXPERTS, "base") | {"single_turn": {
        "tasks": 9, "start": 0.1, "expert": 0.2, "unified": 0.3, "gain_ci95": [-0.1, 0.3], "kept": None, "ci95": None}})
    assert "swe, sampled" in page and "75% (75% – 75%)" in page and "no headroom" in page and "+10.0 (-10.0 – +30.0)" in page
    assert headroom_table({}) == ""
