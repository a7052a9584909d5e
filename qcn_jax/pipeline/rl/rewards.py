"""What an episode is worth: decided by execution alone.

A verdict comes from a fresh grading sandbox that saw nothing of the episode but its patch. Penalties take away
from it (no end of its own; turns that break the tool format); nothing but a passed test or an executed call adds.
"""

import numpy as np

from qcn_jax.config import ExpertsConfig
from qcn_jax.agents.episode import EndReason, EpisodeResult
from qcn_jax.envs.tasks.grading import Verdict
from qcn_jax.pipeline.rl.rollout import Outcome, RolloutRecord

FORMAT_SHARE = 0.5  # of the format domain's reward for a call that was read and executed; the rest is for the tests


def task_outcome(result: EpisodeResult, verdict: Verdict | None, unfinished_penalty: float) -> Outcome:
    """The reward of the software-engineering and single-turn domains.

    1 if the patch resolves the task, else 0; less the penalty if the policy did not end the episode itself.

    Args:
      result: the finished episode.
      verdict: of its patch; None where nothing was graded because the sandbox failed.
    """
    if verdict is None or verdict.outcome == "infrastructure":
        return Outcome(0.0, False, False, infrastructure=True, detail=_detail(result, verdict))
    finished = result.reason is EndReason.SUBMITTED
    reward = float(verdict.resolved) - (0.0 if finished else unfinished_penalty)
    return Outcome(reward, verdict.resolved, finished, detail=_detail(result, verdict))


def format_outcome(result: EpisodeResult, verdict: Verdict | None) -> Outcome:
    """The reward of the tool-format domain.

    Half for an answer in the template asked for whose every call was executed without an error (`solved`), half
    for resolving the task, which keeps the calls meaningful. An answer that breaks the format earns nothing.
    """
    if verdict is None or verdict.outcome == "infrastructure":
        return Outcome(0.0, False, False, infrastructure=True, detail=_detail(result, verdict))
    clean = result.reason is EndReason.SUBMITTED and not any(result.malformed)
    reward = FORMAT_SHARE * clean + (1.0 - FORMAT_SHARE) * (clean and verdict.resolved)
    return Outcome(reward, clean, clean, detail=_detail(result, verdict))


def _detail(result: EpisodeResult, verdict: Verdict | None) -> dict[str, object]:
    return {
        "task": result.task_id, "scaffold": result.scaffold, "reason": result.reason.value, "turns": result.turns,
        "attempts": result.attempts, "blocked": result.blocked, "outcome": "infrastructure" if verdict is None else verdict.outcome,
        "resolved": bool(verdict and verdict.resolved), "patch": result.patch,
    }  # fmt: skip


def informative_groups(records: list[RolloutRecord]) -> dict[int, list[RolloutRecord]]:
    """Records by prompt, without infrastructure failures and without prompts whose pass rate is 0 or 1.

    Prompts that are always or never solved say nothing about which sample was better (report, RL of the
    software-engineering expert; DAPO's dynamic sampling).
    """
    groups: dict[int, list[RolloutRecord]] = {}
    for record in records:
        if not record.outcome.infrastructure:
            groups.setdefault(record.prompt, []).append(record)
    return {
        prompt: group for prompt, group in groups.items()
        if 0 < sum(record.outcome.solved for record in group) < len(group)
    }  # fmt: skip


def token_advantages(record: RolloutRecord, advantage: float, config: ExpertsConfig) -> np.ndarray:
    """The advantage of each token [n] float32: the episode's, less penalties in the turns that earned them.

    Penalties are for turns that broke the format, and for those that only did again what tests had refuted. A turn that
    ended in failing tests is never reinforced, however well the episode went on: what its edit claimed has been refuted.
    Zero where the policy did not choose the token.
    """
    advantages = np.where(record.sampled, np.float32(advantage), np.float32(0.0))
    for turn in record.turns:
        if turn.refuted:
            advantages[turn.start : turn.stop] = min(advantage, 0.0)
        if turn.malformed:
            advantages[turn.start : turn.stop] -= config.malformed_penalty
        if turn.repeated:
            advantages[turn.start : turn.stop] -= config.repeat_penalty
    return advantages.astype(np.float32)


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
        "infrastructure": float(len(records) - len(counted)),
        "episodes": float(len(counted)),
    }
