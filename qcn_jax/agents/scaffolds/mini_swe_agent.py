"""mini-swe-agent: no tool-call syntax, one code block with one shell command in every turn."""

import re
from collections.abc import Sequence

from qcn_jax.agents import operations
from qcn_jax.agents.scaffolds.prose import TASK
from qcn_jax.agents.scaffolds.scaffold import Message, Scaffold, object_schema
from qcn_jax.agents.tools import ToolSpec
from qcn_jax.chat.rendering import ParsedMessage, ToolCall

_FENCE = re.compile(r"```(mswea_bash_command|bash)[ \t]*\n(.*?)\n?```", re.DOTALL)
_MINI_SYSTEM = """\
You are a helpful assistant that works on a repository through a shell.
Every response holds your thoughts and then exactly one code block with one command:

```mswea_bash_command
your_command_here
```

Responses with no block or several are rejected."""
_MINI_TASK = TASK.replace(", then submit.", ".") + f"""

Each command runs in a new shell in {{root}}; changes of folder or environment do not last.
When you are done, run exactly this, alone:

```mswea_bash_command
echo {operations.SUBMIT_COMMAND}
```"""


class FencedScaffold(Scaffold):
    """Calls are code blocks; anything else around the one block is what the agent thinks."""

    def parse(self, text: str) -> ParsedMessage:
        """As Scaffold.parse; other than one block is a problem."""
        blocks = list(_FENCE.finditer(text))
        if len(blocks) != 1:
            return ParsedMessage(text, [], [f"expected exactly one code block with a command, found {len(blocks)}"])
        return ParsedMessage(text[: blocks[0].start()].strip(), [ToolCall("bash", {"command": blocks[0][2]})], [])

    def assistant(self, calls: Sequence[ToolCall], content: str = "") -> Message:
        """As Scaffold.assistant, as text: chat templates know no code blocks."""
        return {"role": "assistant", "content": self.render(content, calls)}

    def render(self, content: str, calls: Sequence[ToolCall]) -> str:
        """As Scaffold.render."""
        blocks = [f"```mswea_bash_command\n{call.arguments['command']}\n```" for call in calls]
        return "\n\n".join(([content] if content else []) + blocks)


MINI_SWE_AGENT = FencedScaffold(
    "mini_swe_agent",
    (ToolSpec("bash", "Runs a command.", object_schema("command", command="The command."), operations.bash_or_submit,
              shell=True),),
    system=_MINI_SYSTEM,
    instance=_MINI_TASK,
    describe_tools=False,
    template="fenced_bash",
    result_role="user",
    output_limit=2 * operations.MINI_OUTPUT,  # the operation itself leaves out what is too long
    advice="Format error: {problem}. Give exactly one action in a ```mswea_bash_command block.",
)
