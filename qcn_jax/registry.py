"""Names that a configuration gives: registered ones, or `package.module:OBJECT` of any installed package.

  SCAFFOLDS = Registry("scaffold", Scaffold, {"nano": "qcn_jax.recipes.nano.scaffold:NANO"})
  SCAFFOLDS.resolve("their_package.scaffold:TERSE", "--config.sft.scaffold")

A registered name is short for such a path, so what comes with this package is reached as anything else is. Modules are
imported when a name is resolved and not before.
"""

import importlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from qcn_jax.errors import UserError

T = TypeVar("T")

_PATH = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


def is_path(name: str) -> bool:
    """Tells whether `name` has the form `package.module:OBJECT`."""
    return _PATH.fullmatch(name) is not None


class Registry(Generic[T]):
    """What one kind of name may stand for.

    Args:
      what: the kind in words, for messages: scaffold, expert.
      kind: class that an object must be an instance of; None where any callable will do.
      known: registered name -> `package.module:OBJECT`.
    """

    def __init__(self, what: str, kind: type[T] | None, known: Mapping[str, str]) -> None:
        self.what, self._kind, self.known = what, kind, dict(known)

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def __call__(self, name: str) -> T:
        """As `resolve`, whose message begins with what is wrong, for a caller that says where the name stands."""
        return self.resolve(name)

    def resolve(self, name: str, field: str = "") -> T:
        """Imports what `name` stands for.

        Args:
          name: a registered one, or a path.
          field: where it was given, such as --config.sft.scaffold; begins the message.

        Raises:
          UserError: no such name, or the path's module cannot be imported, lacks the object, or has something else
            there.
        """
        try:
            return self._found(name)
        except UserError as error:
            raise UserError(f"{field}: {name!r}; {error}" if field else str(error)) from error.__cause__

    def _found(self, name: str) -> T:
        path = self.known.get(name, name)
        if not is_path(path):
            raise UserError(f"allowed: {', '.join([*self.known, 'package.module:OBJECT'])}")
        module, _, attributes = path.partition(":")
        try:
            found: Any = importlib.import_module(module)
        except Exception as error:  # somebody else's module: whatever it raises is reported by its name
            detail = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"module {module} cannot be imported: {detail}") from error
        for attribute in attributes.split("."):
            if not hasattr(found, attribute):
                raise UserError(f"module {module} has no {attributes}")
            found = getattr(found, attribute)
        fits = callable(found) if self._kind is None else isinstance(found, self._kind)
        if not fits:
            wanted = "a function" if self._kind is None else f"{_article(self._kind.__name__)}"
            raise UserError(f"is {_article(type(found).__name__)}; {self.what} needs {wanted}")
        return found


def _article(word: str) -> str:
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"
