"""Stage midtrain on a micro model: killed and resumed it ends in the same bytes; every start is checked."""

import dataclasses
import json
import pathlib
import runpy
import signal
import subprocess
import sys

import numpy as np
import pytest

from qcn_jax import files, hub
from qcn_jax.config import (
    MidtrainConfig,
    OptimizerConfig,
    PhaseConfig,
    RunConfig,
    TasksConfig,
    TextSource,
    TokenizerConfig,
    TrainConfig,
    from_config_dict,
)
from qcn_jax.envs.sandbox.base import RepositorySpec
from qcn_jax.pipeline import models
from qcn_jax.pipeline.context import Shared, StageContext
from qcn_jax.pipeline.stages import midtrain
from qcn_jax.pipeline.train import trainer
from qcn_jax.pipeline.train.metrics import read_metrics
from qcn_jax.pipeline.train.step import make_step
from qcn_jax.recipes.nano.spans import LINE_TOKENS
from tests.pipeline import chain
from tests.pipeline.micro import MODEL

pytestmark = pytest.mark.slow

VOCABULARY, STEPS = 384, 6
CONFIG = RunConfig(
    init="random", workers=1, model=dataclasses.replace(MODEL, vocab_size=VOCABULARY),
    tokenizer=TokenizerConfig(vocab_size=VOCABULARY, added_tokens=LINE_TOKENS), tasks=TasksConfig(),
    midtrain=MidtrainConfig(
        sources={name: TextSource(kind="nano", form=form, share=share, megabytes=0.03) for name, form, share in (
            ("repository", "repository", 0.3), ("fim", "fim", 0.2), ("edits", "nano_edits", 0.5))},
        train=TrainConfig(steps=STEPS, rows=2, sequence_length=512, mtp_coef=0.0, checkpoint_every=2, log_every=1,
                          optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2))))


def _context(root, config=CONFIG, lines=None):
    """A work directory whose stage tasks has finished with the two small repositories."""
    folder = root / "repositories"
    chain.write(folder)
    specs = [RepositorySpec(name=f"{name}==1.0", archive=str(folder / f"{name}-1.0")) for name in ("shapes", "words")]
    files.write_json(root / "tasks" / "repositories.json", [dataclasses.asdict(spec) for spec in specs])
    files.write_json(root / "tasks" / "DONE.json", {"results": {"repos_train": ["shapes==1.0"],
                                                                "repos_heldout": ["words==1.0"]}})
    context = StageContext(config, root, "midtrain", Shared(config, root))
    object.__setattr__(context, "log", (lines if lines is not None else []).append)
    return context


def run_and_die(root, calls, config=CONFIG, phase=1):
    """Called in a child process: a stage that is killed before step number `calls` that it does of a phase."""
    made = []

    def dying(*arguments):
        step, seen = make_step(*arguments), []
        made.append(step)
        number = len(made)

        def count(state, batch, frozen):
            seen.append(1)
            if len(seen) == calls and number == phase:
                import os
                os.kill(os.getpid(), signal.SIGKILL)
            return step(state, batch, frozen)

        return count

    trainer.make_step = dying
    midtrain.run_stage(_context(pathlib.Path(root), config))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    lines = []
    return root, midtrain.run_stage(_context(root, lines=lines)), lines


def test_results_curves_and_files(whole):
    root, results, lines = whole
    assert results["steps"] == STEPS and results["tokens"] == STEPS * 1024
    assert results["shares"] == {"repository": 0.3, "fim": 0.2, "edits": 0.5}
    assert results["packing"]["fragmentation"] == 0 and results["seconds_per_step"] > 0
    assert json.loads(json.dumps(results)) == results
    rows = read_metrics(root / "midtrain" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)) and rows[-1]["ce"] < rows[0]["ce"]
    config, params = hub.load(root / "midtrain" / "model")
    _, base = models.initial(CONFIG)
    assert config.hidden_size == MODEL.hidden_size and results["init"] == {"init": "random"}
    assert np.abs(params["norm"]["weight"] - base["norm"]["weight"]).max() > 0
    assert any(line.startswith("repository: ") and " kept" in line for line in lines)
    assert results["sources"]["fim"]["kept"] == results["sources"]["fim"]["read"] > 0


def test_tokenizer_and_corpus_know_nothing_of_heldout_repositories(whole):
    root, _, _ = whole
    context = _context(root)
    text = json.dumps([dataclasses.asdict(text) for text in midtrain.read_texts(context)["fim"]])
    assert "first_missing" in text and "is_palindrome" not in text
    assert "palindrome" not in (root / "midtrain" / "tokenizer" / "tokenizer.json").read_text()
    added = (*midtrain.ADDED_TOKENS, *LINE_TOKENS)
    assert [context.tokenizer().id(token) for token in added] == list(range(VOCABULARY - len(added), VOCABULARY))


def test_a_copy_of_heldout_code_in_a_training_repository_is_left_out(tmp_path):
    context = _context(tmp_path)
    copy = tmp_path / "repositories" / "shapes-1.0" / "shapes" / "borrowed.py"
    copy.write_text("# renamed\n" + chain.HELDOUT_REPOSITORY["words/core.py"])
    stores = midtrain.read_texts(context)
    paths = [text.path for text in stores["repository"] if text.repo == "shapes==1.0"]
    assert "shapes/core.py" in paths and "shapes/borrowed.py" not in paths
    assert stores["edits"].folder == stores["repository"].folder  # read once
    assert stores["fim"].summary["left_out"]["copies of held-out code"] == 1


def test_killed_and_resumed_gives_the_same_bytes(whole, tmp_path):
    code = (f"import sys; sys.path[:0] = [{str(pathlib.Path(__file__).parents[3])!r}]\n"
            f"from tests.pipeline.stages import test_midtrain as t; t.run_and_die({str(tmp_path)!r}, 6)")
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    assert not (tmp_path / "midtrain" / "model").exists()
    lines = []
    results = midtrain.run_stage(_context(tmp_path, lines=lines))
    # The checkpoint of step 4 may still have been on its way to the disk.
    assert any(line.startswith(("resumes at step 2", "resumes at step 4")) for line in lines)
    weights = lambda root: (root / "midtrain" / "model" / "model.safetensors").read_bytes()
    assert weights(tmp_path) == weights(whole[0])
    same = lambda values: {k: v for k, v in values.items() if k != "seconds_per_step"}
    assert same(results) == same(whole[1])


# Rows grow from 512 tokens to 1024, as the mixture changes.
PHASED = dataclasses.replace(CONFIG, midtrain=dataclasses.replace(CONFIG.midtrain, phases=(
    PhaseConfig(steps=3), PhaseConfig(steps=3, sequence_length=1024, rows=1, shares={"repository": 0.8}))))


def test_phases_follow_one_another_and_a_resume_across_the_boundary_changes_nothing(tmp_path):
    (tmp_path / "whole").mkdir()
    lines = []
    whole = midtrain.run_stage(_context(tmp_path / "whole", PHASED, lines))
    assert whole["steps"] == STEPS and whole["tokens"] == STEPS * 1024 and whole["shares"]["repository"] == 0.8
    assert whole["phases"] == [{"steps": 3, "rows": 2, "sequence_length": 512},
                               {"steps": 3, "rows": 1, "sequence_length": 1024}]
    assert any(line.startswith("phase 2 of 2: steps 4 to 6") for line in lines)
    # Killed at the first step of the second phase, and in it.
    for phase, calls in ((2, 1), (2, 3)):
        code = (f"import sys; sys.path[:0] = [{str(pathlib.Path(__file__).parents[3])!r}]\n"
                "from tests.pipeline.stages import test_midtrain as t\n"
                f"t.run_and_die({str(tmp_path / 'killed')!r}, {calls}, t.PHASED, {phase})")
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
        assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    lines = []
    results = midtrain.run_stage(_context(tmp_path / "killed", PHASED, lines))
    assert any(line.startswith(("resumes at step 3", "resumes at step 4")) for line in lines)
    weights = lambda name: (tmp_path / name / "midtrain" / "model" / "model.safetensors").read_bytes()
    assert weights("killed") == weights("whole")
    same = lambda values: {k: v for k, v in values.items() if k != "seconds_per_step"}
    assert same(results) == same(whole)
    curve = lambda name: [(row["step"], row["loss"], row["learning_rate"])
                          for row in read_metrics(tmp_path / name / "midtrain" / "metrics.jsonl")]
    assert curve("killed") == curve("whole") and [step for step, *_ in curve("whole")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("name", ["nano", "nano_long"])
def test_the_packaged_base_fits_the_laptop_configurations(name, tmp_path):
    path = pathlib.Path(__file__).parents[3] / "configs" / f"{name}.py"
    config = from_config_dict(RunConfig, runpy.run_path(str(path))["get_config"]())
    context = StageContext(config, tmp_path, "midtrain", Shared(config, tmp_path))
    midtrain.check_initial(config)
    model, params = models.load(context, "base")
    _, packaged = hub.load(models.INITIAL("base"))
    np.testing.assert_array_equal(params["lm_head"]["kernel"], packaged["lm_head"]["kernel"])
    assert model == config.model and "mtp" in params
