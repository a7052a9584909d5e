"""The Qwen3-Coder chat template (non-thinking) written out in Python, and tool calls read back.

`render` gives the text that the published Jinja template gives, except where a tool call's value or an
assistant's text would not read back (see `tool_calls`). `segments` gives the same text in pieces that say who
wrote them, for loss masks and for tokenizing untrusted text without added tokens.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
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

    kind: "frame" for what the template adds, "text" for the contents of system, user and tool messages, "tools" for
      what tool definitions say (names, descriptions, keys, values), "generated" for what the model writes in its
      turn, `<|im_end|>` included.
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
      UserError: an unknown role, content that is no text, a malformed tool call or tool; the line names it.
    """
    return "".join(segment.text for segment in segments(messages, tools, add_generation_prompt))


def segments(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None,
             add_generation_prompt: bool = False) -> Iterator[Segment]:
    """`render` in pieces; see `Segment`."""
    messages = list(messages)
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"messages[{index}]: expected an object, got {type(message).__name__}")
    has_system = bool(messages) and messages[0].get("role") == "system"
    if has_system or tools:
        yield Segment("<|im_start|>system\n", "frame")
        yield Segment(text_of(messages[0], 0), "text") if has_system else Segment(DEFAULT_SYSTEM, "frame")
        if tools:
            yield from _tool_segments(tools)
        yield Segment("<|im_end|>\n", "frame")
    for index in range(int(has_system), len(messages)):
        yield from _render_message(messages, index, first=int(has_system))
    if add_generation_prompt:
        yield Segment("<|im_start|>assistant\n", "frame")


def render_assistant(content: str, calls: Sequence[ToolCall] = (), guard: Callable[[str], str] = str) -> str:
    """What an assistant writes in its turn: text, then calls; `parse_tool_calls` gives both back.

    Text is trimmed where calls follow it. `guard` is applied to all that is the assistant's own, as it is written.
    """
    if not calls:
        return guard(escape_content(content))
    lead = escape_content(content.strip())
    return (guard(lead) + "\n\n" if lead else "") + "\n".join(render_tool_call(call, guard) for call in calls)


def _render_message(messages: list[Mapping[str, Any]], index: int, first: int) -> Iterator[Segment]:
    message = messages[index]
    role = message.get("role")
    if role in ("user", "system"):
        yield Segment(f"<|im_start|>{role}\n", "frame")
        yield Segment(text_of(message, index), "text")
        yield Segment("<|im_end|>\n", "frame")
    elif role == "assistant":
        calls = tool_calls_of(message, index)
        yield Segment("<|im_start|>assistant\n", "frame")
        yield Segment(render_assistant(text_of(message, index), calls) + "<|im_end|>", "generated")
        yield Segment("\n", "frame")
    elif role == "tool":
        if index == first:
            raise UserError(f"messages[{index}]: a tool message must follow an assistant's call")
        opening = "" if messages[index - 1].get("role") == "tool" else "<|im_start|>user\n"
        last = index + 1 == len(messages) or messages[index + 1].get("role") != "tool"
        yield Segment(opening + "<tool_response>\n", "frame")
        yield Segment(text_of(message, index), "text")
        yield Segment("\n</tool_response>\n" + ("<|im_end|>\n" if last else ""), "frame")
    else:
        raise UserError(f"messages[{index}].role: expected system, user, assistant or tool, got {role!r}")


def text_of(message: Mapping[str, Any], index: int) -> str:
    """A message's content as text; raises UserError, which names it by `index`, where it is none."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
            isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    raise UserError(f"messages[{index}].content: expected text or a list of text parts")


def tool_calls_of(message: Mapping[str, Any], index: int) -> list[ToolCall]:
    """An assistant's calls; raises UserError, which names the message by `index`, where they are malformed."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list | tuple):
        raise UserError(f"messages[{index}].tool_calls: expected a list, got {type(calls).__name__}")
    return [_tool_call(call, index) for call in calls]


def _tool_call(call: ToolCall | Mapping[str, Any], index: int) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise UserError(f"messages[{index}].tool_calls: expected objects with a name and arguments")
    arguments = function.get("arguments") or {}
    if not isinstance(arguments, Mapping):
        raise UserError(f"messages[{index}].tool_calls: arguments must be a mapping, got {type(arguments).__name__}")
    return ToolCall(function.get("name", ""), dict(arguments))


def _tool_segments(tools: Sequence[Mapping[str, Any]]) -> Iterator[Segment]:
    """What the system turn says of tools."""
    yield Segment("\n\n", "frame")
    yield from tool_list(tools)
    yield Segment(TOOLS_FORMAT, "frame")


def tool_list(tools: Sequence[Mapping[str, Any]]) -> Iterator[Segment]:
    """The list of tools; raises UserError for one that is no object with a name."""
    yield Segment(TOOLS_HEADING.lstrip("\n"), "frame")
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f"tools[{index}]: expected an object with a name")
        yield Segment("\n<function>", "frame")
        yield from _field("name", function["name"])
        yield from _description(function)
        yield Segment("\n<parameters>", "frame")
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        for name, fields in (properties.items() if isinstance(properties, Mapping) else ()):
            yield Segment("\n<parameter>", "frame")
            yield from _field("name", name)
            if isinstance(fields, Mapping) and "type" in fields:
                yield from _field("type", str(fields["type"]))
            yield from _description(fields)
            yield from _extra_keys(fields, ("name", "type", "description"))
            yield Segment("\n</parameter>", "frame")
        yield from _extra_keys(parameters, ("type", "properties"))
        yield Segment("\n</parameters>", "frame")
        yield from _extra_keys(function, ("type", "name", "description", "parameters"))
        yield Segment("\n</function>", "frame")
    yield Segment("\n</tools>", "frame")


def _field(tag: str, value: str, kind: str = "frame") -> Iterator[Segment]:
    for text, whose in (("\n<", "frame"), (tag, kind), (">", "frame"), (value, "tools"), ("</", "frame"), (tag, kind),
                        (">", "frame")):
        yield Segment(text, whose)


def _description(fields: Any) -> Iterator[Segment]:
    if isinstance(fields, Mapping) and "description" in fields:
        yield from _field("description", str(fields["description"]).strip())


def _extra_keys(values: Any, handled: tuple[str, ...]) -> Iterator[Segment]:
    for key, value in values.items() if isinstance(values, Mapping) else ():
        if key not in handled:
            yield from _field(key, format_value(value), "tools")
