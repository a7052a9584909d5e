"""qcn generate and qcn serve as command lines: what they print, and one line for every mistake."""

import dataclasses
import io
import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from qcn_jax import hub, testing
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.cli.main import main
from qcn_jax.inference.checkpoint import load_engine
from qcn_jax.inference.sampling import Sampling
from qcn_jax.model import Qwen3Next
from tests.pipeline.micro import MODEL

ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer.train(["hello world\n"] * 3, 256 + 10 + len(ADDED), ADDED)
    config = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    params = jax.jit(Qwen3Next(config).init)(jax.random.key(3), jnp.zeros((1, 4), jnp.int32))["params"]
    hub.save(folder, config, params)
    tokenizer.save(folder)
    return folder


def test_text_goes_on_greedily(folder, capsys, monkeypatch) -> None:
    arguments = ["generate", f"--checkpoint={folder}", "--prompt=hello", "--max_new_tokens=20", "--max_length=40"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    config, params = hub.load(folder)
    tokenizer = Tokenizer.from_folder(folder)
    tokens, written = tokenizer.encode("hello"), []
    apply = jax.jit(Qwen3Next(config).apply)
    while len(written) < 20:
        padded = jnp.asarray([(tokens + written + [0] * 40)[:40]])
        token = int(apply({"params": params}, padded).logits[0, len(tokens) + len(written) - 1].argmax())
        if token in (tokenizer.id("<|im_end|>"), tokenizer.id("<|endoftext|>")):
            break
        written.append(token)
    assert out == tokenizer.decode(written) + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert main([*arguments[:2], "--prompt=-", *arguments[3:]]) == 0 and capsys.readouterr().out == out


@pytest.mark.slow
def test_a_mesh_writes_what_one_device_does(folder, capsys):
    arguments = ["generate", f"--checkpoint={folder}", "--prompt=hello", "--max_new_tokens=12", "--max_length=40"]
    assert main(arguments) == 0
    done = subprocess.run([sys.executable, "-m", "qcn_jax", *arguments, "--mesh=expert=4,dispatch=gather"], text=True,
                          capture_output=True, check=False, timeout=testing.processes.TIMEOUT,
                          env={**os.environ, **testing.emulated(8), "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0 and done.stdout == capsys.readouterr().out, done.stderr[-2000:]


@pytest.mark.parametrize("arguments,line", [
    (["generate", "--checkpoint=X", "--prompt=a", "--mesh=expert"], "--mesh=expert: 'expert' is not KEY=VALUE"),
    (["generate", "--checkpoint=X", "--prompt=a", "--mesh=experts=2"], "--mesh.experts: unknown key"),
    (["serve", "--checkpoint=X", "--port=0", "--mesh=expert=x"], "--mesh.expert"),
    (["serve", "--checkpoint=X", "--port=0", "--mesh=expert=2,dispatch=fast"], "--mesh.dispatch"),
    (["generate"], "--checkpoint"), (["generate", "--checkpoint=X"], "either --prompt=TEXT or --chat=TEXT"),
    (["generate", "--checkpoint=X", "--prompt=a", "--chat=b"], "either --prompt"),
    (["generate", "--checkpoint=X", "--prompt=a", "--system=b"], "--system goes with --chat"),
    (["generate", "--checkpoint=/nowhere", "--prompt=a"], "/nowhere"),
    (["generate", "--checkpoint=X", "--prompt=a", "--top_p=2"], "top_p"),
    (["serve", "--checkpoint=/nowhere", "--port=0"], "/nowhere"), (["serve", "--port=0"], "--checkpoint"),
    (["serve", "--checkpoint=X", "--host=no.such.host.invalid"], "no.such.host.invalid"),
])  # fmt: skip
def test_mistakes_are_one_line(arguments, line, capsys) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1 and error.startswith(f"qcn {arguments[0]}: ")


def test_prompts_and_ports_that_do_not_fit(folder, capsys) -> None:
    long = ["generate", f"--checkpoint={folder}", "--prompt=" + "hello world " * 50, "--max_length=32"]
    assert main(long) == 1 and "--max_length" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--checkpoint=X", f"--port={port}"]) == 1
    assert f"--port={port}: cannot listen there" in capsys.readouterr().err
    few = ["serve", f"--checkpoint={folder}", "--port=0", "--max_length=32", "--block_size=8", "--num_blocks=3"]
    assert main(few) == 1 and "--num_blocks: 3, 3 of 8 tokens on each device; allowed: at least 5" in capsys.readouterr().err


def _changed(folder, target, vocab_size, change=lambda params: params):
    """The checkpoint with more rows than tokens, and `change` applied to its weights."""
    config, params = hub.load(folder)
    grown = dataclasses.replace(config, vocab_size=vocab_size)
    extra = jnp.zeros(vocab_size - config.vocab_size, int)
    grow = lambda leaf, axis: jnp.concatenate([leaf, jnp.take(leaf, extra, axis)], axis)
    params["embed_tokens"]["embedding"] = grow(params["embed_tokens"]["embedding"], 0)
    if "lm_head" in params:
        params["lm_head"]["kernel"] = grow(params["lm_head"]["kernel"], 1)
    hub.save(target, grown, change(params))
    Tokenizer.from_folder(folder).save(target)
    return target


def test_eos_lists_end_a_text_and_nan_is_one_line(folder, tmp_path, capsys) -> None:
    arguments = ["--prompt=hello", "--max_new_tokens=8", "--max_length=40"]
    loaded = load_engine(folder, slots=1, max_length=40, max_new_tokens=16)
    loaded.engine.extend({0: loaded.tokenizer.encode("hello")})
    first, second = loaded.engine.generate([0], seeds=[0], sampling=Sampling(0.0), max_new_tokens=2)[0].tokens
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [*range(200, 212), first]}))
    try:
        assert main(["generate", f"--checkpoint={folder}", *arguments]) == 0 and capsys.readouterr().out == "\n"
        path.write_text('{"eos_token_id": "two"}')
        assert main(["generate", f"--checkpoint={folder}", *arguments]) == 1
        assert "generation_config.json: eos_token_id must be an id or a list of ids" in capsys.readouterr().err
    finally:
        path.unlink()
    broken = _changed(folder, tmp_path / "nan", loaded.engine.config.vocab_size,
                      lambda params: jax.tree.map(lambda leaf: leaf * jnp.nan, params))
    assert main(["generate", f"--checkpoint={broken}", *arguments]) == 1
    out, error = capsys.readouterr()
    assert out == "" and "logits are not finite" in error and error.count("\n") == 1


def test_ids_without_a_token_are_never_written(folder, tmp_path) -> None:
    size = Tokenizer.from_folder(folder).vocab_size
    loaded = load_engine(_changed(folder, tmp_path / "grown", size + 40), slots=1, max_length=64, max_new_tokens=32)
    loaded.engine.extend({0: loaded.tokenizer.encode("hello")})
    for seed in range(3):
        piece = loaded.engine.generate([0], seeds=[seed], sampling=Sampling(8.0), max_new_tokens=16)[0]
        assert max(piece.tokens) < size


def test_help_explains(capsys) -> None:
    for verb in ("generate", "serve"):
        assert main([verb, "--help"]) == 0
        assert f"qcn {verb} --checkpoint=DIR" in capsys.readouterr().out
