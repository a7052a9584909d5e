"""The tool-format expert: answers are written in the tool-call template that the prompt asks for.

With a scaffold whose chat template lists its tools a prompt has all three axes of its template (chat.templates); nano's
is one turn and names it. Besides the run's tasks it answers requests whose tools a user defines (envs/calls), of a
configuration's files or made here: the template lists these in the system turn.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax.agents.episode import EndReason, EpisodeResult
from qcn_jax.agents.scaffolds import Scaffold
from qcn_jax.agents.scaffolds.calls import CALLS
from qcn_jax.agents.services import Services
from qcn_jax.chat.encoder import Encoder
from qcn_jax.chat.templates import NATIVE
from qcn_jax.config import RunConfig, ToolCallsConfig
from qcn_jax.envs.calls import make, schema
from qcn_jax.envs.calls.check import Judged, expresses
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.tasks.verdicts import Verdict
from qcn_jax.errors import UserError
from qcn_jax.pipeline.experts import metrics
from qcn_jax.pipeline.experts.calling import CallConversation, counted
from qcn_jax.pipeline.experts.conversation import detail_of
from qcn_jax.pipeline.experts.expert import OWN, Conversation, Expert, Prompt, Reward
from qcn_jax.pipeline.rl.records import Outcome

_Row = metrics.Row
FORMAT_SHARE = 0.5  # of the reward for calls that were read and fit; the rest is for the tests, or the right calls


@dataclasses.dataclass(frozen=True)
class ToolFormat(Expert):
    """Takes the run's templates in turn; is measured by the share of turns that keep them.

    Attributes:
      requests: of its split.
      edits: whether it also acts on the run's tasks.
    """

    requests: tuple[Task, ...] = ()
    edits: bool = True

    def configured(self, config: RunConfig, split: str) -> "ToolFormat":
        """See Expert.configured."""
        found = requests(config.tool_calls, config.seed, split)
        if not found and not config.tool_calls.edits:
            raise UserError("--config.tool_calls.edits: is off, and there are no requests; give data or made")
        return dataclasses.replace(self, requests=found, edits=config.tool_calls.edits)

    def own_tasks(self) -> Sequence[Task]:
        """See Expert.own_tasks."""
        return self.requests

    def domain(self, tasks: Sequence[Task]) -> list[Task]:
        """See Expert.domain."""
        return super().domain(tasks) if self.edits else []

    def wants_tasks(self, config: RunConfig) -> bool:
        """See Expert.wants_tasks."""
        return config.tool_calls.edits

    def present(self, scaffold: Scaffold, template: str = NATIVE) -> Scaffold:
        """See Expert.present."""
        return (scaffold if self.edits else CALLS).in_template(template)

    def prompts(self, tasks: Sequence[Task], scaffold: Scaffold, templates: Sequence[str] = (),
                unseen: Sequence[str] = ()) -> list[Prompt]:
        """See Expert.prompts; where there are unseen templates, every task is asked under one of these, too.

        Raises:
          UserError: no template can say the calls that answer a request.
        """
        found, tasks = [], self.domain(tasks)
        for names in filter(None, (templates, unseen)):
            presented = {name: self.present(scaffold, name) for name in names} if tasks else {}
            turn = [names[index % len(names)] for index in range(len(tasks))]
            found += [Prompt(self, task, presented[name], name, names is unseen)
                      for task, name in zip(tasks, turn, strict=True)]
            for index, task in enumerate(self.requests):
                name = _expressing(task, [*names[index % len(names):], *names[:index % len(names)]])
                found.append(Prompt(self, task, CALLS.in_template(name), name, names is unseen))
        return found

    def conversation(
        self, prompt: Prompt, encoder: Encoder, services: Services, *, max_turns: int,
        unfinished_penalty: float = 0.0, reward: Reward | None = None, graded: bool = True, redraws: int = 0,
    ) -> Conversation:  # fmt: skip
        """See Expert.conversation."""
        if prompt.task.repo != schema.REPOSITORY:
            return super().conversation(prompt, encoder, services, max_turns=max_turns, reward=reward, graded=graded,
                                        unfinished_penalty=unfinished_penalty, redraws=redraws)

        def score(result: EpisodeResult, verdict: Verdict, judged: Judged) -> Outcome:
            if reward is not None:
                return reward(result, verdict, unfinished_penalty)
            earned = _earned(judged.valid and not judged.uncalled, judged.right)
            finished = result.reason is EndReason.SUBMITTED
            return Outcome(earned, judged.right, finished, detail=detail_of(result, verdict))

        return CallConversation(prompt.task, prompt.scaffold, encoder, score if graded else None)

    def outcome(self, result: EpisodeResult, verdict: Verdict, unfinished_penalty: float) -> Outcome:
        """Half for an answer in the template asked for whose every call was executed without an error (`solved`).

        The other half is for resolving the task, which keeps the calls meaningful. An answer that breaks the format
        earns nothing.
        """
        clean = result.reason is EndReason.SUBMITTED and not any(result.malformed)
        return Outcome(_earned(clean, verdict.resolved), clean, clean, detail=detail_of(result, verdict))

    def metrics(self, rows: Sequence[metrics.Row]) -> dict[str, Any]:
        """Share of turns that keep the demanded tool-call format, in all and per template (the rows' `kind`).

        `calls` has what answers to requests were (calling.counted). Templates that no model was trained on are apart,
        as `format_valid_unseen` (None where none was asked for) and `unseen`.
        """
        unseen = [row for row in rows if row.get("unseen")]
        found = self._counted([row for row in rows if not row.get("unseen")])
        other = self._counted(unseen) if unseen else {}
        found["format_valid_unseen"] = other.get("format_valid")
        if other:
            found[self.name]["unseen"] = other[self.name]
        return found

    def _counted(self, rows: Sequence[_Row]) -> dict[str, Any]:
        by_template: dict[str, list[_Row]] = {}
        for row in rows:
            by_template.setdefault(row["kind"], []).append(row)
        turns, broken = sum(row["turns"] for row in rows), sum(row["malformed"] for row in rows)
        valid = [row for row in rows if not row["infrastructure"]]
        calls = counted(valid)
        return {
            "format_valid": round(1 - broken / turns, 6) if turns else 0.0,
            self.name: metrics.proportion(sum(bool(row["solved"]) for row in valid), len(valid)) | {
                "by_template": {name: metrics.proportion(sum(row["turns"] - row["malformed"] for row in group),
                                                         sum(row["turns"] for row in group))
                                for name, group in sorted(by_template.items())},
                "solved": {row["instance_id"]: bool(row["solved"]) for row in valid},
            } | ({"calls": calls} if calls else {}),
        }

    def rate(self, model: Mapping[str, Any]) -> float | None:
        """See Expert.rate."""
        return model.get("format_valid")


def _earned(clean: bool, right: bool) -> float:
    return FORMAT_SHARE * clean + (1.0 - FORMAT_SHARE) * (clean and right)


def _expressing(task: Task, names: Sequence[str]) -> str:
    """The first template that can say what answers a request: not all write several calls, or all values."""
    request = schema.request_of(task)
    for name in names:
        if expresses(name, request):
            return name
    raise UserError(f"request {task.instance_id}: none of the templates {', '.join(names)} can say its calls so that "
                    "they are read back as they are; give other --config.templates")


@functools.lru_cache(maxsize=8)
def requests(config: ToolCallsConfig, seed: int, split: str) -> tuple[Task, ...]:
    """The requests of a split.

    Raises:
      UserError: a file is missing or malformed, or an id is there twice.
    """
    name = "data" if split == "train" else "heldout_data"
    path = getattr(config, name)
    given = schema.read(path) if path else []
    if path and not given:
        raise UserError(f"--config.tool_calls.{name}={path}: holds no request")
    made = [schema.to_task(row) for row in make.requests(config.made, seed, config.kinds or make.KINDS, split)]
    twice = {task.instance_id for task in given} & {task.instance_id for task in made}
    if twice:
        raise UserError(f"--config.tool_calls.{name}={path}: {sorted(twice)[0]} is the id of one that is made here")
    return (*given, *made)


TOOL_FORMAT = ToolFormat("tool_format", "format expert", column="format valid", comparisons=((OWN, "sft"),),
                         summary=("format_valid", "format_valid_unseen"))
