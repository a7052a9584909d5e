"""Tests of JavaScript and Go under names drawn for one run, and copies of them that must fail.

What a test runner of these languages prints can be printed by the code it tests. That code does not know, though, which
names its tests have this time, nor which of them claim the opposite of the truth: `rename` gives all tests of a file
names that carry a word, `invert` gives a copy with another word in which equality is asserted where there is none.
Which of the copies fail is learned from the fixed state.
"""

import posixpath
import re

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
_GO_OPPOSITE = {"True": "False", "False": "True", "Error": "NoError", "NoError": "Error"}


def rename(language: str, text: str, word: str) -> str:
    """A test file whose tests carry `word`, letters and digits, in their names; other languages stay as they are."""
    if language not in ("javascript", "go"):
        return text
    if language == "go":
        return _GO_NAME.sub(rf"func Test{word}_\1(\2", text)
    return _JS_TEST.sub(rf"\1\2{word} ", text)


def invert(language: str, path: str, text: str, renamed: str, word: str) -> dict[str, str]:
    """Files that add inverted copies of the tests of `text`, at `path`, which `renamed` replaces."""
    if language == "go":
        copies = [rename(language, found[0], word) for found in _GO_TEST.finditer(text)]
        copies = [_GO_CALL.sub(_go_call, _GO_CONDITION.sub(_go_condition, copy)) for copy in copies]
        return {path: renamed + "\n" + "\n".join(copies)}
    copy = _JS_EXPECT.sub(_js_expect, _JS_CALL.sub(lambda found: f"{found[1]}{_JS_INVERSE[found[2]]}(", text))
    stem, dot, endings = posixpath.basename(path).partition(".")
    place = posixpath.join(posixpath.dirname(path), f"{stem}-{word}{dot}{endings}")
    return {path: renamed, place: rename(language, copy, word)}


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
