"""The training loop that every stage with gradients shares.

A feed gives the batches of a step: the next of a stream of documents, or what episodes of the newest policy have
taught. The loop runs the compiled step on them, logs, saves, and stops: at the last step, on SIGTERM or SIGINT after a
save, or when a loss or gradient is not finite, with one line that says where that began.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import grain
import jax
import numpy as np
import optax

from qcn_jax.errors import UserError
from qcn_jax.pipeline.train.checkpoints import Checkpoints
from qcn_jax.pipeline.train.metrics import Meter, MetricsLog, Profiler
from qcn_jax.pipeline.train.signals import Agreement, interrupted, stop_signals
from qcn_jax.pipeline.train.step import Batch, Params, TrainState


@dataclasses.dataclass(frozen=True)
class Work:
    """What one step of a loop trains on.

    Attributes:
      batches: placed on the devices, one for each move of the optimizer; there may be none.
      tokens: of all batches, without padding rows.
      metrics: JSON-ready values for the step's row of metrics.jsonl.
      absent: sections of the batch's shape that no slice is of; they have no metrics.
      waited: seconds in which the host made the batches ready, where nothing else was done meanwhile.
    """

    batches: Sequence[Batch]
    tokens: int
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    waited: float | None = None


class Feed(Protocol):
    """Where a loop's work comes from.

    stream: a Grain iterator whose position is saved with the state, or None.
    """

    stream: grain.DatasetIterator | None

    def next(self, step: int, state: TrainState, stop: Callable[[], bool]) -> Work | None:
        """Returns the work of step number `step`, from 0.

        Args:
          step: how many are done.
          state: not to be donated.
          stop: whether to give up; None is returned then, and a run that resumes does this step again.

        Raises:
          StopIteration: there is no more.
        """


class Stream:
    """A feed of batches that a Grain iterator gives and `place` puts on the devices."""

    def __init__(self, stream: grain.DatasetIterator, place: Callable[[dict[str, np.ndarray]], Batch]) -> None:
        self.stream, self._place = stream, place

    def next(self, step: int, state: TrainState, stop: Callable[[], bool]) -> Work:
        """See Feed."""
        began = time.perf_counter()
        batch = self._place(dict(next(self.stream)))
        return Work([batch], batch["tokens"].size, waited=time.perf_counter() - began)


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
      flops_per_token: of the model, per token trained on (pipeline.train.flops), for the logged utilisation.
    """

    checkpoint_every: int = 100
    log_every: int = 10
    keep: int = 1
    nonfinite: str = "stop"
    flops_per_token: float | None = None


MAX_SKIPPED = 10  # steps in a row without a finite gradient: the run is broken, not unlucky


def progress(values: Mapping[str, Any]) -> str:
    """Words a row of metrics.jsonl for the progress line of a supervised stage."""
    waited = f"  input {values['input_wait']:.1%}" if "input_wait" in values else ""
    return (f"loss {values['loss']:.4g}  grad {values['grad_norm']:.3g}  "
            f"{values['tokens_per_second']:,.0f} tokens/s{waited}")


def loop(directory: pathlib.Path, state: TrainState, step_fn: Callable, feed: Feed, steps: int, *,
         log: Callable[[str], None], line: Callable[[Mapping[str, Any]], str] = progress,
         schedule: optax.Schedule | None = None, first: int = 0, options: LoopOptions = LoopOptions(),
         explain: Callable[[Params, Batch], str] | None = None) -> LoopResult:
    """Runs `step_fn` until `steps` steps are done, continuing from the newest checkpoint.

    While it runs, a file called `profile` in `directory` makes it trace the next steps into `directory`/profiles.

    Args:
      directory: holds metrics.jsonl and checkpoints/.
      state: the initial state (donated), used where there is no checkpoint, and for the layout of one; where there
        must be one, ShapeDtypeStructs will do.
      step_fn: (state, batch) -> (state, metrics), see train.step.make_step.
      feed: see Feed.
      steps: total number of steps, those before a resume included.
      log: takes one progress line.
      line: words a row of metrics for `log`.
      first: steps that other feeds have done before; this one's stream begins behind them.
      schedule: learning rate by move of the optimizer, to be logged.
      options: see LoopOptions.
      explain: (params, batch) -> where a non-finite value began, called when there is one.
    Raises:
      UserError: a loss or gradient was not finite; the data ran out; the disk is full.
      Interrupted: stopped by a signal, saved.
    """
    if options.nonfinite not in ("stop", "skip"):
        raise UserError(f"--config.*.train.nonfinite: {options.nonfinite!r}; allowed: stop, skip")
    checkpoints = Checkpoints(directory / "checkpoints", options.keep)
    restored = checkpoints.restore(state, feed.stream, log, first)
    done = 0
    if restored is not None:
        done, state, _ = restored
        log(f"resumes at step {done} of {steps}")
    curve = MetricsLog(directory / "metrics.jsonl", done, enabled=jax.process_index() == 0)
    recorder = _Recorder(curve, log, line, schedule, steps, options.flops_per_token)
    guard = _Guard(options.nonfinite, explain, log)
    profiler = Profiler(directory, log)
    started = done
    try:
        with stop_signals() as stop:
            agreed = Agreement(stop)
            while done < steps:
                profiler.step(done)
                work = _next(feed, done, steps, state, stop.is_set)
                if work is None:
                    checkpoints.save(done, state, feed.stream, wait=True)
                    raise interrupted(stop.number, f"at step {done}", log)
                for batch in work.batches:
                    # Nothing but the batch, which the feed put there, may travel to the device in a step.
                    with jax.transfer_guard_host_to_device("disallow"):
                        state, metrics = step_fn(state, batch)
                    guard.watch(metrics, done + 1, batch)
                    recorder.add(metrics, work.absent)
                done += 1
                recorder.end(work)
                # Reading the verdict on all but the newest batch lets the device run one ahead of the host.
                guard.check(state, leave=1)
                stopping = agreed.stops()
                saving = stopping or done == steps or (
                    options.checkpoint_every and done % options.checkpoint_every == 0)
                if saving or done % options.log_every == 0:
                    guard.check(state)
                    recorder.flush(done, state)
                if saving:
                    checkpoints.save(done, state, feed.stream, wait=stopping or done == steps)
                    recorder.skip()
                if stopping or (done == steps and agreed.stops_now()):
                    raise interrupted(agreed.number, f"at step {done}", log)
    finally:
        profiler.close()
        checkpoints.close()
        curve.close()
    return LoopResult(state, recorder.last, done - started)


def _next(feed: Feed, done: int, steps: int, state: TrainState, stop: Callable[[], bool]) -> Work | None:
    try:
        return feed.next(done, state, stop)
    except StopIteration:
        raise UserError(f"the data ended after {done} of {steps} steps; give fewer steps or more documents") from None


class _Recorder:
    """Means over the steps since the last row, as a row of metrics.jsonl and a progress line."""

    def __init__(self, curve: MetricsLog, log: Callable[[str], None], line: Callable[[Mapping[str, Any]], str],
                 schedule: optax.Schedule | None, steps: int, flops_per_token: float | None) -> None:
        self._curve, self._log, self._line, self._schedule, self._steps = curve, log, line, schedule, steps
        self._pending: list[dict[str, jax.Array]] = []
        self._host: list[Mapping[str, Any]] = []
        self._meter = Meter(flops_per_token)
        self._first = True
        self.last: dict[str, float] = {}

    def add(self, metrics: dict[str, jax.Array], absent: frozenset[str]) -> None:
        """Takes the metrics of one call of the step."""
        self._pending.append({name: value for name, value in metrics.items() if name.split("/")[-1] not in absent})

    def end(self, work: Work) -> None:
        """Counts a finished step."""
        self._host.append(work.metrics)
        if self._first and self._pending:  # the first step compiles; its time is not speed
            jax.block_until_ready(self._pending)
            self._meter.skip()
            self._first = False
        else:
            self._meter.add(work.tokens, work.waited)

    def skip(self) -> None:
        """What has passed since the last row was no training."""
        self._meter.skip()

    def flush(self, step: int, state: TrainState) -> None:
        """Writes the row of `step`."""
        rows = jax.device_get(self._pending)
        kept = [row for row in rows if row["finite"]] or rows
        values = _means(self._host) | _means([{k: v for k, v in row.items() if k != "finite"} for row in kept])
        self._pending, self._host = [], []
        skipped = sum(not row["finite"] for row in rows)
        if skipped:
            values["skipped"] = skipped
        if self._schedule is not None:
            values["learning_rate"] = float(self._schedule(max(int(state.step) - 1, 0)))
        values |= self._meter.read()
        self._curve.write(step, values)
        self.last = values
        left = (self._steps - step) * values["seconds_per_step"]
        self._log(f"step {step}/{self._steps}  {self._line(values)}" + (f"  {left:.0f} s left" if left else ""))


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of every value over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


class _Guard:
    """What happens when a step's loss or gradient was not finite; the step itself has left the parameters alone."""

    def __init__(self, policy: str, explain: Callable[[Params, Batch], str] | None, log: Callable[[str], None]) -> None:
        self._policy, self._explain, self._log = policy, explain, log
        self._watched: list[tuple[dict[str, jax.Array], int, Batch]] = []
        self._in_a_row = 0

    def watch(self, metrics: dict[str, jax.Array], step: int, batch: Batch) -> None:
        """Takes the verdict of a call of the step, to be read by `check`."""
        self._watched.append((metrics, step, batch))

    def check(self, state: TrainState, leave: int = 0) -> None:
        """Reads all verdicts but the newest `leave`."""
        while len(self._watched) > leave:
            self._judge(*self._watched.pop(0), state)

    def _judge(self, metrics: dict[str, jax.Array], step: int, batch: Batch, state: TrainState) -> None:
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
