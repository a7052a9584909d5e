"""Problems and tools of a user's own, from files alone and a checkpoint to models that are trained, measured and shown.

The model says one of a few answers, each as probable as the others; a run has no stage `tasks`.
"""

import dataclasses
import json
import shutil

import pytest

from qcn_jax import hub
from qcn_jax.chat import templates
from qcn_jax.chat.tool_calls import ToolCall
from qcn_jax.config import (
    DistillConfig,
    EvaluateConfig,
    ExpertsConfig,
    OptimizerConfig,
    ProblemsConfig,
    RolloutConfig,
    RunConfig,
    TasksConfig,
    ToolCallsConfig,
)
from qcn_jax.errors import UserError
from qcn_jax.pipeline import run
from tests.inference import speaking

# As a user would write them.
PROBLEMS = """
{"id": "double", "kind": "stdio", "prompt": "Read a number and print twice the number.", "timeout": 30, "tests": [{"input": "4\\n", "output": "8\\n"}, {"input": "-3\\n", "output": "-6\\n"}]}
{"id": "above", "kind": "sql", "prompt": "The table t has a column a. Select all a above 1.", "timeout": 30, "tests": [{"setup": "CREATE TABLE t (a INTEGER); INSERT INTO t VALUES (1), (2), (3);", "rows": [[2], [3]]}, {"setup": "CREATE TABLE t (a INTEGER);", "rows": []}]}
{"id": "upper", "kind": "stdio", "language": "javascript", "prompt": "Print the input in capitals.", "timeout": 30, "tests": [{"input": "abc", "output": "ABC"}]}
"""
CALLS = """
{"id": "lamp", "prompt": "Switch lamp 3 on.", "tools": [{"name": "lamp", "description": "Switches a lamp.", "parameters": {"type": "object", "properties": {"number": {"type": "integer"}, "on": {"type": "boolean"}}, "required": ["number", "on"]}}], "calls": [{"name": "lamp", "arguments": {"number": 3, "on": true}}]}
{"id": "ring", "prompt": "Who are you?", "tools": [{"name": "ring", "parameters": {"type": "object", "properties": {}}}], "calls": []}
"""
LAMP = lambda template, number: templates.render(template, "", [ToolCall("lamp", {"number": number, "on": True})])
ANSWERS = ["```python\nprint(2 * int(input()))\n```", "```sql\nSELECT a FROM t WHERE a > 1\n```",
           "```javascript\nconsole.log(require('fs').readFileSync(0, 'utf8').toUpperCase());\n```",
           LAMP("hermes", 3), LAMP("hermes", "three"), LAMP("react", 3), "I cannot tell."]
LENGTH = 640


@pytest.fixture(name="config")
def _config(tmp_path) -> RunConfig:
    lines = [line for line in PROBLEMS.strip().splitlines() if "javascript" not in line or shutil.which("node")]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "calls.jsonl").write_text(CALLS.lstrip())
    folder = speaking.write(tmp_path / "model", ANSWERS, [PROBLEMS, CALLS, json.dumps(json.loads(CALLS.split("\n")[1]))] * 3, length=LENGTH)
    rollout = RolloutConfig(slots=24, max_turns=1, max_new_tokens=8, max_length=LENGTH, prefill_rows=8, prefill_chunk=128)
    learning = {"rows": 4, "sequence_length": LENGTH, "rollout": rollout,
                "optimizer": OptimizerConfig(learning_rate=3e-3, warmup_steps=0, weight_decay=0.0)}
    own = lambda name: {"data": str(tmp_path / f"{name}.jsonl"), "heldout_data": str(tmp_path / f"{name}.jsonl"), "edits": False}
    return RunConfig(
        init=str(folder), model=dataclasses.replace(hub.load_config(folder), dtype="float32", chunk_size=16), sandbox="local",
        workers=2, templates=("hermes",), heldout_templates=("react",), tasks=TasksConfig(train=0, heldout=0),
        problems=ProblemsConfig(**own("problems")), tool_calls=ToolCallsConfig(**own("calls")),
        experts=ExpertsConfig(names=("single_turn", "tool_format"), updates=3, prompts=2, group_size=8, max_staleness=0, **learning),
        distill=DistillConfig(updates=1, prompts=2, group_size=2, **learning),
        evaluate=EvaluateConfig(tasks=4, pass_k_tasks=2, samples=4, baseline="", sft_control=False, rollout=rollout))


@pytest.mark.slow
def test_from_rows_to_a_report(config, tmp_path) -> None:
    root = tmp_path / "run"
    results = run.run(config, root, stages=("experts", "distill", "evaluate", "report"))
    trained = results["experts"]["experts"]
    count = len((tmp_path / "problems.jsonl").read_text().splitlines())
    assert trained["single_turn"]["prompts"] == count and trained["tool_format"]["prompts"] == 2
    for name in trained:
        rows = [json.loads(line) for line in (root / "experts" / name / "metrics.jsonl").read_text().splitlines()]
        assert all(row["infrastructure"] == 0 for row in rows) and 0 < sum(row["reward"] for row in rows) < len(rows), rows
    models = results["evaluate"]["models"]
    assert list(models) == ["base", "expert_single_turn", "expert_tool_format", "unified"]
    for model in models.values():
        assert model["attempted"] == count and set(model["sampled_solved"]) == {"double", "above"}
        for part in (model["tool_format"], model["tool_format"]["unseen"]):
            assert part["calls"]["parsed"]["attempted"] == 2 and set(part["calls"]["by_kind"]) == {"given"}
        assert set(model["tool_format"]["unseen"]["calls"]["by_template"]) == {"react"}
    assert set(results["evaluate"]["headroom"]) == {"single_turn", "single_turn_sampled", "tool_format"}
    page, summary = ((root / "report" / name).read_text() for name in ("index.html", "summary.json"))
    assert "Calls of tools that users define" in page and "react, never trained on" in page and "no headroom" in page
    assert json.loads(summary)["tool_format"]["base"]["calls"]["right"]["attempted"] == 2
    changed = dataclasses.replace(config, problems=dataclasses.replace(config.problems, made=2))
    with pytest.raises(UserError, match=r"config\.problems\.made was 0 and is 2"):
        run.run(changed, root, stages=("evaluate",))


def test_what_is_refused_before_any_work(config, tmp_path) -> None:
    change = lambda name, **values: dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **values)})
    for wrong, message in (
            (change("evaluate", baseline="heuristic"), "--config.evaluate.baseline: 'heuristic'; plays the run's tasks, and expert single_turn"),
            (change("problems", edits=True), "--config.tasks.data: is empty and --config.tasks.train is 0"),
            (change("tool_calls", data=""), "--config.tool_calls.edits: is off, and there are no requests"),
            (change("tool_calls", kinds=("nested",)), "--config.tool_calls.kinds: 'nested'; allowed: plain, enum"),
            (change("experts", names=("single_turn",)), "--config.tool_calls.data: only expert tool_format reads it"),
            (change("web", judge_endpoint="http://u", judge_model="m"), "--config.web.judge_endpoint: only expert web reads it"),
            (change("evaluate", sft_control=True), "--config.evaluate.sft_control: continues stage sft")):
        with pytest.raises(UserError) as raised:
            run.run(wrong, tmp_path / "refused", stages=("experts", "distill", "evaluate"))
        assert message in str(raised.value)
    (tmp_path / "other.jsonl").write_text(CALLS.lstrip() + '{"id": "x", "prompt": "?", "tools": [], "calls": []}\n')
    with pytest.raises(UserError, match=r"other\.jsonl:3: field tools must be a list"):
        run.run(change("tool_calls", data=str(tmp_path / "other.jsonl")), tmp_path / "refused", stages=("experts",))
