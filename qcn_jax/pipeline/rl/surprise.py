"""Which rewards do not fit what else is known of their episodes: a list to look at, the least likely first.

A logistic regression tells from an episode's course (did its last turn end in failing tests, did it break the format,
did the samples beside it succeed, what did episodes of the same last turn earn, ...) whether it was solved. It is
fitted on other groups than those that it judges (cross-fitting, as in Northcutt et al. 2021, confident learning); the
surprise of an episode is the probability that the fit gives to the verdict that it did not get. A false verdict, a
flaky test and a lucky policy all surprise.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from qcn_jax.pipeline.rl.records import RolloutRecord

FOLDS = 5
_PENALTY, _STEPS = 1.0, 30  # of the fit: ridge on standardised features, Newton's steps


def features(records: Sequence[RolloutRecord]) -> np.ndarray:
    """What is known of the episodes of an update beside their verdicts; [n, F] float64."""
    groups: dict[int, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(record.prompt, []).append(index)
    found = []
    for index, record in enumerate(records):
        beside = [records[other] for other in groups[record.prompt] if other != index]
        twins = [other for other in beside if _last(other) == _last(record)]
        turns = record.turns
        share = lambda name: float(np.mean([getattr(turn, name) for turn in turns])) if turns else 0.0
        last = lambda name: float(bool(turns) and getattr(turns[-1], name))
        found.append([
            last("failing"), last("malformed"), last("stopped"), last("repeated"), float(record.outcome.finished),
            share("failing"), share("malformed"), share("repeated"), np.log1p(len(turns)),
            np.log1p(record.sampled.sum()),
            float(record.logprobs[record.sampled].mean()) if record.sampled.any() else 0.0,
            _solved(beside), float(bool(twins)), _solved(twins)])
    return np.asarray(found, np.float64).reshape(len(records), 14)


def _last(record: RolloutRecord) -> bytes:
    """What the policy said in its last turn."""
    turn = record.turns[-1] if record.turns else None
    return b"" if turn is None else record.tokens[turn.start : turn.stop].tobytes()


def _solved(records: Sequence[RolloutRecord]) -> float:
    return float(np.mean([record.outcome.solved for record in records])) if records else 0.5


def surprise(rows: Sequence[Sequence[float]], solved: Sequence[bool], groups: Sequence[Any], seed: int = 0
             ) -> np.ndarray:
    """How little the verdict of each episode fits, from 0 (certain) to 1; [n] float64.

    Args:
      rows: `features` [n, F].
      solved: [n] verdicts.
      groups: [n] what must not be on both sides of a fit.
      seed: deals groups out to folds.
    """
    values, labels = np.asarray(rows, np.float64), np.asarray(solved, np.float64)
    names = sorted(set(groups))
    fold = dict(zip(names, np.random.default_rng(seed).permutation(len(names)) % min(FOLDS, len(names)), strict=True))
    folds = np.asarray([fold[name] for name in groups])
    found = np.zeros(len(labels))
    for number in np.unique(folds):
        judged, others = folds == number, folds != number
        if not others.any():
            others = judged  # a single group
        chance = _fitted(values[others], labels[others], values[judged])
        found[judged] = np.abs(labels[judged] - chance)
    return found


def _fitted(rows: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Probabilities of `asked` [m, F] under a ridge logistic regression of labels [n] on rows [n, F]."""
    mean, spread = rows.mean(0), np.maximum(rows.std(0), 1e-6)
    scale = lambda values: np.concatenate([np.ones((len(values), 1)), (values - mean) / spread], axis=1)
    inputs, weights = scale(rows), np.zeros(rows.shape[1] + 1)
    ridge = _PENALTY * np.eye(len(weights))
    for _ in range(_STEPS):
        chance = expit(inputs @ weights)
        slope = inputs.T @ (chance - labels) + ridge @ weights
        bend = (inputs * (chance * (1 - chance))[:, None]).T @ inputs + ridge
        step = np.linalg.solve(bend, slope)
        weights -= step * min(1.0, 5.0 / max(np.linalg.norm(step), 1e-12))  # far from the solution Newton overshoots
    return expit(scale(asked) @ weights)
