"""Next-token training of one model on one stream of batches: what midtrain, sft and the control share."""

import pathlib
from collections.abc import Callable
from typing import Any

import grain
import jax

from qcn_jax import hub
from qcn_jax.config import MeshConfig, ModelConfig, TrainConfig
from qcn_jax.errors import UserError
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.model import Qwen3Next
from qcn_jax.pipeline.train import diagnosis, layout, loop, losses, optimizer
from qcn_jax.pipeline.data import loader
from qcn_jax.pipeline.train.flops import token_flops
from qcn_jax.pipeline.train.layout import Rows
from qcn_jax.pipeline.train.metrics import read_metrics
from qcn_jax.sharding.mesh import make_parallel


def fit(directory: pathlib.Path, out: pathlib.Path, model: ModelConfig, params: Any, batches: grain.DatasetIterator,
        config: TrainConfig, *, tokenizer: Tokenizer, log: Callable[[str], None], rows: Rows | None = None
        ) -> dict[str, Any]:
    """Trains until `config.steps` and writes the weights to `out`; resumes from `directory`'s checkpoint.

    Args:
      directory: metrics.jsonl and checkpoints/.
      out: folder of the final weights, in Hugging Face form with `tokenizer`.
      model, params: the initial model; `params` is donated.
      batches: from data.loader; its position is part of the checkpoint.
      config: steps, batch shape, optimizer.
      rows: the mesh, and which rows `batches` gives this process (see `input_rows`); None is one device.
    Returns:
      JSON-ready results: steps, tokens, loss and its parts at the end, seconds_per_step (without
      compilation), packing statistics.
    Raises:
      UserError: rows that `accumulate` does not divide, and whatever train.loop says.
    """
    if config.rows % config.accumulate:
        raise UserError(f"--config.*.train.accumulate: {config.accumulate} does not divide {config.rows} rows")
    parallel = None if rows is None else rows.parallel
    network = Qwen3Next(model, parallel=parallel)
    loss_fn = losses.language_model_loss(network, config.mtp_coef, config.mtp_steps)
    update = optimizer.make_optimizer(config.optimizer, config.steps)
    if parallel is None:
        step, place = loop.make_train_step(loss_fn, update, config.accumulate), jax.device_put
        state = loop.TrainState.create(params, update)
    else:
        shardings = layout.state_shardings(model, parallel, update, config.optimizer.offload)
        step = loop.make_train_step(loss_fn, update, config.accumulate, shardings, layout.batch_sharding(parallel))
        state, place = layout.place_state(params, update, shardings), rows.place
    result = loop.loop(
        directory, state, step, batches, config.steps, log=log,
        schedule=optimizer.schedule(config.optimizer, config.steps), place=place,
        options=loop.LoopOptions(
            config.checkpoint_every, config.log_every, config.keep, config.nonfinite,
            token_flops(model, config.sequence_length, config.mtp_coef > 0).training),
        explain=diagnosis.explain(model, loss_fn, parallel))
    weights = layout.on_host(result.state.params)
    if jax.process_index() == 0:
        hub.save(out, model, weights, tokenizer)
    return {
        "steps": config.steps, "tokens": config.steps * config.rows * config.sequence_length,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(result.state.params)),
        **_recorded(directory), "packing": loader.statistics(batches).as_dict(),
    }


def input_rows(mesh: MeshConfig, config: TrainConfig) -> Rows:
    """The mesh over all devices there are, and this process's rows of a batch.

    Raises:
      UserError: a mesh that does not fit the devices, or rows that do not divide by it.
    """
    return Rows.of(make_parallel(mesh) if jax.device_count() > 1 else None, config.rows)


def _recorded(directory: pathlib.Path) -> dict[str, float]:
    """Last loss and the median step time of the curve, which a resumed process has not all seen itself."""
    rows = read_metrics(directory / "metrics.jsonl")
    speeds = sorted(row["seconds_per_step"] for row in rows if row["seconds_per_step"] > 0) or [0.0]
    last = rows[-1] if rows else {}
    kept = {name: last[name] for name in ("loss", "ce", "accuracy", "mtp", "balance") if name in last}
    return kept | {"seconds_per_step": speeds[len(speeds) // 2]}
