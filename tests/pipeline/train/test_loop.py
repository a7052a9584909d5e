"""The train loop: resumption after every kind of end gives the uninterrupted run, bit for bit."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qcn_jax.config import OptimizerConfig
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data import loader
from qcn_jax.pipeline.train import loop, metrics, optimizer, signals
from qcn_jax.pipeline.train.checkpoints import Checkpoints
from qcn_jax.pipeline.train.step import BatchShape, TrainState, make_step

STEPS, ROWS, LENGTH = 24, 4, 16
CONFIG = OptimizerConfig(learning_rate=0.05, warmup_steps=4)
OPTIONS = loop.LoopOptions(log_every=4, checkpoint_every=6)


def loss_fn(params, batch):
    """A bigram table: enough to have gradients, weights and a curve; compiles in no time."""
    tokens = batch["tokens"] % 8
    scores = jax.nn.log_softmax(params["table"][tokens] + params["bias"])
    picked = jnp.take_along_axis(scores, jnp.roll(tokens, -1, 1)[..., None], -1)[..., 0]
    loss = -jnp.sum(picked * batch["weights"]) / batch["weight_sum"]
    return loss, {"mean_position": batch["fraction"] * batch["positions"].mean()}


OPTIMIZER = optimizer.make_optimizer(CONFIG, STEPS)
SHAPE = BatchShape(1, ROWS, LENGTH)
STEP = make_step(loss_fn, OPTIMIZER, SHAPE)


def fresh():
    return TrainState.create({"bias": jnp.zeros(8), "table": jnp.eye(8) * 0.1}, OPTIMIZER)


def batches():
    rng = np.random.default_rng(0)
    documents = [{"tokens": np.cumsum(rng.integers(1, 3, n)) % 8} for n in rng.integers(2, 12, 90)]
    return loader.batches([loader.Source("walks", documents, 1.0)], rows=ROWS, length=LENGTH, seed=1)


def place(batch, slices):
    return jax.device_put({name: np.reshape(array, (slices, -1, LENGTH)) for name, array in batch.items()})


def feed(stream=None):
    return loop.Stream(batches() if stream is None else stream, lambda batch: place(batch, 1))


def first():
    """The first batch on the device."""
    return feed().next(0, None, None).batches[0]


def run(directory, step_fn=STEP, log=lambda line: None, **options):
    return loop.loop(directory, fresh(), step_fn, feed(), STEPS, log=log, options=OPTIONS,
                      schedule=optimizer.schedule(CONFIG, STEPS), **options)


def curve(directory):
    """Logged rows without what depends on the clock."""
    clock = ("tokens_per_second", "seconds_per_step", "goodput", "seconds", "input_wait")
    return [{k: v for k, v in row.items() if k not in clock} for row in metrics.read_metrics(directory / "metrics.jsonl")]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return directory, run(directory)


def test_it_learns_logs_and_compiles_once(whole):
    directory, result = whole
    rows = curve(directory)
    assert [row["step"] for row in rows] == [4, 6, 8, 12, 16, 18, 20, 24]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2
    assert rows[-1]["learning_rate"] < rows[2]["learning_rate"]
    assert result.steps_done == STEPS and int(result.state.step) == STEPS
    waits = [row["input_wait"] for row in metrics.read_metrics(directory / "metrics.jsonl")]
    assert len(waits) == len(rows) and all(0 < wait < 1 for wait in waits)
    assert result.metrics["tokens_per_second"] > 0 and result.metrics["loss"] == pytest.approx(rows[-1]["loss"], abs=1e-5)
    assert STEP._cache_size() == 1


def test_weights_bound_to_a_device_compile_no_second_step():
    for place in (lambda x: x, lambda x: jax.device_put(x, jax.devices()[0])):
        step = make_step(loss_fn, OPTIMIZER, SHAPE)
        state = TrainState.create(place(fresh().params), OPTIMIZER)
        for batch in [first()] * 2:
            state, _ = step(state, batch)
        assert step._cache_size() == 1


def test_a_finished_run_does_nothing_again(whole):
    directory, result = whole
    again = run(directory)
    assert again.steps_done == 0 and same(again.state, result.state)


def test_kill_resumes_bit_for_bit(whole, tmp_path):
    """A child process kills itself with SIGKILL between checkpoints, right after a step was logged."""
    code = (f"import sys; sys.path[:0] = [{str(pathlib.Path(__file__).parent)!r}]\n"
            "import os, signal, pathlib, test_loop as t\n"
            "calls = []\n"
            "def step(state, batch):\n"
            "    calls.append(1)\n"
            "    if len(calls) == 17: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return t.STEP(state, batch)\n"
            f"t.run(pathlib.Path({str(tmp_path)!r}), step)\n")
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    assert curve(tmp_path)[-1]["step"] == 16
    lines = []
    result = run(tmp_path, log=lines.append)
    # The checkpoint of step 12 was written in the background and may not have been complete, or without checksums yet.
    (resumes,) = [line for line in lines if line.startswith("resumes")]
    assert (resumes, result.steps_done) in (("resumes at step 12 of 24", 12), ("resumes at step 6 of 24", 18))
    assert same(result.state, whole[1].state)
    assert curve(tmp_path) == curve(whole[0])
    left = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert left == ["24"]  # the earlier ones, and anything half-written, are gone


def test_a_damaged_checkpoint_costs_steps_and_nothing_else(whole, tmp_path):
    options = dataclasses.replace(OPTIONS, keep=2)
    again = lambda log: loop.loop(tmp_path, fresh(), STEP, feed(), STEPS, log=log, options=options,
                                  schedule=optimizer.schedule(CONFIG, STEPS))
    again(lambda line: None)
    stored = max((tmp_path / "checkpoints/24/state").rglob("d/*"), key=lambda path: path.stat().st_size)
    stored.write_bytes(bytes(stored.stat().st_size))
    lines = []
    result = again(lines.append)
    assert lines[0].startswith("checkpoint 24 is damaged") and lines[1] == "resumes at step 18 of 24"
    assert same(result.state, whole[1].state) and curve(tmp_path) == curve(whole[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits(whole, tmp_path, number):
    calls = []

    def step(state, batch):
        calls.append(1)
        if len(calls) == 9:
            os.kill(os.getpid(), number)
        return STEP(state, batch)

    before = signal.getsignal(number)
    with pytest.raises(signals.Interrupted) as stopped:
        run(tmp_path, step)
    assert stopped.value.code == 128 + number and signal.getsignal(number) is before
    assert (tmp_path / "checkpoints" / "9").is_dir()
    result = run(tmp_path)
    assert result.steps_done == STEPS - 9 and same(result.state, whole[1].state)


@pytest.mark.parametrize("when", ["in the last step", "while its checkpoint is written"])
def test_a_signal_at_the_end_is_not_swallowed(whole, tmp_path, when, monkeypatch):
    """The next stage must not start; what is done is saved and is not done again."""
    kill = lambda: os.kill(os.getpid(), signal.SIGTERM)
    calls, save = [], Checkpoints.save

    def step(state, batch):
        calls.append(1)
        if when == "in the last step" and len(calls) == STEPS:
            kill()
        return STEP(state, batch)

    def saving(self, done, *rest, **more):
        save(self, done, *rest, **more)
        if when != "in the last step" and done == STEPS:
            kill()

    lines = []
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", saving)
        with pytest.raises(signals.Interrupted) as stopped:
            run(tmp_path, step, lines.append)
    assert stopped.value.code == 128 + signal.SIGTERM and lines[-1].startswith(f"stopped by a signal at step {STEPS}")
    result = run(tmp_path)
    assert result.steps_done == 0 and same(result.state, whole[1].state)
    assert curve(tmp_path) == curve(whole[0])


def test_no_block_swallows_a_signal():
    with pytest.raises(signals.Interrupted), signals.stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(ValueError), signals.stop_signals():  # what went wrong in the block comes first
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError


def test_hidden_transfers_to_the_device_are_refused(tmp_path):
    with pytest.raises(jax.errors.JaxRuntimeError, match="[Dd]isallow"):
        run(tmp_path, lambda state, batch: STEP(state, {**batch, "weights": np.ones((1, ROWS, LENGTH), np.float32)}))


def test_half_a_metrics_line_is_forgotten(whole, tmp_path):
    log = metrics.MetricsLog(tmp_path / "m.jsonl")
    log.write(1, {"loss": jnp.float32(2.5), "bad": float("nan")})
    log.close()
    with open(tmp_path / "m.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"step": 2, "lo')
    assert metrics.read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "loss": 2.5, "bad": None}]
    metrics.MetricsLog(tmp_path / "m.jsonl", resume_step=0).close()
    assert (tmp_path / "m.jsonl").read_text() == ""


def test_small_numbers_keep_their_digits(tmp_path):
    log = metrics.MetricsLog(tmp_path / "m.jsonl")
    values = {"learning_rate": 1.23456789e-7, "kl": np.float32(3e-12), "tokens_per_second": 123456789.4, "rate": 0.1}
    log.write(1, values)
    log.close()
    row = metrics.read_metrics(tmp_path / "m.jsonl")[0]
    assert np.float32(row["kl"]) == values["kl"] and row["rate"] == 0.1
    assert all(row[name] == pytest.approx(float(value), rel=1e-8) for name, value in values.items())


def test_accumulated_gradients_equal_the_whole_batch():
    batch = next(batches())
    batch["weights"][0] *= 0.1  # slices of unequal weight
    results = []
    for parts in (1, 2, 4):
        step = make_step(loss_fn, optax.sgd(1.0), BatchShape(parts, ROWS // parts, LENGTH))
        state = TrainState.create(fresh().params, optax.sgd(1.0))
        results.append(step(state, place(batch, parts)))
    for state, values in results[1:]:
        np.testing.assert_allclose(state.params["table"], results[0][0].params["table"], atol=1e-6)
        np.testing.assert_allclose(values["loss"], results[0][1]["loss"], rtol=1e-6)
        np.testing.assert_allclose(values["mean_position"], results[0][1]["mean_position"], rtol=1e-6)


def test_non_finite_stops_before_it_spreads(tmp_path):
    def poisoned(params, batch):
        loss, values = loss_fn(params, batch)
        return jnp.where(batch["poison"][0, 0] > 0, jnp.nan, 1.0) * loss, values

    class Poison(grain.DatasetIterator):
        def __init__(self, parent):
            super().__init__(parent)
            self.count = 0

        def __next__(self):
            self.count += 1
            return next(self._parent) | {"poison": np.full((ROWS, LENGTH), self.count == 10, np.float32)}

        def get_state(self):
            return {"parent": self._parent.get_state(), "count": self.count}

        def set_state(self, state):
            self._parent.set_state(state["parent"])
            self.count = state["count"]

    step = make_step(poisoned, OPTIMIZER, SHAPE)
    with pytest.raises(UserError, match=r"^step 10: loss nan .* not finite: the table; the last checkpoint is kept$"):
        loop.loop(tmp_path, fresh(), step, feed(Poison(batches())), STEPS, log=lambda line: None, options=OPTIONS,
                   explain=lambda params, batch: "the table")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["6"]
    # The step itself left the parameters alone.
    state, values = step(fresh(), first() | {"poison": np.ones((1, ROWS, LENGTH), np.float32)})
    assert not values["finite"] and same(state.params, fresh().params)
    # With the policy to skip, the run goes on and says what it left out.
    lines = []
    skipping = dataclasses.replace(OPTIONS, nonfinite="skip")
    result = loop.loop(tmp_path / "skip", fresh(), step, feed(Poison(batches())), STEPS, log=lines.append, options=skipping,
                        explain=lambda params, batch: "the table")
    assert [line for line in lines if "left out" in line] == [
        "step 10: loss nan with gradient norm nan is not finite: the table; the step is left out"]
    rows = curve(tmp_path / "skip")
    assert result.steps_done == STEPS and [row["step"] for row in rows if row.get("skipped")] == [12]
    assert all(np.isfinite(row["loss"]) for row in rows) and rows[-1]["loss"] < rows[0]["loss"]
    with pytest.raises(UserError, match="so were the 10 before it"):
        broken = make_step(lambda p, b: (jnp.nan * loss_fn(p, b)[0], {}), OPTIMIZER, SHAPE)
        loop.loop(tmp_path / "broken", fresh(), broken, feed(), STEPS, log=lines.append, options=skipping)


def test_a_profile_is_made_on_demand(tmp_path):
    lines = []

    def step(state, batch):
        if int(state.step) == 3:
            (tmp_path / "profile").touch()
        return STEP(state, batch)

    run(tmp_path, step, lines.append)
    assert any("traces 3 steps" in line for line in lines) and not (tmp_path / "profile").exists()
    assert list((tmp_path / "profiles" / "step_4").rglob("*.xplane.pb"))


def test_data_that_ends_is_one_line(tmp_path):
    class Ends(grain.DatasetIterator):
        def __next__(self):
            raise StopIteration

        def get_state(self):
            return {}

        def set_state(self, state):
            pass

    with pytest.raises(UserError, match="the data ended after 0 of 24 steps"):
        loop.loop(tmp_path, fresh(), STEP, feed(Ends()), STEPS, log=lambda line: None)


def test_checkpoint_of_another_model_is_refused_in_one_line(whole, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"a": jnp.ones(4)}, extra={"cursor": [1, 2]}, wait=True)
    step, state, extra = checkpoints.restore({"a": jnp.zeros(4)})
    assert step == 3 and extra == {"cursor": [1, 2]} and np.all(state["a"] == 1)
    with pytest.raises(UserError, match="does not fit this model") as error:
        checkpoints.restore({"b": jnp.zeros(4)})
    assert "\n" not in str(error.value)
    checkpoints.close()
    assert json.loads(json.dumps(extra)) == extra


def test_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        Checkpoints(tmp_path / "file" / "checkpoints")
