"""What tests of a second opinion claim (withheld.py), and whether that holds: decided here, of values alone."""

import builtins
import dataclasses
import operator
import random
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from qcn_jax import syntax

MOST_COERCED = 6  # what one value of another type turns into (inside/evidence.py, `coerced`)
_DRAWS = 50  # of a decoy that differs from all that stood in its place
MOST_WORDS = 2000  # characters of an exception's text
ROOM, FACTOR = 200, 4  # how much larger than the fixed state's a value may be in which something is looked for
MORE_LEAVES, MORE_NAMES = 1, 4  # built-in exceptions, and all, that one may be more than the fixed state's


def _near(value: Any, literal: tuple[Any, int, Any]) -> bool:
    """unittest's assertAlmostEqual; the literal is (value, places, delta)."""
    second, places, delta = literal
    if delta is not None:
        return value == second or abs(value - second) <= delta
    return value == second or round(abs(value - second), places) == 0


def _count(value: Any, literal: Any) -> bool:
    """unittest's assertCountEqual."""
    left = list(literal)
    for one in value:
        if one not in left:
            return False
        left.remove(one)
    return not left


# What the host compares itself; for other operators few values would fail.
APPLY: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq, "in": lambda a, b: a in b, "is": lambda a, b: type(a) is type(b) and a == b,
    "approx": lambda a, b: a == pytest.approx(*b[0], **b[1]), "near": _near,
    "count": _count, "regex": lambda a, b: re.search(b, a) is not None}


@dataclasses.dataclass(frozen=True)
class Claim:
    """What one place of a test claims.

    `kind` is value (`expected` is a literal's text, or such by the brackets of test ids where parameters say what is
    expected, or None where the fixed state taught it; compared by `operator` on the side `left` or right), taught
    (tells what is expected, in the fixed state alone), truth (`expected` is True or False), compare (`expected` is
    whether it must hold), raises (`expected` holds names of exceptions and a pattern) or end. `always`: it depends on
    no condition of its own function. `key` names it, the same in every rewriting of a file.
    """

    key: str
    kind: str
    expected: Any = None
    operator: str = ""
    left: bool = False
    always: bool = True

    def judge(self, found: Any, brackets: str = "", known: Any = None) -> str:
        """What a record says of the claim: holds, fails, or opaque (only the value's own methods can tell).

        Args:
          found: the record's value.
          brackets: the end of the test's id.
          known: what the fixed state sent in this place; None where that is not known, or not yet.
        """
        try:
            if self.kind == "taught":
                return "opaque" if isinstance(found, dict) and "opaque" in found else "holds"
            if self.kind == "value":
                return self._value(found, brackets, known)
            if self.kind == "compare":
                # What a decoy is compared with besides may be the true value.
                good = found == [True, False] if self.expected is not False else len(found) == 2 and found[0] is False
            elif self.kind == "raises":
                names, pattern = self.expected
                good = (bool(set(names) & set(found[0])) and len(found[1]) <= MOST_WORDS
                        and re.search(pattern or "", found[1]) is not None and plausible(found[0], known))
            else:
                good = found is (True if self.kind == "end" else self.expected)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, re.error, RecursionError, OverflowError):
            return "fails"
        return "holds" if good else "fails"

    def _value(self, found: Any, brackets: str, known: Any) -> str:
        if self.expected is None:
            literal = plain_value(known)
        else:
            literal = syntax.literal(self.expected if isinstance(self.expected, str) else self.expected[brackets])
            if self.left and self.operator == "in" and known is not None and weight(found) > FACTOR * known + ROOM:
                return "fails"  # much in which there is everything
        if isinstance(found, dict) and "opaque" in found:
            if len(found["as"]) > MOST_COERCED:
                return "fails"  # guesses
            return "holds" if any(self._compare(one, literal) for one in found["as"]) else "opaque"
        return "holds" if self._compare(found, literal) else "fails"

    def _compare(self, found: Any, literal: Any) -> bool:
        value = plain_value(found)
        try:
            return bool(APPLY[self.operator](*((literal, value) if self.left else (value, literal))))
        except TypeError:
            return False

    def fact(self, found: Any) -> Any:
        """What of a value that the fixed state sent is kept, for `judge`; None where nothing is."""
        if self.kind == "taught":
            return found
        if self.kind == "raises":
            return found[0]
        return weight(found) if self.kind == "value" and self.left and self.operator == "in" else None


def plausible(names: Sequence[str], known: Sequence[str] | None) -> bool:
    """Whether one exception has all these classes, and is not simply all that could be expected."""
    if known is None:
        return True
    return (len(_leaves(names)) <= len(_leaves(known)) + MORE_LEAVES
            and len(set(names) - set(_BUILT_IN)) <= len(set(known) - set(_BUILT_IN)) + MORE_NAMES)


_BUILT_IN: dict[str, type[BaseException]] = {name: kind for name, kind in vars(builtins).items()
                                             if isinstance(kind, type) and issubclass(kind, BaseException)}


def _leaves(names: Sequence[str]) -> set[type[BaseException]]:
    """The built-in exceptions among the names of which no other one among them is a kind."""
    kinds = {_BUILT_IN[name] for name in names if name in _BUILT_IN}
    return {kind for kind in kinds if not any(other is not kind and issubclass(other, kind) for other in kinds)}


def decoy(found: Sequence[Any], rng: random.Random) -> Any:
    """A value like the first of those that were sent from one place, and equal to none of them."""
    first = found[0] if found else None
    for _ in range(_DRAWS):
        value = differing(first, rng)
        if not any(_equals(one, value) for one in found):
            return value
    return f"{rng.getrandbits(64):x}"


def _equals(found: Any, value: Any) -> bool:
    """Whether a value that was sent is `value`, or turns into it where it is of a type of its own."""
    if isinstance(found, dict) and "opaque" in found:
        return any(_equals(one, value) for one in found["as"])
    return bool(plain_value(found) == value)


def differing(found: Any, rng: random.Random) -> Any:
    """A value like one that was sent, and not equal to it; neither smaller nor larger, shorter nor longer by habit."""
    try:
        value = plain_value(found)
    except (ValueError, TypeError):
        value = None
    if isinstance(value, bool) or not isinstance(value, int | float | str | bytes | list | tuple | dict):
        return rng.choice([rng.randrange(2, 100), f"{rng.getrandbits(20):x}", [rng.randrange(100)]])
    if isinstance(value, int | float):
        most = 6 + int(abs(value)) // 4 if abs(value) < 1e12 else 0  # what counts or tells the time comes near
        return value + rng.choice((-1, 1)) * rng.randrange(1, most) if most else 0
    if isinstance(value, str):
        return _other_text(value, rng)
    if isinstance(value, bytes):
        return _other_text(value.decode("latin-1"), rng).encode("latin-1")
    if isinstance(value, dict):
        if value and rng.getrandbits(1):
            gone = rng.choice(list(value))
            return {key: item for key, item in value.items() if key != gone}
        return {**value, f"{rng.getrandbits(20):x}": rng.randrange(100)}
    if not value:
        return type(value)([rng.randrange(100)])
    at = rng.randrange(len(value))
    if _simple(value[at]):
        changed = [differing(value[at], rng)]
    else:  # one more, or one less
        changed = [value[at], value[at]] if rng.getrandbits(1) else []
    return type(value)([*value[:at], *changed, *value[at + 1:]])


def _other_text(text: str, rng: random.Random) -> str:
    """A text with another letter or digit in the place of one; with one more where it has none."""
    places = [(at, kind) for at, char in enumerate(text) for kind in _CLASSES if char in kind]
    if not places:
        return text + rng.choice(_CLASSES[0])
    at, kind = rng.choice(places)
    return text[:at] + rng.choice([char for char in kind if char != text[at]]) + text[at + 1:]


def _simple(value: Any) -> bool:
    return isinstance(value, int | float | str) and not isinstance(value, bool)


_CLASSES = (string.ascii_lowercase, string.ascii_uppercase, string.digits)


OF_HOST = frozenset({"approx", "near", "count", "regex"})  # operators that a test can also apply itself


def weight(found: Any) -> int:
    """How much a value is: its parts, and the characters of its texts."""
    total, front = 0, [found]
    while front:
        one = front.pop()
        total += 1 + (len(one) if isinstance(one, str) else 0)
        front += one if isinstance(one, list) else [*one.values()] if isinstance(one, dict) else ()
    return total


def plain_value(found: Any) -> Any:
    """The value that inside/evidence.py, `plain`, wrote; raises ValueError where it is none."""
    if not isinstance(found, dict):
        return found
    ((kind, items),) = found.items()
    if kind == "bytes":
        return bytes.fromhex(items)
    if kind == "complex":
        return complex(*items)
    if kind == "dict":
        return {plain_value(key): plain_value(item) for key, item in items}
    kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    if kind not in kinds:
        raise ValueError(f"no plain value: {kind}")
    return kinds[kind](map(plain_value, items))
