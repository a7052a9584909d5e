"""Tests of JavaScript and Go under names drawn for one run, and copies of them that must fail.

What a test runner of these languages prints can be printed by the code it tests, which can also read its tests' text.
It does not know, though, which of several copies of a test is the true one: `disguise` puts copies under words drawn
for this run in a file's place, in an order drawn, too. In one of them equality is asserted where there is none; its
text says so, and it catches assertions that do nothing. The others differ in the values that they expect: these are an
arithmetic progression, in which the true one has a place drawn for each test, so that neither order nor size, sign or
length tells it from the others, nor does a test that the code passes anyway say which copy of another test is true;
comments, messages and titles, which may say what is expected, go from all of them.
Which copies pass and which fail is learned from the fixed state (grade.py), and several rounds with draws of their own
leave a blind guess one chance in GROUPS ** ROUNDS for each test.
"""

import dataclasses
import itertools
import posixpath
import random
import re
import zlib
from collections.abc import Mapping, Sequence

GROUPS, ROUNDS = 8, 3  # 1 in 512; copies whose values are exchangeable, and runs
COPIES = GROUPS + 1  # with the inverted one, which is the last
# What is changed: of a test's expected values one, or all; where it has none, its other literals; "unsigned" leaves
# nothing below zero. Later ones are for files that do not compile, or lose tests, with earlier ones.
CHOICES = ("one", "all", "expected", "unsigned")

_JS_TEST = re.compile(r"((?:\b(?:test|it|specify)(?:\.\w+)?|\bt\.test)\(\s*)(['\"`])"
                      r"(?:(\w(?:(?:(?!\2)[\w ,.:;()!?'=+*/<>\[\]-])*(?!\2)[\w.()!?'=+*\]-])?)\2)?")
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
_NUMBER = re.compile(r"(-?)(0|[1-9]\d*)(?:\.(\d+))?")
_CLASSES = ("abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789")
_OPPOSITE = {"true": "false", "false": "true", "null": "undefined", "undefined": "null"}
_JS_COMMENT = re.compile(r"(?m)^[ \t]*//[^\n]*|(?<=[;{},)])[ \t]+//[^\n'\"`]*$")
_JS_WORDS = re.compile(r"'[^'\\\n]*'|\"[^\"\\\n]*\"|`[^`\\$]*`")
_GO_COMMENT = re.compile(r"(\"(?:[^\"\\\n]|\\.)*\"|`[^`]*`|'(?:[^'\\\n]|\\.)*')|//[^\n]*|/\*.*?\*/", re.DOTALL)
_GO_MESSAGE = re.compile(r"(\b\w+\.(?:Error|Fatal|Log|Skip)(f?)\(\s*)(\"(?:[^\"\\\n]|\\.)*\")")
_VERB = re.compile(r"%[-+# 0\d.*\[\]]*[a-zA-Z%]")
# Literals that are no value of a test: comments, modules, sizes and places of arrays, messages, names of subtests.
_NO_VALUE = {"javascript": re.compile(r"//[^\n]*|/\*.*?\*/|\b(?:require|import)\([^\n]*?\)|\bfrom\s+['\"][^\n]*|"
                                      r"`(?:[^`\\]|\\.)*`|\w\[[^\]\n]*\]", re.DOTALL),
             "go": re.compile(r"//[^\n]*|/\*.*?\*/|\[\d*\]|\w\[[^\]\n]*\]|`[^`]*`|"
                              r"\bt\.(?:Run|Log|Error|Fatal|Skip)f?\([^\n]*|\"[^\"\n]*%[^\"\n]*\"", re.DOTALL)}
_LONGEST_CALL = 2000  # characters
_LONGEST_NUMBER = 300  # digits
_MOST_STEP = 9
_JS_EQUALITY = re.compile(r"\b(?:(assert|t)\.(?:strictEqual|equal|deepEqual|deepStrictEqual|same|is|equals)|"
                          r"expect\([^\n]*\)\.(?:to\.)?(?:deep\.)?(?:toBe|toEqual|toStrictEqual|equal|eql))\(")
_GO_VALUE = r"(-?\b\d+(?:\.\d+)?|\"[^\"\\\n]*\"|\btrue|\bfalse)"
_GO_EXPECTED = (re.compile(rf"(?m)^\s*(?:\}} else )?if [^\n]*?[!=]= {_GO_VALUE} \{{"),
                re.compile(rf", {_GO_VALUE},?\s*\}}"),
                re.compile(rf"\b(?:want|expected|exp):\s*{_GO_VALUE}"),
                re.compile(rf"\b(?:assert|require)\.Equal\(\w+, {_GO_VALUE},"))
_GO_OPPOSITES = {"True": "False", "False": "True", "Error": "NoError", "NoError": "Error"}


@dataclasses.dataclass(frozen=True)
class Draw:
    """What one round's values come from: a seed, the round's number, and one of CHOICES."""

    seed: str
    number: int
    choice: str = CHOICES[0]

    def rng(self, *about: object) -> random.Random:
        """The same generator for the same question."""
        return random.Random(" ".join(map(str, (self.seed, self.number, *about))))


def rename(language: str, text: str, word: str, path: str = "") -> str:
    """A test file whose tests carry `word`, letters and digits, in their names; other languages stay as they are.

    Of JavaScript the plain titles are numbers, which `titles` knows by the same `path`.
    """
    if language not in ("javascript", "go"):
        return text
    if language == "go":
        return _GO_NAME.sub(rf"func Test{word}_\1(\2", text)
    numbers = itertools.count()

    def renamed(found: re.Match[str]) -> str:
        number = _number(path, next(numbers))
        return f"{found[1]}{found[2]}{word} " + (f"{number}{found[2]}" if found[3] else "")

    return _JS_TEST.sub(renamed, text)


def titles(language: str, path: str, text: str) -> dict[str, str]:
    """The titles of a JavaScript file's tests, by what `rename` puts in their places."""
    found = enumerate(_JS_TEST.finditer(_silent(language, text))) if language == "javascript" else ()
    return {_number(path, number): test[3] for number, test in found if test[3]}


def _number(path: str, number: int) -> str:
    return f"{zlib.crc32(f'{path} {number}'.encode()):08x}"


def _silent(language: str, text: str) -> str:
    """Tests without comments and messages; what those format stays, as a message without words."""
    if language == "go":
        text = _GO_COMMENT.sub(lambda found: found[1] or " ", text)
        return _GO_MESSAGE.sub(lambda found: f'{found[1]}"{" ".join(found[2] and _VERB.findall(found[3]))}"', text)
    text = _JS_COMMENT.sub("", text)
    spans = []
    for call in _JS_EQUALITY.finditer(text):
        parts = _arguments(text, call.end())
        if call[1] and len(parts) == 3 and _JS_WORDS.fullmatch(text[slice(*parts[2])]):
            spans.append(parts[2])
    for start, end in reversed(spans):
        text = f"{text[:start]}''{text[end:]}"
    return text


def disguise(language: str, path: str, text: str, words: Sequence[str], draw: Draw,
             rng: random.Random) -> dict[str, str]:
    """Files in place of the test file `text`, at `path`.

    Args:
      language: of the file; of others than JavaScript and Go nothing is changed.
      path: where it stands.
      text: what it holds.
      words: COPIES of them, one for each copy; which copy of a test is true depends on `draw` and the test.
      draw: of the values; the same one gives the same.
      rng: draws the order.
    """
    if rename(language, text, words[0]) == text:
        return {}
    order = rng.sample(range(COPIES), COPIES)
    if language == "go":
        def copy(number: int, found: re.Match[str]) -> str:
            part = _silent(language, found[0])
            part = _inverted(language, part) if number == GROUPS else _moved(
                language, part, 0, number, draw, f"{path} {found[1]}")
            return rename(language, part, words[number])

        made = _GO_TEST.sub(lambda found: copy(order[0], found), text)
        made = _GO_NAME.sub(lambda found: found[0] if found[1].startswith(tuple(words)) else rename(
            language, found[0], words[order[0]]), made)
        copies = [copy(number, found) for number in order[1:] for found in _GO_TEST.finditer(text)]
        return {path: made + "\n" + "\n".join(copies)}
    text = _silent(language, text)
    stem, dot, endings = posixpath.basename(path).partition(".")
    places = [path, *(posixpath.join(posixpath.dirname(path), f"{stem}-{rng.getrandbits(40):010x}{dot}{endings}")
                      for _ in order[1:])]
    return {place: rename(language, _inverted(language, text) if number == GROUPS else _javascript_moved(
        text, number, draw, path), words[number], path) for place, number in zip(places, order)}


def _inverted(language: str, text: str) -> str:
    if language == "go":
        return _GO_CALL.sub(_go_call, _GO_CONDITION.sub(_go_condition, text))
    return _JS_EXPECT.sub(_js_expect, _JS_CALL.sub(lambda found: f"{found[1]}{_JS_INVERSE[found[2]]}(", text))


def _javascript_moved(text: str, group: int, draw: Draw, path: str) -> str:
    """The text with each test's values, up to the next test's, those of a group."""
    starts = [found.start() for found in _JS_TEST.finditer(text)]
    parts = [text[:starts[0]]]
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(text)])):
        parts.append(_moved("javascript", text[start:end], _title(text[start:end]), group, draw, f"{path} {number}"))
    return "".join(parts)


def _title(part: str) -> int:
    """Where the title ends of the test that begins a part."""
    found = _JS_TEST.match(part)
    if found is None or found[3]:
        return found.end() if found else 0
    return max(0, part.find(found[2], found.end()) + 1)


def _moved(language: str, part: str, start: int, group: int, draw: Draw, test: str) -> str:
    """A test with values of one group: moved by as much as the group is away from the true one.

    Args:
      language: of the test.
      part: its text.
      start: where to look for values.
      group: 0 to GROUPS - 1.
      draw: of the round.
      test: names it.
    """
    spans = [span for span in _expected(language, part) if span[0] >= start]
    if not spans and draw.choice in ("one", "all"):
        spans = _others(language, part, start)
    elif draw.choice == "one" and (able := [span for span in spans if _moves(part[slice(*span)])]):
        turn = Draw(draw.seed, 0).rng(test, "turn").sample(able, len(able))  # another one in each round
        spans = [turn[draw.number % len(turn)]]
    moves = any(_moves(part[slice(*span)]) for span in spans)
    # The nearest neighbours at first: among them no value is the only small or short one.
    steps = {span: 1 if draw.choice == "one" else draw.rng(test, span, "step").randint(1, _MOST_STEP) for span in spans}
    below = GROUPS - 1  # groups that may lie below the true one
    if draw.choice == "unsigned":
        below = min([below, *(int(part[slice(*span)].partition(".")[0]) // steps[span] for span in spans
                              if _NUMBER.fullmatch(part[slice(*span)]) and part[span[0]] != "-")])
    distance = group - draw.rng(test, "place").randint(0, below)
    opposite = _split(draw.rng(test, "split"))[group]
    out, at = [], 0
    for span in spans:
        if span[0] < at:
            continue
        literal = part[slice(*span)]
        if moves:
            literal = _shifted(literal, distance, steps[span], draw.choice == "one", draw.rng(test, span, "letter"))
        elif opposite:
            literal = _OPPOSITE.get(literal, literal)
        out += [part[at:span[0]], literal]
        at = span[1]
    return "".join(out) + part[at:]


def _split(rng: random.Random) -> list[bool]:
    """A bit for each group, the true value or the other, so that how many have which says nothing."""
    while len(set(bits := [rng.random() < 0.5 for _ in range(GROUPS)])) < 2:
        pass
    return bits


def _moves(literal: str) -> bool:
    """Whether a literal has a place in a progression: a number, or a text with a letter or digit."""
    if _NUMBER.fullmatch(literal):
        return len(literal) <= _LONGEST_NUMBER
    return literal[0] in "'\"" and any(char in alphabet for char in literal for alphabet in _CLASSES)


def _shifted(literal: str, distance: int, step: int, fine: bool, rng: random.Random) -> str:
    """A number `distance` steps away, of ones or (`fine`) of its last digit; or a text with another letter or digit."""
    if not distance or not _moves(literal):
        return literal
    if found := _NUMBER.fullmatch(literal):
        digits = found[3] or ""
        value = int(found[1] + found[2] + digits) + distance * step * (1 if fine else 10 ** len(digits))
        text = f"{abs(value):0{len(digits) + 1}d}"
        text = f"{text[:-len(digits)]}.{text[-len(digits):]}" if digits else text
        return f"-{text}" if value < 0 else text
    places = [(at, alphabet) for at, char in enumerate(literal) for alphabet in _CLASSES if char in alphabet]
    inner = [(at, alphabet) for at, alphabet in places  # far enough from the ends, where it would be the first or last
             if GROUPS <= alphabet.index(literal[at]) + 1 <= len(alphabet) - GROUPS + 1]
    at, alphabet = rng.choice(inner or places)
    moved = alphabet[(alphabet.index(literal[at]) + distance) % len(alphabet)]
    return literal[:at] + moved + literal[at + 1:]


def _others(language: str, part: str, start: int) -> list[tuple[int, int]]:
    """Where a test's literals stand that are no message, name, size or module; no minus that may be an operator."""
    hidden = [found.span() for found in _NO_VALUE[language].finditer(part)]
    spans = []
    for found in _LITERAL.finditer(part, start):
        first, end = found.span()
        if part[first] == "-" and re.search(r"[\w)\]]\s*$", part[:first]):
            continue
        if not any(first < stop and end > begin for begin, stop in hidden):
            spans.append((first, end))
    return spans


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


def original(language: str, name: str, word: str, known: Mapping[str, str]) -> str | None:
    """The name of a test before it carried `word`, where `known` are `titles`; None where it does not."""
    if language == "go":
        return name.replace(f"Test{word}_", "Test") if f"Test{word}_" in name else None
    if f"{word} " not in name:
        return None
    name = re.sub(rf"{word} ([0-9a-f]{{8}})\b", lambda found: known.get(found[1], found[0]), name)
    return name.replace(f"{word} ", "")


def _js_expect(found: re.Match[str]) -> str:
    flipped = {"to.": "not.to.", "not.to.": "to.", "not.": "", "": "not."}
    return found[1] + flipped[found[2]]


def _go_condition(found: re.Match[str]) -> str:
    return found[1] + {"!=": "==", "==": "!="}[found[2]]


def _go_call(found: re.Match[str]) -> str:
    kind = found[3]
    if kind in _GO_OPPOSITES:
        return f"{found[1]}{_GO_OPPOSITES[kind]}("
    return f"{found[1]}{'' if found[2] else 'Not'}{kind}("
