"""qcn evaluate on predictions: the gold patch resolves, others do not, and bad input is named."""

import dataclasses
import json

import pytest

from qcn_jax.cli import main as cli
from qcn_jax.envs.patches import make_diff
from qcn_jax.envs.tasks.schema import Task, write_tasks
from qcn_jax.pipeline.evaluate import predictions
from tests.pipeline import chain
from tests.pipeline.micro import MODEL

PATH = "words/core.py"
GOOD = chain.HELDOUT_REPOSITORY[PATH]
TESTS = [f"tests/test_core.py::test_{name}" for name in ("count", "short", "long", "palindrome", "digit", "no_digit")]


def _task(name, good, bad, failing):
    assert GOOD.count(good) == 1
    buggy = GOOD.replace(good, bad)
    failing = [test for test in TESTS if test.rpartition("test_")[2] in failing]
    return Task(instance_id=name, repo="words==1.0", base_commit="", patch=make_diff({PATH: buggy}, {PATH: GOOD}),
                test_patch="", problem_statement="?", FAIL_TO_PASS=tuple(failing),
                PASS_TO_PASS=tuple(test for test in TESTS if test not in failing),
                bug_patch=make_diff({PATH: GOOD}, {PATH: buggy}), path=PATH, timeout=20.0)


@pytest.fixture(name="setting")
def _setting(tmp_path, monkeypatch):
    """(task by name, command that evaluates predictions and returns status)"""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    chain.write(tmp_path)
    tmp_path.chmod(0o755)
    tasks = [_task("count", "elif not inside", "elif inside", {"count"}),
             _task("short", "<= limit", "< limit", {"short"}),
             _task("digit", "return True\n    return False", "return True\n    return True", {"no_digit"})]
    write_tasks(tmp_path / "tasks.jsonl", tasks)

    def evaluate(rows, *more):
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (tmp_path / "preds.jsonl").write_text("".join(line + "\n" for line in lines))
        return cli.main(["evaluate", f"--predictions={tmp_path}/preds.jsonl", f"--tasks={tmp_path}/tasks.jsonl",
                         f"--out={tmp_path}/out", f"--repo={tmp_path}/words-1.0", "--sandbox=local", "--workers=1", *more])

    return {task.instance_id: task for task in tasks}, evaluate, tmp_path / "out"


def _prediction(name, patch, model="some/model"):
    return {"instance_id": name, "model_name_or_path": model, "model_patch": patch}


def test_gold_resolves_and_empty_and_wrong_patches_do_not(setting, capsys):
    tasks, evaluate, out = setting
    wrong = tasks["digit"].patch.replace("+    return False", "+    return None")
    assert wrong != tasks["digit"].patch
    assert evaluate([_prediction("count", tasks["count"].patch), _prediction("short", ""),
                     _prediction("digit", wrong)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["resolved"], printed["attempted"], printed["sandbox"]) == (1, 3, "local")
    assert printed["ci95"] == pytest.approx([0.0615, 0.7923], abs=1e-3)
    report = json.loads((out / "some__model.qcn.json").read_text())
    assert (report["resolved_ids"], report["unresolved_ids"], report["empty_patch_ids"]) == (["count"], ["digit"], ["short"])
    status = json.loads((out / "digit" / "report.json").read_text())["digit"]["tests_status"]
    assert status["FAIL_TO_PASS"]["failure"] == ["tests/test_core.py::test_no_digit"]
    assert len(status["PASS_TO_PASS"]["success"]) == 5


def test_a_task_without_prediction_is_not_resolved(setting, capsys):
    tasks, evaluate, _ = setting
    assert evaluate([_prediction("count", tasks["count"].patch)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["resolved"], printed["attempted"]) == (1, 3)


@pytest.mark.parametrize("rows, words", [
    (["{"], ["preds.jsonl:1", "JSON"]),
    ([[1]], ["preds.jsonl:1", "object"]),
    ([{"instance_id": "short", "model_patch": ""}], ["preds.jsonl:1", "model_name_or_path"]),
    ([{"instance_id": "count", "model_name_or_path": "m"}], ["preds.jsonl:1", "model_patch"]),
    ([_prediction("count", 3)], ["preds.jsonl:1", "model_patch"]),
    ([_prediction("none", "")], ["preds.jsonl:1", "'none'"]),
    ([_prediction("count", ""), _prediction("short", "", "n")], ["several models"]),
])
def test_bad_predictions_are_named(setting, capsys, rows, words):
    _, evaluate, _ = setting
    assert evaluate(rows) == 1
    error = capsys.readouterr().err
    assert all(word in error for word in words) and error.count("\n") == 1, error


def test_bad_predictions_among_good_ones_are_named_and_counted(setting, capsys):
    tasks, evaluate, _ = setting
    rows = [_prediction("count", ""), _prediction("count", tasks["count"].patch), {"instance_id": "short", "model_patch": ""}]
    assert evaluate(rows) == 0
    captured = capsys.readouterr()
    assert "preds.jsonl:2" in captured.err and "second time" in captured.err and "preds.jsonl:3" in captured.err
    printed = json.loads(captured.out)
    assert (printed["resolved"], printed["attempted"], printed["bad_rows"]) == (0, 3, 2)


ROWS = [_prediction("count", "a"), _prediction("short", None)]


@pytest.mark.parametrize("text", [
    json.dumps({row["instance_id"]: row for row in ROWS}, indent=2), json.dumps(ROWS), json.dumps(ROWS, indent=1),
    json.dumps({row["instance_id"]: {"model_name_or_path": "some/model", "model_patch": row["model_patch"]} for row in ROWS}),
    "".join(json.dumps(row) + "\n" for row in ROWS)], ids=["by_id", "list", "lines_of_list", "without_ids", "json_lines"])
@pytest.mark.parametrize("name", ["preds.json", "preds.jsonl", "all_preds"])
def test_predictions_come_as_agents_and_swebench_write_them(tmp_path, text, name):
    """SWE-agent and mini-swe-agent write preds.json by id; swebench.harness.utils takes that, lists and JSON lines."""
    (tmp_path / name).write_text(text)
    found = predictions.read_predictions(tmp_path / name, dict.fromkeys(("count", "short")))
    assert [(row.instance_id, row.model, row.patch) for row in found] == [
        ("count", "some/model", "a"), ("short", "some/model", "")]
    (tmp_path / name).write_text(json.dumps(ROWS[0]))
    assert len(predictions.read_predictions(tmp_path / name, {"count": None})) == 1


@pytest.mark.parametrize("arguments, words", [
    ([], ["--tasks"]), (["--tasks=none.jsonl", "--out=o", "--predictions=p"], ["none.jsonl"]),
    (["--tasks=none.jsonl", "--out=o"], ["--checkpoint", "--predictions"]),
])
def test_bad_flags_are_named(capsys, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", *arguments]) == 1
    error = capsys.readouterr().err
    assert all(word in error for word in words) and error.count("\n") == 1, error


@pytest.mark.slow
def test_a_checkpoint_acts_and_its_patches_are_graded(setting, capsys, tmp_path):
    """A model of random weights: it resolves nothing, and every step on the way to that verdict is real."""
    import jax
    import jax.numpy as jnp

    from qcn_jax import hub
    from qcn_jax.chat.tokenizer import Tokenizer
    from qcn_jax.model import Qwen3Next
    from qcn_jax.pipeline.stages.midtrain import ADDED_TOKENS
    from qcn_jax.recipes.nano.spans import LINE_TOKENS

    tokenizer = Tokenizer.train([GOOD] * 3, 400, (*ADDED_TOKENS, *LINE_TOKENS))
    config = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size, max_position_embeddings=256)
    params = jax.jit(Qwen3Next(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    hub.save(tmp_path / "model", config, jax.device_get(params), tokenizer)
    _, _, out = setting
    assert cli.main(["evaluate", f"--checkpoint={tmp_path}/model", f"--tasks={tmp_path}/tasks.jsonl", f"--out={out}",
                     f"--repo={tmp_path}/words-1.0", "--sandbox=local", "--max_turns=2", "--max_new_tokens=8",
                     "--max_length=256", "--slots=4"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["resolved"], printed["attempted"]) == (0, 3)
    rows = [json.loads(line) for line in (out / "preds.jsonl").read_text().splitlines()]
    assert {row["instance_id"] for row in rows} == {"count", "short", "digit"}
    assert {row["model_patch"] for row in rows} == {""}
    assert json.loads((out / "summary.json").read_text()) == printed
