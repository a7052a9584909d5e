"""One answer to a problem (envs/problems): its last code block, or all of its text, is graded."""

import re
from collections.abc import Sequence

from qcn_jax.agents.scaffolds.scaffold import Message, Scaffold, object_schema
from qcn_jax.agents.tools import ToolExecutor, ToolResult, ToolSpec
from qcn_jax.chat.rendering import ParsedMessage, ToolCall
from qcn_jax.envs.problems.schema import checks_of
from qcn_jax.envs.tasks.schema import Task

_FENCE = re.compile(r"^```[\w+\-]*[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
_HOW = "\n\nAnswer with one block of {language}, between lines of three backquotes."


def answer(executor: ToolExecutor, text: str) -> ToolResult:
    """Keeps the answer; of code the last block, as whoever thinks aloud corrects himself."""
    checks = checks_of(executor.task)
    blocks = _FENCE.findall(text)
    if checks.language != "text" and not blocks:
        return ToolResult("answer", "no block of code", ok=False, malformed=True)
    executor.change(checks.path, text.strip() + "\n" if checks.language == "text" else blocks[-1])
    return ToolResult("answer", "", submitted=True)


_ANSWER = ToolSpec("answer", "Gives the answer.", object_schema("text", text="All of it."), answer)


class Answer(Scaffold):
    """A chat of one question and one answer."""

    def statement(self, task: Task) -> str:
        """As Scaffold.statement, with the form in which code is expected."""
        language = checks_of(task).language
        return task.problem_statement.strip() + ("" if language == "text" else _HOW.format(language=language))

    def single(self) -> "Answer":
        """As Scaffold.single: it is that already."""
        return self

    def parse(self, text: str) -> ParsedMessage:
        """As Scaffold.parse: all of the text is the call."""
        return ParsedMessage(text, [ToolCall("answer", {"text": text})] if text.strip() else [], [])

    def assistant(self, calls: Sequence[ToolCall], content: str = "") -> Message:
        """As Scaffold.assistant: what was said."""
        return {"role": "assistant", "content": self.render(content, calls)}

    def render(self, content: str, calls: Sequence[ToolCall]) -> str:
        """As Scaffold.render."""
        return calls[0].arguments["text"] if calls else content


ANSWER = Answer("answer", (_ANSWER,), describe_tools=False, template="chat_answer", single_turn=True)
