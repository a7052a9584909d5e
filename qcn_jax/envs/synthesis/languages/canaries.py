"""Tests of JavaScript and Go under names drawn for one run, and copies of them that must fail.

What a test runner of these languages prints can be printed by the code it tests, which can also read its tests' text.
It does not know, though, which of several copies of a test is the true one: `disguise` gives a file's tests names that
carry a word drawn for this run, and beside them copies under other words, in an order drawn, too. In one of them
equality is asserted where there is none; in the others what is expected is another value, so that nothing in their text
tells them from the true one. Which of the copies fail is learned from the fixed state.
"""

import posixpath
import random
import re
from collections.abc import Sequence

MUTATED = 3  # copies that expect other values; whoever guesses has one chance in four for each test

_JS_TEST = re.compile(r"((?:\b(?:test|it|specify)(?:\.\w+)?|\bt\.test)\(\s*)(['\"`])")
_JS_INVERSE = {"strictEqual": "notStrictEqual", "equal": "notEqual", "deepEqual": "notDeepEqual",
               "deepStrictEqual": "notDeepStrictEqual", "throws": "doesNotThrow", "same": "notSame", "is": "not",
               "match": "doesNotMatch"}
_JS_INVERSE |= {inverse: name for name, inverse in _JS_INVERSE.items()}
_JS_CALL = re.compile(r"\b((?:assert|t)\.)(" + "|".join(sorted(_JS_INVERSE, key=len, reverse=True)) + r")\(")
_JS_EXPECT = re.compile(r"(\bexpect\([^\n]*\)\.)(to\.|not\.to\.|not\.|)(?=\w)")
_GO_TEST = re.compile(r"(?m)^func Test(\w*)\((\w+) \*testing\.T\) \{\n(?:(?!^\}).*\n)*?^\}\n?")
_GO_NAME = re.compile(r"(?m)^func Test(\w*)\((\w+ \*testing\.T\))")
_GO_CONDITION = re.compile(r"(?m)^(\s*(?:\} else )?if [^\n]*?)(!=|==)")
_GO_CALL = re.compile(r"\b((?:assert|require)\.)(Not)?(Equal|Nil|Empty|True|False|Error|NoError)\(")
_LITERAL = re.compile(r"-?\b\d+(?:\.\d+)?\b|\b(?:true|false|null|undefined|nil)\b|'[^'\\\n]*'|\"[^\"\\\n]*\"")
_LONGEST_CALL = 2000  # characters
_JS_EQUALITY = re.compile(r"\b(?:(assert|t)\.(?:strictEqual|equal|deepEqual|deepStrictEqual|same|is|equals)|"
                          r"expect\([^\n]*\)\.(?:to\.)?(?:deep\.)?(?:toBe|toEqual|toStrictEqual|equal|eql))\(")
_GO_VALUE = r"(-?\b\d+(?:\.\d+)?|\"[^\"\\\n]*\"|\btrue|\bfalse)"
_GO_EXPECTED = (re.compile(rf"(?m)^\s*(?:\}} else )?if [^\n]*?[!=]= {_GO_VALUE} \{{"),
                re.compile(rf", {_GO_VALUE},?\s*\}}"),
                re.compile(rf"\b(?:want|expected|exp):\s*{_GO_VALUE}"),
                re.compile(rf"\b(?:assert|require)\.Equal\(\w+, {_GO_VALUE},"))
_GO_OPPOSITE = {"True": "False", "False": "True", "Error": "NoError", "NoError": "Error"}


def rename(language: str, text: str, word: str) -> str:
    """A test file whose tests carry `word`, letters and digits, in their names; other languages stay as they are."""
    if language not in ("javascript", "go"):
        return text
    if language == "go":
        return _GO_NAME.sub(rf"func Test{word}_\1(\2", text)
    return _JS_TEST.sub(rf"\1\2{word} ", text)


def disguise(language: str, path: str, text: str, words: Sequence[str], seed: str,
             rng: random.Random) -> dict[str, str]:
    """Files in place of the test file `text`, at `path`.

    Args:
      language: of the file; of others than JavaScript and Go nothing is changed.
      path: where it stands.
      text: what it holds.
      words: one for the true tests, one for inverted ones, and one for each copy that expects other values.
      seed: of those values; the same seed gives the same.
      rng: draws the order.
    """
    if rename(language, text, words[0]) == text:
        return {}

    def copy(number: int, part: str) -> str:
        if number == 1:
            part = _inverted(language, part)
        elif number > 1:
            part = _expecting_others(language, part, random.Random(f"{seed} {path}"), number)
        return rename(language, part, words[number])

    order = rng.sample(range(len(words)), len(words))
    if language == "go":
        made = _GO_TEST.sub(lambda found: copy(order[0], found[0]), text)
        made = _GO_NAME.sub(lambda found: found[0] if found[1].startswith(tuple(words)) else rename(
            language, found[0], words[0]), made)
        copies = [copy(number, found[0]) for number in order[1:] for found in _GO_TEST.finditer(text)]
        return {path: made + "\n" + "\n".join(copies)}
    stem, dot, endings = posixpath.basename(path).partition(".")
    places = [path, *(posixpath.join(posixpath.dirname(path), f"{stem}-{rng.getrandbits(40):010x}{dot}{endings}")
                      for _ in order[1:])]
    return {place: copy(number, text) for place, number in zip(places, order)}


def _inverted(language: str, text: str) -> str:
    if language == "go":
        return _GO_CALL.sub(_go_call, _GO_CONDITION.sub(_go_condition, text))
    return _JS_EXPECT.sub(_js_expect, _JS_CALL.sub(lambda found: f"{found[1]}{_JS_INVERSE[found[2]]}(", text))


def _expecting_others(language: str, text: str, rng: random.Random, number: int) -> str:
    """The text of tests with other values in the places of expected ones; each `number` has its own."""
    out, at = [], 0
    for start, end in _expected(language, text):
        if start >= at:
            out += [text[at:start], _other(text[start:end], rng.sample(range(1, 10), 9)[number])]
            at = end
    return "".join(out) + text[at:]


def _other(literal: str, shift: int) -> str:
    if re.fullmatch(r"-?\d+", literal):
        return str(int(literal) + shift)
    if re.fullmatch(r"-?\d+\.\d+", literal):
        return str(float(literal) + shift)
    if literal in ("true", "false"):
        return "false" if literal == "true" else "true"
    return str(shift) if literal in ("null", "nil", "undefined") else f"{literal[:-1]}{chr(96 + shift)}{literal[-1]}"


def _expected(language: str, text: str) -> list[tuple[int, int]]:
    """Where literals stand that tests expect: (start, end), in order."""
    if language == "go":  # of a table's rows the last one, by habit
        return sorted(found.span(1) for form in _GO_EXPECTED for found in form.finditer(text))
    found = []
    for call in _JS_EQUALITY.finditer(text):
        parts = _arguments(text, call.end())
        part = parts[1] if call[1] and len(parts) > 1 else parts[0] if not call[1] and parts else None
        if part is not None and (literals := list(_LITERAL.finditer(text, *part))) and (
                literals[0].span() == part or text[part[0]] in "[{"):
            found.append(literals[-1].span())
    return sorted(found)


def _arguments(text: str, at: int) -> list[tuple[int, int]]:
    """Where the arguments of a call stand whose parenthesis opens before `at`; blanks around them are left out."""
    parts, depth, start, quote = [], 0, at, ""
    for place in range(at, min(len(text), at + _LONGEST_CALL)):
        char = text[place]
        if quote:
            quote = "" if char == quote and text[place - 1] != "\\" else quote
        elif char in "'\"`":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ",)]}" and (char != "," or not depth):
            if char == "," or not depth:
                part = text[start:place]
                if part.strip():
                    parts.append((start + len(part) - len(part.lstrip()), start + len(part.rstrip())))
                start = place + 1
                if char != ",":
                    return parts
            else:
                depth -= 1
    return []


def original(language: str, name: str, word: str) -> str | None:
    """The name of a test before it carried `word`; None where it does not."""
    mark = f"Test{word}_" if language == "go" else f"{word} "
    return name.replace(mark, "Test" if language == "go" else "") if mark in name else None


def _js_expect(found: re.Match[str]) -> str:
    flipped = {"to.": "not.to.", "not.to.": "to.", "not.": "", "": "not."}
    return found[1] + flipped[found[2]]


def _go_condition(found: re.Match[str]) -> str:
    return found[1] + {"!=": "==", "==": "!="}[found[2]]


def _go_call(found: re.Match[str]) -> str:
    kind = found[3]
    if kind in _GO_OPPOSITE:
        return f"{found[1]}{_GO_OPPOSITE[kind]}("
    return f"{found[1]}{'' if found[2] else 'Not'}{kind}("
