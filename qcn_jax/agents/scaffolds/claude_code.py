"""Claude Code's tool names and parameters, over our operations: what a model that knows them writes can be run.

Names, parameters and limits are facts that its documentation publishes; every word that a model reads is our own. It
ends with a turn that calls nothing.
"""

import fnmatch
import shlex
from typing import Any

from qcn_jax.agents import operations
from qcn_jax.agents.scaffolds.prose import TASK
from qcn_jax.agents.scaffolds.scaffold import Scaffold, field_schema, object_schema
from qcn_jax.agents.tools import ToolError, ToolExecutor, ToolResult, ToolSpec
from qcn_jax.agents.workspace import ROOT, relative_path

BASH_MS, LONGEST_MS = 120_000, 600_000
OUTPUT, READ_LINES, LINE = 30_000, 2000, 2000  # characters, lines, characters of a line
_SEARCH_SECONDS = 30.0


def _bash(executor: ToolExecutor, command: str, timeout: float = BASH_MS, description: str = "",
          run_in_background: bool = False) -> ToolResult:
    if run_in_background:
        raise ToolError("Bash: nothing runs in the background here")
    ran = operations.terminal(executor, command, min(timeout, LONGEST_MS) / 1000)
    if ran.timed_out:
        return ToolResult("Bash", f"{ran.output}\nCommand timed out".lstrip("\n"))
    status = f"\nExit code {ran.exit_code}" if ran.exit_code else ""
    return ToolResult("Bash", (ran.output.rstrip("\n") + status).lstrip("\n"))


def _read(executor: ToolExecutor, file_path: str, offset: int = 1, limit: int = READ_LINES) -> str:
    text = executor.workspace.read(relative_path(file_path))
    first = max(offset, 1)
    lines = text.removesuffix("\n").split("\n")[first - 1:first - 1 + max(limit, 1)]
    executor.notes.setdefault("read", []).append(relative_path(file_path))
    return "\n".join(f"{number:6}→{line[:LINE]}" for number, line in enumerate(lines, first))


def _edit(executor: ToolExecutor, file_path: str, old_string: str, new_string: str, replace_all: bool = False) -> str:
    if old_string == "":
        return operations.create(executor, file_path, new_string)
    return operations.replace(executor, file_path, old_string, new_string, replace_all)


def _write(executor: ToolExecutor, file_path: str, content: str) -> str:
    return operations.create(executor, file_path, content, overwrite=True)


def _glob(executor: ToolExecutor, pattern: str, path: str = ROOT) -> str:
    folder = relative_path(path)
    begin = "" if folder == "." else f"{folder}/"
    names = [name[len(begin):] for name in executor.workspace.paths() if name.startswith(begin)]
    pattern = pattern.removeprefix(f"{ROOT}/")
    deep = "**" in pattern
    found = [name for name in names if (deep or name.count("/") == pattern.count("/"))
             and (fnmatch.fnmatchcase(name, pattern) or deep and fnmatch.fnmatchcase(name, pattern.replace("**/", "")))]
    return "\n".join(f"{ROOT}/{begin}{name}" for name in found) or "No files found"


def _grep(executor: ToolExecutor, pattern: str, path: str = ROOT, glob: str = "",
          output_mode: str = "files_with_matches", head_limit: int = 0, **options: Any) -> str:
    words = ["grep", "-rIE", *{"files_with_matches": ["-l"], "count": ["-c"], "content": ["-n"]}[output_mode]]
    words += [f"{name}{value}" if name in ("-A", "-B", "-C") else name for name, value in options.items() if value]
    words += [f"--include={glob}"] if glob else []
    words += ["--exclude-dir=.git", "-e", pattern, "--", relative_path(path)]
    ran = executor.workspace.bash(f"cd . && {shlex.join(words)}", _SEARCH_SECONDS)
    if ran.exit_code > 1:
        raise ToolError(f"Grep: {ran.output.strip()[:200]}")
    lines = [line.removeprefix("./") for line in ran.output.splitlines()]
    lines = [line for line in lines if not (output_mode == "count" and line.endswith(":0"))]
    return "\n".join(lines[:head_limit or None]) or "No matches found"


def _todo(executor: ToolExecutor, todos: list[Any]) -> str:
    executor.notes["todos"] = todos
    return "noted"


_TODO = {"type": "object", "properties": {
    "content": {"type": "string"}, "activeForm": {"type": "string"},
    "status": {"type": "string", "enum": ["pending", "in_progress", "completed"]}}, "required": ["content", "status"]}
CLAUDE_CODE = Scaffold(
    "claude_code",
    (
        ToolSpec("Bash", "Runs a command in a shell whose folder and variables last.",
                 object_schema("command", command="The command.",
                               timeout=field_schema("number", f"Milliseconds, at most {LONGEST_MS}."),
                               description="What it does, in some words.",
                               run_in_background=field_schema("boolean", "Not available here.")), _bash, shell=True),
        ToolSpec("Read", f"Reads a file with line numbers, by default its first {READ_LINES} lines.",
                 object_schema("file_path", file_path="Absolute path.",
                               offset=field_schema("integer", "First line."),
                               limit=field_schema("integer", "Lines to read.")), _read),
        ToolSpec("Edit", "Replaces text that occurs exactly once in a file.",
                 object_schema("file_path", "old_string", "new_string", file_path="Absolute path.",
                               old_string="Text to replace.", new_string="Text that takes its place.",
                               replace_all=field_schema("boolean", "Replace every occurrence.")), _edit),
        ToolSpec("Write", "Writes a whole file.",
                 object_schema("file_path", "content", file_path="Absolute path.", content="Its text."), _write),
        ToolSpec("Glob", "Lists files whose paths match a pattern such as `**/*.py`.",
                 object_schema("pattern", pattern="The pattern.", path="Folder to look in."), _glob),
        ToolSpec("Grep", "Searches files for a regular expression.",
                 object_schema(
                     "pattern", pattern="The expression.", path="File or folder.", glob="Only files like this.",
                     output_mode=field_schema("string", "What to show.",
                                              enum=["content", "files_with_matches", "count"]),
                     head_limit=field_schema("integer", "Lines to show."),
                     **{"-i": field_schema("boolean", "Ignore case."), "-n": field_schema("boolean", "Line numbers."),
                        "-A": field_schema("integer", "Lines after."), "-B": field_schema("integer", "Lines before."),
                        "-C": field_schema("integer", "Lines around.")}), _grep),
        ToolSpec("TodoWrite", "Keeps a list of what is to be done.",
                 object_schema("todos", todos=field_schema("array", "The whole list.", items=_TODO)), _todo),
    ),
    system=f"You are an agent that works on the repository in {ROOT} with tools. Keep to the conventions of the code "
    "around you and prove changes with the tests. When all is done, say so in a turn without a tool call.",
    instance=TASK.replace("then submit.", "then say what you did."),
    output_limit=OUTPUT,
    advice="Your turn could not be read: {problem}.",
    ends_without_call=True,
)
