"""Programs of JavaScript and Go that show a defect, what they give in a state, and held-out tests made of such calls.

The counterpart of issue.py and heldout.py: recorded calls of exported functions are repeated as users would write them,
in both states, so that what a statement says is true; calls with other arguments become tests that no agent sees.
"""

import dataclasses
import json
import posixpath
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax import syntax
from qcn_jax.envs.synthesis import heldout
from qcn_jax.envs.synthesis.build.container import Container
from qcn_jax.envs.synthesis.languages import LANGUAGES, go_module, go_package, record
from qcn_jax.envs.synthesis.statement import Observation
from qcn_jax.envs.testpaths import is_test_path

HELD_OUT = "held out"  # of these tests' names; in Go TestHeldOut
_SECONDS = 180.0  # for all programs of a task, Go's compiler included; what ends takes far less
_EACH = 40  # seconds of one process of JavaScript
_MODERN = re.compile(r"(?m)^(?:import\b|export\b)")
_WHOLE = {"int": 63, "int8": 7, "int16": 15, "int32": 31, "int64": 63}
_ERROR = re.compile(r'(?:^|, )error "')  # as record.py writes Go's errors, which have no literal
_SIZES = {**_WHOLE, **{f"u{name}": bits + 1 for name, bits in _WHOLE.items()}}
_RUN_JAVASCRIPT = """
function __qcnRun(number, call) {
  let out;
  try {
    out = ['gives', __qcnText(call())];
  } catch (error) {
    out = ['raises', `${error.name}: ${error.message}`];
  }
  console.log('\\nMARK' + JSON.stringify([number, ...out]));
}
"""
Result = tuple[str, str, str]  # program, "gives" or "raises", text


def of_calls(language: str, path: str, expressions: Sequence[str], function: str, files: Mapping[str, str]
             ) -> list[str]:
    """Programs that end in each expression, in every form in which the function may be had; the last line is the call.

    Args:
      language: javascript or go.
      path: of the function's file.
      expressions: calls, as `calls` writes them.
      function: its name.
      files: texts by path.
    """
    if language == "go":
        name = go_import(path, files)
        return [f'import "{name}"\n{text}' for text in expressions] if name and function[0].isupper() else []
    place = f"./{path}"
    heads = (f"const {{ {function} }} = require('{place}');", f"const {function} = require('{place}');")
    if _MODERN.search(files.get(path, "")):
        heads = (f"import {{ {function} }} from '{place}';", f"import {function} from '{place}';")
    return [f"{head}\n{text}" for text in expressions for head in heads]


def go_import(path: str, files: Mapping[str, str]) -> str:
    """The import path of a Go file's package; "" where it is a program, or there is no module."""
    module = go_module(files)
    if not module or go_package(files.get(path, "")) in ("", "main"):
        return ""
    return posixpath.normpath(posixpath.join(module, posixpath.dirname(path)))


def call(language: str, path: str, function: str, arguments: Sequence[str], files: Mapping[str, str]) -> str:
    """A call as users write it; of a Go function with its package's name."""
    package = go_package(files.get(path, "")) if language == "go" else ""
    return f"{package + '.' if package else ''}{function}({', '.join(arguments)})"


def run(container: Container, language: str, programs: Sequence[str]) -> list[Result | None]:
    """What each program's last line gives in the container's present state, twice the same; None where that fails."""
    if not programs:
        return []
    mark = uuid.uuid4().hex
    runs = [(_run_go if language == "go" else _run_javascript)(container, programs, mark) for _ in range(2)]
    return [first if first == second else None for first, second in zip(*runs)]


def _read(output: str, mark: str, programs: Sequence[str]) -> list[Result | None]:
    found: list[Result | None] = [None] * len(programs)
    for line in output.splitlines():
        if line.startswith(mark):
            try:
                number, verb, text = json.loads(line[len(mark):])
            except (ValueError, TypeError, RecursionError):
                continue
            known = isinstance(number, int) and 0 <= number < len(programs) and verb in ("gives", "raises")
            if known and isinstance(text, str) and len(text) <= record.LONGEST:
                found[number] = programs[number], verb, text
    return found


def _run_javascript(container: Container, programs: Sequence[str], mark: str) -> list[Result | None]:
    """One process for each way to have the function."""
    groups: dict[str, list[str]] = {}
    for number, program in enumerate(programs):
        head, _, last = program.rpartition("\n")
        groups.setdefault(head, []).append(f"__qcnRun({number}, () => {last});")
    files, commands = {}, []
    for at, (head, calls) in enumerate(groups.items()):
        name = f"qcn-{mark}-{at}.{'mjs' if head.startswith('import') else 'cjs'}"
        files[name] = "\n".join([head, record.JAVASCRIPT, _RUN_JAVASCRIPT.replace("MARK", mark), *calls, ""])
        commands.append(f"timeout {_EACH} node {name}")
    try:
        container.write(files)
        return _read(container.run_tests("\n".join(commands), _SECONDS).output, mark, programs)
    finally:
        container.write(dict.fromkeys(files))


def _run_go(container: Container, programs: Sequence[str], mark: str) -> list[Result | None]:
    lines = sorted({line for program in programs for line in program.split("\n")[:-1]})
    calls = "\n".join(f'\tqcnRun({number}, func() []interface{{}} {{ return qcnAll({program.split(chr(10))[-1]}) }})'
                      for number, program in enumerate(programs))
    text = "\n".join(['package main\nimport ("encoding/json"; "fmt"; "reflect"; "strings")', *lines, record.GO, """
func qcnAll(values ...interface{}) []interface{} { return values }

func qcnRun(number int, call func() []interface{}) {
	verb, text := "gives", ""
	defer func() {
		if reason := recover(); reason != nil {
			verb, text = "raises", fmt.Sprintf("panic: %v", reason)
		}
		if line, err := json.Marshal([]interface{}{number, verb, text}); err == nil && verb != "" {
			fmt.Println("\\nMARK" + string(line))
		}
	}()
	texts := []string{}
	for _, value := range call() {
		text, good := qcnText(value)
		if !good {
			verb = ""
		}
		texts = append(texts, text)
	}
	text = strings.Join(texts, ", ")
}
""".replace("MARK", mark), f"func main() {{\n{calls}\n}}\n"])
    path = f"qcn_{mark}/main.go"
    try:
        container.write({path: text})
        return _read(container.run_tests(f"go run ./qcn_{mark}", _SECONDS).output, mark, programs)
    finally:
        container.write({path: None})


# Held-out tests.


def unseen(language: str, path: str, function: str, calls: Sequence[Mapping[str, Any]], seed: str,
           files: Mapping[str, str]) -> list[str]:
    """Calls with other arguments than the recorded ones, as users write them."""
    made: dict[str, None] = {}
    known = {call(language, path, function, [text for name, text in one["args"] if name != "self"], files)
             for one in calls}
    for one in calls:
        values, types = _values(one), one.get("types") or [""] * len(one["args"])
        if values is None or "." in function or len(values) != len(types):
            continue
        names = [str(number) for number in range(len(values))]
        arguments = tuple((name, repr(value)) for name, value in zip(names, values))
        seen = Observation(path, function, arguments, ("", ""), ("", ""))
        for varied in heldout.calls([seen], f"{seed}{len(made)}"):
            texts = [literal(language, syntax.literal(varied["arguments"][name]), kind)
                     for name, kind in zip(names, types)]
            if None not in texts:
                made.setdefault(call(language, path, function, [text for text in texts if text is not None], files))
    return [text for text in made if text not in known][:heldout.VARIANTS]


def _values(one: Mapping[str, Any]) -> list[Any] | None:
    """A recorded call's arguments, where JSON holds them as they were."""
    try:
        values = json.loads(one.get("values") or "null")
    except (ValueError, RecursionError):
        return None
    texts = [text for name, text in one["args"] if name != "self"]
    if not isinstance(values, list) or len(values) != len(texts) or any(
            value is None and text != "null" for value, text in zip(values, texts)):
        return None  # NaN and undefined, which JSON has not
    return values


def literal(language: str, value: Any, kind: str = "") -> str | None:
    """A value as source; in Go one of type `kind`. None where it has no such form."""
    if language == "javascript":
        return json.dumps(value, ensure_ascii=False)
    if kind == "bool" and isinstance(value, bool):
        return "true" if value else "false"
    if kind in _SIZES and isinstance(value, int) and not isinstance(value, bool):
        low = 0 if kind.startswith("u") else -(1 << _SIZES[kind])
        return str(value) if low <= value < 1 << _SIZES[kind] else None
    if kind in ("float32", "float64") and isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value)
    if kind == "string" and isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if kind.startswith("[]") and isinstance(value, list):
        parts = [literal(language, one, kind[2:]) for one in value]
        return None if None in parts else f"{kind}{{{', '.join(map(str, parts))}}}"
    if (inner := re.fullmatch(r"map\[string\](.+)", kind)) and isinstance(value, dict):
        pairs = {key: literal(language, one, inner[1]) for key, one in value.items()}
        return None if None in pairs.values() else f"{kind}{{" + ", ".join(
            f"{json.dumps(key, ensure_ascii=False)}: {text}" for key, text in pairs.items()) + "}"
    return None


@dataclasses.dataclass(frozen=True)
class TestFile:
    """A file of held-out tests, and how their names begin in results."""

    path: str
    text: str
    marks: str


def test_file(language: str, command: str, path: str, results: Sequence[Result], files: Mapping[str, str]
              ) -> TestFile | None:
    """Tests of what programs gave in the fixed state; None for a runner that is not known."""
    if language == "go":
        return _go_tests(path, results, files)
    beside = next((name for name in sorted(files) if name.endswith(LANGUAGES[language].endings) and is_test_path(name)
                   and "/" in name), None)
    test = "test" if "node --test" in command or "jest" in command else "it" if "mocha" in command else ""
    if beside is None or not test:
        return None
    modern = bool(_MODERN.search(files[beside]))
    wanted = [("assert", "assert")] + ([("test", "node:test")] if "node --test" in command else [])
    lines = [f"import {name} from '{module}';" if modern else f"const {name} = require('{module}');"
             for name, module in wanted]
    folder, name = posixpath.split(beside)
    heads = {program.split("\n")[0] for program, *_ in results}
    up = posixpath.relpath(".", folder)
    for head in sorted(heads):
        found = re.fullmatch(r"(?:const|import) (.+?) (?:= require\(|from )'\./(.+?)'\)?;", head)
        if found is None:
            return None
        lines.append(f"import {found[1]} from '{up}/{found[2]}';" if modern else
                     f"const {found[1]} = require('{up}/{found[2]}');")
    for number, (program, verb, text) in enumerate(results):
        if verb == "raises" and not re.match(r"\w+:", text):
            continue
        last = program.split("\n")[-1]
        body = (f"assert.deepStrictEqual({last}, {text})" if verb == "gives" else
                f"assert.throws(() => {last}, {{ name: '{text.partition(':')[0]}' }})")
        lines.append(f"{test}('{HELD_OUT} {number}', () => {{\n  {body};\n}});")
    ending = re.search(r"((?:[._-](?:test|spec))?\.[cm]?js)$", name)
    start = re.match(r"(?:test[-_.])?", name)
    return TestFile(posixpath.join(folder, f"{start[0] if start else ''}held_out{ending[1] if ending else '.js'}"),
                    "\n".join(lines) + "\n", HELD_OUT)


def _go_tests(path: str, results: Sequence[Result], files: Mapping[str, str]) -> TestFile | None:
    package = go_package(files[path])
    kept = [(program, text) for program, verb, text in results if verb == "gives" and not _ERROR.search(text)]
    if not package or not kept:
        return None
    heads = sorted({program.split("\n")[0].removeprefix("import ") for program, _ in kept})
    lines = [f"package {package}_test", "", "import (", '\t"fmt"', '\t"testing"', "",
             *(f"\t{head}" for head in heads), ")", "", "func heldOut(values ...interface{}) string {",
             '\treturn fmt.Sprintf("%#v", values)', "}"]
    for number, (program, text) in enumerate(kept):
        last = program.split("\n")[-1]
        lines += ["", f"func TestHeldOut{number}(t *testing.T) {{",
                  f"\tif got := heldOut({last}); got != heldOut({text}) {{", "\t\tt.Error(got)", "\t}", "}"]
    return TestFile(posixpath.join(posixpath.dirname(path), "held_out_test.go"), "\n".join(lines) + "\n", "TestHeldOut")

