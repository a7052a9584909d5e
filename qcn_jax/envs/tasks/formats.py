"""Task sets of other projects, read and written under their own field names.

SWE-bench (release 4, and 5 with image, eval_script, log_parser, eval_type), SWE-smith (whose `patch` is the bug),
SWE-bench Pro (lower-case test lists). Harbor's task folders are in `envs/tasks/harbor.py`.
"""

import dataclasses
import json
import os
import pathlib
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from qcn_jax import files, syntax
from qcn_jax.envs import patches
from qcn_jax.envs.tasks import hidden
from qcn_jax.envs.tasks.schema import FOLDER_GRADER, LANGUAGES, Task, read_rows
from qcn_jax.errors import UserError

FORMATS = ("swebench", "swebench5", "swesmith", "swebench_pro")
_HEREDOC = "EOF_QCN_TEST_PATCH"
_SWEBENCH_FIELDS = (
    "repo", "instance_id", "base_commit", "patch", "test_patch", "problem_statement", "hints_text", "created_at",
    "version", "environment_setup_commit",
)  # fmt: skip


def test_files(task: Task) -> list[str]:
    """Files of the task's tests, in order of first mention."""
    return list(dict.fromkeys(name.split("::")[0] for name in (*task.FAIL_TO_PASS, *task.PASS_TO_PASS)))


def to_swebench(task: Task) -> dict[str, Any]:
    """A row of SWE-bench as published: test lists are JSON strings."""
    row = {name: getattr(task, name) for name in _SWEBENCH_FIELDS}
    row["FAIL_TO_PASS"] = json.dumps(list(task.FAIL_TO_PASS))
    row["PASS_TO_PASS"] = json.dumps(list(task.PASS_TO_PASS))
    return row


def to_swebench5(task: Task) -> dict[str, Any]:
    """A row of SWE-bench 5: the same, with what is needed to run it in its image."""
    if not task.image_name:
        raise UserError(f"task {task.instance_id}: SWE-bench 5 needs image_name, which is empty")
    return {**to_swebench(task), "image": task.image_name, "eval_script": eval_script(task),
            "log_parser": "parse_log_pytest_v2", "eval_type": "pass_and_fail"}  # fmt: skip


def eval_script(task: Task) -> str:
    """The script that SWE-bench 5 runs in the image: tests as they were, test patch, tests between markers, all undone.

    The image's only commit is the task's starting state, so HEAD names it whatever `base_commit` says.
    """
    chosen = " ".join(map(shlex.quote, test_files(task)))
    touched = " ".join(map(shlex.quote, patches.touched(task.test_patch))) if task.test_patch else ""
    lines = ["#!/bin/bash", "set -uxo pipefail", "cd /testbed"]
    # One by one: a file that only the test patch brings is not there, and the others must be put back all the same.
    lines += [f"git checkout HEAD -- {shlex.quote(name)}" for name in test_files(task)]
    if touched:
        lines += [f"git apply -v - <<'{_HEREDOC}'", task.test_patch.rstrip("\n"), _HEREDOC]
    tests = f"python -m pytest -rA -p no:cacheprovider {chosen}"
    # Status 4: options of plugins that the image does not have.
    again = f"{{ s=$?; [ $s -eq 4 ] && {tests} -o addopts= || (exit $s); }}"
    lines += [": '>>>>> Start Test Output'", f"{tests} || {again}", ": '>>>>> End Test Output'"]
    if touched:
        lines.append(f"git checkout HEAD -- {touched} || git clean -fdq -- {touched}")
    return "\n".join(lines) + "\n"


def to_swesmith(task: Task) -> dict[str, Any]:
    """A row of SWE-smith: `patch` is the bug, the gold fix is its reverse."""
    bug = patches.reverse(task.patch) if task.test_patch else task.bug_patch or patches.reverse(task.patch)
    if task.test_patch and not hidden.takes_out(task):  # SWE-smith takes failing tests out itself
        raise UserError(f"task {task.instance_id}: SWE-smith has no place for a test patch")
    return {"instance_id": task.instance_id, "repo": task.repo, "patch": bug, "FAIL_TO_PASS": list(task.FAIL_TO_PASS),
            "PASS_TO_PASS": list(task.PASS_TO_PASS), "created_at": task.created_at, "image_name": task.image_name,
            "base_commit": task.base_commit, "problem_statement": task.problem_statement}  # fmt: skip


def to_swebench_pro(task: Task) -> dict[str, Any]:
    """A row of SWE-bench Pro."""
    tests = patches.touched(task.test_patch) if task.test_patch else []
    prepare = [f"git reset --hard {task.base_commit}", "git clean -fd"]
    if tests:
        prepare.append(f"git checkout {task.environment_setup_commit or task.base_commit} -- {' '.join(tests)}")
    return {"repo": task.repo, "instance_id": task.instance_id, "base_commit": task.base_commit, "patch": task.patch,
            "test_patch": task.test_patch, "problem_statement": task.problem_statement,
            "fail_to_pass": json.dumps(list(task.FAIL_TO_PASS)), "pass_to_pass": json.dumps(list(task.PASS_TO_PASS)),
            "before_repo_set_cmd": "\n".join(prepare), "selected_test_files_to_run": json.dumps(test_files(task)),
            "dockerhub_tag": task.image_name, "repo_language": "python"}  # fmt: skip


WRITERS = dict(zip(FORMATS, (to_swebench, to_swebench5, to_swesmith, to_swebench_pro)))


def detect(row: Mapping[str, Any]) -> str:
    """Which format a row is in: one of FORMATS, or "qcn" for our own."""
    if "fail_to_pass" in row or "selected_test_files_to_run" in row:
        return "swebench_pro"
    if "bug_patch" in row:
        return "qcn"
    if "eval_script" in row:
        return "swebench5"
    if "image_name" in row and "test_patch" not in row:
        return "swesmith"
    return "swebench"


def from_row(row: Mapping[str, Any], where: str = "task") -> Task:
    """Reads a row of any of the formats.

    Raises:
      UserError: a field is missing or malformed; names `where` and the field.
    """
    kind = detect(row)
    row = dict(row)
    if row.get("log_parser") == FOLDER_GRADER:  # no row leads to a folder of this machine
        raise UserError(f"{where}: field log_parser: {FOLDER_GRADER!r} stands for a task folder of Harbor; name that "
                        "folder in the place of this file")
    if kind == "swebench_pro":
        for ours, theirs in (("FAIL_TO_PASS", "fail_to_pass"), ("PASS_TO_PASS", "pass_to_pass")):
            if theirs not in row:
                raise UserError(f"{where}: field {theirs} is missing")
            row[ours] = _names(row[theirs], f"{where}: field {theirs}")
        row["image_name"] = row.get("dockerhub_tag") or ""
    elif kind == "swebench5":
        row["image_name"] = row.get("image") or ""
    elif kind == "swesmith":
        bug = row.get("patch")
        if not isinstance(bug, str):
            raise UserError(f"{where}: field patch is missing")
        try:
            row |= {"bug_patch": bug, "patch": patches.reverse(bug), "test_patch": "", "strategy": "swesmith"}
        except patches.PatchError as error:
            raise UserError(f"{where}: field patch cannot be reversed: {error}") from error
        row.setdefault("kind", str(row.get("instance_id", "")).rpartition(".")[2].rpartition("__")[0])
        row.setdefault("base_commit", "")
        row.setdefault("problem_statement", "")
    if kind != "qcn" and row.get("language") not in LANGUAGES:
        row.pop("language", None)  # others' sets name languages that only their own images know
    # Published rows hold null where we have text, and dates and versions as numbers.
    required = {field.name for field in dataclasses.fields(Task)
                if field.type is str and field.default is dataclasses.MISSING} - {"instance_id", "repo", "patch"}
    row |= {name: "" for name in required if name in row and row[name] is None}
    row |= {name: str(row[name]) for name in ("created_at", "version")
            if isinstance(row.get(name), int | float) and not isinstance(row[name], bool)}
    return Task.from_json(row, where)


def read(path: str | os.PathLike[str], faults: list[str] | None = None) -> list[Task]:
    """Reads tasks from JSONL or from a JSON list, in any of the formats.

    Raises:
      UserError: names the file, the row and the field at fault. Where `faults` is given, faults of rows become lines
        of it instead, and the other rows are read.
    """
    return read_rows(path, numbered(path, faults), from_row, faults)


def numbered(path: str | os.PathLike[str], faults: list[str] | None = None) -> list[tuple[int, Any]]:
    """Rows of a JSONL file with their lines' numbers, or of a JSON list with their places; `faults` as in `read`."""
    if pathlib.Path(path).suffix != ".json":
        return files.read_numbered(path, faults)
    rows = files.read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: must hold a list of objects")
    return list(enumerate(rows, 1))


def write(path: str | os.PathLike[str], tasks: Iterable[Task], kind: str) -> None:
    """Writes tasks as JSONL in one of FORMATS.

    Raises:
      UserError: unknown format, or a task that it cannot hold.
    """
    if kind not in WRITERS:
        raise UserError(f"format: expected one of {', '.join(FORMATS)}, got {kind!r}")
    files.write_jsonl(path, (WRITERS[kind](task) for task in tasks))


def _names(value: Any, where: str) -> list[str]:
    """A list of test names that may come as a JSON or Python literal (Pro publishes the latter)."""
    if isinstance(value, str):
        try:
            value = syntax.literal(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise UserError(f"{where} is not a list of test names") from None
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{where} is not a list of test names")
    return list(value)
