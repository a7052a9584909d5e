"""Two real processes of four devices each: one is killed, both start again, and the curve is the uninterrupted one.

Beside it: a checkpoint of eight devices goes on on two and on one.
"""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

STEPS, ROWS, LENGTH, KILLED = 12, 8, 16, 9


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
    batches = loader.batches(_sources(), rows=trainer.rows.count, length=LENGTH, seed=3, shard=trainer.rows.shard)
    params = jax.jit(Qwen3Next(MODEL).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    params = jax.tree.map(np.asarray, params)
    calls = []

    def counted(state, batch):
        before_step(len(calls))
        calls.append(1)
        return trainer.step(state, batch)

    result = training.loop(
        pathlib.Path(directory), trainer.create(params), counted, training.Stream(batches, trainer.place), steps,
        log=log, options=training.LoopOptions(checkpoint_every=checkpoint_every, log_every=1))
    return multihost_utils.process_allgather(result.state.params, tiled=True)


def _main(directory, port, process, kill):
    """One process of two; process 1 dies before its step number `kill` (0: never)."""
    from qcn_jax.sharding import distributed

    assert distributed.start(f"127.0.0.1:{port}", 2, process)

    def before(done):
        if process == 1 and kill and done == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    params = train(directory, before_step=before, log=lambda line: print(line, flush=True))
    if process == 0:
        import jax

        np.savez(pathlib.Path(directory) / "params.npz", *jax.tree.leaves(params))


def _start(directory, kill=0):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    directory.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
                   "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    code = "import sys; from tests.pipeline import test_distributed as t; t._main({!r}, {}, {}, {})"
    return [subprocess.Popen([sys.executable, "-c", code.format(str(directory), port, process, kill)], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
            for process in (0, 1)]


def _finish(processes, timeout=400):
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output[-3000:]
    return outputs


def _curve(directory):
    clock = ("tokens_per_second", "seconds_per_step", "goodput", "seconds")
    rows = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(row).items() if k not in clock} for row in rows]


def _params(directory):
    with np.load(directory / "params.npz") as stored:
        return [stored[name] for name in stored.files]


@pytest.fixture(scope="module", name="whole")
def _whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two") / "whole"
    _finish(_start(directory))
    return directory


@pytest.mark.slow
def test_two_processes_one_killed_resume_bit_for_bit(whole, tmp_path):
    directory = tmp_path / "killed"
    processes = _start(directory, KILLED)
    try:
        assert processes[1].wait(timeout=400) == -signal.SIGKILL
        deadline = time.monotonic() + 120  # the survivor notices that its peer is gone
        while processes[0].poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
        assert processes[0].poll() not in (None, 0)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert 4 <= _curve(directory)[-1]["step"] <= KILLED
    outputs = _finish(_start(directory))
    assert "resumes at step" in outputs[0]
    assert _curve(directory) == _curve(whole) and len(_curve(whole)) == STEPS
    assert all(np.array_equal(a, b) for a, b in zip(_params(directory), _params(whole), strict=True))


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


def test_rows_of_a_mesh():
    from qcn_jax.config import MeshConfig
    from qcn_jax.errors import UserError
    from qcn_jax.pipeline.train.layout import Rows
    from qcn_jax.sharding.mesh import make_parallel

    parallel = make_parallel(MeshConfig())
    rows = Rows.of(parallel, 4)
    assert rows.shard == (0, 1) and rows.count == 4
    batch = {"tokens": np.arange(12).reshape(4, 3)}
    assert np.array_equal(rows.place(batch)["tokens"][0], batch["tokens"])
    assert dataclasses.is_dataclass(rows)
    with pytest.raises(UserError, match="does not multiply to 1 devices"):
        make_parallel(MeshConfig(fsdp=3))
