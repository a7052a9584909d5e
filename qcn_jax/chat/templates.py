"""Tool-call templates of many agents and models, each in three axes: definitions, calls, responses.

The report (arXiv 2603.00729, table of 4.2.2) trains on these so that a model follows any format it is asked for. A
template says how tools are defined for the model (`describe`), how the model writes calls (`render`, `parse`) and how
it is told what they gave (`respond`), each as the model or agent does that it is named after, without the turns around
it. docs/agents.md lists where a published rendering differs, and the forms of which none is published.

`typescript`, `react` and `qwen3_xml_json` are not the report's.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax.chat import call_syntax, form_reader
from qcn_jax.chat.call_reader import CallReader, parse_tool_calls
from qcn_jax.chat.call_syntax import Form, JsonForm, TaggedForm
from qcn_jax.chat.python_calls import PythonForm
from qcn_jax.chat.rendering import render_assistant
from qcn_jax.chat.tool_calls import ParsedMessage, ToolCall
from qcn_jax.chat.tool_frames import (
    Definitions,
    JsonDefinitions,
    Part,
    Responses,
    TextDefinitions,
    TypeScriptDefinitions,
    XmlDefinitions,
)
from qcn_jax.errors import UserError

NATIVE = "qwen3_coder"
_EXAMPLE = ToolCall("FUNCTION_NAME", {"PARAMETER_1": "VALUE_1", "PARAMETER_2": "VALUE_2"})
_HOW = "\n\nA call of a function is written in this form, with nothing behind it:\n\n"


@dataclasses.dataclass(frozen=True)
class Template:
    """One template; `form` is None where calls are written as NATIVE's (see chat.tool_calls)."""

    definitions: Definitions
    form: Form | None
    responses: Responses


_DEEPSEEK = JsonForm("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```<｜tool▁call▁end｜>", "\n```json\n",
                     begin="<｜tool▁calls▁begin｜>", end="<｜tool▁calls▁end｜>")
_DEEPSEEK_OUTPUTS = Responses("<｜tool▁output▁begin｜>{text}<｜tool▁output▁end｜>",
                              begin="<｜tool▁outputs▁begin｜>", end="<｜tool▁outputs▁end｜>")
_HARMONY = Responses("<|start|>functions.{name} to=assistant<|channel|>commentary<|message|>{text}<|end|>",
                     between="", as_json="text")
_TOOLS = JsonDefinitions("# Tools\n\n<tools>\n", "{tool}", "\n", "\n</tools>")
_INDENTED = JsonDefinitions("", "{tool}", "\n\n", "", indent=4)
_TOOL_RESPONSE = Responses("<tool_response>\n{text}\n</tool_response>")

_TEMPLATES: dict[str, Template] = {
    NATIVE: Template(XmlDefinitions(), None, _TOOL_RESPONSE),
    "qwen3_xml_mixed": Template(_TOOLS, None, _TOOL_RESPONSE),
    "deepseekr1": Template(JsonDefinitions("## Tools\n\n### Function\n\n", "```json\n{tool}\n```", "\n\n", ""),
                           _DEEPSEEK, _DEEPSEEK_OUTPUTS),
    "deepseekv3": Template(JsonDefinitions("# Tools\n\n<tools>\n", "{tool}", "\n", "\n</tools>"),
                           _DEEPSEEK, _DEEPSEEK_OUTPUTS),
    "deepseekv31": Template(
        TextDefinitions(),
        JsonForm("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
                 begin="<｜tool▁calls▁begin｜>", between="", end="<｜tool▁calls▁end｜>"),
        Responses("<｜tool▁output▁begin｜>{text}<｜tool▁output▁end｜>", between="")),
    "deepseekv32": Template(
        JsonDefinitions("## Tools\n\n<functions>\n", "{tool}", "\n", "\n</functions>", whole=False),
        TaggedForm('<｜DSML｜invoke name="{name}">\n', "</｜DSML｜invoke>",
                   '<｜DSML｜parameter name="{key}" string="true">', "</｜DSML｜parameter>\n",
                   json_parameter='<｜DSML｜parameter name="{key}" string="false">',
                   begin="<｜DSML｜function_calls>\n", end="\n</｜DSML｜function_calls>"),
        Responses("<result>{text}</result>", begin="<function_results>\n", end="\n</function_results>")),
    "glm46": Template(
        _TOOLS,
        TaggedForm("<tool_call>{name}\n", "</tool_call>", "<arg_key>{key}</arg_key>\n<arg_value>", "</arg_value>\n",
                   json_values=True),
        _TOOL_RESPONSE),
    "minimax_m1": Template(
        JsonDefinitions("<tools>\n", "{tool}", "\n", "\n</tools>"),
        JsonForm(begin="<tool_calls>\n", end="\n</tool_calls>"), Responses("tool result: {text}")),
    "minimax_m2": Template(
        JsonDefinitions("# Tools\n\n<tools>\n", "<tool>{tool}</tool>", "\n", "\n</tools>", whole=False),
        TaggedForm('<invoke name="{name}">\n', "</invoke>", '<parameter name="{key}">', "</parameter>\n",
                   begin="<minimax:tool_call>\n", end="\n</minimax:tool_call>", json_values=True),
        Responses("<response>{text}</response>")),
    "kimik2": Template(
        JsonDefinitions("[", "{tool}", ", ", "]"),
        JsonForm("<|tool_call_begin|>functions.", "<|tool_call_end|>", ":{i}<|tool_call_argument_begin|>",
                 begin="<|tool_calls_section_begin|>", between="", end="<|tool_calls_section_end|>"),
        Responses("## Return of functions.{name}:{i}\n{text}")),
    "hermes": Template(_TOOLS, JsonForm("<tool_call>\n", "\n</tool_call>"), _TOOL_RESPONSE),
    "qwen25_coder": Template(
        JsonDefinitions("Available tools:\n", "{tool}", "\n", "", whole=False),
        JsonForm("<tools>\n", "\n</tools>"), _TOOL_RESPONSE),
    "harmony_json": Template(
        TypeScriptDefinitions(),
        JsonForm("<|channel|>commentary to=functions.", "<|call|>", " <|constrain|>json<|message|>",
                 between="<|start|>assistant"),
        _HARMONY),
    "harmony_xml": Template(
        TypeScriptDefinitions(),
        TaggedForm("<|channel|>commentary to=functions.{name} <|constrain|>xml<|message|>\n", "<|call|>",
                   "<{key}>", "</{key}>\n"),
        _HARMONY),
    "llama4_pythonic": Template(
        JsonDefinitions("[\n", "{tool}", ",\n", "\n]", indent=4, shift=4),
        PythonForm("<|python_start|>", "<|python_end|>"), Responses("{text}", as_json="text")),
    "toolace": Template(_INDENTED, PythonForm(), Responses('{"output": {text}}', as_json="text")),
    "mistral3": Template(
        JsonDefinitions("[AVAILABLE_TOOLS][", "{tool}", ", ", "][/AVAILABLE_TOOLS]"),
        JsonForm("[TOOL_CALLS]", separator="[ARGS]", between=""),
        Responses("[TOOL_RESULTS]{text}[/TOOL_RESULTS]", between="")),
    "xlam_qwen": Template(
        _INDENTED, JsonForm(begin="[", between=", ", end="]", marker='[{"name":'), Responses("{text}")),
    "xml_cline": Template(
        JsonDefinitions("# Tools\n\n", "{tool}", "\n", "", whole=False),
        TaggedForm("<{name}>\n", "</{name}>", "<{key}>", "</{key}>\n"), Responses("[{name}] Result:\n{text}")),
    "xml_aone": Template(
        JsonDefinitions("# Tools\n\n<available_tools>\n", "{tool}", "\n", "\n</available_tools>", whole=False),
        TaggedForm('<use_tool name="{name}">\n', "</use_tool>", '<argument name="{key}">', "</argument>\n"),
        Responses('<tool_result name="{name}">\n{text}\n</tool_result>')),
    "typescript": Template(TypeScriptDefinitions(), JsonForm("await tools.", ");", "("),
                           Responses("// {name}: {text}")),
    "react": Template(JsonDefinitions("Tools:\n", "{tool}", "\n", "", whole=False),
                      JsonForm("Action: ", separator="\nAction Input: "), Responses("Observation: {text}")),
    "qwen3_xml_json": Template(
        _TOOLS, JsonForm("<tool_call>\n<function=", "\n</function>\n</tool_call>", ">\n"), _TOOL_RESPONSE),
}
REPORT = tuple(name for name in _TEMPLATES if name not in ("typescript", "react", "qwen3_xml_json"))
TEMPLATES: tuple[str, ...] = tuple(_TEMPLATES)


def render(name: str, content: str, calls: Sequence[ToolCall]) -> str:
    """What an assistant writes in its turn under template `name`; `parse` gives both back.

    Content is trimmed where calls follow it. Strings come back as strings; other values come back typed where
    the template marks types (JSON, Python) or the tools' schema tells them.

    Raises:
      UserError: no such template, or a call that it cannot express.
    """
    form = _template(name).form
    return render_assistant(content, calls) if form is None else call_syntax.render(form, content, calls)


def parse(name: str, text: str, tools: Sequence[Mapping[str, Any]] | None = None) -> ParsedMessage:
    """Reads an assistant's turn written under template `name`; never raises for any text.

    Raises:
      UserError: no such template.
    """
    form = _template(name).form
    return parse_tool_calls(text, tools) if form is None else form_reader.parse(form, text, tools)


def reader(name: str, tools: Sequence[Mapping[str, Any]] | None = None) -> CallReader | form_reader.FormReader:
    """Reads an assistant's turn under template `name` piece by piece.

    Raises:
      UserError: no such template.
    """
    form = _template(name).form
    return CallReader(tools) if form is None else form_reader.FormReader(form, tools)


def render_call(name: str, call: ToolCall) -> str:
    """The text of one call under template `name`."""
    return render(name, "", [call])


def definitions(name: str, tools: Sequence[Mapping[str, Any]]) -> list[Part]:
    """The list of tools as template `name` has it in the system turn; see `describe`.

    Raises:
      UserError: no such template, or a tool that is no object with a name.
    """
    return _template(name).definitions.parts(tools)


def describe(name: str, tools: Sequence[Mapping[str, Any]], style: str = "") -> list[Part]:
    """What a system turn says of tools under template `name`: which there are, and how a call is written.

    Args:
      tools: OpenAI-style function descriptions.
      style: the template whose definitions are used, where a user defines the tools otherwise than `name` does.

    Raises:
      UserError: no such template, or a tool that is no object with a name.
    """
    return [*definitions(style or name, tools), (_HOW, True), (render_call(name, _EXAMPLE), True)]


def respond(name: str, results: Sequence[tuple[str, str]]) -> list[Part]:
    """What a turn says that tells an assistant what its calls gave, under template `name`.

    Args:
      results: (name of the tool, what it gave) of each call in order.

    Raises:
      UserError: no such template.
    """
    return _template(name).responses.parts(results)


def _template(name: str) -> Template:
    if name not in _TEMPLATES:
        raise UserError(f"tool-call template {name!r} is unknown; known: {', '.join(TEMPLATES)}")
    return _TEMPLATES[name]
