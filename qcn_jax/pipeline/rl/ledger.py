"""The ledger of rewards: why each episode earned what it earned."""

from collections.abc import Mapping, Sequence

import numpy as np

from qcn_jax.pipeline.rl.records import Outcome, RolloutRecord

# policy: tests decided on what it handed in. limit: it ran into one of turns, tokens, time or memory, itself or in its
# tests. suspected_exploit: it seems to forge. verifier: the sandbox worked and the grading did not. infrastructure: the
# sandbox did not. The last two teach nothing.
CAUSES = ("policy", "limit", "suspected_exploit", "verifier", "infrastructure")
_LIMITS = ("turn_limit", "length_limit", "time_limit", "unreadable", "timeout", "out_of_memory", "killed")


def cause_of(outcome: Outcome) -> str:
    """Which of CAUSES an outcome has, by its `detail` (pipeline.experts.conversation.detail_of)."""
    reason, verdict = outcome.detail.get("reason", ""), outcome.detail.get("outcome", "")
    if outcome.infrastructure:
        broken = reason == "infrastructure" or verdict != "infrastructure"
        return "infrastructure" if broken else "verifier"
    if verdict == "suspected_exploit":
        return verdict
    return "limit" if reason in _LIMITS or verdict in _LIMITS else "policy"


def shares(records: Sequence[RolloutRecord]) -> dict[str, float]:
    """Of all episodes the share of each cause, and how long those without a verdict were beside the others.

    `missing_length` is the ratio of their mean sampled tokens, 1 where either has none: far from 1, what is missing is
    not missing at random.
    """
    causes = [cause_of(record.outcome) for record in records]
    lengths = {missing: [int(record.sampled.sum()) for record in records if record.outcome.infrastructure == missing]
               for missing in (True, False)}
    known = all(lengths.values()) and sum(lengths[False]) > 0
    ratio = float(np.mean(lengths[True]) / np.mean(lengths[False])) if known else 1.0
    return {f"cause/{name}": causes.count(name) / max(1, len(causes)) for name in CAUSES} | {"missing_length": ratio}


def over_updates(curve: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The means of `shares` over the rows of a metrics.jsonl that have them; empty where none has."""
    names = (*(f"cause/{name}" for name in CAUSES), "missing_length")
    rows = [row for row in curve if all(name in row for name in names)]
    return {name: round(float(np.mean([row[name] for row in rows])), 6) for name in names} if rows else {}
