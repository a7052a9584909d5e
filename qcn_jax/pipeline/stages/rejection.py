"""Rejection sampling: of several episodes of a model those that survive execution are imitated (stage `experts`).

The report trains its web expert on trajectories that survive; here reinforcement learning goes on from there.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from qcn_jax import files
from qcn_jax.agents import trajectory
from qcn_jax.inference.engine import Engine
from qcn_jax.pipeline.context import StageContext
from qcn_jax.pipeline.data import loader
from qcn_jax.pipeline.experts.conversation import TaskConversation
from qcn_jax.pipeline.experts.expert import Expert
from qcn_jax.pipeline.rl import episodes
from qcn_jax.pipeline.rl.records import RolloutRecord, sequence_seed
from qcn_jax.pipeline.rl.rollout import acts_here, rollout
from qcn_jax.pipeline.stages import sft
from qcn_jax.sharding import distributed

SURVIVORS, SUMMARY, STORE = "survivors.jsonl", "survivors.json", "survivors"
STREAM = 2_000_029  # takes the place of an update's number in seeds


def model_name(expert: Expert) -> str:
    """How `models.load` calls the model that has imitated the survivors."""
    return f"{expert.model}/imitation"


def began_with(context: StageContext, expert: str, start: str) -> str:
    """The model that an expert's RL began with, in a run where it has begun: `start`, or one that imitated before."""
    own = f"expert_{expert}/imitation"
    return own if files.is_dir(context.model_path(own)) else start


def imitate_survivors(context: StageContext, expert: Expert, start: str, engine: Engine, params: Any,
                      prompts: Sequence[Any], converse: Callable[[Any], TaskConversation],
                      log: Callable[[str], None]) -> dict[str, Any] | None:
    """Lets a model act, keeps what survives, trains the model on it; what has been done is not done again.

    Args:
      context: of stage experts.
      expert: says how many episodes a prompt has and how many steps follow.
      start: name of the model.
      engine: of rollouts.
      params: of the model.
      prompts: to act on.
      converse: prompt -> a fresh conversation.
      log: takes a line.

    Returns:
      Counts and the loss at the end, JSON-ready; the weights lie where `model_name` says. None where nothing survived.
    """
    samples, steps = expert.rejection
    folder = context.workdir / expert.name
    if not (folder / SUMMARY).exists():
        kept, counts = _survivors(context, expert, engine, params, prompts, converse, samples)
        if distributed.is_first():
            _write(folder, kept)
        distributed.write_json(folder / SUMMARY, counts)
    counts = files.read_json(folder / SUMMARY)
    log(f"rejection sampling: {counts['kept']} of {counts['episodes']} episodes on {counts['prompts_kept']} of "
        f"{counts['prompts']} tasks survive and are imitated")
    if not counts["kept"] or not steps:
        return None
    shape = context.config.experts
    train = dataclasses.replace(context.config.sft.train, steps=steps, rows=shape.rows, accumulate=1,
                                sequence_length=shape.sequence_length)
    source = loader.Source(STORE, loader.TokenStore(folder / STORE), 1.0)
    results = sft.imitate(context, [source], train, folder / "imitation", start, model_name(expert),
                          context.seed + STREAM)
    return counts | {"steps": steps, "loss": results.get("loss")}


def _survivors(context: StageContext, expert: Expert, engine: Engine, params: Any, prompts: Sequence[Any],
               converse: Callable[[Any], TaskConversation], samples: int
               ) -> tuple[list[tuple[dict[str, Any], RolloutRecord]], dict[str, int]]:
    """(a conversation as `qcn collect` writes it, its tokens) of each episode that is kept, and counts."""
    engine.params = params
    groups = [[converse(prompt) for _ in range(samples)] for prompt in prompts]
    seeds = [[sequence_seed(context.seed, STREAM, number, sample) for sample in range(samples)]
             for number in range(len(groups))]
    records = rollout(engine, groups, seeds, sampling=episodes.sampling_of(context.config.experts.rollout))
    solved = [record for record in records if record.outcome.solved and record.outcome.finished
              and not any(turn.malformed for turn in record.turns)]
    told = {(record.prompt, record.sample): _row(groups[record.prompt][record.sample], record)
            for record in solved if acts_here(record.prompt)}
    rows = dict(itertools.chain.from_iterable(found.items() for found in distributed.exchanged("survivors", told)))
    kept, seen = [], set()
    for record in sorted(solved, key=lambda record: (record.prompt, record.sample)):
        key = (record.prompt, record.tokens.tobytes())
        if key not in seen:
            seen.add(key)
            kept.append((rows[record.prompt, record.sample], record))
    counts = {"prompts": len(prompts), "episodes": len(records), "survived": len(solved), "kept": len(kept),
              "prompts_kept": len({record.prompt for _, record in kept})}
    return kept, counts


def _row(conversation: TaskConversation, record: RolloutRecord) -> dict[str, Any]:
    return trajectory.of_episode(conversation.episode, record.outcome.detail["patch"]).to_json()


def _write(folder: pathlib.Path, kept: Sequence[tuple[dict[str, Any], RolloutRecord]]) -> None:
    files.write_jsonl(folder / SURVIVORS, [row for row, _ in kept])
    if kept:
        loader.TokenStore.write(folder / STORE, _documents(record for _, record in kept))


def _documents(records: Iterator[RolloutRecord]) -> Iterator[dict[str, Any]]:
    """Episodes as documents; a turn that ended in failing tests is read, not imitated."""
    for record in records:
        sampled = record.sampled.copy()
        for turn in record.turns:
            if turn.failing:
                sampled[turn.start : turn.stop] = False
        document = episodes.document(dataclasses.replace(record, sampled=sampled))
        yield document | {"tokens": np.asarray(document["tokens"], np.int32), "head": 0}
