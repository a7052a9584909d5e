"""Rows of requests, read and checked line by line, as Tasks."""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema
import referencing
import referencing.exceptions

from qcn_jax import files
from qcn_jax.chat.tool_calls import ToolCall
from qcn_jax.envs import names
from qcn_jax.envs.tasks.schema import Task, read_rows
from qcn_jax.errors import UserError

REPOSITORY = "calls"  # of all of them; there is no such repository, as nothing is executed
ANY = "any"  # in the place of calls: whatever is valid is right
_FIELDS = ("id", "tools", "prompt", "calls", "system", "kind")
_NOTHING: Mapping[str, Any] = {"type": "object", "properties": {}}  # the parameters of a function that has none
# Where a schema takes part in another one, what is unknown to it may be known to that.
_PARTS = ("allOf", "anyOf", "oneOf", "not", "if", "$ref", "$dynamicRef", "dependentSchemas")
_OPEN = ("additionalProperties", "patternProperties", "unevaluatedProperties")


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
      tools: OpenAI-style function descriptions.
      calls: that are right, all in one turn and in any order; () where none may be made, None where all valid ones are.
      system: what the system turn says before the tools.
    """

    tools: tuple[Mapping[str, Any], ...]
    calls: tuple[ToolCall, ...] | None
    system: str = ""

    @functools.cached_property
    def functions(self) -> dict[str, Mapping[str, Any]]:
        """The functions of the tools by name."""
        return {tool["function"]["name"]: tool["function"] for tool in self.tools}

    @functools.cached_property
    def validators(self) -> dict[str, Any]:
        """What checks the arguments of a function, by its name: its JSON schema, which takes no unknown key."""
        return {name: _validator(closed(_parameters(function))) for name, function in self.functions.items()}

    def fault(self, call: ToolCall) -> str:
        """What of a call does not fit the tools; "" where all does."""
        validator = self.validators.get(call.name)
        if validator is None:
            return f"there is no function {names.shown(call.name)}"
        try:
            error = next(validator.iter_errors(dict(call.arguments)), None)
        except RecursionError:
            return f"{call.name}: the schema goes round in circles"
        where = "".join(f"[{step!r}]" for step in error.absolute_path) if error else ""
        return f"{call.name}{where}: {error.message:.200}" if error else ""


@functools.lru_cache(maxsize=4096)
def request_of(task: Task) -> Request:
    """The request of a task of this kind."""
    found = json.loads(task.checks)
    calls = found["calls"]
    return Request(tuple(found["tools"]), None if calls == ANY else tuple(
        ToolCall(call["name"], call["arguments"]) for call in calls), found["system"])


def read(path: str | os.PathLike[str]) -> list[Task]:
    """Requests of a JSONL file as Tasks; raises UserError for a bad row."""
    return read_rows(path, files.read_numbered(path, None), to_task)


def to_task(row: Mapping[str, Any], where: str = "request") -> Task:
    """A row as a Task.

    Raises:
      UserError: a field is missing, unknown or malformed; names `where`, the field and what is allowed.
    """
    fault = _fault(row)
    if fault:
        raise UserError(f"{where}: {fault}")
    tools = [{"type": "function", "function": tool.get("function", tool)} for tool in row["tools"]]
    calls = row["calls"] if row["calls"] == ANY else [
        {"name": call["name"], "arguments": call.get("arguments", {})} for call in row["calls"]]
    request = Request(tuple(tools), None if calls == ANY else tuple(
        ToolCall(call["name"], call["arguments"]) for call in calls))
    for number, call in enumerate(request.calls or ()):
        if fault := request.fault(call):
            raise UserError(f"{where}: field calls[{number}] does not fit tools: {fault}")
    return Task.from_json({
        "instance_id": row["id"], "repo": REPOSITORY, "base_commit": "", "patch": "", "test_patch": "",
        "problem_statement": row["prompt"], "FAIL_TO_PASS": [], "PASS_TO_PASS": [], "strategy": "call",
        "kind": row.get("kind", "given"),
        "checks": json.dumps({"tools": tools, "calls": calls, "system": row.get("system", "")})}, where)


def closed(schema: Any) -> Any:
    """`schema` with objects that take the keys alone that they name, but for those that say otherwise."""
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for name in ("properties", "$defs", "definitions"):
        if isinstance(found.get(name), Mapping):
            found[name] = {key: closed(value) for key, value in found[name].items()}
    for name in ("items", "additionalProperties"):
        if isinstance(found.get(name), Mapping):
            found[name] = closed(found[name])
    if isinstance(found.get("prefixItems"), list):
        found["prefixItems"] = [closed(value) for value in found["prefixItems"]]
    if "properties" in found and not any(name in found for name in (*_OPEN, *_PARTS)):
        found["additionalProperties"] = False
    return found


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    return function.get("parameters") or _NOTHING


def _validator(schema: Mapping[str, Any]) -> Any:
    cls = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return cls(schema, registry=referencing.jsonschema.EMPTY_REGISTRY)  # nothing is looked up elsewhere


def _fault(row: Mapping[str, Any]) -> str:
    """What is wrong with a row, an object, but for whether its calls fit its tools; "" where nothing is."""
    unknown = sorted(set(row) - set(_FIELDS))
    if unknown:
        return f"field {names.shown(unknown[0])} is unknown; allowed: {', '.join(_FIELDS)}"
    for name in ("id", "prompt"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return f"field {name} must be text"
    for name in ("system", "kind"):
        if not isinstance(row.get(name, ""), str):
            return f"field {name} must be text"
    tools, calls = row.get("tools"), row.get("calls")
    if not isinstance(tools, list) or not tools:
        return "field tools must be a list of functions, and not empty"
    for number, tool in enumerate(tools):
        if fault := _tool_fault(tool):
            return f"field tools[{number}] {fault}"
    called = [tool.get("function", tool)["name"] for tool in tools]
    if twice := sorted({name for name in called if called.count(name) > 1}):
        return f"field tools has {names.shown(twice[0])} twice"
    if calls != ANY and not isinstance(calls, list):
        return f'field calls must be "{ANY}", or a list of the calls that are right, empty where none may be made'
    for number, call in enumerate(() if calls == ANY else calls):
        if not (isinstance(call, dict) and set(call) <= {"name", "arguments"} and isinstance(call.get("name"), str)
                and isinstance(call.get("arguments", {}), dict)):
            return f"field calls[{number}] must be an object of name (text) and arguments (an object)"
    return ""


def _tool_fault(tool: Any) -> str:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        return "must be an object with a function's name"
    if not isinstance(function.get("description", ""), str):
        return "has a description that is no text"
    schema = function.get("parameters")
    if schema is None:
        return ""
    if not isinstance(schema, dict) or schema.get("type") != "object":
        return "has parameters that are no JSON schema of type object"
    try:
        validator = _validator(schema)
        type(validator).check_schema(schema)
        resource = referencing.jsonschema.DRAFT202012.create_resource(schema)
        resolver = referencing.jsonschema.EMPTY_REGISTRY.with_resource("", resource).resolver()
        for reference in _references(schema):
            resolver.lookup(reference)
        closed(schema)
    except jsonschema.SchemaError as error:
        where = "".join(f"[{step!r}]" for step in error.absolute_path)
        return f"has parameters{where} that are no JSON schema: {error.message:.100}"
    except (referencing.exceptions.Unresolvable, ValueError) as error:
        return f"has parameters with a $ref that leads nowhere within them: {str(error):.100}"
    except RecursionError:
        return "has parameters that are nested too deep"
    return ""


def _references(value: Any) -> Sequence[str]:
    """All `$ref`s within a schema."""
    if isinstance(value, list):
        return [found for item in value for found in _references(item)]
    if not isinstance(value, dict):
        return []
    own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
    return own + [found for item in value.values() for found in _references(item)]
