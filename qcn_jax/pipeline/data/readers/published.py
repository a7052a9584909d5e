"""Agents' trajectories as their makers publish them, as OpenAI's messages; which form a row has is seen from its keys.

  SWE-agent        *.traj: `history` of messages (older ones: `query` or `messages` of the last step), `info`
  mini-swe-agent   *.traj.json: `messages`, `info`, `trajectory_format`; also those of the Responses API
  OpenHands        output.jsonl or a list of events: `history` of actions and observations (0.x) or of events with a
                   `kind` (1.x and later)
  SWE-smith        rows with `messages` (a list or its JSON text; splits tool, xml and ticks) and `resolved`
  ours             agents.trajectory.Trajectory.to_json, also within the lines of agents.collecting's journal

What a scaffold notes for itself (state changes, costs, condensations) is no message. A tool's answer is the text that
the model was shown, as far as the file keeps it.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


class Malformed(Exception):
    """A row is no conversation; the message says why."""


_EXITS = "Exit due to "  # how SWE-agent begins the turn that it writes itself where a limit ends the run
_NOTES = frozenset({  # events of OpenHands that no model sees
    "agent_state_changed", "change_agent_state", "null", "recall", "condensation", "condensation_request", "pause",
    "resume", "start", "stop"})
_ENDED = frozenset({"submitted", "submit", "finish", "finished", "agentstate.finished", "agent_finish"})


def normalised(row: Row) -> Row:
    """The row with `messages`, `tools` and what it says of itself in the usual keys; other rows as they are.

    Keys that it may have in the end: `messages`, `tools`; `resolved` and `submitted`, bool or None where the row does
    not say.

    Raises:
      Malformed: it has a form of the above, but not its parts.
    """
    try:
        return _normalised(row)
    except (TypeError, ValueError, AttributeError, LookupError) as error:  # a value of another kind somewhere within
        raise Malformed(f"is no trajectory of a known form: {str(error) or type(error).__name__}") from error


def _normalised(row: Row) -> Row:
    if not (is_events(row.get("history")) or "messages" in row):
        if _is_messages(row.get("trajectory")):
            row = {**row, "messages": row["trajectory"]}
        elif isinstance(row.get("trajectory"), list) and ("info" in row or "history" in row):
            row = {**row, "messages": _of_swe_agent(row)}
    if is_events(row.get("history")):
        messages, tools, finished = _of_openhands(row["history"])
        row = {**row, "messages": messages, "tools": row.get("tools") or tools, "exit_status": finished}
    elif _is_mini(row):
        row = {**row, "messages": list(_of_mini(row["messages"]))}
    return {**row, "resolved": _resolved(row), "submitted": _submitted(row)}


def is_ours(row: Row) -> bool:
    """Whether a row is Trajectory.to_json's."""
    return {"scaffold", "template", "outcomes", "messages"} <= row.keys()


def rows_of(value: Any) -> Iterator[Any]:
    """The rows that a JSON value of a file holds: itself, those of a list or journal line, or one history of events."""
    if is_events(value):
        yield {"history": value}
    elif isinstance(value, list):
        yield from value
    elif isinstance(value, Mapping) and value.keys() == {"key", "value"} and isinstance(value["value"], list):
        yield from value["value"]
    else:
        yield value


def weighted(messages: Iterable[Mapping[str, Any]], failed: Collection[int]) -> list[Mapping[str, Any]]:
    """`messages`, of which the assistant's turns whose numbers, from 0, are in `failed` have no weight."""
    found, turn = [], -1
    for message in messages:
        assistant = message["role"] == "assistant"
        turn += assistant
        found.append({**message, "weight": 0.0} if assistant and turn in failed else message)
    return found


def _is_messages(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and isinstance(values[0], Mapping) and "role" in values[0]


def is_events(values: Any) -> bool:
    """Whether a list is a history of OpenHands' events, or of pairs of them."""
    if not isinstance(values, list) or not values:
        return False
    first = values[0][0] if isinstance(values[0], list) and values[0] else values[0]
    return isinstance(first, Mapping) and "role" not in first and bool({"action", "observation", "kind"} & first.keys())


def _is_mini(row: Row) -> bool:
    return isinstance(row.get("messages"), list) and (
        str(row.get("trajectory_format", "")).startswith("mini-swe-agent") or "mini_version" in _of(row, "info"))


def _map(value: Any) -> Row:
    return value if isinstance(value, Mapping) else {}


def _of(row: Row, key: str) -> Row:
    return _map(row.get(key))


def _resolved(row: Row) -> bool | None:
    """What a row says of its outcome: `resolved`, `target`, `reward`, or a report within."""
    if is_ours(row):
        return True
    report = _of(row, "report") or _of(_of(row, "test_result"), "report") or _of(row, "test_result")
    for said in (row.get("resolved"), row.get("target"), row.get("reward"), report.get("resolved")):
        if isinstance(said, bool | int | float):
            return said >= 1
    return None


def _submitted(row: Row) -> bool | None:
    """Whether the agent itself ended the run, where the row says how it ended."""
    if is_ours(row):
        return True
    status = row.get("exit_status") if "exit_status" in row else _of(row, "info").get("exit_status")
    if isinstance(status, bool):
        return status
    return status.lower() in _ENDED if isinstance(status, str) and status else None


def _of_swe_agent(row: Row) -> list[Any]:
    """The messages of a .traj: all of its history, or where it keeps none what the last step was shown, and said."""
    found = row.get("history")
    if not _is_messages(found):
        last = _map(row["trajectory"][-1] if row["trajectory"] else None)
        query = last.get("query")
        if _is_messages(query):
            found = [*query, {"role": "assistant", "content": last.get("response") or last.get("thought"),
                              "tool_calls": last.get("tool_calls")}]
        else:
            found = last.get("messages")
    if not _is_messages(found):
        raise Malformed("trajectory: its steps keep no messages (history, query or messages)")
    return [_swe_agent_message(message) for message in found if not _is_exit(message)]


def _is_exit(message: Any) -> bool:
    return (isinstance(message, Mapping) and message.get("role") == "assistant" and not message.get("tool_calls")
            and isinstance(message.get("content"), str) and message["content"].startswith(_EXITS))


def _swe_agent_message(message: Any) -> Any:
    """A history item without what only the scaffold reads; blocks of thought are reasoning."""
    if not isinstance(message, Mapping):
        return message
    keys = ("role", "content", "tool_calls", "tool_call_ids", "weight", "reasoning_content")
    kept = {key: message[key] for key in keys if message.get(key) is not None}
    blocks = message.get("thinking_blocks")
    if isinstance(blocks, list) and "reasoning_content" not in kept:
        text = "".join(str(_map(block).get("thinking") or "") for block in blocks)
        kept |= {"reasoning_content": text} if text else {}
    return kept


def _of_mini(messages: Sequence[Any]) -> Iterator[Any]:
    """mini-swe-agent's messages: the exit is the scaffold's own; answers of the Responses API are taken apart."""
    for message in messages:
        if not isinstance(message, Mapping):
            yield message
        elif message.get("object") == "response":
            yield _of_response(message)
        elif message.get("type") == "function_call_output":
            yield {"role": "tool", "content": message.get("output"), "tool_call_id": message.get("call_id")}
        elif message.get("role") != "exit":
            yield message


def _of_response(response: Row) -> Row:
    content, reasoning, calls = "", "", []
    for item in response.get("output") or ():
        item = _map(item)
        if item.get("type") == "message":
            content += "".join(str(_map(part).get("text") or "") for part in item.get("content") or ())
        elif item.get("type") == "reasoning":
            reasoning += "".join(str(_map(part).get("text") or "") for part in item.get("summary") or ())
        elif item.get("type") == "function_call":
            calls.append({"id": item.get("call_id"), "function": {
                "name": item.get("name"), "arguments": item.get("arguments")}})  # fmt: skip
    return {"role": "assistant", "content": content} | (
        {"tool_calls": calls} if calls else {}) | ({"reasoning_content": reasoning} if reasoning else {})


def _of_openhands(history: Sequence[Any]) -> tuple[list[Any], Any, bool]:
    """(messages, tools, whether the agent finished) of a history; pairs of action and observation are two events."""
    events = [event for item in history for event in (item if isinstance(item, list) else [item])]
    for number, event in enumerate(events):
        if not isinstance(event, Mapping):
            raise Malformed(f"history[{number}]: expected an event, got {type(event).__name__}")
    read = _of_events if any("kind" in event for event in events) else _of_actions
    return read(events)


def _of_actions(events: Sequence[Row]) -> tuple[list[Any], Any, bool]:
    """OpenHands 0.x: `action` with `args`, `observation` with `content`; `tool_call_metadata` has what was written."""
    messages: list[Any] = []
    tools, finished, answered = None, False, set()
    for number, event in enumerate(events):
        action, observation, source = event.get("action"), event.get("observation"), event.get("source")
        metadata, arguments = _of(event, "tool_call_metadata"), _of(event, "args")
        if action in _NOTES or observation in _NOTES:
            continue
        if observation is not None:
            messages.append(_observed(event, metadata))
        elif action == "system":
            messages.append({"role": "system", "content": arguments.get("content")})
            tools = arguments.get("tools")
        elif source == "agent" and metadata:
            finished |= action == "finish"
            response = _of(metadata, "model_response")
            if response.get("id") is None or response["id"] not in answered:
                messages.append({"role": "assistant", **_of(response["choices"][0], "message")})
                answered.add(response.get("id"))
        elif action == "message":
            messages.append({"role": "assistant" if source == "agent" else "user", "content": arguments.get("content")})
        elif source == "agent":
            raise Malformed(f"history[{number}]: action {action!r} has no tool_call_metadata, so what the model wrote "
                            "is not known")
    return messages, tools, finished


def _observed(event: Row, metadata: Row) -> Row:
    """What a model was shown of an observation: commands with what the shell tells of itself, errors marked."""
    text, kind = event.get("content") or "", event.get("observation")
    if kind == "run":
        text = _shell(text, _of(_of(event, "extras"), "metadata"))
    text += {"error": "\n[Error occurred in processing last action]",
             "user_rejected": "\n[Last action has been rejected by the user]"}.get(str(kind), "")
    if not metadata:
        return {"role": "user", "content": text}
    return {"role": "tool", "content": text, "tool_call_id": metadata.get("tool_call_id")}


def _shell(text: str, metadata: Row) -> str:
    text = f"{metadata.get('prefix') or ''}{text}{metadata.get('suffix') or ''}"
    for key, words in (("working_dir", "Current working directory: "), ("py_interpreter_path", "Python interpreter: ")):
        text += f"\n[{words}{metadata[key]}]" if metadata.get(key) else ""
    code = metadata.get("exit_code", -1)
    return text if code in (-1, None) else f"{text}\n[Command finished with exit code {code}]"


def _of_events(events: Sequence[Row]) -> tuple[list[Any], Any, bool]:
    """OpenHands from 1.0 on: events with a `kind`; the actions of one answer are one message with several calls."""
    messages: list[Any] = []
    tools, finished, answer = None, False, None
    for number, event in enumerate(events):
        kind = event.get("kind")
        if kind == "SystemPromptEvent":
            parts = [part for key in ("system_prompt", "dynamic_context") if (part := event.get(key))]
            messages.append({"role": "system", "content": [_part(part) for part in parts]})
            tools = _described(event.get("tools"))
        elif kind == "MessageEvent":
            said = _of(event, "llm_message")
            content = [*map(_part, _listed(said.get("content"))), *map(_part, _listed(event.get("extended_content")))]
            messages.append({**said, "content": content})
        elif kind == "ActionEvent":
            finished |= event.get("tool_name") == "finish"
            same = answer is not None and event.get("llm_response_id") == answer and messages[-1].get("tool_calls")
            if not same:
                messages.append({"role": "assistant", "content": list(map(_part, _listed(event.get("thought")))),
                                 "reasoning_content": event.get("reasoning_content"), "tool_calls": []})
            if not isinstance(event.get("tool_call"), Mapping):
                raise Malformed(f"history[{number}]: the action has no tool_call, so what the model wrote is not known")
            messages[-1]["tool_calls"].append(event["tool_call"])
            answer = event.get("llm_response_id")
        elif kind in ("ObservationEvent", "AgentErrorEvent", "UserRejectObservation"):
            messages.append({"role": "tool", "tool_call_id": event.get("tool_call_id"), "content": _answered(event)})
    return messages, tools, finished


def _answered(event: Row) -> str:
    if event.get("kind") == "AgentErrorEvent":
        return str(event.get("error") or "")
    if event.get("kind") == "UserRejectObservation":
        return f"Action rejected: {event.get('rejection_reason') or ''}"
    seen = _of(event, "observation")
    content = next((seen[key] for key in ("content", "output", "message") if seen.get(key)), "")
    text = "".join(str(_part(part).get("text") or "") for part in _listed(content))
    text = _shell(text, seen["metadata"]) if isinstance(seen.get("metadata"), Mapping) else text
    return text + "".join(str(_part(part).get("text") or "") for part in _listed(event.get("extended_content")))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _part(value: Any) -> Row:
    return {"type": "text", "text": value} if isinstance(value, str) else _map(value)


def _described(tools: Any) -> list[Any] | None:
    """Tools with a schema; definitions that only name their classes tell a model nothing."""
    found = [tool for tool in tools or () if isinstance(tool, Mapping) and ("function" in tool or "parameters" in tool)]
    return found or None
