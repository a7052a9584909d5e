"""From episode rows to rates: hand-counted examples."""

import pytest

from qcn_jax.pipeline.experts import metrics
from qcn_jax.pipeline.experts.swe import SWE
from qcn_jax.pipeline.experts.tool_format import TOOL_FORMAT


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
    assert found["solved"] == {"a": True, "b": True, "c": False, "d": True} and found["guard"] == {}
    counted = [{**row, "guard": {"allowed": 2, "blocked/git_remote": 1}} for row in ROWS]
    assert metrics.greedy(counted)["guard"] == {"allowed": 10, "blocked/git_remote": 5}


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
    found = TOOL_FORMAT.metrics(rows)
    assert found["format_valid"] == 0.75
    assert found["tool_format"]["by_template"]["json"]["rate"] == 0.5 and found["tool_format"]["by_template"]["xml"]["rate"] == 1.0
    assert found["tool_format"]["resolved"] == 2


def test_an_experts_metrics_stand_under_its_name():
    found = SWE.metrics(ROWS)
    assert found["swe"]["rate"] == 0.75 and set(found["swe"]) == {"resolved", "attempted", "rate", "ci95", "solved"}


def test_templates_that_nobody_was_trained_on_are_reported_apart():
    rows = [_row("a", True, "hermes", turns=1), _row("b", False, "react", turns=1, malformed=1),
            _row("a", True, "glm46", turns=2) | {"unseen": True}, _row("b", False, "glm46", turns=2, malformed=1) | {"unseen": True}]
    found = TOOL_FORMAT.metrics(rows)
    assert (found["format_valid"], found["format_valid_unseen"]) == (0.5, 0.75)
    assert list(found["tool_format"]["by_template"]) == ["hermes", "react"] and found["tool_format"]["attempted"] == 2
    assert found["tool_format"]["unseen"]["by_template"]["glm46"]["rate"] == 0.75
    assert TOOL_FORMAT.metrics(rows[:2])["format_valid_unseen"] is None
