"""What a scaffold is: what an agent is told, which tools it has, how it writes calls, and how their results read."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from qcn_jax.agents.tools import ToolExecutor, ToolResult, ToolSpec
from qcn_jax.agents.workspace import ROOT, Workspace
from qcn_jax.chat import templates, tool_frames
from qcn_jax.chat.rendering import ParsedMessage, ToolCall
from qcn_jax.chat.templates import NATIVE
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.errors import UserError

Message = dict[str, Any]
"""role, content (text, or parts of which those with `special` may hold added tokens); assistants also tool_calls."""


@dataclasses.dataclass(frozen=True)
class Scaffold:
    """One way to present a task; methods may be overridden.

    Attributes:
      name: of the scaffold, as results report it.
      tools: what the agent can call.
      system: system prompt; empty for none.
      instance: first user turn; `{statement}` and `{root}` are filled in.
      describe_tools: the chat template lists the tools in the system turn.
      template: tool-call template in which the agent writes.
      framed: the system turn's list of tools and the results of calls are that template's, too (its three axes).
      single_turn: the first turn whose calls all work is the submission.
      join_results: one message for the results of a turn, without those that have nothing to say.
      result_role: of messages that hold results: tool or user.
      output_limit: characters of one result.
      advice: what an agent reads after a turn without a call; `{problem}` says what was wrong.
      ends_without_call: a turn of text alone is the submission.
    """

    name: str
    tools: tuple[ToolSpec, ...]
    system: str = ""
    instance: str = "{statement}"
    describe_tools: bool = True
    template: str = NATIVE
    framed: bool = False
    single_turn: bool = False
    join_results: bool = False
    result_role: str = "tool"
    output_limit: int = 10_000
    advice: str = "{problem}"
    ends_without_call: bool = False

    @property
    def has_shell(self) -> bool:
        """Whether the agent can run commands, which a guard should then look at and a live sandbox must run."""
        return any(tool.shell for tool in self.tools)

    def single(self) -> "Scaffold":
        """The variant that shows the code at once and whose first turn is the answer.

        Raises:
          UserError: this scaffold has none.
        """
        raise UserError(f"scaffold {self.name} cannot present a task for a single turn")

    def in_template(self, template: str) -> "Scaffold":
        """The variant whose prompt asks for a tool-call template: tools, calls and results are as that has them.

        Raises:
          UserError: this scaffold has none, as its calls are no tool calls.
        """
        if not self.describe_tools and not self.framed:
            raise UserError(f"scaffold {self.name} cannot ask for a tool-call template")
        return dataclasses.replace(self, name=f"{self.name.split(':')[0]}:{template}", template=template, framed=True,
                                   describe_tools=False, result_role="user")

    def executor(self, task: Task, workspace: Workspace | None) -> ToolExecutor:
        """Runs this scaffold's tools on `workspace`, which holds `task`'s starting state."""
        return ToolExecutor(task, self.tools, workspace, output_limit=self.output_limit)

    def schemas(self) -> list[dict[str, Any]] | None:
        """Tools for the chat template's system turn; None where the prompt does not list them."""
        return [tool.schema() for tool in self.tools] if self.describe_tools else None

    def first_messages(self, task: Task, executor: Any) -> list[Message]:
        """System and user turn of `task`, whose starting state `executor` holds."""
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        if self.framed:
            parts = templates.describe(self.template, [tool.schema() for tool in self.tools])
            lead = [(self.system + "\n\n", False)] if self.system else []
            messages = [{"role": "system", "content": tool_frames.content_of([*lead, *parts])}]
        return [*messages, {"role": "user", "content": self.statement(task)}]

    def statement(self, task: Task) -> str:
        """`instance` with its places filled in."""
        return self.instance.replace("{root}", ROOT).replace("{statement}", task.problem_statement.strip())

    def parse(self, text: str) -> ParsedMessage:
        """What the agent wrote in one turn, taken apart."""
        return templates.parse(self.template, text, [tool.schema() for tool in self.tools])

    def render(self, content: str, calls: Sequence[ToolCall]) -> str:
        """How the agent writes `content` and `calls` in one turn; `parse` gives both back."""
        return templates.render(self.template, content, calls)

    def assistant(self, calls: Sequence[ToolCall], content: str = "") -> Message:
        """A turn as a message to learn from; says which arguments of calls are written as added tokens."""
        special = {tool.name: list(tool.special) for tool in self.tools if tool.special}
        written = [{"name": call.name, "arguments": dict(call.arguments)}
                   | ({"special": special[call.name]} if call.name in special else {}) for call in calls]
        return {"role": "assistant", "content": content, "tool_calls": written, "template": self.template}

    def observe(self, results: Sequence[ToolResult]) -> list[Message]:
        """Messages that tell the agent what its calls gave."""
        if self.framed:
            told = templates.respond(self.template, [(result.tool, result.text or "done") for result in results])
            return [{"role": "user", "content": tool_frames.content_of(told)}]
        messages: list[Message] = []
        for result in results:
            if self.join_results and not result.text:
                continue
            message: Message = {"role": self.result_role, "content": result.text}
            if result.special:
                message["content"] = content_parts(result)
            elif self.join_results and messages and isinstance(messages[-1]["content"], str):
                messages[-1]["content"] += "\n" + result.text
                continue
            messages.append(message)
        return messages or [{"role": self.result_role, "content": "done"}]

    def observe_problem(self, problem: str) -> list[Message]:
        """Messages that tell the agent that its turn could not be read."""
        return [{"role": self.result_role, "content": self.advice.replace("{problem}", problem)}]


class Text(Protocol):
    """Text of which `special` spans [start, stop) were written by a tool, as a ToolResult's is."""

    text: str
    special: tuple[tuple[int, int], ...]


def content_parts(result: Text) -> list[dict[str, Any]]:
    """The text as content parts, those that may become added tokens marked `special`."""
    parts: list[dict[str, Any]] = []
    position = 0
    for start, stop in (*result.special, (len(result.text), len(result.text))):
        if position < start:
            parts.append({"type": "text", "text": result.text[position:start]})
        if start < stop:
            parts.append({"type": "text", "text": result.text[start:stop], "special": True})
        position = stop
    return parts


def object_schema(*required: str, **properties: Any) -> dict[str, Any]:
    """JSON schema of an object; a property given as text is a string with that description."""
    fields = {
        name: {"type": "string", "description": field} if isinstance(field, str) else field
        for name, field in properties.items()
    }
    return {"type": "object", "properties": fields, "required": list(required)}


def field_schema(kind: str, description: str, **extra: Any) -> dict[str, Any]:
    """JSON schema of one property of another type than string."""
    return {"type": kind, "description": description, **extra}
