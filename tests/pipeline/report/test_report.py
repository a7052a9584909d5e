"""The report: summary.json's fixed form, and a page that is whole, self-contained, escaped and true to its numbers."""

import html.parser
import json
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcn_jax.config import RunConfig
from qcn_jax.pipeline.context import Shared, StageContext
from qcn_jax.pipeline.report import charts, conversations
from qcn_jax.pipeline.rl import ledger
from qcn_jax.pipeline.stages import report

MODELS = ["base", "midtrain", "sft", "expert_swe", "expert_single_turn", "expert_tool_format", "unified"]
NASTY = "</pre><script>alert(1)</script>"


def _model(resolved, attempted=40, **more):
    rate = resolved / attempted
    return {"resolved": resolved, "attempted": attempted, "rate": rate, "ci95": [rate * 0.8, rate * 0.8 + 0.2],
            "pass_at_1": rate, "pass_at_8": min(1.0, rate + 0.1), "format_valid": 0.75,
            "single_turn": {"resolved": 3, "attempted": 10, "rate": 0.3, "ci95": [0.1, 0.6]},
            "kinds": {"delete_not": {"resolved": resolved // 2, "attempted": 20}},
            "attempts": [{"attempts": 1, "rate": rate / 2}, {"attempts": 2, "rate": rate}],
            "mean_turns": 3.25, "outcomes": {"infrastructure": 1}, **more}


@pytest.fixture(name="context")
def _context(tmp_path):
    """A work directory as a finished run leaves it."""
    root = tmp_path / "run"

    def put(path, value):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        lines = value if isinstance(value, list) else [value]
        (root / path).write_text("".join(json.dumps(line) + "\n" for line in lines))

    tasks = {"train": 80, "heldout": 40, "candidates": 300, "repos_train": ["toolz==1.2.0"],
             "repos_heldout": ["schema==0.7.8"], "sandbox": "docker",
             "yields": {"delete_not": {"candidates": 200, "kept": 90}, "none_tried": {"candidates": 0, "kept": 0}}}
    models = {name: _model(index * 4) for index, name in enumerate(MODELS)}
    models["sft"]["guard"] = {"allowed": 9, "blocked": 3, "blocked/git_remote": 2, "blocked/package_download": 1}
    models["sft"]["feedback"] = {"sampled": None, "greedy": {
        "next": {"told": 0.41, "fresh": 0.13}, "equal": None, "repeated": 0.05, "redrawn": 3.25, "gain": 0.123}}
    models |= {"sft_control": _model(9), "heuristic": _model(2, pass_at_8=None)}
    evaluation = {
        "sandbox": "docker", "isolation": "network none", "models": models,
        "tests": {"swe_sft": {"first": "expert_swe", "second": "sft", "domain": "swe", "tasks": 40, "only_first": 9,
                              "only_second": 1, "difference": 0.2, "p_value": 0.0215}},
        "retention": {"swe": {"unified": 0.3, "expert": 0.4, "kept": 0.75}},
        "control": {"steps": 33, "target_seconds": 20.0, "seconds": 21.5},
    }
    for stage, results in (("tasks", tasks), ("midtrain", {}), ("sft", {}), ("experts", {}), ("distill", {}),
                           ("evaluate", evaluation)):
        put(f"{stage}/DONE.json", {"seconds": 10.0, "config_hash": "", "results": results})
    causes = {f"cause/{name}": 0.0 for name in ledger.CAUSES} | {
        "cause/policy": 0.875, "cause/limit": 0.1, "cause/verifier": 0.025, "missing_length": 1.25}
    put("midtrain/metrics.jsonl", [{"step": step, "ce": 5 / step} for step in range(1, 40)])
    put("sft/metrics.jsonl", [{"step": step, "ce": 1 / step} for step in range(1, 9)])
    put("experts/swe/metrics.jsonl", [{"step": step, "reward": 0.1 * step} | causes for step in range(6)])
    put("distill/metrics.jsonl", [{"step": step, "loss": 0.1, "loss/swe": 0.1, "agreement/swe": 0.9} for step in range(6)])
    put("evaluate/trajectories.jsonl", [
        {"model": "expert_swe", "instance_id": f"toolz{NASTY}", "kind": "delete_not", "resolved": True, "messages": [
            {"role": "user", "content": f"broken {NASTY}"},
            {"role": "assistant", "content": "<tool_call>\n<function=view>\n</function>\n</tool_call>"},
            {"role": "tool", "content": "a.py\n<|1|>def f():\n<|12|>    return 1"}]}])
    return StageContext(RunConfig(), root, "report", Shared(RunConfig(), root))


class _Balance(html.parser.HTMLParser):
    """Checks that tags close in order; collects ids of everything that a browser would fetch."""

    VOID = {"meta", "br", "line", "rect", "circle", "polyline", "path", "i"} - {"i"}

    def __init__(self):
        super().__init__()
        self.open, self.fetched = [], []

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()


def _page(context):
    report.run_stage(context)
    return (context.workdir / "index.html").read_text()


def test_summary_has_exactly_the_fixed_form(context):
    report.run_stage(context)
    summary = json.loads((context.workdir / "summary.json").read_text())
    assert summary["sandbox"] == "docker" and summary["wall_seconds"] == 60.0
    assert summary["tasks"] == {"train": 80, "heldout": 40, "candidates": 300, "repos_train": ["toolz==1.2.0"],
                                "repos_heldout": ["schema==0.7.8"]}
    assert list(summary["models"]) == MODELS and list(summary["single_turn"]) == [*MODELS, "sft_control", "heuristic"]
    for model in summary["models"].values():
        assert list(model) == ["resolved", "attempted", "rate", "ci95", "pass_at_8", "format_valid",
                               "format_valid_unseen"]
    assert summary["models"]["expert_swe"] == {"resolved": 12, "attempted": 40, "rate": 0.3, "ci95": [0.24, 0.44],
                                               "pass_at_8": 0.4, "format_valid": 0.75,
                                               "format_valid_unseen": None}
    assert set(summary["baselines"]) == {"sft_control", "heuristic"}
    assert summary["causes"]["swe"]["cause/policy"] == 0.875 and summary["causes"]["swe"]["missing_length"] == 1.25
    assert summary["tests"]["swe_sft"]["p_value"] == 0.0215 and summary["feedback"]["sft"]["greedy"]["gain"] == 0.123


def test_page_is_whole_and_fetches_nothing(context):
    page = _page(context)
    parser = _Balance()
    parser.feed(page)
    assert parser.open == [] and parser.fetched == []
    assert not re.search(r"(?:url\(|@import|https?://)", page)
    for figure in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(figure)  # each figure is well-formed XML


def test_page_shows_the_numbers(context):
    page = _page(context)
    for text in ("12/40", "30.0%", "24.0% – 44.0%", "+20.0 points", "0.0215", "33 further SFT steps", "90/200",
                 "SFT control, equal time", "heuristic, guessing on", "75%", "network none", "schema==0.7.8", "1.0 min",
                 "same first choice", "3 (git_remote 2, package_download 1)",
                 "41% told, 13% not", "+12.3", "3.2", "What decided rewards", "87.5%", "2.5%", "1.25 of the others'"):
        assert text in page, text
    assert page.count("<svg") >= 7
    assert "none_tried" not in page


def test_what_models_wrote_is_escaped(context):
    page = _page(context)
    assert "<script" not in page and "&lt;script&gt;" in page


def test_unfinished_stages_leave_their_sections_out_and_are_named(context):
    for stage in ("distill", "evaluate"):
        (context.root / stage / "DONE.json").unlink()
        for path in (context.root / stage).glob("*.jsonl"):
            path.unlink()
    page = _page(context)
    assert "Not finished: distill, evaluate." in page
    assert "Paired comparisons" not in page and "Training loss" in page
    summary = json.loads((context.workdir / "summary.json").read_text())
    assert summary["models"] == {} and summary["sandbox"] == "docker" and summary["tasks"]["train"] == 80


def test_report_of_nothing_is_still_a_page(tmp_path):
    context = StageContext(RunConfig(), tmp_path, "report", Shared(RunConfig(), tmp_path))
    page = _page(context)
    assert "Not finished: tasks, midtrain" in page
    _Balance().feed(page)


def test_bars_are_as_long_as_their_rates():
    chart = charts.interval_bars([charts.Bar("a", 0.2, 0.1, 0.3), charts.Bar("b", 0.4, 0.3, 0.5)])
    first, second = (float(width) for width in re.findall(r'height="18" width="([\d.]+)"', chart))
    assert second == pytest.approx(2 * first, rel=1e-3)


def test_curves_pass_through_their_points():
    chart = charts.line_chart([charts.Series("s", [0, 1, 2], [0.0, 1.0, 0.5])], "x", "y")
    points = re.search(r'class="curve" points="([^"]*)"', chart).group(1)
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, point.split(","))) for point in points.split()]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert (y0 - y2) == pytest.approx((y0 - y1) / 2, abs=0.2) and y1 < y2 < y0  # y grows upwards


def test_points_that_are_not_finite_are_left_out():
    series = [charts.Series("s", [0, 1, 2, 3], [1.0, None, float("nan"), 2.0])]
    assert len(re.search(r'points="([^"]*)"', charts.line_chart(series, "x", "y")).group(1).split()) == 2
    assert charts.line_chart([charts.Series("s", [0], [None])], "x", "y") == ""


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 9))
@settings(max_examples=200, deadline=None)
def test_ticks_are_round_and_span_the_range(low, span, about):
    high = low + span
    if high - low < 1e-6 * max(abs(low), abs(high)):
        return
    ticks = charts.nice_ticks(low, high, about)
    assert ticks[0] <= low + 1e-6 * span and ticks[-1] >= high - 1e-6 * span
    assert len(ticks) <= about + 2
    step = ticks[1] - ticks[0]
    assert f"{step:.0e}"[0] in "125"


def test_running_mean_keeps_ends_and_averages_inside():
    values = [float(i % 2) for i in range(64)]
    means = charts.running_mean(values)
    assert means[0] == values[0] and means[-1] == values[-1]
    assert all(abs(mean - 0.5) < 0.2 for mean in means[8:-8])


@pytest.mark.parametrize("seconds, text", [(3.21, "3.2 s"), (245, "4 min 05 s"), (3725, "1 h 02 min")])
def test_times_read_well(seconds, text):
    assert charts.format_seconds(seconds) == text


def test_added_tokens_become_what_they_hold_and_tags_are_marked():
    shown = conversations.highlight("<tool_call>\n<function=edit>\n<|7|>x < y")
    assert '<span class="token">  7 </span>x &lt; y' in shown
    assert '<span class="tag">&lt;function=edit&gt;</span>' in shown
