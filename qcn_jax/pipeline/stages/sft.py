"""Stage `sft`: imitation of verified trajectories, with loss on the assistant's own tokens.

The scripted solver acts through the same tools in the same sandboxes as the model will; what its tests did not
confirm is not kept. Tasks are those of the imitation side of pipeline.data.splits, so that reinforcement learning meets
none of them. Turns whose edit the tests refuted are part of what the model reads and no part of the loss: it learns
to recover from mistakes, not to make them. Trajectories that look for a defect nobody has told them (`searches`) are
learned whole: there the refuted edits are the search.
"""

import dataclasses
import pathlib
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from qcn_jax.agents.trajectory import Trajectory
from qcn_jax.chat.encoder import ChatEncoder
from qcn_jax.config import RunConfig
from qcn_jax.errors import UserError
from qcn_jax.pipeline import models
from qcn_jax.pipeline.context import StageContext
from qcn_jax.pipeline.data import loader
from qcn_jax.pipeline.data.splits import split_tasks
from qcn_jax.pipeline.train import fit
from qcn_jax.pipeline.train.signals import interrupted, stop_signals
from qcn_jax.pipeline.train.trainer import Trainer, mesh_here
from qcn_jax.recipes.nano import guesses
from qcn_jax.recipes.nano.trajectories import collect, plan
from qcn_jax.sharding.parallel import Parallel

CONTROL_SEED = 1_000_003  # the control sees the same documents in another order


def make_trainer(config: RunConfig, parallel: Parallel | None) -> Trainer:
    """Builds the step of the stage on `parallel`.

    Raises:
      UserError: rows that `accumulate` or the mesh does not divide.
    """
    return fit.make_trainer(config.model, config.sft.train, parallel, "sft.train")


def run_stage(context: StageContext) -> dict[str, Any]:
    """Collects trajectories, trains the mid-trained model on them, writes sft/model/."""
    began = time.monotonic()
    trajectories = collect_trajectories(context)
    collecting = time.monotonic() - began
    documents, dropped = encode(trajectories, ChatEncoder(context.tokenizer()),
                                context.config.sft.train.sequence_length)
    results = _train(context, documents, context.config.sft.train.steps, context.workdir,
                     context.model_path("midtrain"), context.model_path("sft"), context.config.seed)
    ending = f"loss {results['loss']:.3f}" if "loss" in results else "no steps"
    return results | {
        "trajectories": len(documents), "dropped_too_long": dropped, "collecting_seconds": round(collecting, 1),
        "scaffolds": dict(Counter(trajectory.scaffold.split(":")[0] for trajectory in trajectories)),
        "recoveries": sum(trajectory.wrong_edits > 0 for trajectory in trajectories),
        "document_tokens": sum(len(document["tokens"]) for document in documents),
        "loss_tokens": int(sum(document["weights"].sum() for document in documents)),
        "line": f"{len(documents)} verified trajectories, {results['steps']} steps, {ending}"}


def train_control(context: StageContext, steps: int, directory: pathlib.Path) -> dict[str, Any]:
    """Continues from sft/model for `steps` steps on the same trajectories, with the same schedule begun anew.

    Args:
      context: of a later stage; stage sft has finished.
      directory: gets checkpoints, metrics.jsonl and model/.
    Returns:
      fit's results and `seconds`, of steps alone.
    """
    documents, _ = encode(collect_trajectories(context), ChatEncoder(context.tokenizer()),
                          context.config.sft.train.sequence_length)
    results = _train(context, documents, steps, directory, context.model_path("sft"),
                     context.model_path("sft_control"), context.config.seed + CONTROL_SEED)
    return results | {"seconds": results["seconds_per_step"] * steps}


def collect_trajectories(context: StageContext) -> list[Trajectory]:
    """All verified trajectories of the imitation tasks, from the journal as far as it goes.

    Raises:
      Interrupted: a signal came; what was solved is in the journal.
      UserError: there is no trajectory at all.
    """
    settings, seed = context.config.sft, context.config.seed
    tasks, _ = split_tasks(context.tasks("train"), seed)
    pool = context.pool()
    pool.register(context.repositories().values())
    names = context.templates()
    guessed = guesses.propose(context, tasks)
    requests = lambda number, task: plan(task, number, seed, settings.trajectories_per_task, settings.recovery, names,
                                         guessed.get(task.instance_id, ()), settings.searches)
    with stop_signals() as stop:
        found = collect(context.root / "sft" / "trajectories.jsonl", tasks, requests, pool, context.log, stop.is_set)
        if stop.is_set():
            raise interrupted(stop.number, "while trajectories were collected", context.log)
    if not found:
        raise UserError(f"stage sft: the solver solved none of {len(tasks)} training tasks; see "
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
                document["weights"] = document["weights"] * ~_refuted(trajectory, document["weights"])
            documents.append(document)
    return documents, len(trajectories) - len(documents)


def _refuted(trajectory: Trajectory, weights: np.ndarray) -> np.ndarray:
    """[T] bool: positions whose next token is of an assistant turn that ended in failing tests."""
    turns = np.cumsum(np.diff(weights, prepend=0) > 0) * (weights > 0)  # number of the assistant turn, from 1
    runs = iter(trajectory.outcomes)
    refuted, number = [], 0
    for message in trajectory.messages:
        if message["role"] == "assistant":
            number += 1
            calls = [call["name"] for call in message.get("tool_calls", ())]
            if "run_tests" in calls and not next(runs):
                refuted.append(number)
    return np.isin(turns, refuted)


def _train(context: StageContext, documents: list[dict[str, np.ndarray]], steps: int, directory: pathlib.Path,
           start: pathlib.Path, out: pathlib.Path, seed: int) -> dict[str, Any]:
    config = context.config
    train = dataclasses.replace(config.sft.train, steps=steps)
    if not documents:
        raise UserError(f"--config.sft.train.sequence_length: {train.sequence_length} is shorter than every trajectory")
    trainer = fit.make_trainer(config.model, train, mesh_here(config.mesh), "sft.train")
    _, params = models.read(start, config.model, trainer.parallel)
    batches = loader.batches([loader.Source("trajectories", documents, 1.0)], rows=trainer.rows.count,
                             length=train.sequence_length, seed=seed, shard=trainer.rows.shard)
    return fit.fit(directory, out, trainer, params, batches, train, tokenizer=context.tokenizer(), log=context.log)
