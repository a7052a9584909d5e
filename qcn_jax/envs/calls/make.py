"""Requests of our own: invented tools with invented names, drawn by seeds, and the calls that answer them.

Names and texts are words that nobody uses, and the words of one split are never the other's: what is measured is
whether definitions are read, not whether tools are known.
"""

import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
# What a row is about: the type of one parameter, a choice between tools, or that none fits and none may be called.
KINDS = ("plain", "enum", "array", "object", "optional", "number", "choice", "none")
SYSTEM = ("Call the function that does what is asked, with the values that are given. Where none of them does it, say "
          "so in words and call nothing.")
_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "gr", "kl", "pr", "st")
_VOWELS = ("a", "e", "i", "o", "u")
_ENDS = ("", "", "l", "m", "n", "r", "x")
_VERBS = ("create", "find", "move", "send", "count", "open", "start", "check", "merge", "rename", "archive", "measure")
_FORMS = ("{verb} a {noun} with {values}.", "Please {verb} a {noun}: {values}.",
          "I need you to {verb} a {noun}; {values}.", "Could you {verb} a {noun}? {values}.")


class _Words:
    """Draws words of one split."""

    def __init__(self, rng: random.Random, split: str) -> None:
        self.rng, self._half, self._used = rng, split == "heldout", set()

    def new(self) -> str:
        """A word that was not drawn before."""
        while True:
            count = self.rng.choice((2, 2, 3))
            word = "".join(self.rng.choice(_ONSETS) + self.rng.choice(_VOWELS) for _ in range(count))
            word += self.rng.choice(_ENDS)
            if word not in self._used and (zlib.crc32(word.encode()) % 2 == 1) == self._half:
                self._used.add(word)
                return word


# A parameter's JSON schema, and a value of it.
_Made = tuple[dict[str, Any], Any]


def _text(words: _Words) -> _Made:
    return {"type": "string"}, " ".join(words.new() for _ in range(words.rng.choice((1, 1, 2))))


def _enum(words: _Words) -> _Made:
    members = [words.new() for _ in range(words.rng.randint(3, 5))]
    return {"type": "string", "enum": members}, words.rng.choice(members)


def _integer(words: _Words) -> _Made:
    least, most = words.rng.choice(((0, 9), (1, 99), (100, 9999)))
    return {"type": "integer", "minimum": least, "maximum": most}, words.rng.randint(least, most)


def _number(words: _Words) -> _Made:
    return {"type": "number"}, words.rng.randint(1, 400) + words.rng.choice((0.25, 0.5, 0.75))


def _boolean(words: _Words) -> _Made:
    return {"type": "boolean"}, words.rng.random() < 0.5


def _array(words: _Words) -> _Made:
    item = words.rng.choice((_text, _integer))
    first, value = item(words)
    values = [value] + [item(words)[1] for _ in range(words.rng.randint(1, 2))]
    schema = first if item is _text else {"type": "integer"}
    return {"type": "array", "items": schema}, values


def _object(words: _Words) -> _Made:
    made = {words.new(): kind(words) for kind in words.rng.sample((_text, _integer, _enum, _boolean), 2)}
    return ({"type": "object", "properties": {name: schema for name, (schema, _) in made.items()},
             "required": list(made)}, {name: value for name, (_, value) in made.items()})


_SCALARS = (_text, _integer, _number, _boolean, _enum)
_ASKED: dict[str, Callable[[_Words], _Made]] = {"enum": _enum, "array": _array, "object": _object, "number": _number}


def requests(count: int, seed: int, kinds: Sequence[str] = KINDS, split: str = "train") -> list[Row]:
    """`count` rows of envs.calls.schema, the kinds in turn; no name and no text of one split is the other's.

    The same arguments give the same rows, and a longer list begins with a shorter one.
    """
    return [_request(number, seed, kinds[number % len(kinds)], split) for number in range(count)]


def _request(number: int, seed: int, kind: str, split: str) -> Row:
    rng = random.Random(f"calls {seed} {split} {number}")
    words = _Words(rng, split)
    verb, noun = rng.choice(_VERBS), words.new()
    tool, values = _tool(words, verb, noun, _ASKED.get(kind), optional=kind == "optional" or rng.random() < 0.2)
    others = []
    if kind in ("choice", "none"):  # the same verb, the same noun, and strangers
        others = [_tool(words, verb, words.new())[0],
                  _tool(words, rng.choice([other for other in _VERBS if other != verb]), noun)[0]]
        others += [_tool(words, rng.choice(_VERBS), words.new())[0] for _ in range(rng.randint(0, 2))]
    elif rng.random() < 0.5:
        others = [_tool(words, rng.choice(_VERBS), words.new())[0]]
    tools = others if kind == "none" else [tool, *others]
    rng.shuffle(tools)
    said = ", ".join(f"{_phrase(name)} {_said(value)}" for name, value in values.items())
    prompt = rng.choice(_FORMS).format(verb=verb, noun=noun, values=said)
    calls = [] if kind == "none" else [{"name": tool["function"]["name"], "arguments": values}]
    return {"id": f"call_{kind}_{split}_{seed}_{number}", "kind": kind, "system": SYSTEM, "tools": tools,
            "prompt": prompt[0].upper() + prompt[1:], "calls": calls}


def _tool(words: _Words, verb: str, noun: str, asked: Callable[[_Words], _Made] | None = None, optional: bool = False
          ) -> tuple[Row, Row]:
    """A tool, and the arguments of a call of it; an optional parameter may be left out of these."""
    rng = words.rng
    made = [asked(words)] if asked else []
    made += [rng.choice(_SCALARS)(words) for _ in range(rng.randint(0 if asked else 1, 2))]
    rng.shuffle(made)
    named = {rng.choice(("{0}", "{0}_{1}")).format(words.new(), words.new()): one for one in made}
    values = {name: value for name, (_, value) in named.items()}
    required = list(named)
    if optional:
        extra = words.new()
        schema, value = rng.choice(_SCALARS)(words)
        named[extra] = (schema, value)
        if rng.random() < 0.5:
            values[extra] = value
    properties = {name: schema | {"description": f"The {_phrase(name)} of the {noun}."}
                  for name, (schema, _) in named.items()}
    name = rng.choice((f"{verb}_{noun}", f"{verb}{noun.capitalize()}", f"{noun}_{verb}"))
    return {"type": "function", "function": {
        "name": name, "description": f"{verb.capitalize()}s a {noun}.".replace("chs ", "ches "),
        "parameters": {"type": "object", "properties": properties, "required": required}}}, values


def _phrase(name: str) -> str:
    return name.replace("_", " ")


def _said(value: Any) -> str:
    """A value in words; texts in quotation marks, as they are meant letter by letter."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return " and ".join(map(_said, value))
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_said(item)}" for name, item in value.items()) + ")"
    return str(value)
