"""The web expert: pages whose tests run in a browser; what survives them, and a look at the page, is imitated first."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax.agents.services import Services
from qcn_jax.chat.encoder import Encoder
from qcn_jax.config import RunConfig
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.tasks.schema import PAGES, Task
from qcn_jax.envs.web import judge
from qcn_jax.pipeline.experts.conversation import TaskConversation
from qcn_jax.pipeline.experts.expert import BASELINE, OWN, Conversation, Expert, Prompt, Reward
from qcn_jax.pipeline.rl.records import Outcome


class PageConversation(TaskConversation):
    """An episode on a page that is solved where its tests pass and the page survives a review."""

    def outcome(self, truncated: bool) -> Outcome:
        """As TaskConversation; a page whose review scores less than judge.LEAST earns nothing."""
        found = super().outcome(truncated)
        if not found.solved or self._services.review is None:
            return found
        try:
            review = self._services.review(self._task, found.detail["patch"])
        except SandboxError:
            return Outcome(0.0, False, False, infrastructure=True, detail=found.detail)
        survives = review.score >= judge.LEAST
        return dataclasses.replace(found, reward=found.reward if survives else -found.penalty, solved=survives,
                                   detail=found.detail | {"review": review.to_json()})


class Web(Expert):
    """Takes the run's tasks of pages."""

    def configured(self, config: RunConfig, split: str) -> "Web":
        """See Expert.configured."""
        return dataclasses.replace(self, rejection=(config.web.samples, config.web.steps))

    def absent(self, tasks: Mapping[str, Any]) -> str:
        """See Expert.absent: there is no browser, or no task of pages."""
        pages = tasks.get("pages", {})
        return "" if pages.get("tasks") else pages.get("missing") or "the run has no tasks of pages"

    def domain(self, tasks: Sequence[Task]) -> list[Task]:
        """See Expert.domain."""
        return [task for task in tasks if task.language == PAGES]

    def conversation(
        self, prompt: Prompt, encoder: Encoder, services: Services, *, max_turns: int,
        unfinished_penalty: float = 0.0, reward: Reward | None = None, graded: bool = True, redraws: int = 0,
    ) -> Conversation:  # fmt: skip
        """See Expert.conversation."""
        chosen = reward or self.outcome
        score = lambda result, verdict: chosen(result, verdict, unfinished_penalty)
        return PageConversation(prompt.task, prompt.scaffold, encoder, services, max_turns=max_turns,
                                reward=score if graded else None, redraws=redraws)


WEB = Web("web", "web expert", column="pages", comparisons=(
    ("sft", "midtrain"), (OWN, "sft"), (OWN, "sft_control"), (OWN, BASELINE), ("unified", "sft")))
