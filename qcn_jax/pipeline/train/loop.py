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
from qcn_jax.pipeline.train.checkpoints import Checkpoints
from qcn_jax.pipeline.train.metrics import Meter, MetricsLog, Profiler

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


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, accumulate: int = 1,
    shardings: TrainState | None = None, batch_sharding: jax.sharding.Sharding | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:  # fmt: skip
    """Compiles one update.

    Args:
      loss_fn: (params, batch) -> (loss, metrics), both scalars and dict of scalars. It normalises by
        `batch["weight_sum"]`, the loss weight of the whole batch, and scales terms that are means by
        `batch["fraction"]`, so that accumulated gradients equal those of the undivided batch.
      optimizer: see pipeline.train.optimizer.
      accumulate: number of equal slices of the batch's rows that are processed one after the other.
      shardings: of the state (see pipeline.train.layout), in and out; leaves in host memory travel to the device within
        the step. None leaves the layout to the arguments.
      batch_sharding: of the batch's arrays, given with `shardings`.
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
        if shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        norm = global_norm(grads)
        state = updated(state, grads, jnp.isfinite(loss) & jnp.isfinite(norm), optimizer, shardings)
        return state, metrics | {"loss": loss, "grad_norm": norm, "finite": jnp.isfinite(loss) & jnp.isfinite(norm)}

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, in_shardings=(shardings, batch_sharding),
                   out_shardings=(shardings, shardings.step))


def global_norm(grads: Params) -> jax.Array:
    """Root of the sum of all squares, in float32 whatever the dtypes."""
    return optax.global_norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))


def updated(state: TrainState, grads: Params, finite: jax.Array, optimizer: optax.GradientTransformation,
            shardings: TrainState | None = None) -> TrainState:
    """The state after one optimizer step with `grads`; its step count alone moves where not `finite`."""
    opt_state = state.opt_state
    if shardings is not None:
        opt_state = jax.tree.map(_on_device, opt_state, shardings.opt_state)
    with jax.named_scope("optimizer"):
        updates, new_opt_state = optimizer.update(grads, opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = lambda new, old: jnp.where(finite, new, old)
        params, new_opt_state = jax.tree.map(keep, (params, new_opt_state), (state.params, opt_state))
    if shardings is not None:
        new_opt_state = jax.tree.map(_stored, new_opt_state, shardings.opt_state)
    return TrainState(state.step + 1, params, new_opt_state)


def _in_host_memory(sharding: jax.sharding.Sharding) -> bool:
    return sharding.memory_kind is not None and sharding.memory_kind.endswith("host")


def _on_device(leaf: jax.Array, sharding: jax.sharding.NamedSharding) -> jax.Array:
    return jax.device_put(leaf, sharding.with_memory_kind("device")) if _in_host_memory(sharding) else leaf


def _stored(leaf: jax.Array, sharding: jax.sharding.NamedSharding) -> jax.Array:
    return jax.device_put(leaf, sharding) if _in_host_memory(sharding) else leaf


def _accumulated(gradient: Callable, params: Params, batch: Batch, scalars: dict[str, jax.Array], parts: int):
    # Every parts-th row goes into a slice, so that a slice lies on all the devices that the batch lies on.
    slices = {k: jnp.swapaxes(v.reshape(v.shape[0] // parts, parts, *v.shape[1:]), 0, 1) for k, v in batch.items()}
    add = lambda total, more: jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more)
    shapes = jax.eval_shape(gradient, params, {k: v[0] for k, v in slices.items()} | scalars)
    # Sums of float32, of whatever precision the parts are.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    body = lambda total, part: (add(total, gradient(params, part | scalars)), None)
    return jax.lax.scan(body, zeros, slices)[0]


class Interrupted(SystemExit):
    """SIGTERM or SIGINT came and everything is saved; the process exits with 128 + signal number."""


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Within the block SIGTERM and SIGINT only set the returned event, so that work can be saved first.

    The second signal acts at once. Outside the main thread, where Python allows no handlers, nothing changes.

    Raises:
      Interrupted: at the end of a block that did not act on a signal, so that none is lost.
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
    if stop.is_set():
        raise Interrupted(128 + stop.number)


def interrupted(number: int, where: str, log: Callable[[str], None]) -> Interrupted:
    """Says `where` signal `number` stopped work that is saved; returns what to raise."""
    log(f"stopped by a signal {where}; saved; the same command resumes")
    return Interrupted(128 + number)


class Agreement:
    """Whether to stop, the same answer at the same step in every process.

    A signal reaches processes at different moments. Each puts its own flag into a small array, whose maximum they
    read one step later, so that no step waits for it.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._pending: jax.Array | None = None
        self.number = signal.SIGTERM
        if jax.process_count() > 1:
            self._mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("devices",))
            whole = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
            self._maximum = jax.jit(jnp.max, out_shardings=whole)

    def stops(self) -> bool:
        """To be called once a step, by every process."""
        self.number = getattr(self._stop, "number", self.number)
        if jax.process_count() == 1:
            return self._stop.is_set()
        place = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec("devices"))
        flag = np.full(1, self._stop.is_set(), np.int32)
        before = self._pending
        self._pending = self._maximum(jax.make_array_from_callback((jax.device_count(),), place, lambda _: flag))
        return before is not None and bool(before)

    def stops_now(self) -> bool:
        """As `stops`, of the signals that have come by now; waits for the other processes."""
        return self.stops() | (jax.process_count() > 1 and self.stops())


@dataclasses.dataclass(frozen=True)
class LoopResult:
    """State after the last step, its logged metrics, and how many of the steps this process did."""

    state: TrainState
    metrics: dict[str, float]
    steps_done: int


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """Rhythm and policies of a loop.

    Attributes:
      checkpoint_every, log_every: in steps; 0 saves no checkpoint but the last.
      keep: checkpoints kept.
      nonfinite: "stop", or "skip" to leave such steps out, at most MAX_SKIPPED in a row.
      flops_per_token: of a forward and backward pass (pipeline.train.flops), for the logged utilisation.
    """

    checkpoint_every: int = 100
    log_every: int = 10
    keep: int = 1
    nonfinite: str = "stop"
    flops_per_token: float | None = None


MAX_SKIPPED = 10  # steps in a row without a finite gradient: the run is broken, not unlucky


def loop(directory: pathlib.Path, state: TrainState, step_fn: Callable, batches: Any, steps: int, *,
         log: Callable[[str], None], schedule: optax.Schedule | None = None, options: LoopOptions = LoopOptions(),
         explain: Callable[[Params, Batch], str] | None = None, place: Callable[[Batch], Batch] = jax.device_put
         ) -> LoopResult:
    """Runs `step_fn` until `steps` steps are done, continuing from the newest checkpoint.

    While it runs, a file called `profile` in `directory` makes it trace the next steps into `directory`/profiles.

    Args:
      directory: holds metrics.jsonl and checkpoints/.
      state: the initial state (donated), used where there is no checkpoint, and for the layout of one.
      step_fn: see `make_train_step`.
      batches: Grain iterator of dicts of numpy arrays [rows, T]; its position is saved with the state.
      steps: total number of steps, those before a resume included.
      log: takes one progress line.
      schedule: learning rate by step, to be logged.
      options: see LoopOptions.
      explain: (params, batch) -> where a non-finite value began, called when there is one.
      place: a process's batch -> the arrays that `step_fn` takes.
    Raises:
      UserError: a loss or gradient was not finite; the data ran out; the disk is full.
      Interrupted: stopped by a signal, saved.
    """
    if options.nonfinite not in ("stop", "skip"):
        raise UserError(f"--config.*.train.nonfinite: {options.nonfinite!r}; allowed: stop, skip")
    checkpoints = Checkpoints(directory / "checkpoints", options.keep)
    restored = checkpoints.restore(state, batches, log)
    done = 0
    if restored is not None:
        done, state, _ = restored
        log(f"resumes at step {done} of {steps}")
    curve = MetricsLog(directory / "metrics.jsonl", done, enabled=jax.process_index() == 0)
    recorder = _Recorder(curve, log, schedule, steps, options.flops_per_token)
    guard = _Guard(options.nonfinite, explain, log)
    profiler = Profiler(directory, log)
    started, batch, metrics = done, None, None
    try:
        with stop_signals() as stop:
            agreed = Agreement(stop)
            while done < steps:
                before, batch = batch, _next(batches, place, done, steps)
                profiler.step(done)
                # Nothing but the batch, which `_next` put there, may travel to the device in a step.
                with jax.transfer_guard_host_to_device("disallow"):
                    state, latest = step_fn(state, batch)
                # Reading the previous step's verdict lets the device run one step ahead of the host.
                guard.check(metrics, done, state, before)
                metrics, done = latest, done + 1
                recorder.add(metrics, batch)
                stopping = agreed.stops()
                saving = stopping or done == steps or (
                    options.checkpoint_every and done % options.checkpoint_every == 0)
                if saving or done % options.log_every == 0:
                    guard.check(metrics, done, state, batch)
                    metrics = None
                    recorder.flush(done)
                if saving:
                    checkpoints.save(done, state, batches, wait=stopping or done == steps)
                    recorder.skip()
                if stopping or (done == steps and agreed.stops_now()):
                    raise interrupted(agreed.number, f"at step {done}", log)
    finally:
        profiler.close()
        checkpoints.close()
        curve.close()
    return LoopResult(state, recorder.last, done - started)


class _Recorder:
    """Means over the steps since the last row, as a row of metrics.jsonl and a progress line."""

    def __init__(self, curve: MetricsLog, log: Callable[[str], None], schedule: optax.Schedule | None,
                 steps: int, flops_per_token: float | None) -> None:
        self._curve, self._log, self._schedule, self._steps = curve, log, schedule, steps
        self._pending: list[dict[str, jax.Array]] = []
        self._meter = Meter(flops_per_token)
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

    def skip(self) -> None:
        """What has passed since the last row was no training."""
        self._meter.skip()

    def flush(self, step: int) -> None:
        if not self._pending:
            return
        rows = jax.device_get(self._pending)
        self._pending = []
        sound = [row for row in rows if row["finite"]] or rows
        values = {name: float(np.mean([row[name] for row in sound])) for name in rows[0] if name != "finite"}
        skipped = sum(not row["finite"] for row in rows)
        if skipped:
            values["skipped"] = skipped
        if self._schedule is not None:
            values["learning_rate"] = float(self._schedule(step - 1))
        values |= self._meter.read()
        self._curve.write(step, values)
        self.last = values
        left = (self._steps - step) * values["seconds_per_step"]
        self._log(f"step {step}/{self._steps}  loss {values['loss']:.3f}  grad {values['grad_norm']:.2f}  "
                  f"{values['tokens_per_second']:,.0f} tokens/s  {left:.0f} s left")


def _next(batches: Any, place: Callable[[Batch], Batch], done: int, steps: int) -> Batch:
    try:
        return place(dict(next(batches)))
    except StopIteration:
        raise UserError(f"the data ended after {done} of {steps} steps; give fewer steps or more documents") from None


class _Guard:
    """What happens when a step's loss or gradient was not finite; the step itself has left the parameters alone."""

    def __init__(self, policy: str, explain: Callable[[Params, Batch], str] | None, log: Callable[[str], None]) -> None:
        self._policy, self._explain, self._log = policy, explain, log
        self._in_a_row = 0

    def check(self, metrics: dict[str, jax.Array] | None, step: int, state: TrainState, batch: Batch | None) -> None:
        if metrics is None:
            return
        if bool(metrics["finite"]):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        where = f": {self._explain(state.params, batch)}" if self._explain is not None else ""
        what = (f"step {step}: loss {float(metrics['loss'])} with gradient norm {float(metrics['grad_norm'])} is not "
                f"finite{where}")
        if self._policy == "stop":
            raise UserError(f"{what}; the last checkpoint is kept")
        if self._in_a_row > MAX_SKIPPED:
            raise UserError(f"{what}; so were the {MAX_SKIPPED} before it; the last checkpoint is kept")
        self._log(f"{what}; the step is left out")
