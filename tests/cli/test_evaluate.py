"""qcn evaluate on predictions: the gold patch resolves, others do not, and bad input is named."""

import dataclasses
import json

import pytest

from qcn_jax.chat import endpoint
from qcn_jax.cli import main as cli
from qcn_jax.config import ChatSource
from qcn_jax.envs.patches import make_diff
from qcn_jax.envs.tasks import predictions
from qcn_jax.envs.tasks.schema import write_tasks
from qcn_jax.pipeline.data.readers import chat
from qcn_jax.pipeline.data.texts import Findings
from tests.agents import playing
from tests.pipeline import chain
from tests.pipeline.micro import MODEL

GOOD = playing.GOOD


@pytest.fixture(name="cache", scope="module")
def _cache(tmp_path_factory):
    """A folder in which the repository is prepared once."""
    folder = tmp_path_factory.mktemp("cache")
    folder.chmod(0o755)
    return folder


@pytest.fixture(name="setting")
def _setting(tmp_path, monkeypatch, cache):
    """(task by name, command that evaluates predictions and returns status)"""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    chain.write(tmp_path)
    tmp_path.chmod(0o755)
    tasks = [playing.words(name) for name in ("count", "short", "digit")]
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
    ([], ["--predictions=", "preds.jsonl: holds no prediction"]),
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
    ([], ["--out"]), (["--out=o", "--checkpoint=c"], ["--tasks", "--repo"]), (["--tasks=none.jsonl", "--out=o", "--predictions=p"], ["none.jsonl"]),
    (["--tasks=none.jsonl", "--out=o"], ["--checkpoint", "--predictions", "--endpoint"]),
    (["--tasks=none.jsonl", "--out=o", "--endpoint=http://localhost:1/v1"], ["--model"]),
    (["--tasks=none.jsonl", "--out=o", "--baseline=heuristic", "--export=x"], ["--export", "junit"]),
    (["--tasks=none.jsonl", "--out=o", "--endpoint=http://localhost:1/v1", "--model=m"], ["localhost:1", "cannot be reached"]),
    (["--tasks=none.jsonl", "--out=o", "--endpoint=http://localhost:1/v1", "--model=m", "--scaffold=s"], ["--scaffold", "mini_swe_agent"]),
    (["--out=o", "--endpoint=http://localhost:1/v1", "--model="], ["--model: is empty"]),
    (["--out=o", "--endpoint=u", "--model=m", "--temperature=nan"], ["--temperature=nan: must be finite"]),
    (["--out=o", "--endpoint=u", "--model=m", "--max_seconds=inf"], ["--max_seconds=inf: must be finite"]),
    (["--tasks=t", "--out=o", "--predictions=p", "--attempts=3"], ["--attempts: who made --predictions has acted already; leave it out"]),
    (["--tasks=t", "--out=o", "--baseline=heuristic", "--scaffold=swe_agent"], ["--scaffold=swe_agent: baseline heuristic"]),
    (["--tasks=t", "--out=o", "--checkpoint=nowhere"], ["nowhere/config.json"]),
    (["--tasks=none.jsonl", "--out=o", "--baseline=heuristic", "--num_blocks=9"], ["--num_blocks: only a --checkpoint is run here"]),
    (["--tasks=none.jsonl", "--out=o", "--baseline=heuristic", "--redraws=2"], ["--redraws: only a --checkpoint is run here"]),
    (["--tasks=none.jsonl", "--out=o", "--checkpoint=c", "--redraws=2", "--scaffold=swe_agent"], ["--redraws=2", "--scaffold=swe_agent"]),
])
def test_bad_flags_are_named(capsys, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", *arguments]) == 1
    error = capsys.readouterr().err
    assert all(word in error for word in words) and error.count("\n") == 1, error


def test_a_folder_cannot_be_compared_with_itself(capsys, tmp_path):
    assert cli.main(["compare", str(tmp_path), f"{tmp_path}/."]) == 1
    assert capsys.readouterr().err == f"qcn compare: {tmp_path}: is given twice\n"


def test_a_command_that_came_to_nothing_may_be_corrected_and_one_that_lost_all_says_so(setting, played, monkeypatch):
    """Every episode fails: no status of success; with another model after nothing was written, no refusal."""
    (evaluate, _), out = played, setting[2]
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    status, _, errors = evaluate("refused", "--invalid=keep")
    assert status == 1 and "answers 400" in errors
    (out / "episodes.jsonl").unlink()
    status, summary, errors = evaluate("down", "--invalid=keep")
    assert (status, summary["attempted"], summary["infrastructure"]) == (1, 0, 3)
    assert "down: 3 of 3 episodes were lost to the infrastructure" in errors and "answers 503" in errors
    status, _, errors = evaluate("gold", "--invalid=keep")
    assert status == 1 and "holds what was made with --model=down, and now it is gold" in errors


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
                     "--max_length=256", "--block_size=64", "--num_blocks=2"]) == 1
    assert "--num_blocks: 2, 2 of 64 tokens on each device; allowed: at least 5" in capsys.readouterr().err
    assert cli.main(["evaluate", f"--checkpoint={tmp_path}/model", f"--tasks={tmp_path}/tasks.jsonl", f"--out={out}",
                     f"--repo={tmp_path}/words-1.0", "--sandbox=local", "--max_turns=2", "--max_new_tokens=8",
                     "--max_length=256", "--parallel=4", "--attempts=2", "--temperature=1", "--invalid=keep",
                     "--max_num_seqs=2", "--block_size=64", "--num_blocks=10"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["resolved"], printed["attempted"], printed["scaffold"]) == (0, 6, "nano")
    rows = [json.loads(line) for line in (out / "preds.jsonl").read_text().splitlines()]
    assert {row["instance_id"] for row in rows} == {"count", "short", "digit"}
    assert {row["model_patch"] for row in rows} == {""}
    assert json.loads((out / "summary.json").read_text()) == printed


@pytest.fixture(name="played")
def _played(setting, capsys):
    """(command that lets a model of `playing` act and returns status, what it prints, and its errors; requests)"""
    _, _, out = setting

    with playing.serve() as (url, asked, _):
        def evaluate(model, *more):
            status = cli.main(["evaluate", f"--endpoint={url}", f"--model={model}", f"--tasks={out.parent}/tasks.jsonl",
                               f"--out={out}", f"--repo={out.parent}/words-1.0", "--sandbox=local", "--isolation=shared",
                               "--workers=1", "--max_turns=4", *more])
            printed = capsys.readouterr()
            return status, printed.out and json.loads(printed.out), printed.err

        yield evaluate, asked


def test_a_model_behind_an_endpoint_acts(setting, played):
    (evaluate, asked), out = played, setting[2]
    status, summary, errors = evaluate("mixed", "--attempts=2", "--temperature=0.5")
    assert status == 0 and "episode" in errors
    assert (summary["resolved"], summary["attempted"], summary["limit"], summary["unresolved"]) == (2, 6, 2, 2)
    assert summary["pass_at"]["2"]["rate"] == pytest.approx(1 / 3) and summary["scaffold"] == "mini_swe_agent"
    assert summary["guard"] == {"allowed": summary["turns"]}
    assert json.loads((out / "mixed.qcn.json").read_text())["resolved_ids"] == ["count"]
    assert [json.loads(line)["outcomes"] for line in (out / "results.jsonl").read_text().splitlines()] == [
        ["resolved"] * 2, ["unresolved"] * 2, ["limit"] * 2]
    before = dict(asked)
    assert evaluate("mixed", "--attempts=2", "--temperature=0.5")[:2] == (0, summary) and dict(asked) == before
    status, _, errors = evaluate("mixed", "--attempts=2", "--temperature=0.7")
    assert status == 1 and errors.count("\n") == 1 and "--temperature=0.5" in errors and "0.7" in errors


def test_tasks_that_are_not_valid_are_named_before_anybody_acts(setting, played):
    (evaluate, asked), (tasks, _, out) = played, setting
    broken = dataclasses.replace(tasks["short"], patch=tasks["digit"].patch)
    write_tasks(out.parent / "tasks.jsonl", [tasks["count"], broken])
    status, _, errors = evaluate("gold")
    assert status == 1 and not asked and "1 of 2 tasks are not valid, such as short" in errors and "--invalid=skip" in errors
    status, summary, errors = evaluate("gold", "--invalid=skip")
    assert (status, summary["resolved"], summary["attempted"]) == (0, 1, 1)


@pytest.mark.slow
def test_models_are_compared_on_a_repository(setting, capsys):
    """Which of two models is best on a repository of one's own: tasks made, checked, played, a page."""
    out = setting[2]
    with playing.serve(playing.putting(playing.PATH, playing.GOOD)) as (url, asked, _):
        command = ["evaluate", f"--repo={out.parent}/words-1.0", f"--endpoint={url}", "--model=gold", "--model=empty",
                   f"--out={out}", "--count=2", "--sandbox=local", "--isolation=shared", "--workers=1", "--max_turns=3",
                   "--export=junit,harbor,swe_agent"]
        assert cli.main(command) == 0
        assert "won 2, lost 0" in capsys.readouterr().out
        found = json.loads((out / "comparison.json").read_text())
        assert found["tasks"] == 2 and [one["model"] for one in found["evaluations"]] == ["gold", "empty"]
        assert "<table>" in (out / "index.html").read_text() and (out / "1_gold/junit.xml").exists()
        assert len(list(out.glob("2_empty/swe_agent/*/*.traj"))) == 2 == len(list(out.glob("1_gold/harbor/*/result.json")))
        before = dict(asked)
        assert cli.main(command) == 0 and dict(asked) == before


def test_what_execution_verifies_is_collected(setting, capsys):
    out = setting[2].parent / "chats.jsonl"
    with playing.serve() as (url, asked, _):
        command = ["collect", f"--tasks={out.parent}/tasks.jsonl", f"--endpoint={url}", "--model=mixed", f"--out={out}",
                   f"--repo={out.parent}/words-1.0", "--sandbox=local", "--isolation=shared", "--workers=1",
                   "--max_turns=3", "--attempts=2", "--temperature=1"]
        assert cli.main(command) == 0
        assert "kept 1 of 6 episodes, of 1 of 3 tasks; dropped: duplicate 1, limit 2, unresolved 2" in capsys.readouterr().out
        before, text = dict(asked), out.read_text()
        assert cli.main(command) == 0 and dict(asked) == before and out.read_text() == text
    yields = json.loads((out.parent / "chats.jsonl.yields.json").read_text())
    assert yields["by_task"]["count"] == {"tried": 2, "kept": 1, "duplicate": 1}
    (conversation,) = chat._read(ChatSource(path=str(out)), chat.Options(resolved=True, submitted=True),
                                 Findings("stop", "--config.sft.malformed"))
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert "Let me see." in conversation.messages[2]["content"] and "elif not inside" in conversation.messages[2]["content"]


def test_a_failing_test_is_mended_and_the_repository_is_not_touched(setting, capsys):
    out = setting[2]
    place = out.parent / "mine"
    chain.write(place)
    source = place / "words-1.0" / playing.PATH
    good, bad, _ = playing.DEFECTS["count"]
    source.write_text(source.read_text().replace(good, bad))
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    more = "echo 'import os' > conftest.py; mkdir -p .github/workflows; echo 'on: push' > .github/workflows/a.yml"
    with playing.serve(playing.putting(playing.PATH, playing.GOOD, more)) as (url, _, _):
        def fix(model, test="tests/test_core.py::test_count"):
            return cli.main(["fix", f"--repo={place}/words-1.0", f"--test={test}", f"--endpoint={url}", f"--model={model}",
                             "--sandbox=local", "--isolation=shared", "--workers=1", "--max_turns=3"])

        assert fix("gold") == 0
        printed = capsys.readouterr()  # and nothing that no test judged, for `git apply`
        assert printed.out == make_diff({playing.PATH: source.read_text()}, {playing.PATH: playing.GOOD})
        assert "left out: '.github/workflows/a.yml' is hidden\nleft out: 'conftest.py' is a test" in printed.err
        assert fix("empty") == 1
        printed = capsys.readouterr()
        assert printed.out == "" and "not mended in 1 attempts; the last: unresolved, ended by submitted" in printed.err
        for test, words in (("tests/test_core.py::test_none", "no such test; tests that fail: tests/test_core.py::test_count"),
                            ("tests/test_core.py::test_long", "passes already")):
            assert fix("gold", test) == 1 and words in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
