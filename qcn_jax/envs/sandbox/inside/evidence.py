"""What tests of a second opinion say instead of asserting (envs/tasks/withheld.py writes such tests).

A claim is a number, drawn for this one run, and what was found; what was expected is known to the host alone, so that
nothing in this process can be asked for it.
"""

import ctypes
import gc
import operator
import os
import types

import pytest

draw = os.urandom
MAX_VALUE, MAX_DEPTH = 20_000, 12  # bytes, roughly, and levels of one value that is sent
COMPARISONS = {"==": operator.eq, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
               "in": lambda a, b: a in b}


class Opaque(Exception):
    """A value that only its own methods can compare."""


def plain(value, left, depth=0):
    """A value of built-in types as JSON that `claims.plain_value` reads; by no method that a subclass overrides."""
    kind = type(value)
    left[0] -= 1
    if left[0] < 0 or depth > MAX_DEPTH:
        raise Opaque
    if value is None or kind is bool:
        return value
    if issubclass(kind, int):
        number = int.__int__(value)
        if number.bit_length() > 4000:  # json refuses to print more
            raise Opaque
        left[0] -= number.bit_length() // 4
        return number
    if issubclass(kind, float):
        return float.__float__(value)
    if issubclass(kind, (str, bytes)):
        left[0] -= len(value)
        if left[0] < 0:
            raise Opaque
        return str.__str__(value) if issubclass(kind, str) else {"bytes": bytes.hex(value)}
    if issubclass(kind, complex):
        return {"complex": [value.real, value.imag]}
    for base in (list, tuple, set, frozenset):
        if issubclass(kind, base):
            return {base.__name__: [plain(item, left, depth + 1) for item in base.__iter__(value)]}
    if issubclass(kind, dict):
        pairs = dict.items(value)
        return {"dict": [[plain(key, left, depth + 1), plain(item, left, depth + 1)] for key, item in pairs]}
    raise Opaque


def coerced(value):
    """What a value of another type turns into, where it can: the host asks whether any of that is what is expected."""
    found = []
    for convert in (operator.index, float, list, tuple, dict, str):
        try:
            found.append(plain(convert(value), [MAX_VALUE]))
        except Exception:
            continue
    return found


def other(value):
    """A value like `value` and not equal to it; of types that are not built in, an object that nothing equals."""
    kind, chance = type(value), draw(2)
    shift = 1 + chance[0] % 5
    if kind in (int, float, complex):
        return value + shift if value + shift != value else kind(shift)  # of large floats nothing is left
    if kind is str:
        return value[:-1] + chr(97 + chance[0] % 26) + value[-1:] if shift > 1 else value + chr(97 + chance[1] % 26)
    if kind is bytes:
        return value + chance[:1]
    if kind is bool:
        return not value
    if kind in (list, tuple):
        at = chance[1] % len(value) if value else 0
        return kind([*value[:at], other(value[at]), *value[at + 1:]]) if value else kind([shift])
    if kind in (set, frozenset):
        return kind([*value, chance.hex()])
    if kind is dict:
        if not value:
            return {chance.hex(): shift}
        chosen = list(value)[chance[1] % len(value)]
        return {**value, chosen: other(value[chosen])}
    return object()


def blind():
    """Takes away the common ways to what tests hold in their variables: frames' locals, and lists of all objects."""
    attributes = gc.get_referents(types.FrameType.__dict__)[0]
    attributes["f_locals"] = property(lambda frame: {})
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(types.FrameType))
    gc.get_objects = gc.get_referrers = gc.get_referents = lambda *arguments, **options: []


def holds(compare, left, right):
    """Whether a comparison says yes; what raises does not."""
    try:
        return bool(compare(left, right))
    except Exception:
        return False


class Raised:
    """Stands for `pytest.raises` and `assertRaises`: any exception is taken, and told."""

    def __init__(self, write, number):
        self._write, self._number, self._info = write, number, None

    def __enter__(self):
        self._info = pytest.ExceptionInfo.for_later()
        return self._info

    def __exit__(self, kind, value, trace):
        names = [base.__name__ for base in kind.__mro__] if kind is not None else []
        self._write({"claim": self._number, "value": [names[:30], str(value)[:2000]]})
        if kind is None:
            raise AssertionError("nothing was raised")
        self._info.fill_unfilled((kind, value, trace))
        self._info.exception = value  # as unittest has it
        return not issubclass(kind, KeyboardInterrupt)


class Evidence:
    """The object that such tests call; `write` sends one record to the server."""

    def __init__(self, write):
        self._write = write

    def value(self, number, value):
        """Sends what stands beside an expected literal."""
        try:
            found = plain(value, [MAX_VALUE])
        except Opaque:
            found = {"opaque": type(value).__name__, "as": coerced(value)}
        self._write({"claim": number, "value": found})

    def truth(self, number, value):
        """Sends whether a condition holds."""
        self._write({"claim": number, "value": bool(value)})

    def compare(self, number, name, left, right):
        """Sends how two values compare, and whether either also compares so with what it must not.

        That is an object that nothing equals and, for equality, values like the right one, in an order drawn here: the
        left one is asked without being told which of them is meant.
        """
        compare, nothing = COMPARISONS[name], object()
        if name == "==":
            asked = sorted([(draw(8), True, right), (draw(8), False, nothing),
                            *((draw(8), False, other(right)) for _ in range(2))], key=operator.itemgetter(0))
            answers = [(meant, holds(compare, left, value)) for _, meant, value in asked]
            found = any(meant and answer for meant, answer in answers)
            probe = any(answer and not meant for meant, answer in answers) or holds(compare, nothing, right)
        else:
            found = bool(compare(left, right))
            probe = holds(compare, nothing, right) or (name != "in" and holds(compare, left, nothing))
        self._write({"claim": number, "value": [found, probe]})

    def raises(self, number):
        """The context in which something must raise."""
        return Raised(self._write, number)

    def end(self, number):
        """Says that a test came to its end."""
        self._write({"claim": number, "value": True})
