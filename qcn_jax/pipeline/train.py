"""The training loop that every gradient-based stage shares.

A step is a pure function (state, batch) -> (state, metrics), compiled once per batch shape, with the state
donated. The loop around it feeds batches, logs, saves, and stops: at the last step, on SIGTERM or SIGINT after a
save, or when a loss or gradient is not finite, with one line that says where that began.
"""

import contextlib
import dataclasses
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from qcn_jax.errors import UserError
from qcn_jax.pipeline.checkpoints import Checkpoints
from qcn_jax.pipeline.metrics import Meter, MetricsLog

Params = Any
Batch = Mapping[str, jax.Array]
LossFn = Callable[[Params, Batch], tuple[jax.Array, dict[str, jax.Array]]]


@flax.struct.dataclass
class TrainState:
    """What a step changes: the number of steps done, parameters and optimizer state."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation) -> "TrainState":
        """A fresh state. The first step donates `params`; copy them first if they are needed later."""
        return _committed(cls(jnp.zeros((), jnp.int32), params, optimizer.init(params)))


def _committed(state: TrainState) -> TrainState:
    """Every leaf bound to devices: those that are not go where the parameters are, replicated.

    A compiled step returns bound arrays; a first call with free ones would have another signature, and the step
    would be compiled twice.
    """
    bound = [leaf for leaf in jax.tree.leaves(state.params) if getattr(leaf, "committed", False)]
    place = bound[0].sharding if bound else jax.sharding.SingleDeviceSharding(jnp.zeros(()).device)
    if isinstance(place, jax.sharding.NamedSharding):
        place = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec())
    bind = lambda leaf: leaf if getattr(leaf, "committed", False) else jax.device_put(leaf, place)
    return jax.tree.map(bind, state)


def make_train_step(loss_fn: LossFn, optimizer: optax.GradientTransformation, accumulate: int = 1
                    ) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles one update.

    Args:
      loss_fn: (params, batch) -> (loss, metrics), both scalars and dict of scalars. It normalises by
        `batch["weight_sum"]`, the loss weight of the whole batch, and scales terms that are means by
        `batch["fraction"]`, so that accumulated gradients equal those of the undivided batch.
      optimizer: see pipeline.optimizer.
      accumulate: number of equal slices of the batch's rows that are processed one after the other.
    Returns:
      (state, batch) -> (state, metrics); `state` is donated. metrics holds loss_fn's, `loss`, `grad_norm` and
      `finite`. When the loss or a gradient is not finite, params and optimizer state stay as they were.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = dict(batch)
        scalars = {"weight_sum": jnp.maximum(batch["weights"].sum(), 1e-6), "fraction": jnp.float32(1 / accumulate)}
        if accumulate == 1:
            (loss, metrics), grads = gradient(state.params, batch | scalars)
        else:
            (loss, metrics), grads = _accumulated(gradient, state.params, batch, scalars, accumulate)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = lambda new, old: jnp.where(finite, new, old)
        state = TrainState(state.step + 1, jax.tree.map(keep, params, state.params),
                           jax.tree.map(keep, opt_state, state.opt_state))
        return state, metrics | {"loss": loss, "grad_norm": norm, "finite": finite}

    return jax.jit(step, donate_argnums=0)


def _accumulated(gradient: Callable, params: Params, batch: Batch, scalars: dict[str, jax.Array], parts: int):
    slices = {k: v.reshape(parts, v.shape[0] // parts, *v.shape[1:]) for k, v in batch.items()}
    add = lambda a, b: jax.tree.map(jnp.add, a, b)
    first = gradient(params, {k: v[0] for k, v in slices.items()} | scalars)

    def body(total, part):
        return add(total, gradient(params, part | scalars)), None

    return jax.lax.scan(body, first, {k: v[1:] for k, v in slices.items()})[0]


class Interrupted(SystemExit):
    """SIGTERM or SIGINT came and everything is saved; the process exits with 128 + signal number."""


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Within the block SIGTERM and SIGINT only set the returned event, so that work can be saved first.

    The second signal acts at once. Outside the main thread, where Python allows no handlers, nothing changes.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {}

    def handle(number: int, _: Any) -> None:
        stop.number = number
        stop.set()
        signal.signal(number, previous[number] or signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


@dataclasses.dataclass(frozen=True)
class LoopResult:
    """State after the last step, its logged metrics, and how many of the steps this process did."""

    state: TrainState
    metrics: dict[str, float]
    steps_done: int


def loop(directory: pathlib.Path, state: TrainState, step_fn: Callable, batches: Any, steps: int, *,
         log: Callable[[str], None], schedule: optax.Schedule | None = None, checkpoint_every: int = 100,
         log_every: int = 10, explain: Callable[[Params, Batch], str] | None = None, keep: int = 1) -> LoopResult:
    """Runs `step_fn` until `steps` steps are done, continuing from the newest checkpoint.

    Args:
      directory: holds metrics.jsonl and checkpoints/.
      state: the initial state, used where there is no checkpoint (and for the shapes of one).
      step_fn: see `make_train_step`.
      batches: Grain iterator of dicts of numpy arrays [rows, T]; its position is saved with the state.
      steps: total number of steps, those before a resume included.
      log: takes one progress line.
      schedule: learning rate by step, to be logged.
      checkpoint_every, log_every: in steps; 0 saves no checkpoint but the last.
      explain: (params, batch) -> where a non-finite value began, called before stopping for one.
      keep: checkpoints kept.
    Raises:
      UserError: a loss or gradient was not finite; the data ran out; the disk is full.
      Interrupted: stopped by a signal, saved.
    """
    checkpoints = Checkpoints(directory / "checkpoints", keep)
    restored = checkpoints.restore(state, batches)
    done = 0
    if restored is not None:
        done, state, _ = restored
        log(f"resumes at step {done} of {steps}")
    curve = MetricsLog(directory / "metrics.jsonl", done)
    recorder = _Recorder(curve, log, schedule, steps)
    started, batch, metrics = done, None, None
    try:
        with stop_signals() as stop:
            while done < steps:
                before, batch = batch, _next(batches, done, steps)
                # Nothing but the batch, which `_next` put there, may travel to the device in a step.
                with jax.transfer_guard_host_to_device("disallow"):
                    state, latest = step_fn(state, batch)
                # Reading the previous step's verdict lets the device run one step ahead of the host.
                _require_finite(metrics, done, state, before, explain)
                metrics, done = latest, done + 1
                recorder.add(metrics, batch)
                saving = stop.is_set() or done == steps or (checkpoint_every and done % checkpoint_every == 0)
                if saving or done % log_every == 0:
                    _require_finite(metrics, done, state, batch, explain)
                    recorder.flush(done)
                if saving:
                    checkpoints.save(done, state, batches, wait=stop.is_set() or done == steps)
                if stop.is_set() and done < steps:
                    log(f"stopped by a signal at step {done}; saved; the same command resumes")
                    raise Interrupted(128 + stop.number)
    finally:
        checkpoints.close()
        curve.close()
    return LoopResult(state, recorder.last, done - started)


class _Recorder:
    """Means over the steps since the last row, as a row of metrics.jsonl and a progress line."""

    def __init__(self, curve: MetricsLog, log: Callable[[str], None], schedule: optax.Schedule | None,
                 steps: int) -> None:
        self._curve, self._log, self._schedule, self._steps = curve, log, schedule, steps
        self._pending: list[dict[str, jax.Array]] = []
        self._meter = Meter()
        self._first = True
        self.last: dict[str, float] = {}

    def add(self, metrics: dict[str, jax.Array], batch: Batch) -> None:
        if self._first:  # the first step compiles; its time is not speed
            jax.block_until_ready(metrics)
            self._meter.skip()
            self._first = False
        else:
            self._meter.add(batch["tokens"].size)
        self._pending.append(metrics)

    def flush(self, step: int) -> None:
        if not self._pending:
            return
        rows = jax.device_get(self._pending)
        self._pending = []
        values = {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name != "finite"}
        if self._schedule is not None:
            values["learning_rate"] = float(self._schedule(step - 1))
        values |= self._meter.read()
        self._curve.write(step, values)
        self.last = values
        left = (self._steps - step) * values["seconds_per_step"]
        self._log(f"step {step}/{self._steps}  loss {values['loss']:.3f}  grad {values['grad_norm']:.2f}  "
                  f"{values['tokens_per_second']:,.0f} tokens/s  {left:.0f} s left")


def _next(batches: Any, done: int, steps: int) -> Batch:
    try:
        return jax.device_put(dict(next(batches)))
    except StopIteration:
        raise UserError(f"the data ended after {done} of {steps} steps; give fewer steps or more documents") from None


def _require_finite(metrics: dict[str, jax.Array] | None, step: int, state: TrainState, batch: Batch | None,
                    explain: Callable[[Params, Batch], str] | None) -> None:
    if metrics is None or bool(metrics["finite"]):
        return
    where = f": {explain(state.params, batch)}" if explain is not None else ""
    raise UserError(f"step {step}: loss {float(metrics['loss'])} with gradient norm "
                    f"{float(metrics['grad_norm'])} is not finite{where}; the last checkpoint is kept")
