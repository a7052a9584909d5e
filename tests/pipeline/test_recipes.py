"""The commands in the docstrings of recipes, for real and small: from files alone to models that are evaluated."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from qcn_jax import hub
from qcn_jax.agents.scaffolds.mini_swe_agent import MINI_SWE_AGENT
from qcn_jax.chat.tokenizer import Tokenizer
from tests.agents import playing
from tests.chat import of_others
from tests.conftest import ROOT
from tests.inference import speaking
from tests.pipeline import own_files

pytestmark = pytest.mark.slow
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


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


def command(folder, recipe, *flags, model="model"):
    """A recipe's own command on the files of `folder`."""
    small = own_files.write_small(folder / f"small_{recipe}.py", recipe)
    arguments = own_files.documented(recipe)
    for number, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag == "--config":
            named = value.partition(":")[2].replace("MODEL_FOLDER", model)
            arguments[number] = f"--config={small}:{named}@{model}"
        arguments[number] = arguments[number].replace("HF_FOLDER", model).replace("=DIR", "=runs/all")
    return [sys.executable, "-m", "qcn_jax", "run", *arguments, *flags]


def run(folder, recipe, *flags, **more):
    """Runs that command; returns the work directory and what was printed."""
    words = command(folder, recipe, *flags, **more)
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=2700, cwd=folder, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / next(word for word in reversed(words) if word.startswith("--workdir=")).partition("=")[2], done.stdout


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


MENDS = "sed -i 's/if value > low/if value < low/; s/n % 2 == 1/n % 2 == 0/' calc/core.py"
SPOKEN = [playing.block(MENDS), playing.SUBMIT, playing.block("curl -L https://github.com/tiny/calc/archive/main.zip")]


def test_live_sessions_are_killed_and_go_on(folder):
    """A model that mends, submits or looks for the fix outside, by chance: it has a shell, the guard counts, rewards differ."""
    folder, flags = folder
    speaking.write(folder / "speaker", SPOKEN, [MINI_SWE_AGENT.system, MINI_SWE_AGENT.instance], length=2048)
    more = [f"--config.{stage}.{key}={value}" for stage in ("experts", "distill") for key, value in
            {"sequence_length": 2048, "group_size": 6, "updates": 2, "rollout.slots": 6, "rollout.max_turns": 3,
             "rollout.max_length": 2048}.items()]
    more += ["--config.evaluate.rollout.max_length=2048", "--workdir=runs/spoken"]
    words = command(folder, "rl_swe", *flags, *more, model="speaker")
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=ENVIRONMENT)
    seen = []
    for line in child.stdout:
        seen.append(line)
        if line.startswith("[ experts") and (folder / "runs/spoken/experts/swe/metrics.jsonl").exists():
            child.kill()  # an update is done, the other is not
            break
    child.communicate(timeout=600)
    assert child.returncode == -9, "".join(seen)
    workdir, output = run(folder, "rl_swe", *flags, *more, model="speaker")
    assert "experts" in output and "resumes" in output
    rows = [json.loads(line) for line in (workdir / "experts/swe/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(row["infrastructure"] == 0 for row in rows)
    assert sum(row["blocked"] for row in rows) > 0 and any(0 < row["resolved"] < 6 for row in rows), rows
    evaluated = results(workdir, "evaluate")["models"]
    assert all(model["resolved"] == model["attempted"] == 1 for model in evaluated.values())  # greedily it mends at once


def test_the_80b_learns_from_files_alone(folder):
    """Its command up to where it acts, which it does as the recipe above; test_config_checks asks for all stages."""
    folder, flags = folder
    workdir, _ = run(folder, "qwen3_coder_next", *flags, "--stages=tasks,midtrain,sft")
    midtrain = results(workdir, "midtrain")
    assert midtrain["sources"]["data"]["kept"] == 30 and results(workdir, "sft")["conversations"] == 20
    assert results(workdir, "tasks")["repos_train"] == ["tiny==1"]
    for model in ("midtrain", "sft"):
        check_model(folder, workdir / model / "model")
