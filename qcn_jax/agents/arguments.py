"""Arguments of tool calls, which a model wrote, as the tools' schemas want them, or a ToolError."""

import math
from collections.abc import Callable, Mapping
from typing import Any


class ToolError(Exception):
    """A call that could not do its work; `str(error)` is told to the agent."""


def fit_arguments(parameters: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Checks `arguments` against a tool's schema and converts strings where the schema wants another type.

    Raises:
      ToolError: a parameter is missing, unknown or of a type that cannot be converted; the message names it.
    """
    properties = parameters.get("properties", {})
    for name in arguments:
        if name not in properties:
            raise ToolError(f"no parameter {str(name)[:40]!r}; parameters: {', '.join(properties) or 'none'}")
    for name in parameters.get("required", ()):
        if name not in arguments:
            raise ToolError(f"parameter {name!r} is missing")
    fitted = {}
    for name, value in arguments.items():
        kind, choices = properties[name].get("type", "string"), properties[name].get("enum")
        try:
            fitted[name] = _CONVERTERS[kind](value)
            if kind == "array" and (of := properties[name].get("items", {}).get("type")):
                fitted[name] = [_CONVERTERS[of](item) for item in fitted[name]]
        except (TypeError, ValueError, OverflowError) as error:
            raise ToolError(f"parameter {name!r} must be of type {kind}") from error
        if choices and fitted[name] not in choices:
            raise ToolError(f"parameter {name!r} must be one of {', '.join(map(str, choices))}")
    return fitted


def _string(value: Any) -> str:
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str):
        raise TypeError
    value.encode("utf-8")  # or it is no text: half a character
    return value


def _number(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError
    return value


def _integer(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
        raise TypeError
    return int(value.strip() if isinstance(value, str) and len(value) < 20 else value)


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str):
        return bool(_integer(value))
    word = value.strip().lower()
    if word not in ("true", "false"):
        raise ValueError
    return word == "true"


def _array(value: Any) -> list[Any]:
    if isinstance(value, str):
        return value.split()
    if not isinstance(value, list | tuple):
        raise TypeError
    return list(value)


_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "string": _string, "integer": _integer, "number": _number, "boolean": _boolean, "array": _array,
    "object": _object,
}
