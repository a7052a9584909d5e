"""Next-token training of one model on one stream of batches: what midtrain, sft and the control share."""

import pathlib
from collections.abc import Callable
from typing import Any

import grain
import jax

from qcn_jax import hub
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.config import ModelConfig, TrainConfig
from qcn_jax.errors import UserError
from qcn_jax.model import Qwen3Next
from qcn_jax.pipeline.data import loader
from qcn_jax.pipeline.train import layout, loop, losses
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
    loss = losses.language_model_loss(Qwen3Next(model, parallel=parallel), config.mtp_coef, config.mtp_steps)
    shape = BatchShape(config.accumulate, config.rows // config.accumulate, config.sequence_length)
    return Trainer.build(model, loss, config.optimizer, config.steps, shape, parallel, field=field,
                         mtp=config.mtp_coef > 0)


def fit(directory: pathlib.Path, out: pathlib.Path, trainer: Trainer, params: Any, batches: grain.DatasetIterator,
        config: TrainConfig, *, tokenizer: Tokenizer, log: Callable[[str], None]) -> dict[str, Any]:
    """Trains until `config.steps` and writes the weights to `out`; resumes from `directory`'s checkpoint.

    Args:
      directory: metrics.jsonl and checkpoints/.
      out: folder of the final weights, in Hugging Face form with `tokenizer`.
      trainer: see `make_trainer`.
      params: the initial parameters; donated.
      batches: from data.loader, of `trainer.rows`; its position is part of the checkpoint.
      config: steps and rhythm.
    Returns:
      JSON-ready results: steps, tokens, loss and its parts at the end, seconds_per_step (without
      compilation), packing statistics, the mesh.
    Raises:
      UserError: see train.loop.
    """
    result = trainer.run(directory, params, loop.Stream(batches, trainer.place), config.steps, config, log=log)
    hub.save(out, trainer.model, result.state.params, tokenizer)
    return {
        "steps": config.steps, "tokens": config.steps * config.rows * config.sequence_length,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(result.state.params)),
        **_recorded(directory), "packing": loader.statistics(batches).as_dict(),
        "mesh": layout.mesh_of(result.state),
    }


def _recorded(directory: pathlib.Path) -> dict[str, float]:
    """Last loss and the median step time of the curve, which a resumed process has not all seen itself."""
    rows = read_metrics(directory / "metrics.jsonl")
    speeds = sorted(row["seconds_per_step"] for row in rows if row["seconds_per_step"] > 0) or [0.0]
    last = rows[-1] if rows else {}
    kept = {name: last[name] for name in ("loss", "ce", "accuracy", "mtp", "balance") if name in last}
    return kept | {"seconds_per_step": speeds[len(speeds) // 2]}
