"""A tiny model and tasks, on which two processes of four emulated devices run stage `experts` as two hosts."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping

from qcn_jax import testing
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.pipeline.stages.midtrain import ADDED_TOKENS
from tests.pipeline import chain, own_files

ROOT = pathlib.Path(__file__).resolve().parent.parent
LENGTH = 1280  # of episodes: mini_swe_agent's instructions are 900 of this vocabulary's tokens
PROMPTS, GROUP = 4, 4  # of an update, and episodes of each
MESH = ("--config.mesh.fsdp=4", "--config.mesh.expert=2")
SETTINGS = (
    *MESH, "--config.experts.max_staleness=1",
    *(f"--config.experts.{setting}" for setting in (
        "rows=8", f"prompts={PROMPTS}", f"group_size={GROUP}", "burst=8", f"sequence_length={LENGTH}")),
    *(f"--config.experts.rollout.{setting}" for setting in (
        "slots=32", "max_turns=4", "max_new_tokens=16", f"max_length={LENGTH}")))


def command(folder: pathlib.Path, workdir: str, stages: str, *settings: str) -> list[str]:
    """`qcn run` of some stages in a work directory of `folder`."""
    paths = {"init": "model", "tasks.data": "tasks.jsonl", "tasks.heldout_data": "heldout.jsonl"}
    return [sys.executable, "-m", "qcn_jax", "run", f"--config={folder}/small.py:v5p-128@{folder}/model",
            f"--workdir={folder / workdir}", f"--stages={stages}",
            *(f"--config.{name}={folder / path}" for name, path in paths.items()), *settings]


def environment(folder: pathlib.Path, **more: str) -> dict[str, str]:
    """Variables of all processes; they find the experts of benchmarks."""
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), *sys.path]), "PYTHONUNBUFFERED": "1",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), **more}


def prepare(folder: pathlib.Path, variables: Mapping[str, str]) -> None:
    """Writes a model of random weights, and tasks of a small repository in work directory `tasks`."""
    folder.chmod(0o755)
    own_files.write_model(folder / "model", Tokenizer.train(own_files.texts(), 384, ADDED_TOKENS), LENGTH)
    chain.write(folder)
    for name, repository in (("tasks", "shapes-1.0"), ("heldout", "words-1.0")):
        own_files.synthesize(folder, repository, f"{name}.jsonl")
    own_files.write_small(folder / "small.py", "qwen3_coder_next")
    subprocess.run(command(folder, "tasks", "tasks", *MESH), check=True,
                   env=os.environ | testing.emulated(8) | variables)
