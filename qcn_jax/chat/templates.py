"""Tool-call templates of many agents and models, each written and read: the report trains on 21 of them.

The syntax of each is that of the model or agent it is named after, without the turns around it. One template is
native (see `tool_calls`); the others serve to teach and to check that a model follows any format it is asked for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax.chat import call_syntax, form_reader
from qcn_jax.chat.call_reader import CallReader, parse_tool_calls
from qcn_jax.chat.call_syntax import Form, JsonForm, PythonForm, TaggedForm
from qcn_jax.chat.rendering import render_assistant
from qcn_jax.chat.tool_calls import ParsedMessage, ToolCall
from qcn_jax.errors import UserError

NATIVE = "qwen3_coder"

_FORMS: dict[str, Form] = {
    "qwen3_xml_mixed": JsonForm("<tool_call>\n<function=", "\n</function>\n</tool_call>", ">\n"),
    "hermes": JsonForm("<tool_call>\n", "\n</tool_call>"),
    "qwen25_coder": JsonForm("<tools>\n", "\n</tools>"),
    "xlam_qwen": JsonForm(begin="[", between=", ", end="]", marker='[{"name":'),
    "minimax_m1": JsonForm(begin="<tool_calls>\n", end="\n</tool_calls>"),
    "mistral3": JsonForm("[TOOL_CALLS]", separator="[ARGS]", between=""),
    "typescript": JsonForm("await tools.", ");", "("),
    "react": JsonForm("Action: ", separator="\nAction Input: "),
    "harmony_json": JsonForm("<|channel|>commentary to=functions.", "<|call|>", " <|constrain|>json<|message|>",
                             between="<|start|>assistant"),
    "kimi_k2": JsonForm("<|tool_call_begin|>functions.", "<|tool_call_end|>", ":{i}<|tool_call_argument_begin|>",
                        begin="<|tool_calls_section_begin|>", between="", end="<|tool_calls_section_end|>"),
    "deepseek_v3": JsonForm("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```<｜tool▁call▁end｜>", "\n```json\n",
                            begin="<｜tool▁calls▁begin｜>", end="<｜tool▁calls▁end｜>"),
    "deepseek_v31": JsonForm("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
                             begin="<｜tool▁calls▁begin｜>", between="", end="<｜tool▁calls▁end｜>"),
    "deepseek_v32": TaggedForm(
        '<｜DSML｜invoke name="{name}">\n', "</｜DSML｜invoke>", '<｜DSML｜parameter name="{key}" string="true">',
        "</｜DSML｜parameter>\n", json_parameter='<｜DSML｜parameter name="{key}" string="false">',
        begin="<｜DSML｜function_calls>\n", end="\n</｜DSML｜function_calls>"),
    "glm46": TaggedForm(
        "<tool_call>{name}\n", "</tool_call>", "<arg_key>{key}</arg_key>\n<arg_value>", "</arg_value>\n"),
    "minimax_m2": TaggedForm('<invoke name="{name}">\n', "</invoke>", '<parameter name="{key}">', "</parameter>\n",
                             begin="<minimax:tool_call>\n", end="\n</minimax:tool_call>"),
    "xml_cline": TaggedForm("<{name}>\n", "</{name}>", "<{key}>", "</{key}>\n"),
    "llama4_pythonic": PythonForm("<|python_start|>", "<|python_end|>"),
    "toolace": PythonForm(),
}
TEMPLATES: tuple[str, ...] = (NATIVE, *_FORMS)


def render(name: str, content: str, calls: Sequence[ToolCall]) -> str:
    """What an assistant writes in its turn under template `name`; `parse` gives both back.

    Content is trimmed where calls follow it. Strings come back as strings; other values come back typed where
    the template marks types (JSON, Python) or the tools' schema tells them.

    Raises:
      UserError: no such template, or a call that it cannot express.
    """
    return render_assistant(content, calls) if name == NATIVE else call_syntax.render(_form(name), content, calls)


def parse(name: str, text: str, tools: Sequence[Mapping[str, Any]] | None = None) -> ParsedMessage:
    """Reads an assistant's turn written under template `name`; never raises for any text.

    Raises:
      UserError: no such template.
    """
    return parse_tool_calls(text, tools) if name == NATIVE else form_reader.parse(_form(name), text, tools)


def reader(name: str, tools: Sequence[Mapping[str, Any]] | None = None) -> CallReader | form_reader.FormReader:
    """Reads an assistant's turn under template `name` piece by piece.

    Raises:
      UserError: no such template.
    """
    return CallReader(tools) if name == NATIVE else form_reader.FormReader(_form(name), tools)


def render_call(name: str, call: ToolCall) -> str:
    """The text of one call under template `name`."""
    return render(name, "", [call])


def _form(name: str) -> Form:
    if name not in _FORMS:
        raise UserError(f"tool-call template {name!r} is unknown; known: {', '.join(TEMPLATES)}")
    return _FORMS[name]
