"""Values of tool calls: text in, JSON out, by the JSON schema of the tool.

What leaves is a value that JSON can hold (no NaN, no set, no bytes, no number that JSON readers take for infinity, no
nesting that they refuse), or the text as it was. Schemas come from clients and are read as far as they make sense:
nothing in them raises.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qcn_jax import syntax

MAX_DEPTH = 100  # of nested lists and objects; Python's own readers and writers end at about 1,000
_MAX_INTEGER_BITS = 14_000  # Python writes integers of up to 4,300 digits
_MAX_LITERAL = 1 << 16  # characters of a Python literal
_MAX_SCHEMAS = 1_000  # sub-schemas that are looked at for one parameter: $ref can repeat them exponentially

_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_EXACT = 1 << 53  # beyond it a float that is integral need not be the number that was written
_BOOLEANS = {"true": True, "false": False}
_NULLS = ("null", "none")
# Type names as schemas in the wild have them (vLLM's rules).
_KINDS = (
    (re.compile(r"(?:string|str|text|varchar|char|enum)\Z"), "string"),
    (re.compile(r"(?:null|none|nonetype)\Z"), "null"),
    (re.compile(r"(?:boolean|bool|binary)\Z"), "boolean"),
    (re.compile(r"int|uint|long|short|unsigned"), "integer"),
    (re.compile(r"num|float|double"), "number"),
    (re.compile(r"object|dict"), "object"),
    (re.compile(r"array|arr|list"), "array"),
)
_OF_PYTHON = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
_CONTAINERS = {"array": list, "object": dict}


# --- JSON


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse(digits)


def encodable(text: str) -> str:
    """`text` with halves of characters put together, and those that are alone (which no UTF-8 can hold) as U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


STRICT = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)


def read_json(text: str) -> Any:
    """Reads one JSON value strictly: finite numbers, at most MAX_DEPTH lists and objects within one another.

    Raises:
      ValueError: `text` is nothing of the kind.
    """
    try:
        value = STRICT.decode(text)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raises ValueError where lists and objects nest more than MAX_DEPTH deep."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for outer in level if isinstance(outer, dict | list)
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]  # fmt: skip
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


class NotJson(ValueError):
    """A value that JSON cannot hold."""


def json_value(value: Any, room: int = MAX_DEPTH) -> Any:
    """A Python literal's value as JSON has it: tuples become lists.

    Raises:
      NotJson: it is, or holds, what JSON cannot: a set, bytes, a complex number, an infinite one, a key that is no
        string.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int) and value.bit_length() <= _MAX_INTEGER_BITS:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list | tuple) and room:
        return [json_value(item, room - 1) for item in value]
    if isinstance(value, dict) and room and all(isinstance(key, str) for key in value):
        return {key: json_value(item, room - 1) for key, item in value.items()}
    raise NotJson(f"no JSON value: {type(value).__name__}")


def read_literal(text: str) -> Any:
    """Reads a Python literal as a JSON value; raises ValueError where it is none (NotJson: where JSON has none)."""
    if len(text) > _MAX_LITERAL:
        raise ValueError("too long for a literal")
    try:
        return json_value(syntax.literal(text.strip()))
    except (SyntaxError, TypeError, MemoryError, RecursionError, OverflowError) as error:
        raise ValueError(f"no literal: {type(error).__name__}") from None


def format_value(value: Any) -> str:
    """A value as the published template writes it: strings raw, containers JSON, other scalars Python's str."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


# --- schemas


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a schema lets a value be.

    kinds: of JSON Schema's seven types, or "literal" for a type that it does not have; empty: anything.
    members: of enum and const.
    """

    kinds: tuple[str, ...] = ()
    members: tuple[Any, ...] = ()


Schemas = Mapping[str, Mapping[str, Expected]]


def parameter_schemas(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, dict[str, Expected]]:
    """Function name -> parameter name -> what its value may be, of an OpenAI-style tool list."""
    schemas = {}
    for tool in tools or ():
        function = tool.get("function", tool)
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        named = properties.items() if isinstance(properties, Mapping) else ()
        schemas[function["name"]] = {name: _Reader(parameters).read(schema) for name, schema in named}
    return schemas


class _Reader:
    """Reads one parameter's schema; `root` is where its `$ref`s point into."""

    def __init__(self, root: Any) -> None:
        self._root, self._left = root, _MAX_SCHEMAS

    def read(self, schema: Any, room: int = MAX_DEPTH) -> Expected:
        self._left -= 1
        if not isinstance(schema, Mapping) or self._left < 0 or not room:
            return Expected()
        parts = [self._own(schema)]
        if isinstance(schema.get("$ref"), str):
            parts.append(self.read(self._target(schema["$ref"]), room - 1))
        parts += [self.read(part, room - 1) for part in _listed(schema, "allOf")]
        for name in ("anyOf", "oneOf"):
            if options := [self.read(option, room - 1) for option in _listed(schema, name)]:
                parts.append(_any_of(options))
        found = _all_of(parts)
        if schema.get("nullable") is True and found.kinds:
            return Expected((*found.kinds, "null"), found.members)
        return found

    @staticmethod
    def _own(schema: Mapping[str, Any]) -> Expected:
        members = (schema["const"],) if "const" in schema else tuple(_listed(schema, "enum"))
        type_ = schema.get("type")
        names = type_ if isinstance(type_, list) else [] if type_ is None else [type_]
        kinds = [_kind(name) for name in names] or [_OF_PYTHON.get(type(member), "null") for member in members]
        if not kinds and isinstance(schema.get("properties", schema.get("additionalProperties")), Mapping):
            kinds = ["object"]
        if not kinds and ("items" in schema or "prefixItems" in schema):
            kinds = ["array"]
        return Expected(tuple(dict.fromkeys(kinds)), members)

    def _target(self, reference: str) -> Any:
        """What a reference within the document points at; None where there is no such place."""
        start, *path = reference.split("/")
        place = self._root if start == "#" else None
        for step in path:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(place, list) and step.isascii() and step.isdigit() and len(step) < 6:
                place = place[int(step)] if int(step) < len(place) else None
            else:
                place = place.get(step) if isinstance(place, Mapping) else None
        return place


def _listed(schema: Mapping[str, Any], name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []


def _kind(name: Any) -> str:
    text = str(name).strip().lower()
    return next((kind for pattern, kind in _KINDS if pattern.match(text)), "literal")


def _any_of(options: Sequence[Expected]) -> Expected:
    # An option that says nothing lets everything pass, so also the text.
    kinds = [kind for option in options for kind in option.kinds or ("string",)]
    return Expected(tuple(dict.fromkeys(kinds)), tuple(member for option in options for member in option.members))


def _all_of(parts: Iterable[Expected]) -> Expected:
    kinds: tuple[str, ...] = ()
    members: tuple[Any, ...] = ()
    for part in parts:
        shared = tuple(kind for kind in part.kinds if kind in kinds or (kind == "integer" and "number" in kinds))
        kinds = shared or kinds or part.kinds
        members = members or part.members
    return Expected(kinds, members)


# --- values


def coerce(text: str, expected: Expected | None) -> Any:
    """`text` as the JSON value that `expected` names, or as it is where it does not read as one.

    Where a string is allowed too, only what is spelt as the template spells the other kind becomes that kind: "7" is
    a number for integer or string, "007" a string.
    """
    if expected is None or not expected.kinds:
        return text
    bare, kinds = text.strip(), expected.kinds
    for member in expected.members:
        if text == member or (not isinstance(member, str) and bare in (format_value(member), json.dumps(member))):
            return member
    textual = "string" in kinds
    if bare.lower() in _NULLS and ("null" in kinds or not textual):
        return None
    if textual and bare != text and not set(kinds) & set(_CONTAINERS):
        return text
    for kind in ("boolean", "integer", "number", "array", "object", "literal"):
        if kind in kinds:
            try:
                return _read(kind, bare, kinds, textual)
            except ValueError:
                continue
    return text


def _read(kind: str, text: str, kinds: Sequence[str], textual: bool) -> Any:
    """`text` as one kind; raises ValueError where it is none."""
    if kind == "boolean":
        if text.lower() not in _BOOLEANS or (textual and text.lower() != text and text.title() != text):
            if set(kinds) <= {"boolean", "null"}:
                return False  # as vLLM has it
            raise ValueError
        return _BOOLEANS[text.lower()]
    if kind in ("integer", "number"):
        value = _number(text, kind)
        if textual and format_value(value) != text:
            raise ValueError
        return value
    if kind == "literal":
        return read_literal(text)
    try:
        value = read_json(text)
    except ValueError:
        if textual:
            raise
        value = read_literal(text)
    # A tool that wants a container gets whichever was written, unless a string is as good.
    if not isinstance(value, _CONTAINERS[kind] if textual else list | dict):
        raise ValueError
    return value


def _number(text: str, kind: str) -> int | float:
    if _INTEGER.fullmatch(text):
        return int(text)
    if kind == "integer" or not _NUMBER.fullmatch(text):
        raise ValueError
    value = _finite(text)
    return int(value) if value.is_integer() and abs(value) < _EXACT else value
