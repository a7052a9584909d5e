"""The agent loop: one episode of one task, driven from outside, one assistant turn at a time.

    episode = Episode(task, NANO, ToolExecutor(task, NANO.tools, workspace))
    while not episode.done:
        observation = episode.step(model(episode.messages))
    result = episode.result()

The episode holds text and verdicts only; everything that touches files or runs code is `executor.execute(calls)`,
which may live elsewhere.
"""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any, Protocol

from qcn_jax.agents.guard import Guard
from qcn_jax.agents.scaffolds import Message, Scaffold
from qcn_jax.agents.tools import RunSummary, ToolResult, skipped
from qcn_jax.chat.rendering import ParsedMessage, ToolCall
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.tasks.schema import Task

MAX_UNREADABLE = 3  # turns in a row without a readable call that end an episode


class EndReason(enum.StrEnum):
    """Why an episode ended."""

    SUBMITTED = "submitted"
    TURN_LIMIT = "turn_limit"
    LENGTH_LIMIT = "length_limit"
    TIME_LIMIT = "time_limit"
    UNREADABLE = "unreadable"  # MAX_UNREADABLE turns in a row held no call that could be read
    INFRASTRUCTURE = "infrastructure"  # the sandbox or the endpoint failed; the episode must not count


LIMITS = frozenset({EndReason.TURN_LIMIT, EndReason.LENGTH_LIMIT, EndReason.TIME_LIMIT})


@dataclasses.dataclass(frozen=True)
class Observation:
    """What a turn brought.

    Attributes:
      messages: for the agent, to be put before its next turn; empty when done.
      done: the episode is over.
      malformed: the turn was not canonical, or held a call to no tool or with arguments that do not fit; RL
        penalises the tokens of such a turn.
    """

    messages: tuple[Message, ...]
    done: bool
    malformed: bool


@dataclasses.dataclass(frozen=True)
class Turn:
    """One assistant turn and what came of it; `content` is what it says besides its calls."""

    text: str
    calls: tuple[ToolCall, ...]
    results: tuple[ToolResult, ...]
    malformed: bool
    content: str = ""

    @property
    def tests(self) -> RunSummary | None:
        """The last test run of the turn."""
        return next((result.tests for result in reversed(self.results) if result.tests is not None), None)

    @property
    def passed(self) -> bool:
        """Whether that passed."""
        return self.tests is not None and self.tests.passed


@dataclasses.dataclass(frozen=True)
class EpisodeResult:
    """An episode that is over.

    Attributes:
      patch: unified diff from the task's starting state; grading decides which paths of it count.
      runs: outcomes of all test runs in order; `attempts` is their number.
      tests_passed: the last test run passed and nothing was changed after it.
      malformed: per turn, see `Observation.malformed`.
      blocked: calls that the guard refused.
      guard: what it counted, refusals by rule among it (`Guard.counts`).
    """

    task_id: str
    scaffold: str
    patch: str
    reason: EndReason
    turns: int
    runs: tuple[RunSummary, ...]
    tests_passed: bool
    malformed: tuple[bool, ...]
    blocked: int
    guard: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def attempts(self) -> int:
        """How often tests were run."""
        return len(self.runs)

    def to_json(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self) | {"reason": self.reason.value}


class Executor(Protocol):
    """Runs the calls of a turn somewhere; `ToolExecutor` does it here."""

    def execute(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Runs calls in order; raises SandboxError where the sandbox failed."""

    def diff(self) -> str:
        """Unified diff of everything changed so far."""

    def close(self) -> None:
        """Gives back what it acts on; nothing is asked of it afterwards."""


class Episode:
    """State of one episode.

    Args:
      task: what is to be repaired.
      scaffold: how the task is presented.
      executor: runs tool calls on the task's starting state.
      max_turns: assistant turns after which the episode ends; the last one's calls still count.
      guard: refuses calls before they are made; scaffolds with a shell want one.
    """

    def __init__(
        self, task: Task, scaffold: Scaffold, executor: Executor, *, max_turns: int = 8,
        guard: Guard | None = None,
    ) -> None:
        self.task, self.scaffold, self.messages = task, scaffold, scaffold.first_messages(task, executor)
        self.turns: list[Turn] = []
        self.reason: EndReason | None = None
        self.executor, self._max_turns, self.guard = executor, max_turns, guard
        self._unreadable = 0

    @property
    def done(self) -> bool:
        """Whether the episode is over."""
        return self.reason is not None

    def step(self, text: str, complete: bool = True) -> Observation:
        """Takes one assistant turn.

        Args:
          text: what the agent wrote, without the turn's closing token.
          complete: the agent closed its turn itself; a turn that was cut off is not executed.
        """
        return self.take(self.scaffold.parse(text), {"role": "assistant", "content": text}, complete)

    def take(self, parsed: ParsedMessage, message: Message, complete: bool = True) -> Observation:
        """Takes one assistant turn that somebody has taken apart.

        Args:
          parsed: what it holds.
          message: the turn as it stands in the conversation; with `tool_calls`, what each gave is told under its id.
          complete: see `step`.
        """
        if self.done:
            raise ValueError(f"the episode is over: {self.reason}")
        calls, text = tuple(parsed.calls) if complete else (), message["content"]
        self.messages.append(message)
        try:
            results = self._execute(calls)
        except SandboxError:
            self.turns.append(Turn(text, calls, (), bool(parsed.problems), parsed.content))
            return self._end(EndReason.INFRASTRUCTURE)
        ended = self.scaffold.ends_without_call and complete and bool(parsed.content.strip())
        ended = ended and not calls and not parsed.problems
        malformed = not (calls or ended) or bool(parsed.problems) or any(result.malformed for result in results)
        self.turns.append(Turn(text, calls, results, malformed, parsed.content))
        self._unreadable = 0 if calls else self._unreadable + 1
        if ended or any(result.submitted for result in results) or (
            self.scaffold.single_turn and results and all(result.ok for result in results)
        ):
            return self._end(EndReason.SUBMITTED)
        if len(self.turns) >= self._max_turns:
            return self._end(EndReason.TURN_LIMIT)
        if self._unreadable >= MAX_UNREADABLE:
            return self._end(EndReason.UNREADABLE)
        problem = "cut off" if not complete else "; ".join(parsed.problems[:2]) or "no tool call"
        messages = self.scaffold.observe(results) if calls else self.scaffold.observe_problem(problem)
        if "tool_calls" in message:
            messages = _answers(message["tool_calls"], [item["content"] for item in messages], problem)
        self.messages.extend(messages)
        return Observation(tuple(messages), False, malformed)

    def _execute(self, calls: Sequence[ToolCall]) -> tuple[ToolResult, ...]:
        """Results of `calls`; of those before the first that the guard refuses, its refusal, and skipped ones."""
        rules = (self.guard.check(call.name, call.arguments) if self.guard else None for call in calls)
        refused, rule = next(((i, rule) for i, rule in enumerate(rules) if rule is not None), (len(calls), None))
        results = self.executor.execute(calls[:refused]) if refused else []
        for result in results if self.guard else ():
            self.guard.add(result.network)
        if rule is not None and all(result.ok and not result.submitted for result in results):
            results.append(ToolResult(calls[refused].name, rule.message, ok=False, blocked=True))
            results += [skipped(call) for call in calls[refused + 1 :]]
        return tuple(results)

    def snapshot(self) -> tuple[Any, ...]:
        """What `restore` takes back to; the executor must be a ToolExecutor on files in memory."""
        return len(self.messages), len(self.turns), self.reason, self._unreadable, self.executor.snapshot()

    def restore(self, state: tuple[Any, ...]) -> None:
        """Makes the episode what it was when `snapshot` gave `state`: later turns count for nothing."""
        messages, turns, self.reason, self._unreadable, held = state
        del self.messages[messages:], self.turns[turns:]
        self.executor.restore(held)

    def end(self, reason: EndReason) -> None:
        """Ends the episode from outside: no room for another turn, or the run is being stopped."""
        if not self.done:
            self._end(reason)

    def _end(self, reason: EndReason) -> Observation:
        self.reason = reason
        return Observation((), True, bool(self.turns) and self.turns[-1].malformed)

    def result(self) -> EpisodeResult:
        """The outcome; raises ValueError while the episode goes on."""
        if self.reason is None:
            raise ValueError("the episode is not over")
        results = [result for turn in self.turns for result in turn.results]
        passed = False
        for result in results:
            if result.tests is not None:
                passed = result.tests.passed
            elif result.changed:
                passed = False
        try:
            patch = "" if self.reason is EndReason.INFRASTRUCTURE else self.executor.diff()
        except SandboxError:
            self.reason, patch = EndReason.INFRASTRUCTURE, ""
        return EpisodeResult(
            task_id=self.task.instance_id, scaffold=self.scaffold.name,
            patch=patch, reason=self.reason, turns=len(self.turns),
            runs=tuple(result.tests for result in results if result.tests is not None), tests_passed=passed,
            malformed=tuple(turn.malformed for turn in self.turns), blocked=sum(result.blocked for result in results),
            guard=dict(self.guard.counts) if self.guard else {},
        )


def _answers(calls: Sequence[Message], contents: Sequence[Any], problem: str) -> list[Message]:
    """One message for every call, which servers insist on: those that were not made are told why not."""
    told, made = iter(contents), []
    for call in calls:
        content = next(told, "not executed") if call.get("readable", True) else f"not executed: {problem}"
        made.append({"role": "tool", "tool_call_id": call["id"], "content": content})
    return made
