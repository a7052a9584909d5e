"""OpenHands' tools: a terminal that lasts, a file editor, a list of what is to be done, thoughts, and an end.

Names, parameters and limits are those of openhands-tools 1.58; what they say is in our own words.
"""

from typing import Any

from qcn_jax.agents import operations
from qcn_jax.agents.scaffolds.prose import TASK
from qcn_jax.agents.scaffolds.scaffold import Scaffold, field_schema, object_schema
from qcn_jax.agents.scaffolds.swe_agent import EDITOR, str_replace_editor
from qcn_jax.agents.tools import ToolError, ToolExecutor, ToolResult, ToolSpec
from qcn_jax.agents.workspace import ROOT

OUTPUT = 30_000  # characters, MAX_CMD_OUTPUT_SIZE
_STATES = ("todo", "in_progress", "done")


def _terminal(executor: ToolExecutor, command: str, is_input: bool = False, timeout: float = operations.BASH_TIMEOUT,
              reset: bool = False) -> str:
    if is_input:
        raise ToolError("terminal: no command is running that could read input")
    if reset:
        operations.terminal(executor, 'rm -f "${TMPDIR:-/tmp}/.terminal"; trap - EXIT', timeout)
        if not command:
            return "The terminal is new."
    ran = operations.terminal(executor, command, timeout)
    ended = "[The command ran out of time and was stopped]" if ran.timed_out else \
        f"[Command finished with exit code {ran.exit_code}]"
    return f"{ran.output.rstrip()}\n{ended}".lstrip("\n")


def _edit(executor: ToolExecutor, command: str, path: str, **arguments: Any) -> str:
    return str_replace_editor(executor, command, path, **arguments)


def _track(executor: ToolExecutor, command: str = "view", task_list: list[Any] | None = None) -> str:
    if command == "plan":
        items = task_list or []
        if not all(isinstance(item, dict) and isinstance(item.get("title"), str)
                   and item.get("status", "todo") in _STATES for item in items):
            raise ToolError("task_tracker: task_list must hold objects with a title and a status of "
                            f"{', '.join(_STATES)}")
        executor.notes["tasks"] = [{key: item.get(key, "") for key in ("title", "notes", "status")} for item in items]
        return f"{len(items)} tasks"
    found = executor.notes.get("tasks", [])
    return "\n".join(f"{n}. [{task['status'] or 'todo'}] {task['title']} {task['notes']}".rstrip()
                     for n, task in enumerate(found, 1)) or "no tasks"


def _think(executor: ToolExecutor, thought: str) -> str:
    return "noted"


def _finish(executor: ToolExecutor, message: str = "") -> ToolResult:
    return ToolResult("finish", submitted=True)


_ITEM = {"type": "object", "properties": {"title": {"type": "string"}, "notes": {"type": "string"},
                                          "status": {"type": "string", "enum": list(_STATES)}}, "required": ["title"]}
OPENHANDS = Scaffold(
    "openhands",
    (
        ToolSpec(
            "terminal", "Runs a command in a terminal whose folder and variables last.",
            object_schema("command", command="The command.",
                          is_input=field_schema("boolean", "It is input of the program that runs."),
                          timeout=field_schema("number", "Seconds after which it is stopped."),
                          reset=field_schema("boolean", "Begin a new terminal first.")),
            _terminal, shell=True),
        ToolSpec("file_editor", "Views, creates and edits files.", EDITOR, _edit),
        ToolSpec("task_tracker", "Keeps a list of what is to be done; `plan` replaces it.",
                 object_schema(command=field_schema("string", "What to do.", enum=["view", "plan"]),
                               task_list=field_schema("array", "The whole list, for `plan`.", items=_ITEM)), _track),
        ToolSpec("think", "Notes a thought; changes nothing.", object_schema("thought", thought="The thought."),
                 _think),
        ToolSpec("finish", "Ends the work; the edits made so far are the answer.",
                 object_schema("message", message="What was done."), _finish),
    ),
    system=f"You are OpenHands agent, which works on a repository in {ROOT} through a terminal and an editor. Look "
    "before you change, make small changes, test them, and call finish when done.",
    instance=TASK.replace("then submit.", "then finish."),
    output_limit=OUTPUT,
    advice="Your turn held no tool call that could be read: {problem}. Go on, or call finish.",
)
