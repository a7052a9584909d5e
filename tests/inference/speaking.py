"""Checkpoints that say what they are told to, and `qcn serve` of a folder as a process of its own.

Weights are real and every token goes through the engine; the next one depends on the last alone, as mixers and experts add
nothing: behind the opening of a turn stands one of the answers, each as probable as the others, and then the turn's end.
"""

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qcn_jax import hub
from qcn_jax.chat.tokenizer import END_OF_TEXT, TURN_END, TURN_START, Tokenizer
from qcn_jax.model import Qwen3Next
from tests.pipeline.micro import MODEL

OPENS, ANSWERS, ELSE = 0, 1, 2  # axes of the embedding: what opens a turn, what answers, all other tokens
SURE = 20.0  # times 4, as a token's state is of norm 4: logits of 80 and 40
BIAS = 60


def write(folder: pathlib.Path, answers: Sequence[str], texts: Sequence[str], unlikely: Sequence[str] = (), length: int = 8192
          ) -> pathlib.Path:
    """Writes a checkpoint of up to `length` tokens, whose tokenizer is trained on `texts`; returns its folder.

    What is `unlikely` is said where a client's logit_bias has it so, by BIAS.
    """
    tokenizer = Tokenizer.train([*texts, "\n"], 900, (END_OF_TEXT, TURN_START, TURN_END, *answers, *unlikely))
    config = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size, max_position_embeddings=length)
    params = jax.jit(Qwen3Next(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    silent = ("o_proj", "out_proj", "down_proj")
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.zeros_like(leaf) if any(name in jax.tree_util.keystr(path) for name in silent) else np.array(leaf),
        params)
    said, more = ([tokenizer.id(text) for text in group] for group in (answers, unlikely))
    embedding, head = params["embed_tokens"]["embedding"], params["lm_head"]["kernel"]
    embedding[:], head[:] = np.eye(embedding.shape[1])[ELSE], 0.0
    (line,) = tokenizer.encode("\n")
    embedding[line], embedding[[*said, *more]] = np.eye(embedding.shape[1])[[OPENS, ANSWERS]]
    head[OPENS, said] = head[ANSWERS, tokenizer.id(TURN_END)] = SURE
    head[OPENS, more] = SURE / 2
    hub.save(folder, config, params, tokenizer)
    return folder


@contextlib.contextmanager
def serving(folder: pathlib.Path, *flags: str, seconds: float = 60) -> Iterator[str]:
    """Runs `qcn serve` on a free port; yields its address, and asks that it ends in order within `seconds`."""
    command = [sys.executable, "-m", "qcn_jax", "serve", f"--checkpoint={folder}", "--port=0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    try:
        line = ""
        while "serving" not in line:
            line = process.stderr.readline()
            assert line or process.poll() is None, "the server did not start"
        yield line.split()[-1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(seconds) in (0, 128 + signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
