"""Rows of problems, read and checked line by line, as Tasks; and where they are checked."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax import files
from qcn_jax.envs import names, patches
from qcn_jax.envs.problems import rules
from qcn_jax.envs.sandbox.repository import RepositorySpec
from qcn_jax.envs.tasks.schema import MAX_TIMEOUT, Task, read_rows
from qcn_jax.errors import UserError

REPOSITORY = "problems"  # of all of them: the programs that call answers
KINDS = ("stdio", "library", "sql", "secure", "instructions")
LANGUAGES = ("python", "javascript", "go")
ENDINGS = {"python": "py", "javascript": "js", "go": "go", "sql": "sql", "text": "txt"}
TIMEOUT = 5.0  # seconds of one test, where a row names none
MAX_OUTPUT = 48_000  # characters that a test may expect: sandboxes pass on 64 KiB
_FIELDS = ("id", "kind", "language", "prompt", "tests", "rules", "solution", "timeout", "inputs", "solutions")
_WISHES = ("output", "returns", "raises", "refuses", "without", "rows")


def spec(setup: Sequence[str] = ()) -> RepositorySpec:
    """The repository in which problems are checked; `setup` installs languages (docker)."""
    return RepositorySpec(REPOSITORY, str(pathlib.Path(__file__).parent / "inside"), setup=tuple(setup))


@dataclasses.dataclass(frozen=True)
class Checks:
    """What decides about answers to one problem.

    Attributes:
      language: of LANGUAGES, sql or text.
      tests: each has an input (`input`, `call` with function and args, or `setup` of a database) and one of _WISHES;
        `files` are written before, {secret} in them and in `without` is drawn anew each time.
      rules: of the text of an answer (see rules.py).
    """

    language: str
    tests: tuple[Mapping[str, Any], ...]
    rules: tuple[Mapping[str, Any], ...]

    @property
    def path(self) -> str:
        """The file that holds an answer."""
        return f"answer.{ENDINGS[self.language]}"


def checks_of(task: Task) -> Checks:
    """The checks of a problem."""
    found = json.loads(task.checks)
    return Checks(found["language"], tuple(found["tests"]), tuple(found["rules"]))


def is_problem(row: Any) -> bool:
    """Whether a row is one of a problem and not of a task."""
    return isinstance(row, dict) and "prompt" in row and "problem_statement" not in row


def holds_problems(path: str | os.PathLike[str]) -> bool:
    """Whether the first row of a file is a problem's."""
    _, first = next(iter(files.read_numbered(path, [])), (0, None)) if files.is_file(path) else (0, None)
    return is_problem(first)


def read(path: str | os.PathLike[str], faults: list[str] | None = None) -> list[Task]:
    """Problems of a JSONL file as Tasks; a bad row raises UserError, or becomes a line of `faults`."""
    return read_rows(path, files.read_numbered(path, faults), to_task, faults)


def to_task(row: Mapping[str, Any], where: str = "problem") -> Task:
    """A row as a Task.

    Raises:
      UserError: a field is missing, unknown or malformed; names `where`, the field and what is allowed.
    """
    fault = _fault(row)
    if fault:
        raise UserError(f"{where}: {fault}")
    language = row.get("language", _allowed(row["kind"])[0])
    tests, wanted = list(row.get("tests", ())), list(row.get("rules", ()))
    checks = {"language": language, "tests": tests, "rules": wanted}
    solution = row.get("solution", "")
    gold = patches.make_diff({}, {f"answer.{ENDINGS[language]}": solution.rstrip("\n") + "\n"}) if solution else ""
    ids = [f"test {number}" for number in range(len(tests))] + [f"rule {number}" for number in range(len(wanted))]
    return Task.from_json({
        "instance_id": row["id"], "repo": REPOSITORY, "base_commit": "", "patch": gold, "test_patch": "",
        "problem_statement": row["prompt"], "FAIL_TO_PASS": ids, "PASS_TO_PASS": [], "strategy": "problem",
        "kind": row["kind"], "path": f"answer.{ENDINGS[language]}", "timeout": row.get("timeout", TIMEOUT),
        "language": language if language in LANGUAGES else "python", "checks": json.dumps(checks)}, where)


def _allowed(kind: str) -> tuple[str, ...]:
    """Languages of a kind's answers, the one that is meant without a field first."""
    return {"sql": ("sql",), "instructions": ("text", *LANGUAGES), "stdio": LANGUAGES}.get(kind, LANGUAGES[:2])


def _fault(row: Mapping[str, Any]) -> str:
    """What is wrong with a row, which is a JSON object; "" where nothing is."""
    unknown = sorted(set(row) - set(_FIELDS))
    if unknown:
        return f"field {names.shown(unknown[0])} is unknown; allowed: {', '.join(_FIELDS)}"
    for name in ("id", "kind", "prompt"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return f"field {name} must be text"
    if row["kind"] not in KINDS:
        return f"field kind must be one of {', '.join(KINDS)}, got {names.shown(row['kind'])}"
    allowed = _allowed(row["kind"])
    if row.get("language", allowed[0]) not in allowed:
        return f"field language must be one of {', '.join(allowed)} for kind {row['kind']}"
    if not isinstance(row.get("solution", ""), str):
        return "field solution must be text"
    timeout = row.get("timeout", TIMEOUT)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= MAX_TIMEOUT:
        return f"field timeout must be above 0 and at most {MAX_TIMEOUT:.0f}"
    for name in ("tests", "rules"):
        if not isinstance(row.get(name, []), list) or not all(isinstance(one, dict) for one in row.get(name, [])):
            return f"field {name} must be a list of objects"
    if not row.get("tests") and not row.get("rules"):
        return "field tests is empty; a problem needs tests or rules"
    for number, test in enumerate(row.get("tests", ())):
        if fault := _test_fault(row["kind"], test):
            return f"field tests[{number}] {fault}"
    for number, rule in enumerate(row.get("rules", ())):
        if fault := rules.fault(rule):
            return f"field rules[{number}] {fault}"
    return ""


def _test_fault(kind: str, test: Mapping[str, Any]) -> str:
    given = {"stdio": "input", "sql": "setup"}.get(kind, "call")
    wanted = {"stdio": ("output",), "sql": ("rows",)}.get(kind, ("returns", "raises", "refuses", "without"))
    if given == "call":
        call = test.get("call")
        if not (isinstance(call, dict) and isinstance(call.get("function"), str) and call["function"].isidentifier()
                and isinstance(call.get("args"), list)):
            return "needs call, an object with function (a name) and args (a list)"
    elif not isinstance(test.get(given), str):
        return f"needs {given}, a text"
    if sum(name in test for name in _WISHES) != 1 or not any(name in test for name in wanted):
        return f"needs one of {', '.join(wanted)}"
    kinds = {"output": str, "raises": str, "rows": list, "without": list}
    name = next(name for name in wanted if name in test)
    if name in kinds and not isinstance(test[name], kinds[name]):
        return f"has {name} that is no {'text' if kinds[name] is str else 'list'}"
    if len(json.dumps(test[name])) > MAX_OUTPUT:
        return f"expects more than {MAX_OUTPUT} characters"
    placed = test.get("files", {})
    if not isinstance(placed, dict) or not all(isinstance(text, str) and not names.path_fault(path)
                                               for path, text in placed.items()):
        return "has files that are no object of paths and texts"
    return ""
