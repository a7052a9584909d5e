"""Stage `sft`: imitation of verified trajectories, with loss on the assistant's own tokens.

Whoever made them acted through the same tools in the same sandboxes as the model will; what tests did not confirm is
not kept. Tasks are those of the imitation side of pipeline.data.splits, so that reinforcement learning meets none of
them. Turns that ended in failing tests are part of what the model reads and no part of the loss: it learns to recover
from mistakes, not to make them. Trajectories that look for a defect nobody has told them (`search`) are learned whole:
there the failed edits are the search.
"""

import dataclasses
import functools
import pathlib
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from qcn_jax import files
from qcn_jax.agents.trajectory import Trajectory
from qcn_jax.chat.encoder import ChatEncoder
from qcn_jax.config import RunConfig
from qcn_jax.errors import UserError
from qcn_jax.pipeline import models
from qcn_jax.pipeline.context import StageContext
from qcn_jax.pipeline.data import loader
from qcn_jax.pipeline.data.splits import split_tasks
from qcn_jax.pipeline.data.trajectories import TRAJECTORIES
from qcn_jax.pipeline.train import fit
from qcn_jax.pipeline.train.signals import interrupted, stop_signals
from qcn_jax.pipeline.train.trainer import Trainer, mesh_here
from qcn_jax.sharding import distributed
from qcn_jax.sharding.parallel import Parallel

DOCUMENTS, SUMMARY = "data", "summary.json"  # in the stage's folder: what is learned from, for all processes alike
CONTROL_SEED = 1_000_003  # the control sees the same documents in another order


def make_trainer(config: RunConfig, parallel: Parallel | None) -> Trainer:
    """Builds the step of the stage on `parallel`.

    Raises:
      UserError: rows that `accumulate` or the mesh does not divide.
    """
    return fit.make_trainer(config.model, config.sft.train, parallel, "sft.train")


def run_stage(context: StageContext) -> dict[str, Any]:
    """Collects trajectories, trains the mid-trained model on them, writes sft/model/."""
    folder = context.workdir / DOCUMENTS
    with distributed.first_before_others("trajectories"):  # the first process has the sandboxes, the others read
        if distributed.is_first():
            write_documents(context, folder)
        documents, summary = loader.TokenStore(folder), files.read_json(folder / SUMMARY)
    results = _train(context, documents, context.config.sft.train.steps, context.workdir,
                     "midtrain", "sft", context.config.seed)
    ending = f"loss {results['loss']:.3f}" if "loss" in results else "no steps"
    line = f"{summary['trajectories']} verified trajectories, {results['steps']} steps, {ending}"
    return results | summary | {"line": line}


def write_documents(context: StageContext, folder: pathlib.Path) -> None:
    """Collects trajectories and writes them, tokenised, as a `loader.TokenStore` with a summary beside it.

    Raises:
      UserError: every trajectory is longer than a row; see also `collect_trajectories`.
    """
    began, length = time.monotonic(), context.config.sft.train.sequence_length
    trajectories = collect_trajectories(context)
    collecting = time.monotonic() - began
    documents, dropped = encode(trajectories, ChatEncoder(context.tokenizer()), length)
    if not documents:
        raise UserError(f"--config.sft.train.sequence_length: {length} is shorter than every trajectory")
    loader.TokenStore.write(folder, documents)
    files.write_json(folder / SUMMARY, {
        "trajectories": len(documents), "dropped_too_long": dropped, "collecting_seconds": round(collecting, 1),
        "scaffolds": dict(Counter(trajectory.scaffold.split(":")[0] for trajectory in trajectories)),
        "recoveries": sum(trajectory.wrong_edits > 0 for trajectory in trajectories),
        "document_tokens": sum(len(document["tokens"]) for document in documents),
        "loss_tokens": int(sum(document["weights"].sum() for document in documents))})


def train_control(context: StageContext, steps: int, directory: pathlib.Path) -> dict[str, Any]:
    """Continues from sft/model for `steps` steps on the same trajectories, with the same schedule begun anew.

    Args:
      context: of a later stage; stage sft has finished.
      directory: gets checkpoints, metrics.jsonl and model/.
    Returns:
      fit's results and `seconds`, of steps alone.
    """
    documents = loader.TokenStore(context.root / "sft" / DOCUMENTS)
    results = _train(context, documents, steps, directory, "sft", "sft_control", context.config.seed + CONTROL_SEED)
    return results | {"seconds": results["seconds_per_step"] * steps}


def collect_trajectories(context: StageContext) -> list[Trajectory]:
    """All verified trajectories of the imitation tasks, from the journal as far as it goes.

    Raises:
      Interrupted: a signal came; what was solved is in the journal.
      UserError: there is no trajectory at all.
    """
    tasks, _ = split_tasks(context.tasks("train"), context.config.seed)
    source = TRAJECTORIES.resolve(context.config.sft.trajectories, "--config.sft.trajectories")
    context.pool().register(context.repositories().values())
    with stop_signals() as stop:
        found = source.collect(context, tasks, stop.is_set)
        if stop.is_set():
            raise interrupted(stop.number, "while trajectories were collected", context.log)
    if not found:
        raise UserError(f"stage sft: no trajectory of {len(tasks)} training tasks; see "
                        f"{context.root / 'tasks' / 'train.jsonl'}")
    return found


def encode(trajectories: Sequence[Trajectory], encoder: ChatEncoder, max_tokens: int
           ) -> tuple[list[dict[str, np.ndarray]], int]:
    """Documents with loss weights, and how many trajectories were left out for being longer than a row."""
    documents = []
    for trajectory in trajectories:
        document = encoder.encode(trajectory.messages, trajectory.tools)
        if len(document["tokens"]) <= max_tokens:
            if not trajectory.search:
                document["weights"] = document["weights"] * ~_failed(trajectory, document["weights"])
            documents.append(document)
    return documents, len(trajectories) - len(documents)


def _failed(trajectory: Trajectory, weights: np.ndarray) -> np.ndarray:
    """[T] bool: positions whose next token is of an assistant turn that ended in failing tests."""
    turns = np.cumsum(np.diff(weights, prepend=0) > 0) * (weights > 0)  # number of the assistant turn, from 1
    return np.isin(turns, [number + 1 for number in trajectory.failed])


def _train(context: StageContext, documents: loader.TokenStore, steps: int, directory: pathlib.Path,
           start: str, out: str, seed: int) -> dict[str, Any]:
    config = context.config
    train = dataclasses.replace(config.sft.train, steps=steps)
    trainer = fit.make_trainer(config.model, train, mesh_here(config.mesh), "sft.train")
    batches = lambda: loader.batches([loader.Source("trajectories", documents, 1.0)], rows=train.rows,
                                     length=train.sequence_length, seed=seed)
    return fit.fit(directory, [fit.Phase(trainer, batches, train, 0, steps)],
                   lambda parallel: models.load(context, start, parallel)[1],
                   save=functools.partial(models.save, context, start, context.model_path(out)), log=context.log)
