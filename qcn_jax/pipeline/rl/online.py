"""What RL and distillation share: the loop over updates, and episodes turned into rows for the model.

An update is: choose prompts, let the policy act on them, learn from what came back. Everything that an update
does follows from the seed, the update's number and the state, so that a run that was killed and resumes from a
checkpoint gives what it would have given.
"""

import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from qcn_jax.chat.tokenizer import END_OF_TEXT, TURN_END, Tokenizer
from qcn_jax.config import ModelConfig, RolloutConfig
from qcn_jax.errors import UserError
from qcn_jax.inference.engine import Engine
from qcn_jax.inference.sampling import Sampling
from qcn_jax.pipeline.data.packing import pack
from qcn_jax.pipeline.rl.rollout import RolloutRecord, Stop, Stopped
from qcn_jax.pipeline.train.checkpoints import Checkpoints
from qcn_jax.pipeline.train.loop import TrainState, interrupted, stop_signals
from qcn_jax.pipeline.train.metrics import MetricsLog

T = TypeVar("T")
KEPT = 2  # checkpoints, so that there is one to fall back on

# (number of the update from 0, state, whether to give up) -> (state, metrics)
Step = Callable[[int, TrainState, Stop], tuple[TrainState, dict[str, Any]]]


def run_updates(
    directory: pathlib.Path, state: TrainState, step: Step, updates: int, *, log: Callable[[str], None],
    line: Callable[[dict[str, Any]], str], checkpoint_every: int,
) -> TrainState:
    """Does updates up to number `updates`, continuing from the newest checkpoint.

    Args:
      directory: holds metrics.jsonl and checkpoints/.
      state: the initial state (donated), used where there is no checkpoint.
      step: one update; its metrics must be JSON-ready. Where it raises `rollout.Stopped`, which it may do as
        long as it has not donated the state, that update is done again by the run that resumes.
      updates: how many in all.
      log: takes one progress line.
      line: words the metrics of an update for `log`.
      checkpoint_every: in updates.

    Raises:
      Interrupted: SIGTERM or SIGINT came, be it in the last update; all finished updates are saved.
    """
    checkpoints = Checkpoints(directory / "checkpoints", KEPT)
    done = 0
    try:
        restored = checkpoints.restore(state, log=log)
        if restored is not None:
            done, state, _ = restored
            log(f"resumes at update {done} of {updates}")
        curve = MetricsLog(directory / "metrics.jsonl", done)
        try:
            with stop_signals() as stop:
                while done < updates:
                    began = time.perf_counter()
                    try:
                        state, metrics = step(done, state, stop.is_set)
                    except Stopped:
                        checkpoints.save(done, state, wait=True)
                        raise interrupted(stop.number, f"after update {done}", log) from None
                    done += 1
                    metrics = metrics | {"seconds": time.perf_counter() - began}
                    curve.write(done, metrics)
                    left = (updates - done) * metrics["seconds"]
                    log(f"update {done}/{updates}  {line(metrics)}  {metrics['seconds']:.1f} s, {left:.0f} s left")
                    if stop.is_set() or done == updates or done % checkpoint_every == 0:
                        checkpoints.save(done, state, wait=stop.is_set() or done == updates)
                    if stop.is_set():
                        raise interrupted(stop.number, f"after update {done}", log)
        finally:
            curve.close()
    finally:
        checkpoints.close()
    return state


def make_engine(
    model: ModelConfig, params: Any, tokenizer: Tokenizer, config: RolloutConfig, sequence_length: int | None = None
) -> Engine:
    """The engine that a stage's rollouts use.

    Raises:
      UserError: an episode may become longer than the rows that are trained on.
    """
    if sequence_length is not None and config.max_length > sequence_length:
        raise UserError(
            f"rollout.max_length is {config.max_length} and must not exceed sequence_length, {sequence_length}: an "
            "episode is learned from whole"
        )
    stop_ids = [tokenizer.id(TURN_END), tokenizer.id(END_OF_TEXT)]
    return Engine(
        model, params, slots=config.slots, max_length=config.max_length, max_new_tokens=config.max_new_tokens,
        stop_ids=stop_ids,
    )  # fmt: skip


def sampling_of(config: RolloutConfig) -> Sampling:
    """How a stage draws tokens."""
    return Sampling(config.temperature, config.top_p, config.top_k)


def choose(items: Sequence[T], count: int, update: int, seed: int) -> list[T]:
    """The items of one update: consecutive pieces of one shuffled order after another.

    Every item comes once before any comes again; the choice depends on the arguments alone.
    """
    if not items:
        raise UserError("there are no prompts to learn from; stage tasks made too few, or none passed the filter")
    chosen = []
    for position in range(update * count, (update + 1) * count):
        epoch, index = divmod(position, len(items))
        order = np.random.default_rng([seed, epoch]).permutation(len(items))
        chosen.append(items[order[index]])
    return chosen


def document(record: RolloutRecord, **per_token: np.ndarray) -> dict[str, np.ndarray]:
    """An episode as a document for packing, aligned with predicting positions.

    Args:
      record: the episode; weight 1 where the next token is one that the policy chose.
      **per_token: further arrays [n] about each token; shifted to the position that predicts it.
    """
    shift = lambda values: np.append(values[1:], np.zeros(1, values.dtype))
    arrays = {name: shift(np.asarray(values)) for name, values in per_token.items()}
    return {"tokens": record.tokens, "weights": shift(record.sampled.astype(np.float32)), **arrays}


def pack_rows(documents: Sequence[dict[str, np.ndarray]], length: int, rows: int) -> dict[str, np.ndarray]:
    """Documents in as few rows of `length` as best fit finds, a multiple of `rows` of them."""
    return pack(documents, length, rows=rows)


def next_tokens(batch: dict[str, jax.Array]) -> jax.Array:
    """[B, T] what each position predicts; the last one's is of no meaning and has no weight."""
    return jnp.roll(batch["tokens"], -1, axis=1)


class Clock:
    """Seconds by part of an update."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._mark = time.perf_counter()

    def lap(self, name: str) -> None:
        """The time since the last lap went into `name`."""
        now = time.perf_counter()
        self.parts[f"seconds_{name}"] = self.parts.get(f"seconds_{name}", 0.0) + now - self._mark
        self._mark = now
