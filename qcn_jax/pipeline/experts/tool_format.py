"""The tool-format expert: answers are written in the tool-call template that the prompt asks for.

With a scaffold whose chat template lists its tools a prompt has all three axes of its template (chat.templates); nano's
is one turn and names it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax.agents.episode import EndReason, EpisodeResult
from qcn_jax.agents.scaffolds import Scaffold
from qcn_jax.chat.templates import NATIVE
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.tasks.verdicts import Verdict
from qcn_jax.pipeline.experts import metrics
from qcn_jax.pipeline.experts.conversation import detail_of
from qcn_jax.pipeline.experts.expert import OWN, Expert, Prompt
from qcn_jax.pipeline.rl.records import Outcome

_Row = metrics.Row
FORMAT_SHARE = 0.5  # of the reward for a call that was read and executed; the rest is for the tests


class ToolFormat(Expert):
    """Takes the run's templates in turn; is measured by the share of turns that keep them."""

    def present(self, scaffold: Scaffold, template: str = NATIVE) -> Scaffold:
        """See Expert.present."""
        return scaffold.in_template(template)

    def prompts(self, tasks: Sequence[Task], scaffold: Scaffold, templates: Sequence[str] = (),
                unseen: Sequence[str] = ()) -> list[Prompt]:
        """See Expert.prompts; where there are unseen templates, every task is asked under one of these, too."""
        found, tasks = [], self.domain(tasks)
        for names in filter(None, (templates, unseen)):
            presented = {name: self.present(scaffold, name) for name in names}
            turn = [names[index % len(names)] for index in range(len(tasks))]
            found += [Prompt(self, task, presented[name], name, names is unseen)
                      for task, name in zip(tasks, turn, strict=True)]
        return found

    def outcome(self, result: EpisodeResult, verdict: Verdict, unfinished_penalty: float) -> Outcome:
        """Half for an answer in the template asked for whose every call was executed without an error (`solved`).

        The other half is for resolving the task, which keeps the calls meaningful. An answer that breaks the format
        earns nothing.
        """
        clean = result.reason is EndReason.SUBMITTED and not any(result.malformed)
        reward = FORMAT_SHARE * clean + (1.0 - FORMAT_SHARE) * (clean and verdict.resolved)
        return Outcome(reward, clean, clean, detail=detail_of(result, verdict))

    def metrics(self, rows: Sequence[metrics.Row]) -> dict[str, Any]:
        """Share of turns that keep the demanded tool-call format, in all and per template (the rows' `kind`).

        Of templates that no model was trained on apart, as `format_valid_unseen`; None where none was asked for.
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
        counted = [row for row in rows if not row["infrastructure"]]
        return {
            "format_valid": round(1 - broken / turns, 6) if turns else 0.0,
            self.name: metrics.proportion(sum(bool(row["solved"]) for row in counted), len(counted)) | {
                "by_template": {name: metrics.proportion(sum(row["turns"] - row["malformed"] for row in group),
                                                         sum(row["turns"] for row in group))
                                for name, group in sorted(by_template.items())},
                "solved": {row["instance_id"]: bool(row["solved"]) for row in counted},
            },
        }

    def rate(self, model: Mapping[str, Any]) -> float | None:
        """See Expert.rate."""
        return model.get("format_valid")


TOOL_FORMAT = ToolFormat("tool_format", "format expert", column="format valid", comparisons=((OWN, "sft"),),
                         summary=("format_valid", "format_valid_unseen"))
