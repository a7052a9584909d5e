"""The Qwen3-Coder chat template (non-thinking) written out in Python, and tool calls read back.

`render` gives the text that the published Jinja template gives, except where a tool call's value or an
assistant's text would not read back (see `tool_calls`). `segments` gives the same text in pieces that say who
wrote them, for loss masks and for tokenizing untrusted text without added tokens.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qcn_jax.chat.call_reader import parse_tool_calls
from qcn_jax.chat.tool_calls import ParsedMessage, ToolCall, escape_content, render_tool_call
from qcn_jax.chat.values import format_value
from qcn_jax.errors import UserError

__all__ = ["ParsedMessage", "Segment", "ToolCall", "parse_tool_calls", "render", "render_assistant",
           "render_tool_call", "segments"]

DEFAULT_SYSTEM = "You are Qwen, a helpful AI assistant that can interact with a computer to solve tasks."
TOOLS_HEADING = "\n\n# Tools\n\nYou have access to the following functions:\n\n<tools>"
TOOLS_FORMAT = """
</tools>

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Reminder:
- Function calls MUST follow the specified format: an inner <function=...></function> block must be nested within \
<tool_call></tool_call> XML tags
- Required parameters MUST be specified
- You may provide optional reasoning for your function call in natural language BEFORE the function call, but NOT after
- If there is no function call available, answer the question like normal with your current knowledge and do not \
tell the user about function calls
</IMPORTANT>"""


@dataclasses.dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation.

    kind: "frame" for what the template adds, "text" for the contents of system, user and tool messages,
      "generated" for what the model writes in its turn, `<|im_end|>` included.
    """

    text: str
    kind: str


def render(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None,
           add_generation_prompt: bool = False) -> str:
    """Renders a conversation as the Qwen3-Coder template does.

    Args:
      messages: OpenAI-style: role (system first, user, assistant, tool), content (text, or a list of text parts)
        and, for assistants, tool_calls (`ToolCall`s, or mappings with name and arguments, also under "function").
      tools: OpenAI-style function descriptions.
      add_generation_prompt: end with the opening of an assistant turn.

    Raises:
      UserError: an unknown role, content that is no text, or a malformed tool call; the line names the message.
    """
    return "".join(segment.text for segment in segments(messages, tools, add_generation_prompt))


def segments(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None,
             add_generation_prompt: bool = False) -> Iterator[Segment]:
    """`render` in pieces; see `Segment`."""
    messages = list(messages)
    has_system = bool(messages) and messages[0].get("role") == "system"
    if has_system or tools:
        yield Segment("<|im_start|>system\n", "frame")
        yield Segment(_text(messages[0], 0), "text") if has_system else Segment(DEFAULT_SYSTEM, "frame")
        yield Segment((_render_tools(tools) if tools else "") + "<|im_end|>\n", "frame")
    for index in range(int(has_system), len(messages)):
        yield from _render_message(messages, index, first=int(has_system))
    if add_generation_prompt:
        yield Segment("<|im_start|>assistant\n", "frame")


def render_assistant(content: str, calls: Sequence[ToolCall] = ()) -> str:
    """What an assistant writes in its turn: text, then calls; `parse_tool_calls` gives both back.

    Text is trimmed where calls follow it.
    """
    if not calls:
        return escape_content(content)
    lead = escape_content(content.strip())
    return (lead + "\n\n" if lead else "") + "\n".join(render_tool_call(call) for call in calls)


def _render_message(messages: list[Mapping[str, Any]], index: int, first: int) -> Iterator[Segment]:
    message = messages[index]
    role = message.get("role")
    if role in ("user", "system"):
        yield Segment(f"<|im_start|>{role}\n", "frame")
        yield Segment(_text(message, index), "text")
        yield Segment("<|im_end|>\n", "frame")
    elif role == "assistant":
        calls = [_tool_call(call, index) for call in message.get("tool_calls") or ()]
        yield Segment("<|im_start|>assistant\n", "frame")
        yield Segment(render_assistant(_text(message, index), calls) + "<|im_end|>", "generated")
        yield Segment("\n", "frame")
    elif role == "tool":
        if index == first:
            raise UserError(f"messages[{index}]: a tool message must follow an assistant's call")
        opening = "" if messages[index - 1].get("role") == "tool" else "<|im_start|>user\n"
        last = index + 1 == len(messages) or messages[index + 1].get("role") != "tool"
        yield Segment(opening + "<tool_response>\n", "frame")
        yield Segment(_text(message, index), "text")
        yield Segment("\n</tool_response>\n" + ("<|im_end|>\n" if last else ""), "frame")
    else:
        raise UserError(f"messages[{index}].role: expected system, user, assistant or tool, got {role!r}")


def _text(message: Mapping[str, Any], index: int) -> str:
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
            isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    raise UserError(f"messages[{index}].content: expected text or a list of text parts")


def _tool_call(call: ToolCall | Mapping[str, Any], index: int) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    if not isinstance(arguments, Mapping):
        raise UserError(f"messages[{index}].tool_calls: arguments must be a mapping, got {type(arguments).__name__}")
    return ToolCall(function.get("name", ""), dict(arguments))


def _render_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    lines = [TOOLS_HEADING]
    for tool in tools:
        function = tool.get("function", tool)
        lines.append(f"\n<function>\n<name>{function['name']}</name>")
        if "description" in function:
            lines.append(f"\n<description>{str(function['description']).strip()}</description>")
        lines.append("\n<parameters>")
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        for name, fields in (properties.items() if isinstance(properties, Mapping) else ()):
            lines.append(f"\n<parameter>\n<name>{name}</name>")
            if "type" in fields:
                lines.append(f"\n<type>{fields['type']}</type>")
            if "description" in fields:
                lines.append(f"\n<description>{str(fields['description']).strip()}</description>")
            lines.append(_extra_keys(fields, ("name", "type", "description")) + "\n</parameter>")
        lines.append(_extra_keys(parameters, ("type", "properties")) + "\n</parameters>")
        lines.append(_extra_keys(function, ("type", "name", "description", "parameters")) + "\n</function>")
    return "".join([*lines, TOOLS_FORMAT])


def _extra_keys(values: Any, handled: tuple[str, ...]) -> str:
    if not isinstance(values, Mapping):
        return ""
    return "".join(f"\n<{key}>{format_value(value)}</{key}>" for key, value in values.items() if key not in handled)
