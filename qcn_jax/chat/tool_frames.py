"""Two of a tool-call template's three axes: how tools are defined to a model, and how it is told what calls gave.

Both give parts: (text, whether it is the template's own). What is not, names and descriptions of tools and what tools
gave, is somebody's text and may not become added tokens (see `encoder`).
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from qcn_jax.chat import rendering
from qcn_jax.errors import UserError

Part = tuple[str, bool]


class Definitions(Protocol):
    """How tools are defined."""

    def parts(self, tools: Sequence[Mapping[str, Any]]) -> list[Part]:
        """The list of `tools`, OpenAI-style function descriptions."""


def functions(tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The function of each tool; raises UserError for a tool that is no object with a name."""
    found = [tool.get("function", tool) if isinstance(tool, Mapping) else None for tool in tools]
    for index, function in enumerate(found):
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f"tools[{index}]: expected an object with a name")
    return found


def _properties(function: Mapping[str, Any]) -> tuple[Mapping[str, Any], Sequence[str]]:
    """A function's parameters by name, and which of them are required."""
    parameters = function.get("parameters")
    parameters = parameters if isinstance(parameters, Mapping) else {}
    properties, required = parameters.get("properties"), parameters.get("required")
    return properties if isinstance(properties, Mapping) else {}, required if isinstance(required, list | tuple) else ()


class XmlDefinitions:
    """Qwen3-Coder's: a tag for each field, as chat.rendering writes them."""

    def parts(self, tools: Sequence[Mapping[str, Any]]) -> list[Part]:
        """See Definitions."""
        return [(segment.text, segment.kind == "frame") for segment in rendering.tool_list(tools)]


@dataclasses.dataclass(frozen=True)
class JsonDefinitions:
    """Each tool as JSON.

    Attributes:
      begin, between, end: around and between the tools.
      item: around each, with `{tool}`.
      whole: OpenAI's object with its type, and not the function in it alone.
      indent: spaces of a level; None for one line.
      shift: spaces before each line.
    """

    begin: str
    item: str
    between: str
    end: str
    whole: bool = True
    indent: int | None = None
    shift: int = 0

    def parts(self, tools: Sequence[Mapping[str, Any]]) -> list[Part]:
        """See Definitions."""
        before, after = self.item.split("{tool}")
        found: list[Part] = [(self.begin, True)]
        for index, function in enumerate(functions(tools)):
            value = {"type": "function", "function": function} if self.whole else function
            text = json.dumps(value, ensure_ascii=False, indent=self.indent)
            text = re.sub("^", " " * self.shift, text, flags=re.MULTILINE) if self.shift else text
            found += [((self.between if index else "") + before, True), (text, False), (after, True)]
        return [*found, (self.end, True)]


class TextDefinitions:
    """DeepSeek-V3.1's: a heading, a description and the parameters' schema for each tool."""

    def parts(self, tools: Sequence[Mapping[str, Any]]) -> list[Part]:
        """See Definitions."""
        found: list[Part] = [("## Tools\nYou have access to the following tools:\n", True)]
        for function in functions(tools):
            schema = json.dumps(function.get("parameters") or {}, ensure_ascii=False)
            found += [("\n### ", True), (function["name"], False), ("\nDescription: ", True),
                      (str(function.get("description", "")), False), ("\n\nParameters: ", True), (schema, False),
                      ("\n", True)]
        return found


class TypeScriptDefinitions:
    """Harmony's: types of functions in a namespace, descriptions as comments."""

    def parts(self, tools: Sequence[Mapping[str, Any]]) -> list[Part]:
        """See Definitions."""
        found: list[Part] = [("# Tools\n\n## functions\n\nnamespace functions {\n\n", True)]
        for function in functions(tools):
            found += [(line, False) for line in self._function(function)]
        return [*found, ("} // namespace functions", True)]

    def _function(self, function: Mapping[str, Any]) -> Iterator[str]:
        yield f"// {function.get('description', '')}\n"
        properties, required = _properties(function)
        if not properties:
            yield f"type {function['name']} = () => any;\n\n"
            return
        yield f"type {function['name']} = (_: {{\n"
        for name, schema in properties.items():
            schema = schema if isinstance(schema, Mapping) else {}
            if schema.get("description"):
                yield f"// {schema['description']}\n"
            default = f", // default: {_plain(schema['default'])}" if "default" in schema else ""
            yield f"{name}{'' if name in required else '?'}: {typescript(schema)}{default},\n"
        yield "}) => any;\n\n"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


_TYPES = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean", "null": "null"}


def typescript(schema: Mapping[str, Any]) -> str:
    """The type of a JSON schema's values in TypeScript; `any` where the schema says nothing that it could."""
    kind = schema.get("type")
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return " | ".join(json.dumps(member, ensure_ascii=False) for member in schema["enum"])
    if isinstance(kind, list):
        return " | ".join(typescript({**schema, "type": one}) for one in kind) or "any"
    if kind == "array":
        items = schema.get("items")
        inner = typescript(items) if isinstance(items, Mapping) else "any"
        return f"({inner})[]" if " | " in inner else f"{inner}[]"
    if kind == "object":
        properties, required = _properties({"parameters": schema})
        fields = ", ".join(f"{name}{'' if name in required else '?'}: "
                           f"{typescript(field) if isinstance(field, Mapping) else 'any'}"
                           for name, field in properties.items())
        return f"{{{fields}}}" if fields else "object"
    return _TYPES.get(kind, "any") if isinstance(kind, str) else "any"


@dataclasses.dataclass(frozen=True)
class Responses:
    """How an assistant is told what its calls gave.

    Attributes:
      item: one result, with `{text}`, and `{name}` of its tool and `{i}`, its number, where they are told.
      begin, between, end: around and between all of them.
      as_json: "text" where the text stands as a JSON string.
    """

    item: str
    begin: str = ""
    between: str = "\n"
    end: str = ""
    as_json: str = ""

    def parts(self, results: Sequence[tuple[str, str]]) -> list[Part]:
        """The results, (name of the tool, text) in order."""
        found: list[Part] = [(self.begin, True)]
        for index, (name, text) in enumerate(results):
            found.append((self.between if index else "", True))
            shown = {"{text}": json.dumps(text, ensure_ascii=False) if self.as_json else text, "{name}": name}
            for piece in re.split(r"(\{text\}|\{name\}|\{i\})", self.item):
                found.append((shown[piece], False) if piece in shown else (piece.replace("{i}", str(index)), True))
        return [part for part in [*found, (self.end, True)] if part[0]]


def joined(parts: Sequence[Part]) -> str:
    """The text of parts."""
    return "".join(text for text, _ in parts)


def content_of(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Parts as those of a message's content, in which `special` says that added tokens are meant."""
    return [{"type": "text", "text": text} | ({"special": True} if own else {}) for text, own in parts if text]
