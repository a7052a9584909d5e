"""A package that qcn_jax has never heard of brings a scaffold, an expert, trajectories and an objective to `qcn run`."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.pipeline import chain

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = '''
import runpy


def get_config():
    config = runpy.run_path({micro!r})["get_config"]()
    for stage in (config.sft, config.experts, config.distill, config.evaluate):
        stage.scaffold = "terse_recipe.scaffold:SCAFFOLD"
    config.sft.sources = {{"fixes": {{"kind": "terse_recipe.trajectories:SOURCE", "path": "", "share": 1.0, "options": {{"checks": 1}}}}}}
    config.experts.names = ("swe", "terse_recipe.expert:CAREFUL")
    config.experts.objective = "terse_recipe.expert:plain_gradient"
    config.evaluate.baseline, config.evaluate.sft_control, config.evaluate.samples = "", False, 0
    config.tokenizer.added_tokens, config.midtrain.sources.edits.share = (), 0.0
    config.midtrain.train.steps = config.sft.train.steps = 2
    config.experts.updates = config.distill.updates = 1
    return config
'''


def run(folder, *more):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "thirdparty")])}
    command = [sys.executable, "-m", "qcn_jax", "run", f"--config={folder}/config.py", f"--workdir={folder}/run", *more]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800, env=environment)


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thirdparty")
    folder.chmod(0o755)
    (folder / "config.py").write_text(CONFIG.format(micro=str(chain.write(folder))))
    return folder


@pytest.mark.parametrize("override, words", [
    ("--config.sft.sources.fixes.kind=nano", "--config.sft.sources.fixes.options.checks: unknown key"),
    ("--config.experts.names=terse_recipe.expert:Careful", "is a type; expert needs an Expert"),
    ("--config.experts.names=terse_recipe.expert:CAREFUL,single_turn", "scaffold terse cannot present a task"),
    ("--config.evaluate.baseline=heuristic", "plays several turns with nano's tools"),
])
def test_what_does_not_fit_is_one_line_before_any_work(folder, override, words):
    done = run(folder, override)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (folder / "run" / "tasks").exists()


@pytest.mark.slow
def test_a_strangers_recipe_runs_through_every_stage(folder):
    done = run(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = lambda stage: json.loads((folder / "run" / stage / "DONE.json").read_text())["results"]
    assert list(results("sft")["labels"]) == ["terse"] and results("sft")["conversations"] > 0
    assert list(results("experts")["experts"]) == ["swe", "careful"]
    assert {"loss/swe", "loss/careful"} <= set(results("distill")["last"])
    summary = json.loads((folder / "run" / "report" / "summary.json").read_text())
    assert list(summary["models"]) == ["base", "midtrain", "sft", "expert_swe", "expert_careful", "unified"]
    for name, model in summary["models"].items():
        assert list(model) == ["resolved", "attempted", "rate", "ci95", "pass_at_8", "looked"]
        assert model["attempted"] == summary["careful"][name]["attempted"] > 0 and 0 <= model["looked"] <= 1
    assert summary["baselines"] == {} and set(summary["retention"]) == {"swe", "careful"}
    assert {"expert_careful_vs_sft_careful", "expert_careful_vs_expert_swe_careful"} <= set(summary["tests"])
    page = (folder / "run" / "report" / "index.html").read_text()
    assert "careful &lt;expert&gt;" in page and "careful <expert>" not in page
    vocabulary = json.loads((folder / "run" / "midtrain" / "tokenizer" / "tokenizer.json").read_text())
    assert not any(token["content"] == "<|1|>" for token in vocabulary["added_tokens"])
