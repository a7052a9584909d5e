"""A user who has a problem, runs what an assistant proposes, and says what came of it; no tools, no instructions.

The assistant answers as in a chat. What stands in its code blocks is executed in the user's repository, every block a
command; an answer without any is the last.
"""

import re
from collections.abc import Sequence

from qcn_jax.agents.scaffolds.prose import BASH
from qcn_jax.agents.scaffolds.scaffold import Message, Scaffold
from qcn_jax.agents.tools import ToolResult
from qcn_jax.chat.rendering import ParsedMessage, ToolCall

_FENCE = re.compile(r"^```(bash|sh|shell|console|python|py)[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
_WORD = "END_OF_PROGRAM"
_FIRST = """\
I have a problem with my repository in {root}:

{statement}

Can you help? I run the shell commands and Python programs in your code blocks there, one after the other, and tell you
what they print; I type nothing else. The source itself should be changed, not its tests. Once it works, say so without
a code block."""


class SimulatedUser(Scaffold):
    """Calls are code blocks; their results are told in a user's words."""

    def parse(self, text: str) -> ParsedMessage:
        """As Scaffold.parse: shell blocks as they are, Python's as programs."""
        calls = []
        for match in _FENCE.finditer(text):
            code = match[2].removesuffix("\n")
            if match[1] in ("python", "py"):
                code = f"python3 - <<'{_WORD}'\n{code}\n{_WORD}"
            calls.append(ToolCall("bash", {"command": code}))
        return ParsedMessage(text, calls, [])

    def assistant(self, calls: Sequence[ToolCall], content: str = "") -> Message:
        """As Scaffold.assistant: what was said, in which the blocks stand already."""
        return {"role": "assistant", "content": content}

    def render(self, content: str, calls: Sequence[ToolCall]) -> str:
        """As Scaffold.render."""
        blocks = [f"```bash\n{call.arguments['command'].rstrip()}\n```" for call in calls]
        return "\n\n".join(([content] if content else []) + blocks)

    def observe(self, results: Sequence[ToolResult]) -> list[Message]:
        """As Scaffold.observe."""
        told = []
        for number, result in enumerate(results, 1):
            which = f"block {number}" if len(results) > 1 else "that"
            told.append(f"I ran {which}{'' if result.ok else ', and it failed'}:\n```\n{result.text.strip()}\n```")
        return [{"role": "user", "content": "\n\n".join(told)}]


SIMULATED_USER = SimulatedUser(
    "simulated_user", (BASH,), instance=_FIRST, describe_tools=False, template="chat_blocks", result_role="user",
    advice="I do not see what to do: {problem}.", ends_without_call=True)
