"""Episodes as other agents' trajectory files, which their viewers and `pipeline.data.readers` read.

mini-swe-agent's `*.traj.json` (trajectory_format mini-swe-agent-1.1) holds messages and `info`; SWE-agent's `*.traj`
the steps, with thought, action and observation, and the history.
"""

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qcn_jax.agents.acting import on_the_wire
from qcn_jax.agents.episode import EndReason, Episode

if TYPE_CHECKING:
    from qcn_jax.agents.records import Record

FORMAT = "mini-swe-agent-1.1"
# How mini-swe-agent calls what ended a run; other reasons keep their own names.
EXITS = {EndReason.SUBMITTED: "Submitted", EndReason.TURN_LIMIT: "LimitsExceeded",
         EndReason.LENGTH_LIMIT: "LimitsExceeded", EndReason.TIME_LIMIT: "TimeExceeded",
         EndReason.UNREADABLE: "RepeatedFormatError"}


def mini_swe_agent(episode: Episode, record: "Record", model: str) -> dict[str, Any]:
    """The episode as mini-swe-agent saves its own, with `tools`, `resolved` and the instance's id beside."""
    status = EXITS.get(episode.reason, record.reason) if episode.reason else record.reason
    messages = _with_reasoning(episode)
    messages.append({"role": "exit", "content": record.patch, "extra": {
        "exit_status": status, "submission": record.patch}})
    return {
        "info": {"model_stats": {"instance_cost": 0.0, "api_calls": record.turns,
                                 "tokens_sent": record.prompt_tokens, "tokens_received": record.completion_tokens},
                 "config": {"model": {"model_name": model}, "agent": {"scaffold": episode.scaffold.name}},
                 "exit_status": status, "submission": record.patch, "outcome": record.outcome},
        "messages": messages, "tools": episode.scaffold.schemas(), "resolved": record.resolved,
        "instance_id": record.instance_id, "trajectory_format": FORMAT}


def _with_reasoning(episode: Episode) -> list[dict[str, Any]]:
    wire = on_the_wire(episode.messages, episode.scaffold.schemas() is not None)
    for plain, message in zip(wire, episode.messages, strict=True):
        if "reasoning_content" in message:
            plain["reasoning_content"] = message["reasoning_content"]
    return wire


def swe_agent(row: Mapping[str, Any]) -> dict[str, Any]:
    """What `mini_swe_agent` gave as a SWE-agent trajectory."""
    messages = [message for message in row["messages"] if message["role"] != "exit"]
    steps = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            steps.append({"thought": message["content"], "response": message["content"],
                          "action": _action(message.get("tool_calls", ())),
                          "observation": _observation(messages[number + 1:]),
                          "query": messages[:number], "state": {}, "execution_time": 0.0, "extra_info": {}})
    kinds = {"assistant": "action", "tool": "observation"}
    history = [{**_with_ids(message), "agent": "main",
                "message_type": kinds.get(message["role"], "observation" if number > 1 else "system_prompt")}
               for number, message in enumerate(messages)]
    info = row["info"]
    return {"trajectory": steps, "history": history, "environment": row["instance_id"],
            "info": {"exit_status": info["exit_status"].lower(), "submission": info["submission"],
                     "model_stats": info["model_stats"]}}


def _with_ids(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message under SWE-agent's keys: what a tool answers to is a list."""
    called = message.get("tool_call_id")
    return {**{key: value for key, value in message.items() if key != "tool_call_id"},
            **({"tool_call_ids": [called]} if called else {})}


def _action(calls: Iterable[Mapping[str, Any]]) -> str:
    """Calls as one line each."""
    lines = []
    for call in calls:
        arguments = json.loads(call["function"]["arguments"])
        alone = arguments.get("command") if len(arguments) == 1 else None
        lines.append(alone if isinstance(alone, str) else f"{call['function']['name']} {json.dumps(arguments)}")
    return "\n".join(lines)


def _observation(following: Iterable[Mapping[str, Any]]) -> str:
    told = []
    for message in following:
        if message["role"] == "assistant":
            break
        told.append(message["content"])
    return "\n".join(told)
