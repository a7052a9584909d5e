"""What is learned from the episodes of an update: advantages, weights, packed rows."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from qcn_jax.config import ExpertsConfig
from qcn_jax.pipeline.rl import episodes, objectives
from qcn_jax.pipeline.rl.advantages import earned, informative_groups, token_advantages
from qcn_jax.pipeline.rl.records import RolloutRecord
from qcn_jax.pipeline.rl.settings import ACTED

Groups = Sequence[Sequence[RolloutRecord]]


def learnable(records: Sequence[RolloutRecord], version: int, config: ExpertsConfig) -> list[RolloutRecord]:
    """Episodes in the order of their prompts, without the tokens that are too old for the update behind `version`."""
    ordered = sorted(records, key=lambda record: (record.prompt, record.sample))
    if config.stale != "cut":
        return ordered
    oldest = version - config.max_staleness
    return [record if record.versions is None else
            dataclasses.replace(record, sampled=record.sampled & (record.versions >= oldest)) for record in ordered]


def parts(records: Sequence[RolloutRecord], config: ExpertsConfig) -> list[Groups]:
    """The groups that teach something, dealt out to the moves of the optimizer; those that get none are left out."""
    groups = list(informative_groups(list(records), config.attempt_discount).values())
    return [part for part in (groups[i :: config.minibatches] for i in range(config.minibatches)) if part]


def documents(groups: Groups, config: ExpertsConfig) -> list[list[dict[str, np.ndarray]]]:
    """Every episode as a document for packing, by group: with weights, advantages, old log-probabilities, and routes.

    Weights are those within a batch of all `groups`.
    """
    found = []
    lengths = [[int(record.sampled.sum()) for record in group] for group in groups]
    for group, weights in zip(groups, objectives.token_weights(lengths, config.average), strict=True):
        advantages = objectives.group_advantages(
            [earned(record, config.attempt_discount) for record in group], [0] * len(group), [True] * len(group),
            config.advantage_baseline, config.advantage_scale)
        advantages *= np.where(advantages < 0, config.negative_weight, 1.0)
        found.append([
            episodes.document(record, weight, advantages=token_advantages(record, float(advantage), config),
                              old_logprobs=record.logprobs)
            | ({"routes": record.routes} if config.routing in ACTED else {})
            for record, advantage, weight in zip(group, advantages, weights, strict=True)])  # fmt: skip
    return found


def rows(groups: Groups, config: ExpertsConfig) -> dict[str, np.ndarray]:
    """Packed rows of the episodes of some groups; see `documents`."""
    every = [document for group in documents(groups, config) for document in group]
    return episodes.pack_rows(every, config.sequence_length, config.rows)
