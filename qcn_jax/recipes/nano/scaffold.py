"""The scaffold of models too small for prose: no system turn, no tool list, few tokens, lines named by tokens.

`NANO` plays several turns with tools; `NANO.single()` shows the function and takes one edit; `NANO.in_template(name)`
asks for that edit in another tool-call template.
"""

import dataclasses
import functools
from typing import Any

from qcn_jax.agents import operations
from qcn_jax.agents.python_code import occurrences
from qcn_jax.agents.scaffolds.prose import SUBMIT
from qcn_jax.agents.scaffolds.scaffold import Message, Scaffold, content_parts, object_schema
from qcn_jax.agents.tools import RunSummary, ToolError, ToolExecutor, ToolResult, ToolSpec
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.recipes.nano import spans

_NANO_MESSAGE = 80  # characters of what a failure says


def describe_briefly(summary: RunSummary) -> str:
    """An outcome in at most some forty tokens: `ok`, or counts and the first failure's last line."""
    if summary.passed:
        return "ok"
    head = f"FAILED {summary.failed} of {summary.total}" if summary.status == "ok" else f"FAILED {summary.status}"
    # Sandboxes say "Error: what | file:line: source".
    message = summary.message.split(" | ")[0].removeprefix("AssertionError: ")
    return f"{head}\n{message[:_NANO_MESSAGE]}".rstrip()


def view_function(executor: ToolExecutor, path: str | None = None, symbol: str | None = None) -> ToolResult:
    """The path, then each dedented line of the function behind its line token; at most MAX_LINE_TOKENS lines."""
    view = executor.show(path, symbol)
    lines = executor.workspace.read(view.path).split("\n")[view.start - 1 : view.end]
    text, special = view.path, []
    for number, line in enumerate(spans.dedent(lines)[: spans.MAX_LINE_TOKENS], 1):
        token = spans.line_token(number)
        special.append((len(text) + 1, len(text) + 1 + len(token)))
        text += f"\n{token}{line}"
    return ToolResult("view", text, special=tuple(special))


def edit_span(executor: ToolExecutor, line: str, old: str, new: str) -> str:
    """Replaces `old`, which must occur exactly once on its line, by `new` in the function on view.

    Where line `line` does not hold `old` at all, the nearest line on which it occurs exactly once is meant (of two
    equally near ones the earlier), and the answer names it: a line number is what small models get wrong first.
    """
    view = executor.view()
    digits = line.strip().removeprefix("<|").removesuffix("|>")
    if not (digits.isascii() and digits.isdigit()):
        raise ToolError(f"edit: line {line[:20]!r} is not a number")
    number = int(digits[:9])
    source = executor.workspace.read(view.path).split("\n")
    function = source[view.start - 1 : view.end]
    if not 1 <= number <= len(function):
        raise ToolError(f"edit: line {number} is not one of 1 to {len(function)}")
    lines = spans.dedent(function)
    count = occurrences(lines[number - 1], old)
    once = [n for n, text in enumerate(lines, 1) if occurrences(text, old) == 1]
    if count > 1 or not once:
        raise ToolError(f"edit: old occurs {count} times on line {number}")
    if old == new:
        raise ToolError("edit: old and new are the same")
    asked, number = number, min(once, key=lambda n: (abs(n - number), n))
    shown = lines[number - 1]
    index = view.start - 1 + number - 1
    indentation = source[index][: len(source[index]) - len(shown)]
    source[index] = indentation + shown.replace(old, new)
    executor.change(view.path, "\n".join(source))
    executor.view().end += new.count("\n")
    return "" if number == asked else f"edited line {number}"


def undo_quietly(executor: ToolExecutor) -> str:
    """As `undo` without a word (tokens are counted), and content where there is nothing to undo.

    A small model takes an edit back that was refused; the calls behind its `undo` are still meant.
    """
    if not executor.has_changes:
        return "nothing to undo"
    executor.undo()
    return ""


_VIEW = ToolSpec(
    "view", "Shows a function with line numbers; without arguments the one that the statement names.",
    object_schema(path="File, relative to the repository.", symbol="Function, `Class.method` for methods."),
    view_function,
)
_SEARCH = ToolSpec(
    "search", "Lists lines that hold a text.",
    object_schema("pattern", pattern="Literal text.", path="File or folder to search; everything by default."),
    functools.partial(operations.search, matches=5),
)
_EDIT = ToolSpec(
    "edit", "Replaces a span on one line of the function on view.",
    object_schema("line", "old", "new", line="Line number in the view.",
                  old="Text that occurs exactly once on that line.", new="Text that takes its place."),
    edit_span, special=("line",),
)
_UNDO = ToolSpec("undo", "Takes the latest edit back.", object_schema(), undo_quietly)
_RUN_TESTS = ToolSpec(
    "run_tests", "Runs the tests.", object_schema(), functools.partial(operations.run_tests, describe=describe_briefly)
)


@dataclasses.dataclass(frozen=True)
class NanoScaffold(Scaffold):
    """Few tokens; `show_function`: the first user turn also holds the task's function with line tokens."""

    describe_tools: bool = False
    join_results: bool = True
    output_limit: int = 4000
    show_function: bool = False

    def first_messages(self, task: Task, executor: Any) -> list[Message]:
        """As Scaffold.first_messages; with `show_function`, `executor` must be a ToolExecutor with the task's files."""
        if not self.show_function:
            return super().first_messages(task, executor)
        statement = {"type": "text", "text": self.statement(task) + "\n"}
        return [{"role": "user", "content": [statement, *content_parts(view_function(executor))]}]

    def single(self) -> "NanoScaffold":
        """The function is in the prompt, the answer is one edit."""
        return dataclasses.replace(
            self, name=f"{self.name}_single", tools=(_EDIT,), show_function=True, single_turn=True)

    def in_template(self, template: str) -> "NanoScaffold":
        """`single`, with the tool-call template in which the answer must be written named in the prompt."""
        return dataclasses.replace(self.single(), name=f"{self.name}_format:{template}", template=template,
                                   instance=f"{{statement}}\nformat: {template}")


NANO = NanoScaffold("nano", (_VIEW, _SEARCH, _EDIT, _UNDO, _RUN_TESTS, SUBMIT))
