"""Episodes that a model behind an endpoint plays: messages to a turn, until the episode or a limit ends it.

Scaffolds that list their tools are played with the endpoint's own tool calls; the others write calls as text, which the
scaffold reads.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from qcn_jax.agents.episode import EndReason, Episode
from qcn_jax.agents.scaffolds import Message, Scaffold
from qcn_jax.agents.tools import MAX_CALLS
from qcn_jax.chat.completion import Completion, RawCall
from qcn_jax.chat.endpoint import ContextExceeded, Late
from qcn_jax.chat.rendering import ParsedMessage, ToolCall
from qcn_jax.chat.values import read_json


class Model(Protocol):
    """Whoever answers messages with a turn; `chat.endpoint.Endpoint` is one."""

    def turn(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, seed: int,
             deadline: float | None) -> Completion:
        """See Endpoint.turn."""


@runtime_checkable
class Script(Protocol):
    """Whoever plays whole episodes without a model, as baselines do."""

    def play(self, episode: Episode) -> None:
        """Plays `episode` to its end."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an episode may use.

    turns: of the model.
    seconds: of wall time, the sandbox's included.
    tokens: generated in all turns together; 0 is no limit.
    """

    turns: int = 50
    seconds: float = 3600.0
    tokens: int = 0


@dataclasses.dataclass
class Usage:
    """What an episode used."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0
    calls: int = 0

    def add(self, turn: Completion) -> None:
        """Counts a turn."""
        self.prompt_tokens += turn.prompt_tokens
        self.completion_tokens += turn.completion_tokens
        self.retries += turn.retries
        self.calls += 1


class Stopped(Exception):
    """The episode was given up because the run ends."""


def play(episode: Episode, model: Model | Script, limits: Limits, seed: int = 0,
         stopped: Callable[[], bool] = lambda: False) -> Usage:
    """Plays `episode` to its end; its limit of turns is its own, and the only one that a script has.

    Raises:
      ContextExceeded: the task alone is longer than the model's context.
      EndpointError: the endpoint refuses or fails.
      Stopped: `stopped` said so.
    """
    if isinstance(model, Script):
        model.play(episode)
        return Usage()
    tools, usage, deadline = episode.scaffold.schemas(), Usage(), time.monotonic() + limits.seconds
    while not episode.done:
        if stopped():
            raise Stopped
        if time.monotonic() > deadline:
            episode.end(EndReason.TIME_LIMIT)
            break
        try:
            turn = model.turn(on_the_wire(episode.messages, tools is not None), tools, seed, deadline)
        except Late:
            episode.end(EndReason.TIME_LIMIT)
            break
        except ContextExceeded:
            if not episode.turns:
                raise  # nothing that the agent did
            episode.end(EndReason.LENGTH_LIMIT)
            break
        usage.add(turn)
        episode.take(*taken_apart(episode.scaffold, turn), turn.finish != "length")
        if limits.tokens and usage.completion_tokens >= limits.tokens:
            episode.end(EndReason.LENGTH_LIMIT)
    return usage


def taken_apart(scaffold: Scaffold, turn: Completion) -> tuple[ParsedMessage, Message]:
    """What a turn's tool calls are, and the message that tells the endpoint of it later.

    A call whose arguments are no JSON object is a problem and no call, and is told with none: many servers fail at a
    history that holds it.
    """
    message: Message = {"role": "assistant", "content": turn.content}
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning
    if scaffold.schemas() is None:
        return scaffold.parse(turn.content), message
    calls, problems, told = [], [], []
    for raw in turn.calls[:MAX_CALLS]:
        arguments = _arguments(raw)
        if arguments is None:
            problems.append(f"the arguments of {raw.name[:40] or 'a call'} are no JSON object")
        else:
            calls.append(ToolCall(raw.name, arguments))
        told.append({"id": raw.id, "type": "function", "readable": arguments is not None, "function": {
            "name": raw.name or "unnamed", "arguments": json.dumps(arguments or {})}})
    return ParsedMessage(turn.content, calls, problems), message | ({"tool_calls": told} if told else {})


def _arguments(raw: RawCall) -> dict[str, Any] | None:
    try:
        found = read_json(raw.arguments or "{}")
    except ValueError:
        return None
    return found if isinstance(found, dict) and raw.name else None


def on_the_wire(messages: Iterable[Message], calling: bool) -> list[dict[str, Any]]:
    """Messages as any endpoint takes them: contents are text, and nothing stands there that is ours alone.

    With `calling` tools are called by the endpoint's own form, in which a tool answers a call and nothing else.
    """
    wire = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content)
        plain = {"role": message["role"], "content": content}
        if "tool_call_id" in message:
            plain["tool_call_id"] = message["tool_call_id"]
        elif calling and message["role"] == "tool":
            plain["role"] = "user"
        if "tool_calls" in message:
            plain["tool_calls"] = [{key: call[key] for key in ("id", "type", "function")}
                                   for call in message["tool_calls"]]
        wire.append(plain)
    return wire
