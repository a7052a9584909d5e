"""The commands in the docstrings of recipes, for real and small: from files alone to models that are evaluated."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from qcn_jax import hub
from qcn_jax.chat.tokenizer import Tokenizer
from tests.chat import of_others
from tests.conftest import ROOT
from tests.pipeline import own_files

pytestmark = pytest.mark.slow


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory, qwen_tokenizer_path):
    """corpus/, chats.jsonl, tasks.jsonl, heldout.jsonl, and model/ with Qwen's own tokenizer and a template unlike ours; flags
    that name repositories."""
    folder = tmp_path_factory.mktemp("mine")
    folder.chmod(0o755)
    (folder / "corpus").mkdir()
    own_files.write_corpus(folder / "corpus" / "a.parquet")
    own_files.write_chats(folder / "chats.jsonl")
    own_files.write_model(folder / "model", Tokenizer.from_file(qwen_tokenizer_path), own_files.LENGTH)
    (folder / "model" / "chat_template.jinja").write_text(of_others.unmarked(of_others.TEMPLATES["thinking"]))
    return folder, own_files.write_tasks(folder)


def run(folder, recipe, *flags):
    """Runs a recipe's own command on the files of `folder`; returns the work directory and what was printed."""
    small = own_files.write_small(folder / f"small_{recipe}.py", recipe)
    arguments = own_files.documented(recipe)
    for number, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag == "--config":
            named = value.partition(":")[2].replace("MODEL_FOLDER", "model")
            arguments[number] = f"--config={small}:{named}@model"
        arguments[number] = arguments[number].replace("HF_FOLDER", "model").replace("=DIR", "=runs/all")
    done = subprocess.run([sys.executable, "-m", "qcn_jax", "run", *arguments, *flags], capture_output=True, text=True, check=False,
                          timeout=2700, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / next(argument for argument in arguments if argument.startswith("--workdir=")).partition("=")[2], done.stdout


def results(workdir, stage):
    return json.loads((workdir / stage / "DONE.json").read_text())["results"]


def check_model(folder, path):
    """A whole checkpoint with the tokenizer that the run began with."""
    config, params = hub.load(path)
    assert config == hub.load_config(folder / "model") and np.isfinite(params["norm"]["weight"]).all()
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (path / name).read_bytes() == (folder / "model" / name).read_bytes()


def test_experts_from_a_folder_on_a_file_of_tasks(folder):
    folder, flags = folder
    workdir, output = run(folder, "rl_swe", *flags)
    assert (results(workdir, "tasks")["train"], results(workdir, "tasks")["heldout"]) == (1, 1)
    experts, evaluated = results(workdir, "experts"), results(workdir, "evaluate")["models"]
    assert experts["start"] == "base" and list(evaluated) == ["base", "expert_swe", "unified"]
    (row,) = [json.loads(line) for line in (workdir / "experts" / "swe" / "metrics.jsonl").read_text().splitlines()]
    assert (row["episodes"], row["turns"], row["infrastructure"], row["blocked"]) == (2, 2, 0, 0)
    assert all(model["attempted"] == 1 and model["outcomes"]["infrastructure"] == 0 for model in evaluated.values())
    for model in ("experts/swe", "distill"):
        check_model(folder, workdir / model / "model")
    assert "sandbox: local" in output and not (workdir / "midtrain").exists() and not (workdir / "sft").exists()


def test_the_80b_learns_from_files_alone(folder):
    """Its command up to where it acts, which it does as the recipe above; test_config_checks asks for all stages."""
    folder, flags = folder
    workdir, _ = run(folder, "qwen3_coder_next", *flags, "--stages=tasks,midtrain,sft")
    midtrain = results(workdir, "midtrain")
    assert midtrain["sources"]["data"]["kept"] == 30 and results(workdir, "sft")["conversations"] == 20
    assert results(workdir, "tasks")["repos_train"] == ["tiny==1"]
    for model in ("midtrain", "sft"):
        check_model(folder, workdir / model / "model")
