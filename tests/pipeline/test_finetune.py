"""configs/finetune.py: from a model's folder, a Parquet corpus and a file of chats, and nothing else, to a model."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from qcn_jax import hub
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.pipeline.stages.midtrain import ADDED_TOKENS
from tests.pipeline import own_files

ROOT = pathlib.Path(__file__).resolve().parents[2]
VOCABULARY, LENGTH = 384, 96


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    own_files.write_corpus(folder / "corpus.parquet", [{"content": None, "license": "MIT"}])
    own_files.write_chats(folder / "chats.jsonl")
    own_files.write_model(folder / "model", Tokenizer.train(own_files.texts(), VOCABULARY, ADDED_TOKENS), LENGTH)
    return folder


def run(folder, *more):
    command = [sys.executable, "-m", "qcn_jax", "run", f"--config=finetune:{folder}/model", f"--workdir={folder}/run",
               "--stages=midtrain,sft", f"--config.midtrain.data={folder}/*.parquet", f"--config.sft.data={folder}/chats.jsonl",
               *(f"--config.{stage}.train.{key}" for stage in ("midtrain", "sft") for key in ("steps=2", "rows=2")), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=2700, cwd=folder,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_a_malformed_row_stops_the_run_by_file_row_and_reason(folder):
    done = run(folder)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"{folder}/corpus.parquet:31: its text is null, expected text; --config.midtrain.malformed=skip" in done.stderr


@pytest.mark.slow
def test_the_recipe_trains_on_files_alone(folder):
    done = run(folder, "--config.midtrain.malformed=skip")
    assert done.returncode == 0, done.stderr[-3000:]
    results = {stage: json.loads((folder / "run" / stage / "DONE.json").read_text())["results"] for stage in ("midtrain", "sft")}
    source = results["midtrain"]["sources"]["data"]
    assert (source["read"], source["kept"], source["malformed"]) == (31, 30, 1) and "corpus.parquet:31" in source["malformed_rows"][0]
    assert results["sft"]["sources"]["data"]["kept"] == results["sft"]["conversations"] == 20
    assert 0 < results["sft"]["loss_tokens"] < results["sft"]["document_tokens"]
    before = hub.load(folder / "model")[1]
    for stage in ("midtrain", "sft"):
        config, params = hub.load(folder / "run" / stage / "model")
        assert config == hub.load(folder / "model")[0] and np.isfinite(params["norm"]["weight"]).all()
        assert np.abs(params["lm_head"]["kernel"] - before["lm_head"]["kernel"]).max() > 0
        before = params
    assert not (folder / "run" / "sandbox").exists() and not (folder / "run" / "tasks").exists()
