"""What the fields of a configuration may hold, said beside each field and checked in one walk.

  rows: Annotated[int, Within(at_least=1)] = 8
  sandbox: Annotated[str, OneOf("auto", "docker", "local")] = "auto"
  remat: Annotated[str, Known("qcn_jax.layers.remat:POLICIES")] = "none"
"""

import dataclasses
import importlib
import math
import operator
import typing
from collections.abc import Iterator
from typing import Any, Protocol

from qcn_jax.errors import UserError


class Allowed(Protocol):
    """A rule for one value."""

    def refusal(self, value: Any) -> str | None:
        """What is allowed, in words, where `value` is not; None where it is."""


@dataclasses.dataclass(frozen=True)
class Within:
    """A finite number between bounds, or one of `also`; `above` and `below` are not allowed themselves."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()

    def refusal(self, value: float) -> str | None:
        """See Allowed."""
        bounds = ((self.at_least, operator.ge), (self.above, operator.gt), (self.at_most, operator.le),
                  (self.below, operator.lt))
        finite = isinstance(value, int) or math.isfinite(value)
        fits = finite and all(bound is None or holds(value, bound) for bound, holds in bounds)
        return None if fits or value in self.also else f"allowed: {self}"

    def __str__(self) -> str:
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        words = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
        return " or ".join([words, *map(str, self.also)])


class OneOf:
    """One of a few names."""

    def __init__(self, *names: Any) -> None:
        self.names = names

    def refusal(self, value: Any) -> str | None:
        """See Allowed."""
        return None if value in self.names else f"allowed: {', '.join(map(str, self.names))}"

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.names))}"


@dataclasses.dataclass(frozen=True)
class Known:
    """A name that `where`, "package.module:OBJECT", knows; imported when a value is checked.

    OBJECT is a collection of names, or a function of one name that raises UserError for a name that it does not know;
    names in `also` are allowed besides.
    """

    where: str
    also: tuple[str, ...] = ()

    def refusal(self, value: str) -> str | None:
        """See Allowed."""
        if value in self.also:
            return None
        module, name = self.where.split(":")
        known = getattr(importlib.import_module(module), name)
        if not callable(known):
            return None if value in known else f"allowed: {', '.join(known)}"
        try:
            known(value)
        except UserError as error:
            return str(error)
        return None

    def __str__(self) -> str:
        return f"a name of {self.where}"


def refusals(config: Any, prefix: str) -> Iterator[str]:
    """A line for every value of a dataclass, and of those within it, that its field does not allow.

    Args:
      config: a dataclass whose values have the fields' types.
      prefix: what lines call it, e.g. "--config".
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        yield from _of_value(hints[field.name], getattr(config, field.name), f"{prefix}.{field.name}")


def described(config: Any, prefix: str) -> Iterator[str]:
    """`prefix.key=default: what is allowed`, for every value of a dataclass and of those within it."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        name, value = f"{prefix}.{field.name}", getattr(config, field.name)
        held = next(reversed(typing.get_args(hints[field.name])), None)
        if dataclasses.is_dataclass(value):
            yield from described(value, name)
        elif isinstance(value, dict) and dataclasses.is_dataclass(held):
            yield from described(held(), f"{name}.NAME")
        else:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            yield f"{name}={shown}: {_words(hints[field.name])}"


def _words(hint: Any) -> str:
    kind, *rules = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
    element = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None
    words = f"list of {_words(element)}" if element is not None else kind.__name__
    return ", ".join([words, *map(str, rules)])


def _of_value(hint: Any, value: Any, name: str) -> Iterator[str]:
    if dataclasses.is_dataclass(value):
        yield from refusals(value, name)
        return
    kind, *rules = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
    found = (rule.refusal(value) for rule in rules)
    yield from (f"{name}: {value!r}; {words}" for words in found if words)
    if typing.get_origin(kind) is tuple:
        for item in value:
            yield from _of_value(typing.get_args(kind)[0], item, name)
    if typing.get_origin(kind) is dict:
        for key, item in value.items():
            yield from _of_value(typing.get_args(kind)[1], item, f"{name}.{key}")
