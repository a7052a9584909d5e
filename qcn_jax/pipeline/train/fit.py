"""Next-token training of one model on one stream of batches: what midtrain, sft and the control share."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax

from qcn_jax.config import ModelConfig, TrainConfig
from qcn_jax.errors import UserError
from qcn_jax.model import Qwen3Next
from qcn_jax.pipeline.data import loader
from qcn_jax.pipeline.train import layout, loop, losses
from qcn_jax.pipeline.train.checkpoints import Checkpoints
from qcn_jax.pipeline.train.metrics import read_metrics
from qcn_jax.pipeline.train.step import BatchShape
from qcn_jax.pipeline.train.trainer import Trainer
from qcn_jax.sharding.parallel import Parallel


def make_trainer(model: ModelConfig, config: TrainConfig, parallel: Parallel | None, field: str) -> Trainer:
    """Builds next-token training of `model` on `parallel`.

    Args:
      field: of the run's configuration that holds `config`.

    Raises:
      UserError: rows that `accumulate` or the mesh does not divide.
    """
    if config.rows % config.accumulate:
        raise UserError(f"--config.{field}.accumulate: {config.accumulate} does not divide {config.rows} rows")
    network, mtp = Qwen3Next(model, parallel=parallel), (config.mtp_coef, config.mtp_steps)
    loss = losses.language_model_loss(network, *mtp)
    whole = losses.routing(network, *mtp) if model.num_experts and model.router_aux_loss_coef else None
    shape = BatchShape(config.accumulate, config.rows // config.accumulate, config.sequence_length)
    return Trainer.build(model, loss, config.optimizer, config.steps, shape, parallel, field=field,
                         mtp=config.mtp_coef > 0, whole=whole)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training with one batch shape, mesh and mixture.

    Attributes:
      trainer: see `make_trainer`.
      batches: makes the iterator of its batches (data.loader), from their beginning.
      config: batch shape and rhythm.
      first, last: steps done before it and after it.
    """

    trainer: Trainer
    batches: Callable[[], grain.DatasetIterator]
    config: TrainConfig
    first: int
    last: int

    def results(self) -> dict[str, Any]:
        """Returns what it is, JSON-ready."""
        return {"steps": self.last - self.first, "rows": self.config.rows,
                "sequence_length": self.config.sequence_length}


def fit(directory: pathlib.Path, phases: Sequence[Phase], params: Callable[[Parallel | None], Any], *,
        save: Callable[[ModelConfig, Any], None], log: Callable[[str], None]) -> dict[str, Any]:
    """Trains through all phases and saves the weights; resumes from `directory`'s checkpoint.

    A phase takes up the state that the one before it has saved, laid out anew where its mesh is another one; so it
    goes on alike whether the process is the same or a new one.

    Args:
      directory: metrics.jsonl and checkpoints/.
      phases: in order; the position in the batches of the one under way is part of the checkpoint.
      params: mesh -> the initial parameters laid out on it; donated.
      save: is given the model and its final parameters.
      log: gets a line of progress.
    Returns:
      JSON-ready results: steps, tokens, loss and its parts at the end, seconds_per_step (without
      compilation), packing (loader.summary) and the mesh of the last phase, and the phases where there are several.
    Raises:
      UserError: see train.loop.
    """
    done = _done(directory) if len(phases) > 1 else 0
    for number, phase in enumerate(phases, 1):
        if phase.last <= done and phase is not phases[-1]:
            continue
        if len(phases) > 1:
            log(f"phase {number} of {len(phases)}: steps {phase.first + 1} to {phase.last}, {phase.config.rows} rows "
                f"of {phase.config.sequence_length} tokens")
        trainer, batches = phase.trainer, phase.batches()
        start = params(trainer.parallel) if phase is phases[0] else None
        result = None  # the devices do not hold the state of the phase before beside its own from the disk
        result = trainer.run(directory, start, loop.Stream(batches, trainer.place), phase.last, phase.config, log=log,
                             first=phase.first)
    save(trainer.model, result.state.params)
    for words in loader.lines(packed := loader.summary(batches)):
        log(words)
    shapes = [phase.results() for phase in phases]
    return {
        "steps": phases[-1].last,
        "tokens": sum(shape["steps"] * shape["rows"] * shape["sequence_length"] for shape in shapes),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(result.state.params)),
        **_recorded(directory), "packing": packed,
        "mesh": layout.mesh_of(result.state), **({"phases": shapes} if len(phases) > 1 else {}),
    }


def _done(directory: pathlib.Path) -> int:
    checkpoints = Checkpoints(directory / "checkpoints")
    try:
        return checkpoints.newest() or 0
    finally:
        checkpoints.close()


def _recorded(directory: pathlib.Path) -> dict[str, float]:
    """Last loss and the median step time of the curve, which a resumed process has not all seen itself."""
    rows = read_metrics(directory / "metrics.jsonl")
    speeds = sorted(row["seconds_per_step"] for row in rows if row["seconds_per_step"] > 0) or [0.0]
    last = rows[-1] if rows else {}
    kept = {name: last[name] for name in ("loss", "ce", "accuracy", "mtp", "balance") if name in last}
    return kept | {"seconds_per_step": speeds[len(speeds) // 2]}
