"""A request that calls of a user's tools answer, as the rollout sees it; see pipeline.rl.records.Conversation.

No sandbox: what an answer is follows from its text (envs.calls.check).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from qcn_jax.agents.episode import EndReason, EpisodeResult
from qcn_jax.agents.scaffolds import Message, Scaffold
from qcn_jax.chat.encoder import Encoder
from qcn_jax.envs.calls.check import Judged, judge
from qcn_jax.envs.calls.schema import request_of
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.tasks.verdicts import Verdict
from qcn_jax.pipeline.experts import metrics
from qcn_jax.pipeline.rl.records import Outcome, Reply

Score = Callable[[EpisodeResult, Verdict, Judged], Outcome]
MEASURES = ("parsed", "valid", "right")  # of Judged, each of which needs the one before


class CallConversation:
    """One turn, judged by its text."""

    def __init__(self, task: Task, scaffold: Scaffold, encoder: Encoder, score: Score | None) -> None:
        """Args:
          task: a request.
          scaffold: in the template that is asked for.
          encoder: text to tokens and back.
          score: says what the turn was worth; None where nobody asks: every outcome is then 0.
        """
        self.messages: list[Message] = scaffold.first_messages(task, None)
        self._task, self._scaffold, self._encoder, self._score = task, scaffold, encoder, score
        self._judged, self._reason = Judged(why="cut off"), EndReason.LENGTH_LIMIT

    def opening(self) -> list[int]:
        """The prompt, up to where the assistant begins."""
        return self._encoder.encode_prompt(self.messages)

    def reply(self, tokens: list[int], stopped: bool) -> Reply:
        """Judges the turn; one that its own end token did not close makes no call."""
        text = self._encoder.spoken(self._encoder.tokenizer.decode(tokens[:-1] if stopped else tokens))
        self.messages.append({"role": "assistant", "content": text})
        if stopped and tokens[-1] in self._encoder.ends:
            self._judged = judge(request_of(self._task), self._scaffold.template, text)
            self._reason = EndReason.SUBMITTED
        return Reply(done=True, malformed=not self._judged.valid)

    def outcome(self, truncated: bool) -> Outcome:
        """What the turn was worth, with what it was as `call` of the detail."""
        judged, reason = self._judged, EndReason.LENGTH_LIMIT if truncated else self._reason
        if self._score is None:
            return Outcome(0.0, False, reason is EndReason.SUBMITTED)
        name = self._task.instance_id
        result = EpisodeResult(name, self._scaffold.name, "", reason, len(self.messages) - 2, (), False,
                               (not judged.valid,) * (len(self.messages) - 2), 0)
        verdict = Verdict(name, "resolved" if judged.right else "unresolved", detail=judged.why)
        found = self._score(result, verdict, judged)
        call = {name: getattr(judged, name) for name in MEASURES} | {"kind": self._task.kind, "why": judged.why}
        return dataclasses.replace(found, detail=found.detail | {"call": call})

    def close(self) -> None:
        """Holds nothing."""


def counted(rows: Sequence[metrics.Row]) -> dict[str, Any]:
    """How many answers to requests were `parsed`, `valid` and `right`, in all, by template and by the rows' own kind.

    Rows are pipeline.experts.metrics's with what `outcome` says as `call`; empty where there are none of these.
    """
    rows = [row for row in rows if row.get("call")]
    if not rows:
        return {}
    groups = {"by_template": lambda row: row["kind"], "by_kind": lambda row: row["call"]["kind"]}
    found: dict[str, Any] = _measured(rows)
    for name, key in groups.items():
        found[name] = {one: _measured([row for row in rows if key(row) == one]) for one in sorted(set(map(key, rows)))}
    return found


def _measured(rows: Sequence[metrics.Row]) -> dict[str, Any]:
    return {name: metrics.proportion(sum(row["call"][name] for row in rows), len(rows)) for name in MEASURES}
