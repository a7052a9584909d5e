"""Scaffolds: what an agent is told, which tools it has, how it writes calls, and how their results read.

A scaffold is data. The ones here share the operations of `agents.operations` under the names and parameters that
agents know from elsewhere; `nano` is for models too small for prose: no system turn, no tool list, few tokens.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

from qcn_jax.agents import operations
from qcn_jax.recipes.nano.spans import MAX_LINE_TOKENS, dedent, line_token
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.agents.tools import RunSummary, ToolExecutor, ToolResult, ToolSpec
from qcn_jax.agents.workspace import ROOT, Workspace
from qcn_jax.errors import UserError
from qcn_jax.chat import templates
from qcn_jax.chat.rendering import ParsedMessage, ToolCall
from qcn_jax.chat.templates import NATIVE

__all__ = [
    "MAX_LINE_TOKENS", "MINI_SWE_AGENT", "NANO", "NANO_SINGLE", "QWEN_CODE", "SWE_AGENT", "Message", "Scaffold",
    "by_name", "dedent", "line_token", "nano_format",
]

_SHELLS = ("bash", "run_shell_command")
FENCED_BASH = "fenced_bash"  # mini-swe-agent: one ```mswea_bash_command block, no tool-call syntax

Message = dict[str, Any]
"""role, content; assistants also tool_calls; `numbered` where the scaffold wrote line tokens into the content."""


@dataclasses.dataclass(frozen=True)
class Scaffold:
    """One way to present a task.

    Attributes:
      name: of the scaffold, as results report it.
      tools: what the agent can call.
      system: system prompt; empty for none.
      instance: first user turn; `{statement}` and `{root}` are filled in.
      describe_tools: the chat template lists the tools in the system turn.
      template: tool-call template in which the agent writes.
      show_function: the first user turn also holds the task's function with line tokens.
      single_turn: the first turn whose calls all work is the submission.
      join_results: one message for the results of a turn, without those that have nothing to say.
      result_role: of messages that hold results: tool or user.
      output_limit: characters of one result.
      advice: what an agent reads after a turn without a call; `{problem}` says what was wrong.
    """

    name: str
    tools: tuple[ToolSpec, ...]
    system: str = ""
    instance: str = "{statement}"
    describe_tools: bool = True
    template: str = NATIVE
    show_function: bool = False
    single_turn: bool = False
    join_results: bool = False
    result_role: str = "tool"
    output_limit: int = 10_000
    advice: str = "{problem}"

    @property
    def has_shell(self) -> bool:
        """Whether the agent can run commands, which a guard should then look at."""
        return any(tool.name in _SHELLS for tool in self.tools)

    def executor(self, task: Task, workspace: Workspace | None) -> ToolExecutor:
        """Runs this scaffold's tools on `workspace`, which holds `task`'s starting state."""
        return ToolExecutor(task, self.tools, workspace, output_limit=self.output_limit)

    def schemas(self) -> list[dict[str, Any]] | None:
        """Tools for the chat template's system turn; None where the prompt does not list them."""
        return [tool.schema() for tool in self.tools] if self.describe_tools else None

    def first_messages(self, task: Task, executor: Any) -> list[Message]:
        """System and user turn of `task`; with `show_function`, `executor` must be a ToolExecutor with its files."""
        text = self.instance.replace("{root}", ROOT).replace("{statement}", task.problem_statement.strip())
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        if not self.show_function:
            return [*messages, {"role": "user", "content": text}]
        function = operations.view_function(executor).text
        parts = [{"type": "text", "text": text + "\n"}, {"type": "text", "text": function, "numbered": True}]
        return [*messages, {"role": "user", "content": parts}]

    def parse(self, text: str) -> ParsedMessage:
        """What the agent wrote in one turn, taken apart."""
        if self.template == FENCED_BASH:
            return _parse_fenced(text)
        return templates.parse(self.template, text, [tool.schema() for tool in self.tools])

    def render(self, content: str, calls: Sequence[ToolCall]) -> str:
        """How the agent writes `content` and `calls` in one turn; `parse` gives both back."""
        if self.template == FENCED_BASH:
            return _render_fenced(content, calls)
        return templates.render(self.template, content, calls)

    def observe(self, results: Sequence[ToolResult]) -> list[Message]:
        """Messages that tell the agent what its calls gave."""
        messages: list[Message] = []
        for result in results:
            if self.join_results and not result.text:
                continue
            message: Message = {"role": self.result_role, "content": result.text}
            if result.numbered:
                message["numbered"] = True
            elif self.join_results and messages and "numbered" not in messages[-1]:
                messages[-1]["content"] += "\n" + result.text
                continue
            messages.append(message)
        return messages or [{"role": self.result_role, "content": "done"}]

    def observe_problem(self, problem: str) -> list[Message]:
        """Messages that tell the agent that its turn could not be read."""
        return [{"role": self.result_role, "content": self.advice.replace("{problem}", problem)}]


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    """JSON schema of an object; a property given as text is a string with that description."""
    fields = {
        name: {"type": "string", "description": field} if isinstance(field, str) else field
        for name, field in properties.items()
    }
    return {"type": "object", "properties": fields, "required": list(required)}


def _field(kind: str, description: str, **extra: Any) -> dict[str, Any]:
    return {"type": kind, "description": description, **extra}


# --- nano -----------------------------------------------------------------------------------------------------------

_NANO_MESSAGE = 80  # characters of what a failure says


def describe_briefly(summary: RunSummary) -> str:
    """An outcome in at most some forty tokens: `ok`, or counts and the first failure's last line."""
    if summary.passed:
        return "ok"
    head = f"FAILED {summary.failed} of {summary.total}" if summary.status == "ok" else f"FAILED {summary.status}"
    # Sandboxes say "Error: what | file:line: source".
    message = summary.message.split(" | ")[0].removeprefix("AssertionError: ")
    return f"{head}\n{message[:_NANO_MESSAGE]}".rstrip()


_VIEW = ToolSpec(
    "view", "Shows a function with line numbers; without arguments the one that the statement names.",
    _object(path="File, relative to the repository.", symbol="Function, `Class.method` for methods."),
    operations.view_function,
)
_SEARCH = ToolSpec(
    "search", "Lists lines that hold a text.",
    _object("pattern", pattern="Literal text.", path="File or folder to search; everything by default."),
    functools.partial(operations.search, matches=5),
)
_EDIT = ToolSpec(
    "edit", "Replaces a span on one line of the function on view.",
    _object("line", "old", "new", line="Line number in the view.", old="Text that occurs exactly once on that line.",
            new="Text that takes its place."),
    operations.edit_span,
)
_UNDO = ToolSpec("undo", "Takes the latest edit back.", _object(), operations.undo_quietly)
_RUN_TESTS_BRIEFLY = ToolSpec(
    "run_tests", "Runs the tests.", _object(), functools.partial(operations.run_tests, describe=describe_briefly)
)
_SUBMIT = ToolSpec("submit", "Ends the work; the edits made so far are the answer.", _object(), operations.submit)

NANO = Scaffold(
    "nano", (_VIEW, _SEARCH, _EDIT, _UNDO, _RUN_TESTS_BRIEFLY, _SUBMIT),
    describe_tools=False, join_results=True, output_limit=4000,
)
NANO_SINGLE = Scaffold(
    "nano_single", (_EDIT,),
    describe_tools=False, join_results=True, output_limit=4000, show_function=True, single_turn=True,
)


def nano_format(template: str) -> Scaffold:
    """NANO_SINGLE whose prompt names the tool-call template in which the answer must be written."""
    return dataclasses.replace(
        NANO_SINGLE, name=f"nano_format:{template}", template=template, instance=f"{{statement}}\nformat: {template}"
    )


# --- for models that read prose -------------------------------------------------------------------------------------

_TASK = """\
<uploaded_files>
{root}
</uploaded_files>
A Python repository is in {root}. Consider the following problem:

<problem_statement>
{statement}
</problem_statement>

Change the repository's source files (not its tests or configuration) so that the problem is solved, in a way that \
is general and fits the code around it. Find the code at fault, reproduce the problem, mend it, check with the tests, \
then submit."""

_BASH = ToolSpec(
    "bash", "Runs a command in a new shell in the repository.",
    _object("command", command="The command.", timeout=_field("number", "Seconds after which it is stopped.")),
    operations.bash,
)
_RUN_TESTS = ToolSpec(
    "run_tests", "Runs the repository's tests.",
    _object(tests=_field("array", "pytest node ids; by default those that concern the problem.",
                         items={"type": "string"})),
    operations.run_tests,
)


def str_replace_editor(
    executor: ToolExecutor, command: str, path: str, file_text: str | None = None, old_str: str | None = None,
    new_str: str | None = None, insert_line: int | None = None, view_range: list[int] | None = None,
) -> str:
    """SWE-agent's editor: one tool, the operation in `command`."""
    needed = {"create": {"file_text": file_text}, "str_replace": {"old_str": old_str},
              "insert": {"insert_line": insert_line, "new_str": new_str}}.get(command, {})
    for name, value in needed.items():
        if value is None:
            raise operations.ToolError(f"parameter {name!r} is missing for {command}")
    if command == "view":
        try:
            start, end = (int(number) for number in view_range or (1, -1))
        except (TypeError, ValueError) as error:
            raise operations.ToolError("parameter 'view_range' must hold two line numbers") from error
        return operations.view_file(executor, path, start, end)
    if command == "create":
        return operations.create(executor, path, file_text or "")
    if command == "str_replace":
        return operations.replace(executor, path, old_str or "", new_str or "")
    if command == "insert":
        return operations.insert(executor, path, insert_line or 0, new_str or "")
    return operations.undo(executor, path)


SWE_AGENT = Scaffold(
    "swe_agent",
    (
        _BASH,
        ToolSpec(
            "str_replace_editor",
            "Views, creates and edits files; `view` lists a folder or shows a file with line numbers, `create` "
            "refuses files that exist, `str_replace` needs `old_str` to occur exactly once, `undo_edit` takes the "
            "latest edit of `path` back.",
            _object(
                "command", "path",
                command=_field("string", "What to do.",
                               enum=["view", "create", "str_replace", "insert", "undo_edit"]),
                path=f"Absolute path, e.g. `{ROOT}/file.py`.", file_text="Content for `create`.",
                old_str="Text to replace, for `str_replace`.", new_str="New text, for `str_replace` and `insert`.",
                insert_line=_field("integer", "`insert` puts `new_str` after this line."),
                view_range=_field("array", "First and last line to view; [a, -1] to the end.",
                                  items={"type": "integer"}),
            ),
            str_replace_editor,
        ),
        _RUN_TESTS,
        _SUBMIT,
    ),
    system="You are a helpful assistant that can interact with a computer to solve tasks.",
    instance=_TASK,
    advice="Your turn held no tool call that could be read: {problem}. Call exactly the tools that you are given.",
)


def _read_range(executor: ToolExecutor, absolute_path: str, offset: int = 0, limit: int = 2000) -> str:
    lines = operations.view_file(executor, absolute_path, offset + 1).split("\n")
    return "\n".join(lines[: max(limit, 1)])


def _edit_file(
    executor: ToolExecutor, file_path: str, old_string: str, new_string: str, replace_all: bool = False
) -> str:
    if old_string == "":
        return operations.create(executor, file_path, new_string)
    return operations.replace(executor, file_path, old_string, new_string, replace_all)


def _write_file(executor: ToolExecutor, file_path: str, content: str) -> str:
    return operations.create(executor, file_path, content, overwrite=True)


def _list_directory(executor: ToolExecutor, path: str) -> str:
    return operations.view_file(executor, path)


def _shell(executor: ToolExecutor, command: str, description: str = "") -> ToolResult:
    return operations.bash(executor, command)


QWEN_CODE = Scaffold(
    "qwen_code",
    (
        ToolSpec("list_directory", "Lists the files below a folder.", _object("path", path="Absolute path."),
                 _list_directory),
        ToolSpec(
            "read_file", "Reads a file with line numbers.",
            _object("absolute_path", absolute_path="Absolute path.",
                    offset=_field("integer", "Lines to pass over."), limit=_field("integer", "Lines to read.")),
            _read_range,
        ),
        ToolSpec("grep_search", "Lists lines that hold a text.",
                 _object("pattern", pattern="Literal text.", path="File or folder."), operations.search),
        ToolSpec(
            "edit", "Replaces text in a file; an empty `old_string` creates the file.",
            _object("file_path", "old_string", "new_string", file_path="Absolute path.",
                    old_string="Text that occurs exactly once.", new_string="Text that takes its place.",
                    replace_all=_field("boolean", "Replace every occurrence.")),
            _edit_file,
        ),
        ToolSpec("write_file", "Writes a whole file.",
                 _object("file_path", "content", file_path="Absolute path.", content="Its text."), _write_file),
        ToolSpec("run_shell_command", "Runs a command in a new shell in the repository.",
                 _object("command", command="The command.", description="What it is for."),
                 _shell),
        _SUBMIT,
    ),
    system=f"You are Qwen Code, an agent that works on the repository in {ROOT} from the command line. Follow the "
    "conventions of the code around you, prove changes with the repository's tests, and call submit when done.",
    instance=_TASK,
    advice="Your turn held no tool call that could be read: {problem}.",
)

_FENCE = re.compile(r"```(mswea_bash_command|bash)[ \t]*\n(.*?)\n?```", re.DOTALL)
_MINI_SYSTEM = """\
You are a helpful assistant that works on a repository through a shell.
Every response holds your thoughts and then exactly one code block with one command:

```mswea_bash_command
your_command_here
```

Responses with no block or several are rejected."""
_MINI_TASK = _TASK.replace(", then submit.", ".") + f"""

Each command runs in a new shell in {{root}}; changes of folder or environment do not last.
When you are done, run exactly this, alone:

```mswea_bash_command
echo {operations.SUBMIT_COMMAND}
```"""


def _parse_fenced(text: str) -> ParsedMessage:
    blocks = list(_FENCE.finditer(text))
    if len(blocks) != 1:
        return ParsedMessage(text, [], [f"expected exactly one code block with a command, found {len(blocks)}"])
    return ParsedMessage(text[: blocks[0].start()].strip(), [ToolCall("bash", {"command": blocks[0][2]})], [])


def _render_fenced(content: str, calls: Sequence[ToolCall]) -> str:
    blocks = [f"```mswea_bash_command\n{call.arguments['command']}\n```" for call in calls]
    return "\n\n".join(([content] if content else []) + blocks)


MINI_SWE_AGENT = Scaffold(
    "mini_swe_agent",
    (ToolSpec("bash", "Runs a command.", _object("command", command="The command."), operations.bash_or_submit),),
    system=_MINI_SYSTEM,
    instance=_MINI_TASK,
    describe_tools=False,
    template=FENCED_BASH,
    result_role="user",
    advice="Format error: {problem}. Give exactly one action in a ```mswea_bash_command block.",
)

_NAMED = {s.name: s for s in (NANO, NANO_SINGLE, MINI_SWE_AGENT, SWE_AGENT, QWEN_CODE)}


def by_name(name: str) -> Scaffold:
    """The scaffold called `name` (`nano_format:TEMPLATE` for the format scaffolds); raises UserError otherwise."""
    if name.startswith("nano_format:"):
        return nano_format(name.removeprefix("nano_format:"))
    if name not in _NAMED:
        raise UserError(f"--scaffold: unknown scaffold {name!r}; allowed: {', '.join(_NAMED)}, nano_format:TEMPLATE")
    return _NAMED[name]
