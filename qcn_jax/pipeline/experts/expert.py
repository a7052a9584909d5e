"""What an expert is: how tasks become its prompts, what an episode is worth, and how it is measured and shown."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from qcn_jax.agents.episode import EndReason, EpisodeResult
from qcn_jax.agents.scaffolds import Message, Scaffold
from qcn_jax.agents.services import Services
from qcn_jax.chat.encoder import Encoder
from qcn_jax.config import RunConfig
from qcn_jax.envs.tasks.schema import PAGES, Task
from qcn_jax.envs.tasks.verdicts import Verdict
from qcn_jax.pipeline.experts import metrics
from qcn_jax.pipeline.experts.conversation import TaskConversation, detail_of
from qcn_jax.pipeline.rl import records

OWN, BASELINE = "expert", "baseline"  # in comparisons: the expert's own model, and whatever the configuration names
# Pairs of which the first is hoped to be the better one.
COMPARISONS = ((OWN, "sft"), ("unified", "sft"))

Reward = Callable[[EpisodeResult, Verdict, float], records.Outcome]


class Conversation(records.Conversation, Protocol):
    """An episode that can be read."""

    @property
    def messages(self) -> list[Message]:
        """What was said so far."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A task as one expert presents it.

    `template` is the tool-call template where the expert asks for one, `unseen` says that no model was trained on it.
    """

    expert: "Expert"
    task: Task
    scaffold: Scaffold
    template: str = ""
    unseen: bool = False


@dataclasses.dataclass(frozen=True)
class Expert:
    """One thing that a model is trained to do; by itself, several turns with tools, decided by tests.

    Subclasses override what is different. Everything about an expert stands in one object: the stages `experts`,
    `distill` and `evaluate` and the report do the same for each that the configuration names.

    Attributes:
      name: of its folder, metrics and keys: a lower-case word.
      title: of its model in the report.
      column: what its rate is called there.
      headline: its numbers are those of the model as a whole, pass@k included; of several the first's.
      comparisons: pairs of models that are compared by its episodes.
      summary: keys of its metrics that stand beside the headline's in summary.json.
      rejection: (episodes of each training prompt, steps): those that survive are imitated before reinforcement
        learning begins (stages.rejection); no episodes: none.
    """

    name: str
    title: str
    column: str = ""
    headline: bool = False
    comparisons: tuple[tuple[str, str], ...] = COMPARISONS
    summary: tuple[str, ...] = ()
    rejection: tuple[int, int] = (0, 0)

    @property
    def model(self) -> str:
        """Name of the model that it becomes."""
        return f"expert_{self.name}"

    def configured(self, config: RunConfig, split: str) -> "Expert":
        """The expert with what a configuration gives it for `split`, train or heldout.

        Raises:
          UserError: a file that a field names is missing or malformed.
        """
        return self

    def absent(self, tasks: Mapping[str, Any]) -> str:
        """Why a run goes on without it, given the results of stage tasks; "" where it does not."""
        return ""

    def domain(self, tasks: Sequence[Task]) -> list[Task]:
        """Those of the run's tasks that it acts on: all but pages, which are expert web's."""
        return [task for task in tasks if task.language != PAGES]

    def own_tasks(self) -> Sequence[Task]:
        """Tasks that it has beside the run's."""
        return ()

    def wants_tasks(self, config: RunConfig) -> bool:
        """Whether it acts on the run's tasks; a run whose experts all have only their own needs no stage tasks."""
        return True

    def present(self, scaffold: Scaffold, template: str = "") -> Scaffold:
        """The form of `scaffold` in which it presents tasks.

        Raises:
          UserError: the scaffold has no such form.
        """
        return scaffold

    def prompts(self, tasks: Sequence[Task], scaffold: Scaffold, templates: Sequence[str] = (),
                unseen: Sequence[str] = ()) -> list[Prompt]:
        """One prompt a task.

        Args:
          tasks: what is to be solved.
          scaffold: of the stage's configuration.
          templates: tool-call templates of the run, for experts that ask for one.
          unseen: likewise, of those that only evaluation asks for.
        """
        presented = self.present(scaffold)
        return [Prompt(self, task, presented) for task in self.domain(tasks)]

    def conversation(
        self, prompt: Prompt, encoder: Encoder, services: Services, *, max_turns: int,
        unfinished_penalty: float = 0.0, reward: Reward | None = None, graded: bool = True, redraws: int = 0,
    ) -> Conversation:
        """A fresh episode on `prompt`.

        Args:
          prompt: one of its own.
          encoder: text to tokens and back.
          services: sandboxes.
          max_turns: of the policy, where the scaffold has several turns.
          unfinished_penalty: passed on to the reward.
          reward: takes the place of `outcome`.
          graded: False where nobody asks for the reward, which saves the grading; every outcome is then 0.
          redraws: how often a turn that comes again to files on which tests failed is drawn once more.
        """
        chosen = reward or self.outcome
        score = lambda result, verdict: chosen(result, verdict, unfinished_penalty)
        return TaskConversation(prompt.task, prompt.scaffold, encoder, services, max_turns=max_turns,
                                reward=score if graded else None, redraws=redraws)

    def outcome(self, result: EpisodeResult, verdict: Verdict, unfinished_penalty: float) -> records.Outcome:
        """1 if the patch resolves the task, else 0; less the penalty if the policy did not end the episode itself."""
        finished = result.reason is EndReason.SUBMITTED
        penalty = 0.0 if finished else unfinished_penalty
        return records.Outcome(float(verdict.resolved) - penalty, verdict.resolved, finished,
                               detail=detail_of(result, verdict), penalty=penalty)

    def metrics(self, rows: Sequence[metrics.Row]) -> dict[str, Any]:
        """What evaluation reports of its greedy episodes (see experts.metrics), by keys of a model's numbers."""
        found = metrics.greedy(rows)
        return {self.name: {key: found[key] for key in ("resolved", "attempted", "rate", "ci95", "solved")}}

    def rate(self, model: Mapping[str, Any]) -> float | None:
        """Its rate among a model's numbers; None where it was not measured."""
        return self._part(model).get("rate")

    def solved(self, model: Mapping[str, Any]) -> Mapping[str, bool]:
        """Which tasks the model solved in its episodes, by id."""
        return self._part(model).get("solved", {})

    def _part(self, model: Mapping[str, Any]) -> Mapping[str, Any]:
        return model if self.headline else model.get(self.name) or {}
