"""Dataclasses to ConfigDicts, whose keys absl flags override, and back; unknown and ill-typed keys are refused."""

import dataclasses
import types
import typing
from typing import Any, TypeVar

import ml_collections

from qcn_jax.errors import UserError

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """A dataclass as a ConfigDict, which absl flags can override key by key."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return to_config_dict(value)
        if isinstance(value, tuple):
            return tuple(map(plain, value))
        return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value

    values = {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    return ml_collections.ConfigDict(values)


def from_config_dict(cls: type[T], values: Any, prefix: str = "config") -> T:
    """Builds `cls` from a mapping.

    Raises:
      UserError: a key that `cls` does not have, or a value of another type; the line names the key.
    """
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    arguments = {}
    for key in values:
        name = f"{prefix}.{key}"
        if new := new_name(name):
            raise UserError(f"--{name}: is called --{new} now")
        if key not in known:
            raise UserError(f"--{prefix}.{key}: unknown key; allowed: {', '.join(sorted(known))}")
        arguments[key] = typed(hints[key], values[key], name)
    return cls(**arguments)


# Earlier names of keys, the longest first.
_RENAMED = {
    "config.rl.experts": "config.experts.names", "config.rl": "config.experts",
    **{f"config.sft.{name}": f"config.sft.sources.nano.options.{name}" for name in ("recovery", "searches", "guesses")},
    "config.sft.options": "config.sft.sources.nano.options", "config.sft.trajectories": "config.sft.sources.nano.kind",
    "config.sft.trajectories_per_task": "config.sft.sources.nano.options.per_task",
    **{f"config.midtrain.{name}": f"config.midtrain.sources.{name}.share" for name in ("repository", "fim", "edits")},
    "config.midtrain.edit_documents": "config.midtrain.sources.edits.form",
    "config.midtrain.corpus_megabytes": "config.midtrain.sources.NAME.megabytes",
}


def new_name(key: str) -> str | None:
    """What a key like "config.rl.updates" is called now; None for all that have always had their name."""
    for old, new in _RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return None


def typed(expected: Any, value: Any, name: str) -> Any:
    """`value` as a field of type `expected` holds it; raises UserError that begins with --`name` where it cannot."""
    if dataclasses.is_dataclass(expected):
        if not hasattr(value, "items"):
            raise UserError(f"--{name}: expected a group of keys, got {value!r}")
        return from_config_dict(typing.cast("type[DataclassInstance]", expected), value, name)
    origin = typing.get_origin(expected)
    if origin is tuple:
        element = typing.get_args(expected)[0]
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise UserError(f"--{name}: expected a list of {element.__name__}, got {value!r}")
        return tuple(typed(element, item, name) for item in value)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        expected = next(t for t in typing.get_args(expected) if t is not type(None))
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is dict:
        if not hasattr(value, "items"):
            raise UserError(f"--{name}: expected a group of keys, got {value!r}")
        held = typing.get_args(expected)[1]
        return {key: typed(held, value[key], f"{name}.{key}") if held is not Any else value[key] for key in value}
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise UserError(f"--{name}: expected {expected.__name__}, got {value!r}")
    return value
