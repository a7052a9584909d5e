"""Terminus 2, Terminal-Bench's agent: keystrokes for a terminal, written as JSON or XML, and an end that is confirmed.

Format and limits are Harbor's (terminus_2); what it says is in our own words. The terminal's folder and variables last;
programs that go on and read keys do not exist here: every batch of keystrokes runs to its end.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from qcn_jax.agents import operations
from qcn_jax.agents.scaffolds.prose import TASK
from qcn_jax.agents.scaffolds.scaffold import Message, Scaffold, field_schema, object_schema
from qcn_jax.agents.tools import ToolExecutor, ToolResult, ToolSpec
from qcn_jax.chat.rendering import ParsedMessage, ToolCall
from qcn_jax.chat.values import STRICT, check_depth

DURATION = 1.0  # seconds, where a command names none
_KEYS = re.compile(r"\s*C-[a-z]\s*")
_FIELDS = ("analysis", "plan", "commands")
_SECONDS = re.compile(r"""duration\s*=\s*["']([\d.]+)["']""")

_TASK = TASK.replace("then submit.", "then mark the task complete.")
_JSON = """
Every response is one JSON object: "analysis" (what the terminal shows), "plan" (what is next), "commands" (a list of
{"keystrokes": "ls -la\\n", "duration": 0.1}; keystrokes are typed as they are, so end each command with a newline), and
"task_complete": true once all is done."""
_XML = """
Every response is one element:

<response>
<analysis>what the terminal shows</analysis>
<plan>what is next</plan>
<commands>
<keystrokes duration="0.1">ls -la
</keystrokes>
</commands>
<task_complete>true</task_complete>
</response>

Keystrokes are typed as they are, without escapes, so end each command with a newline; task_complete is left out until
all is done."""


def _type(executor: ToolExecutor, keystrokes: str, duration: float = DURATION) -> str:
    if not keystrokes.strip() or _KEYS.fullmatch(keystrokes):
        return ""
    ran = operations.terminal(executor, keystrokes, max(duration, operations.BASH_TIMEOUT))
    return ran.output + ("\n(stopped: out of time)" if ran.timed_out else "")


def _complete(executor: ToolExecutor) -> ToolResult:
    if executor.notes.get("asked"):
        return ToolResult("task_complete", submitted=True)
    executor.notes["asked"] = True
    return ToolResult("task_complete", "Is the task complete? It will be graded as it is, and nothing can be corrected "
                      "afterwards. Mark it complete once more if so.")


@dataclasses.dataclass(frozen=True)
class Terminus(Scaffold):
    """`form` is json or xml."""

    form: str = "json"

    def parse(self, text: str) -> ParsedMessage:
        """As Scaffold.parse; a task_complete is a call of its own, the last."""
        content, commands, complete, problem = (_of_json if self.form == "json" else _of_xml)(text)
        if problem:
            return ParsedMessage(text, [], [problem])
        calls = [ToolCall("keystrokes", {"keystrokes": keys, "duration": seconds}) for keys, seconds in commands]
        if not calls and not complete:
            calls = [ToolCall("keystrokes", {"keystrokes": "", "duration": DURATION})]  # to wait is allowed
        return ParsedMessage(content, calls + [ToolCall("task_complete", {})] * complete, [])

    def render(self, content: str, calls: Sequence[ToolCall]) -> str:
        """As Scaffold.render; content is the analysis, and behind an empty line the plan."""
        analysis, _, plan = content.partition("\n\n")
        commands = [(call.arguments["keystrokes"], call.arguments.get("duration", DURATION)) for call in calls
                    if call.name == "keystrokes"]
        complete = any(call.name == "task_complete" for call in calls)
        if self.form == "json":
            row: dict[str, Any] = {"analysis": analysis, "plan": plan, "commands": [
                {"keystrokes": keys, "duration": seconds} for keys, seconds in commands]}
            return json.dumps(row | ({"task_complete": True} if complete else {}), indent=2, ensure_ascii=False)
        typed = "\n".join(f'<keystrokes duration="{seconds}">{keys}</keystrokes>' for keys, seconds in commands)
        end = "\n<task_complete>true</task_complete>" if complete else ""
        return (f"<response>\n<analysis>{analysis}</analysis>\n<plan>{plan}</plan>\n<commands>\n{typed}\n</commands>"
                f"{end}\n</response>")

    def assistant(self, calls: Sequence[ToolCall], content: str = "") -> Message:
        """As Scaffold.assistant, as text."""
        return {"role": "assistant", "content": self.render(content, calls)}


_Read = tuple[str, list[tuple[str, float]], bool, str]
"""content, (keystrokes, seconds) of each command, whether the task is complete, what is wrong"""


def _of_json(text: str) -> _Read:
    start = text.find("{")
    try:
        row, _ = STRICT.raw_decode(text[start:]) if start >= 0 else (None, 0)
        check_depth(row)
    except (ValueError, RecursionError) as error:
        return "", [], False, f"invalid JSON: {error}"
    if row is None:
        return "", [], False, "no JSON object"
    missing = [name for name in _FIELDS if name not in row]
    if missing:
        return "", [], False, f"missing fields: {', '.join(missing)}"
    complete = str(row.get("task_complete", False)).lower() in ("true", "1", "yes")
    content = f"{row['analysis']}\n\n{row['plan']}"
    found, given = [], row["commands"]
    for number, command in enumerate(given if isinstance(given, list) else [None], 1):
        if not isinstance(command, dict) or not isinstance(command.get("keystrokes"), str):
            if complete:
                return content, [], True, ""  # as Terminus takes it
            return content, [], False, f"command {number} must be an object with keystrokes"
        found.append((command["keystrokes"], _seconds(command.get("duration"))))
    return content, found, complete, ""


def _of_xml(text: str) -> _Read:
    _, opened, body = text.partition("<response>")
    if not opened:
        return "", [], False, "no <response>"
    body = body.rpartition("</response>")[0] if "</response>" in body else body
    parts = {name: found[1] if (found := _element(body, f"<{name}>", name)) else None for name in _FIELDS}
    if parts["commands"] is None and re.search(r"<commands\s*/>", body):
        parts["commands"] = ""
    complete = bool(re.search(r"<task_complete>\s*true\s*</task_complete>", body, re.IGNORECASE))
    missing = [name for name, value in parts.items() if value is None and not (name == "commands" and complete)]
    if missing:
        return "", [], False, f"missing sections: {', '.join(missing)}"
    found, rest = [], parts["commands"] or ""
    while element := _element(rest, "<keystrokes", "keystrokes"):
        attributes, keys, rest = element
        given = _SECONDS.search(attributes)
        found.append((keys, _seconds(given and given[1])))
    return f"{parts['analysis'].strip()}\n\n{parts['plan'].strip()}", found, complete, ""


def _element(text: str, opening: str, name: str) -> tuple[str, str, str] | None:
    """Attributes and content of the first element that opens so, and the text behind it; in linear time."""
    _, opened, rest = text.partition(opening)
    attributes, closed, rest = ("", opened, rest) if opening.endswith(">") else rest.partition(">")
    content, ended, rest = rest.partition(f"</{name}>")
    return (attributes, content, rest) if opened and closed and ended else None


def _seconds(given: Any) -> float:
    """A duration as it was given, or the usual one where it is none."""
    try:
        return DURATION if isinstance(given, bool) else float(given)
    except (TypeError, ValueError, OverflowError):
        return DURATION


def _terminus(form: str, system: str) -> Terminus:
    tools = (ToolSpec("keystrokes", "Types into the terminal.",
                      object_schema("keystrokes", keystrokes="What is typed.",
                                    duration=field_schema("number", "Seconds to wait.")), _type, shell=True),
             ToolSpec("task_complete", "Marks the task complete.", object_schema(), _complete))
    return Terminus(
        f"terminus_{form}", tools, instance=_TASK + "\n" + system, describe_tools=False, template=f"terminus_{form}",
        result_role="user", join_results=True, output_limit=10_000, form=form,
        advice="Your response could not be read: {problem}. Answer with one "
        f"{'JSON object' if form == 'json' else 'XML element'} as described.")


TERMINUS_JSON, TERMINUS_XML = _terminus("json", _JSON), _terminus("xml", _XML)
