"""Conversations to learn from: episodes that ended with passing tests, with the calls of each turn taken apart."""

import dataclasses
from collections.abc import Callable
from typing import Any

from qcn_jax.agents.episode import EndReason, Episode
from qcn_jax.agents.scaffolds.scaffold import Message
from qcn_jax.agents.tools import ToolExecutor
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.tasks.schema import Task


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A conversation that ended with passing tests.

    Attributes:
      messages: assistants carry `tool_calls` (name, arguments) and the `template` they are written in.
      wrong_edits: attempts before the right one.
      outcomes: of each test run, in order: passed or not.
      failed: numbers of the assistant's turns, from 0, that ended in failing tests, or that the guard refused.
      search: nobody knew the answer; also edits on which tests failed show how to look for a defect.
      tools: schemas that the system turn lists; None where it lists none.
    """

    task_id: str
    repo: str
    scaffold: str
    template: str
    messages: tuple[Message, ...]
    patch: str
    wrong_edits: int
    outcomes: tuple[bool, ...]
    failed: tuple[int, ...] = ()
    search: bool = False
    tools: list[dict[str, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready row."""
        row = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in row.items()}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Trajectory":
        """Reads what `to_json` gave."""
        return cls(**row | {key: tuple(row[key]) for key in ("messages", "outcomes", "failed") if key in row})


def verified(
    episode: Episode, executor: ToolExecutor, grade: Callable[[Task, str], bool] | None = None, search: bool = False
) -> Trajectory | None:
    """An episode that is over as a trajectory; None unless it was submitted, well formed and the tests pass.

    Args:
      episode: played to its end on `executor`.
      grade: whether a patch resolves the task; by default the tests are run where the edits were made.
      search: see Trajectory.

    Raises:
      SandboxError: the sandbox failed.
    """
    task = episode.task
    if episode.reason is EndReason.INFRASTRUCTURE:
        raise SandboxError(f"{task.instance_id}: the sandbox failed")
    if episode.reason is not EndReason.SUBMITTED or any(turn.malformed for turn in episode.turns):
        return None
    result = episode.result()
    if not (grade(task, result.patch) if grade else result.tests_passed or executor.test().passed):
        return None
    return of_episode(episode, result.patch, search)


def of_episode(episode: Episode, patch: str, search: bool = False) -> Trajectory:
    """An episode that left `patch` as a conversation; see `verified` for those that are worth it."""
    task, scaffold = episode.task, episode.scaffold
    runs = [result.tests for turn in episode.turns for result in turn.results if result.tests is not None]
    refused = lambda turn: any(result.blocked for result in turn.results)
    return Trajectory(
        task.instance_id, task.repo, scaffold.name, scaffold.template, messages_with_calls(episode), patch,
        wrong_edits=max(len(runs) - 1, 0), outcomes=tuple(run.passed for run in runs),
        failed=tuple(number for number, turn in enumerate(episode.turns)
                     if turn.tests and not turn.passed or refused(turn)),
        search=search, tools=scaffold.schemas(),
    )


def messages_with_calls(episode: Episode) -> tuple[Message, ...]:
    """The episode's messages, assistants with their calls taken apart instead of text."""
    turns, found = iter(episode.turns), []
    for message in episode.messages:
        if message["role"] == "assistant":
            turn = next(turns)
            reasoning = {key: message[key] for key in ("reasoning_content",) if key in message}
            message = episode.scaffold.assistant(turn.calls, turn.content) | reasoning
        found.append(message)
    return tuple(found)
