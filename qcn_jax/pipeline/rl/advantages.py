"""From outcomes to what each token earns: groups that teach, advantages and penalties by turn, means for curves.

Penalties take away from what execution gave (turns that break the tool format or repeat what tests have refused);
nothing here adds.
"""

from collections import Counter

import numpy as np

from qcn_jax.config import ExpertsConfig
from qcn_jax.pipeline.rl import ledger
from qcn_jax.pipeline.rl.objectives import STD_FLOOR
from qcn_jax.pipeline.rl.records import RolloutRecord


def earned(record: RolloutRecord, discount: float) -> float:
    """The episode's reward, what is positive of it times `discount` for every turn that ended in failing tests."""
    reward, failed = record.outcome.reward, sum(turn.failing for turn in record.turns)
    return reward * discount**failed if reward > 0 else reward


def informative_groups(records: list[RolloutRecord], discount: float = 1.0) -> dict[int, list[RolloutRecord]]:
    """Records by prompt, without infrastructure failures and without prompts whose samples all earned the same.

    Prompts that are always or never solved say nothing about which sample was better (report, RL of the
    software-engineering expert; DAPO's dynamic sampling). Where execution earns parts of a reward, samples of one
    verdict may differ all the same, as two answers in the right format do of which one resolves the task; and with a
    `discount` those that resolve it at the first attempt and at a later one. Penalties do not count: which of several
    failures ended in time is nothing to learn from.
    """
    groups: dict[int, list[RolloutRecord]] = {}
    for record in records:
        if not record.outcome.infrastructure:
            groups.setdefault(record.prompt, []).append(record)
    every = lambda group: [earned(record, discount) + record.outcome.penalty for record in group]
    return {prompt: group for prompt, group in groups.items() if np.std(every(group)) > STD_FLOOR}


def token_advantages(record: RolloutRecord, advantage: float, config: ExpertsConfig) -> np.ndarray:
    """The advantage of each token [n] float32: the episode's, less penalties in the turns that earned them.

    Penalties are for turns that broke the format, and for those that only did again what had failed the tests. A turn
    that ended in failing tests is never reinforced, however well the episode went on: its edit did not do what it
    claimed. Zero where the policy did not choose the token.
    """
    advantages = np.where(record.sampled, np.float32(advantage), np.float32(0.0))
    for turn in record.turns:
        if turn.failing:
            advantages[turn.start : turn.stop] = min(advantage, 0.0)
        if turn.malformed:
            advantages[turn.start : turn.stop] -= config.malformed_penalty
        if turn.repeated:
            advantages[turn.start : turn.stop] -= config.repeat_penalty
    return advantages.astype(np.float32)


def staleness(records: list[RolloutRecord], version: int) -> dict[str, float]:
    """How far behind `version` the policies were that drew the tokens: a mean, a maximum, and the share of each.

    In updates, over the sampled tokens of the episodes that count.
    """
    behind = [version - record.versions[record.sampled] for record in records
              if record.versions is not None and not record.outcome.infrastructure]
    every = np.concatenate([np.zeros(0, np.int32), *behind])
    shares = {f"staleness/{age}": float(np.mean(every == age)) for age in np.unique(every)}
    mean = float(every.mean()) if every.size else 0.0
    return {"staleness": mean, "staleness_most": float(every.max(initial=0))} | shares


def summarize(records: list[RolloutRecord]) -> dict[str, float]:
    """Means over the episodes that count, for curves: reward, pass rate, turns, tokens, shares of failures."""
    counted = [record for record in records if not record.outcome.infrastructure]
    mean = lambda values: float(np.mean(values)) if values else 0.0
    return {
        "reward": mean([r.outcome.reward for r in counted]),
        "pass_rate": mean([float(r.outcome.solved) for r in counted]),
        "resolved": mean([float(bool(r.outcome.detail.get("resolved", r.outcome.solved))) for r in counted]),
        "finished": mean([float(r.outcome.finished) for r in counted]),
        "turns": mean([float(len(r.turns)) for r in counted]),
        "sampled_tokens": mean([float(r.sampled.sum()) for r in counted]),
        "malformed": mean([float(turn.malformed) for r in counted for turn in r.turns]),
        "blocked": float(sum(r.outcome.detail.get("blocked", 0) for r in counted)),  # calls that the guard refused
        "repeated": mean([float(turn.repeated) for r in counted for turn in r.turns]),
        "suspected_exploit": float(sum(r.outcome.detail.get("outcome") == "suspected_exploit" for r in counted)),
        "infrastructure": float(len(records) - len(counted)),
        "episodes": float(len(counted)),
    } | ledger.shares(records) | {f"guard/{name}": float(count) for name, count in sorted(_guarded(counted).items())}


def _guarded(records: list[RolloutRecord]) -> Counter[str]:
    """What guards refused, by rule, and could not see through."""
    found: Counter[str] = Counter()
    for record in records:
        found.update({name: count for name, count in record.outcome.detail.get("guard", {}).items()
                      if name not in ("allowed", "blocked")})
    return found
