"""An episode on a task as the rollout sees it: tokens in, tokens out.

A verdict comes from a fresh grading sandbox that saw nothing of the episode but its patch.
"""

import functools
from collections.abc import Callable

from qcn_jax.agents.episode import EndReason, Episode, EpisodeResult
from qcn_jax.agents.scaffolds import Message, Scaffold
from qcn_jax.agents.services import Services
from qcn_jax.chat.encoder import Encoder
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.tasks.verdicts import Verdict
from qcn_jax.pipeline.rl.records import Outcome, Reply

Reward = Callable[[EpisodeResult, Verdict], Outcome]


class TaskConversation:
    """An episode on a task, in tokens; see pipeline.rl.records.Conversation."""

    def __init__(
        self, task: Task, scaffold: Scaffold, encoder: Encoder, services: Services, *, max_turns: int,
        reward: Reward | None, redraws: int = 0,
    ) -> None:  # fmt: skip
        """Args:
          task: what to work on.
          scaffold: how it is presented.
          encoder: text to tokens and back.
          services: sandboxes.
          max_turns: of the policy, where the scaffold has several turns.
          reward: says what the episode was worth; None saves the grading where nobody asks: every outcome is then 0.
          redraws: so often a turn is drawn again whose tests fail on files on which they failed before; what was drawn
            counts for nothing. The scaffold must have no shell.
        """
        self._task, self._scaffold, self._encoder, self._services = task, scaffold, encoder, services
        self._max_turns = max_turns
        self._reward = reward
        self._failing: set[str] = set()  # patches on which tests failed
        self._redraws, self._redrawn = redraws, 0

    @functools.cached_property
    def episode(self) -> Episode:
        """Made when first needed: a run holds far more prompts than open episodes."""
        return self._services.episode(self._task, self._scaffold, self._max_turns)

    @property
    def messages(self) -> list[Message]:
        """What was said so far."""
        return self.episode.messages

    def opening(self) -> list[int]:
        """The prompt, up to where the assistant begins."""
        return self._encoder.encode_prompt(self.episode.messages, self._scaffold.schemas())

    def reply(self, tokens: list[int], stopped: bool) -> Reply:
        """Executes the turn's calls; a turn that its own end token did not close is not executed."""
        before = self.episode.snapshot() if self._redraws else None
        closed = stopped and tokens[-1] in self._encoder.ends
        text = self._encoder.spoken(self._encoder.tokenizer.decode(tokens[:-1] if stopped else tokens))
        observation = self.episode.step(text, complete=closed)
        turn = self.episode.turns[-1]
        run = turn.tests
        failing = run is not None and not run.passed
        patch = self.episode.executor.diff() if failing else ""
        repeated = failing and patch in self._failing
        if repeated and self._redrawn < self._redraws:
            self.episode.restore(before)
            self._redrawn += 1
            return Reply(again=True)
        self._redrawn = 0
        self._failing.add(patch)
        named = self._scaffold.template == self._encoder.calls and not self._scaffold.framed
        calls = turn.calls if named else ()
        answer = () if observation.done else self._encoder.encode_turn(observation.messages, closed, calls)
        return Reply(answer, observation.done, observation.malformed, failing, repeated)

    def outcome(self, truncated: bool) -> Outcome:
        """Grades the patch."""
        if truncated:
            self.episode.end(EndReason.LENGTH_LIMIT)
        try:
            result = self.episode.result()
        finally:
            self.episode.executor.close()
        broken = result.reason is EndReason.INFRASTRUCTURE
        if self._reward is None:
            return Outcome(0.0, False, result.reason is EndReason.SUBMITTED, infrastructure=broken)
        verdict = None if broken else self._services.grade(self._task, result.patch)
        if verdict is None or verdict.outcome == "infrastructure":
            return Outcome(0.0, False, False, infrastructure=True, detail=detail_of(result, verdict))
        return self._reward(result, verdict)

    def close(self) -> None:
        """Frees the sandbox."""
        if "episode" in vars(self):  # otherwise it was never begun
            self.episode.executor.close()


def detail_of(result: EpisodeResult, verdict: Verdict | None) -> dict[str, object]:
    """JSON-ready particulars of an episode; `verdict` is None where nothing was graded because the sandbox failed."""
    return {
        "task": result.task_id, "scaffold": result.scaffold, "reason": result.reason.value, "turns": result.turns,
        "attempts": result.attempts, "runs": [run.passed for run in result.runs],
        "blocked": result.blocked, "guard": result.guard,
        "outcome": "infrastructure" if verdict is None else verdict.outcome,
        "resolved": bool(verdict and verdict.resolved), "patch": result.patch,
    }  # fmt: skip
