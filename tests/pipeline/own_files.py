"""Files of somebody's own, from which recipes run: a model's folder, a Parquet corpus, chats, tasks of a repository."""

import ast
import dataclasses
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pyarrow
from pyarrow import parquet

from qcn_jax import hub
from qcn_jax.envs.tasks import formats
from qcn_jax.testing import TINY, random_params
from tests.agents import tiny
from tests.conftest import ROOT

# What makes a recipe's run small: one device, one update of a few episodes, and lengths that a prompt fits.
LENGTH = 384
SMALL = {
    "sandbox": "local", "workers": 1, "mesh.fsdp": 1, "mesh.expert": 1, "mesh.context": 1, "tasks.verify": 1, "evaluate.tasks": 1,
    **{f"{stage}.train.{key}": value for stage in ("midtrain", "sft") for key, value in
       {"steps": 2, "rows": 1, "sequence_length": LENGTH, "checkpoint_every": 2}.items()},
    **{f"{stage}.{key}": value for stage in ("experts", "distill") for key, value in
       {"updates": 1, "prompts": 1, "group_size": 2, "rows": 1, "sequence_length": LENGTH}.items()},
    **{f"{stage}.rollout.{key}": value for stage in ("experts", "distill", "evaluate") for key, value in
       {"slots": 2, "max_turns": 2, "max_new_tokens": 8, "max_length": LENGTH, "prefill_rows": 2, "prefill_chunk": 128}.items()},
}


def texts(count=30, seed=0):
    """Texts that look like code, from a few words to a few hundred."""
    rng = np.random.default_rng(seed)
    line = lambda: f"value_{rng.integers(9)} = call({rng.integers(9)})\n"
    return ["".join(line() for _ in range(rng.integers(2, 30))) for _ in range(count)]


def write_corpus(path, extra=()):
    """A Parquet file of texts and licences; `extra` rows come last."""
    parquet.write_table(pyarrow.Table.from_pylist([{"content": text, "license": "MIT"} for text in texts()] + list(extra)), path)


def write_chats(path):
    """Conversations of a question and an answer, a row each."""
    lines = [text.splitlines()[0] for text in texts(40, seed=1)]
    chats = [[{"role": "user", "content": asked}, {"role": "assistant", "content": told}] for asked, told in zip(lines[::2], lines[1::2])]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))


def write_model(folder, tokenizer, length):
    """A Hugging Face folder of random weights with `tokenizer`; returns its architecture."""
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size, max_position_embeddings=length)
    hub.save(folder, config, jax.tree.map(lambda leaf: leaf * config.initializer_range, random_params(config)), tokenizer)
    return config


def synthesize(folder, tree, out):
    """Tasks that `qcn synthesize` makes of the repository `tree`, in `out` (within `folder`)."""
    done = subprocess.run(
        [sys.executable, "-m", "qcn_jax", "synthesize", f"--repo={tree}", "--count=4", "--sandbox=local", f"--out={out}"],
        capture_output=True, text=True, check=False, timeout=2700, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def write_tasks(folder):
    """tasks.jsonl and heldout.jsonl: a task each, of two repositories; returns the flags that say where these are."""
    parity = ("return n % 2 == 0", "return n % 2 == 1", "is_even", ("even",))
    tasks = {"tasks": tiny.make_task(), "heldout": tiny.make_task(*parity, instance_id="other.1", repo="other==2",
                                                           problem_statement="is_even(2) is False.")}
    for name, task in tasks.items():
        formats.write(folder / f"{name}.jsonl", [task], "swesmith")
    archives = [tiny.write_tree(folder / name) for name in ("tiny-1", "other-2")]
    return [f"--config.tasks.repos_{split}=('{path}',)" for split, path in zip(("train", "heldout"), archives)]


def documented(recipe):
    """The `qcn run` command in a recipe's docstring, as arguments."""
    text = ast.get_docstring(ast.parse((ROOT / "configs" / f"{recipe}.py").read_text()))
    command = re.search(r"^ *qcn run +((?:.*\\\n)*.*)$", text, re.MULTILINE)[1]
    return shlex.split(command.replace("\\\n", " "))


def write_small(path: pathlib.Path, recipe, steps=1):
    """A configuration file that is `recipe` with SMALL's values, phases of `steps` each, and any folder's model."""
    path.write_text(f"""
import runpy
from qcn_jax import hub
from qcn_jax.config import to_config_dict

def get_config(argument):
    argument, _, folder = argument.rpartition("@")
    config = runpy.run_path({str(ROOT / "configs" / recipe)!r} + ".py")["get_config"](argument)
    for key, value in {SMALL!r}.items():
        group, _, name = key.rpartition(".")
        part = config
        for word in group.split(".") if group else ():
            part = part[word]
        part[name] = value
    config.midtrain.train.steps = 2 * {steps}
    config.midtrain.phases = ({{"steps": {steps}}}, {{"steps": {steps}, "sequence_length": {LENGTH}}}) if config.midtrain.phases else ()
    config.model = to_config_dict(hub.load_config(folder))
    return config
""")
    return path
