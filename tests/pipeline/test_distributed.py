"""A checkpoint of eight devices goes on on two and on one; flags of several hosts. Whole runs are in test_hosts."""

import json
import os
import pathlib

import numpy as np
import pytest

STEPS, ROWS, LENGTH = 12, 8, 16


def _sources():
    from qcn_jax.pipeline.data import loader

    rng = np.random.default_rng(0)
    documents = [{"tokens": rng.integers(2, 30, n)} for n in rng.integers(6, 14, 64)]
    return [loader.Source("random", documents, 1.0)]


def train(directory, steps=STEPS, checkpoint_every=4, before_step=lambda done: None, mesh=None, log=lambda line: None):
    """A micro model on all devices there are; returns the parameters on the host."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import multihost_utils

    from qcn_jax.config import MeshConfig, OptimizerConfig
    from qcn_jax.model import Qwen3Next
    from qcn_jax.pipeline.data import loader
    from qcn_jax.pipeline.train import loop as training
    from qcn_jax.pipeline.train import losses
    from qcn_jax.pipeline.train.step import BatchShape
    from qcn_jax.pipeline.train.trainer import Trainer, mesh_here
    from tests.pipeline.micro import MODEL

    parallel = mesh_here(mesh or MeshConfig(fsdp=-1, expert=min(2, jax.device_count())))
    loss = losses.language_model_loss(Qwen3Next(MODEL, parallel=parallel))
    trainer = Trainer.build(MODEL, loss, OptimizerConfig(learning_rate=0.01, warmup_steps=2), STEPS,
                            BatchShape(1, ROWS, LENGTH), parallel, field="sft.train")
    batches = loader.batches(_sources(), rows=ROWS, length=LENGTH, seed=3)
    params = jax.jit(Qwen3Next(MODEL).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    params = jax.tree.map(np.asarray, params)
    calls = []

    def counted(state, batch):
        before_step(len(calls))
        calls.append(1)
        return trainer.step(state, batch, ())

    result = training.loop(
        pathlib.Path(directory), trainer.create(params), counted, training.Stream(batches, trainer.place), steps,
        log=log, options=training.LoopOptions(checkpoint_every=checkpoint_every, log_every=1))
    return multihost_utils.process_allgather(result.state.params, tiled=True)


def _curve(directory):
    clock = ("tokens_per_second", "seconds_per_step", "goodput", "seconds", "input_wait")
    rows = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(row).items() if k not in clock} for row in rows]


def _params(directory):
    with np.load(directory / "params.npz") as stored:
        return [stored[name] for name in stored.files]


def _eight():
    train(os.environ["QCN_TEST_DIRECTORY"], steps=8)


def _fewer():
    import jax

    lines = []
    params = train(os.environ["QCN_TEST_DIRECTORY"], log=lines.append)
    assert lines[0] == "resumes at step 8 of 12", lines
    np.savez(pathlib.Path(os.environ["QCN_TEST_DIRECTORY"]) / "params.npz", *jax.tree.leaves(params))


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_goes_on_on_two_and_on_one(tmp_path, run_with_devices, monkeypatch):
    import shutil

    saved = tmp_path / "eight"
    monkeypatch.setenv("QCN_TEST_DIRECTORY", str(saved))
    run_with_devices(_eight, 8)
    assert [path.name for path in (saved / "checkpoints").iterdir()] == ["8"]
    found = {}
    for devices in (8, 2, 1):
        directory = tmp_path / str(devices)
        shutil.copytree(saved, directory)
        monkeypatch.setenv("QCN_TEST_DIRECTORY", str(directory))
        run_with_devices(_fewer, devices)
        found[devices] = (_params(directory), _curve(directory))
    for devices in (2, 1):  # sums in another order: nothing but rounding
        for a, b in zip(found[8][0], found[devices][0], strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(a).max()))
        for a, b in zip(found[8][1], found[devices][1], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_flags_of_several_hosts_go_together():
    from qcn_jax.errors import UserError
    from qcn_jax.sharding import distributed

    for arguments, words in (((None, 2, None), "go together"), (("a:1", 2, None), "go together"),
                             (("a:1", 2, 2), "allowed: 0 to 1"), (("host", 2, 0), "not HOST:PORT"),
                             (("auto", 2, 0), "go together")):
        with pytest.raises(UserError, match=words):
            distributed.start(*arguments)
    assert not distributed.start(None, environment={"TPU_WORKER_HOSTNAMES": "localhost"})
    assert distributed.several_tpu_hosts({"TPU_WORKER_HOSTNAMES": "t0,t1"})
    assert distributed.several_tpu_hosts({"MEGASCALE_NUM_SLICES": "2"})
