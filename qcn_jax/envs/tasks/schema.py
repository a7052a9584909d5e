"""A task: a repository state with a defect, a statement, and the tests that decide. SWE-bench's schema.

A row of tasks.jsonl has SWE-bench's fields under their names, plus a few of ours that other readers ignore:
`strategy` and `kind` (how the task was made), `image_name` and `bug_patch` as in SWE-smith, `function` (the
qualified name seen misbehaving), `path` (its file), `timeout`, scores, and held-out tests. Tasks whose tests are not
pytest's carry release 5's `eval_script` and `log_parser`, and `language`.
"""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from qcn_jax import files
from qcn_jax.envs import names
from qcn_jax.errors import UserError

PAGES = "web"  # in the place of a language: pages, tested in a browser (envs/web)
LANGUAGES = ("python", "javascript", "go", PAGES)  # that tasks of our own can be in (synthesis/languages)
# In the place of a log parser: the tests of the Harbor folder that `repo` is decide (harbor_runs.py).
FOLDER_GRADER = "harbor"
MAX_TIMEOUT = 86_400.0  # seconds, a day: whoever wrote a row may not hold a worker for longer
TEST_LISTS = frozenset({"FAIL_TO_PASS", "PASS_TO_PASS", "HELD_OUT_FAIL_TO_PASS", "HELD_OUT_PASS_TO_PASS"})


@dataclasses.dataclass(frozen=True)
class Task:
    """One verifiable task.

    `base_commit` names the state the agent starts from: the source distribution's content hash with
    `bug_patch` applied. `patch` is the gold fix (a unified diff from that state), `test_patch` adds tests
    (empty where the repository already holds them). Test ids are pytest node ids relative to the root.
    """

    instance_id: str
    repo: str  # key of a RepositorySpec, e.g. "toolz==1.2.0"
    base_commit: str
    patch: str
    test_patch: str
    problem_statement: str
    FAIL_TO_PASS: tuple[str, ...]
    PASS_TO_PASS: tuple[str, ...]
    hints_text: str = ""
    created_at: str = ""
    version: str = ""
    environment_setup_commit: str = ""
    strategy: str = "inject"
    kind: str = ""
    image_name: str = ""
    bug_patch: str = ""  # applied to the pristine repository gives the agent's starting state
    path: str = ""
    function: str = ""
    timeout: float = 30.0
    difficulty: float = 0.0  # 0 to 1, as the other scores (synthesis/quality.py)
    ambiguity: float = 0.0
    localisation: float = 0.0  # how much of the fix's place the statement gives away
    held_out_patch: str = ""  # adds tests that no agent sees, for a second opinion
    HELD_OUT_FAIL_TO_PASS: tuple[str, ...] = ()
    HELD_OUT_PASS_TO_PASS: tuple[str, ...] = ()
    language: str = "python"
    eval_script: str = ""
    log_parser: str = ""
    checks: str = ""  # JSON of what decides in place of tests: those of a problem (envs/problems)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready row: test lists are JSON lists, everything else as it stands."""
        row = dataclasses.asdict(self)
        return {**row, **{name: list(row[name]) for name in sorted(TEST_LISTS)}}

    @classmethod
    def from_json(cls, row: dict[str, Any], where: str = "task") -> "Task":
        """Reads a row; unknown fields are ignored; test lists may be lists or JSON strings of lists.

        A field that is null is one that is not there.

        Raises:
          UserError: a required field is missing, or one is malformed; names `where` and the field.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        values = {key: value for key, value in row.items() if key in known and value is not None}
        for name, field in known.items():
            if field.default is dataclasses.MISSING and name not in values:
                raise UserError(f"{where}: field {name} is missing")
        for name in sorted(values.keys() & TEST_LISTS):
            tests = values[name]
            try:
                tests = json.loads(tests) if isinstance(tests, str) else tests
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: field {name} is not a JSON list") from error
            if not isinstance(tests, list | tuple) or not all(isinstance(t, str) for t in tests):
                raise UserError(f"{where}: field {name} must be a list of test ids")
            values[name] = tuple(tests)
        for name, value in values.items():
            if fault := _fault(name, value, known[name].type):
                raise UserError(f"{where}: field {name} {fault}")
        return cls(**{name: float(value) if known[name].type is float else value for name, value in values.items()})


def _fault(name: str, value: Any, kind: Any) -> str:
    """What is wrong with the value of a field; "" where nothing is."""
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
            return f"must be a number, got {names.shown(str(value))}"
        if name == "timeout" and not 0 < value <= MAX_TIMEOUT:
            return f"must be above 0 and at most {MAX_TIMEOUT:.0f}, got {names.shown(str(value))}"
        return "" if abs(value) <= sys.float_info.max else "is too large"
    texts = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(text, str) for text in texts):
        return f"must be text, got {type(value).__name__}"
    if fault := next(filter(None, map(names.text_fault, texts)), ""):
        return fault
    if name == "instance_id" and (fault := names.id_fault(value)):
        return f"{fault}, got {names.shown(value)}"
    if name == "image_name" and value and (fault := names.image_fault(value)):
        return f"{fault}: {names.shown(value)}"
    if name == "repo" and (not value or not value.isprintable()):
        return f"must be a printable name, got {names.shown(value)}"
    if name == "language" and value not in LANGUAGES:
        return f"must be one of {', '.join(LANGUAGES)}, got {names.shown(value)}"
    return ""


class Identified(Protocol):
    """What has an id."""

    @property
    def instance_id(self) -> str:
        """Its id."""


Row = TypeVar("Row", bound=Identified)


def write_tasks(path: str | os.PathLike[str], tasks: Iterable[Task]) -> None:
    """Writes tasks as JSONL, atomically."""
    files.write_jsonl(path, (task.to_json() for task in tasks))


def read_tasks(path: str | os.PathLike[str], faults: list[str] | None = None) -> list[Task]:
    """Reads tasks from JSONL.

    A row that is none, or whose id came before, becomes a line of `faults` that names file, line and field, and the
    others are read; without `faults` it raises UserError.
    """
    return read_rows(path, files.read_numbered(path, faults), Task.from_json, faults)


def read_rows(path: str | os.PathLike[str], rows: Iterable[tuple[int, Any]], read: Callable[[Any, str], Row],
              faults: list[str] | None = None) -> list[Row]:
    """What `read` makes of numbered rows, which has an `instance_id`; `faults` as in `read_tasks`."""
    found: dict[str, Row] = {}
    for number, row in rows:
        where = f"{path}:{number}"
        try:
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
            one = read(row, where)
            if one.instance_id in found:
                raise UserError(f"{where}: field instance_id: {one.instance_id} comes a second time")
            found[one.instance_id] = one
        except UserError as error:
            if faults is None:
                raise
            faults.append(str(error))
    return list(found.values())
