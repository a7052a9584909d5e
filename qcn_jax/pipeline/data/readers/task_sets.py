"""Tasks of somebody's files: rows of JSONL, JSON lists and Parquet, and folders of Harbor tasks.

What a path is, is seen from its name and its inside; what a row is, from its fields: SWE-bench's (releases 4 and 5),
SWE-smith's, SWE-bench Pro's, or those that `qcn synthesize` and stage `tasks` write (envs.tasks.formats).
"""

import datetime
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from qcn_jax.config import TasksConfig
from qcn_jax.envs.tasks import formats, harbor
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.tasks.swebench import Instance
from qcn_jax.errors import UserError
from qcn_jax.pipeline.data.readers.rows import matching, read_rows, row_files
from qcn_jax.pipeline.data.texts import Findings

FIELDS = {"train": "data", "heldout": "heldout_data"}  # of TasksConfig, by split
_BESIDE = (".yields.json", ".journal.jsonl", "repositories.json")  # what `qcn synthesize` and `qcn run` leave there
_WORK = ".work"  # the end of a folder's name, likewise


def check(config: TasksConfig) -> None:
    """Raises UserError where a file of tasks is missing or its first row is none; asked before any work."""
    for split, name in FIELDS.items():
        if path := getattr(config, name):
            findings = Findings(config.malformed, "--config.tasks.malformed")
            if next(read_tasks(path, f"--config.tasks.{name}", findings), None) is None:
                raise UserError(f"--config.tasks.{name}={path}: holds no task ({findings.line()})")


def read_tasks(path: str, field: str, findings: Findings, instances: dict[str, Instance] | None = None
               ) -> Iterator[tuple[str, Task]]:
    """Yields (place, task), the place as FILE:NUMBER or FOLDER.

    Args:
      path: a file, a folder or a glob.
      field: that names it; begins the line where it names nothing.
      findings: is told of rows that are no tasks, and of ids that came before.
      instances: takes, by id, what SWE-bench's own grading needs of rows of its release 5.

    Raises:
      UserError: there is nothing at `path`, or something of an unknown kind.
    """
    seen: dict[str, str] = {}
    for place, make in _makers(path, field, findings, {} if instances is None else instances):
        findings.read += 1
        try:
            task = make()
            if task.instance_id in seen:
                raise UserError(f"field instance_id: {task.instance_id} came before, in {seen[task.instance_id]}")
        except UserError as error:
            findings.row(place, str(error).removeprefix(f"{place}: "))
            continue
        seen[task.instance_id] = place
        yield place, task


def file_of(place: str) -> pathlib.Path:
    """The file or folder that a task was read from."""
    name, _, number = place.rpartition(":")
    return pathlib.Path(name if number.isdecimal() else place)


def _makers(path: str, field: str, findings: Findings, instances: dict[str, Instance]
            ) -> Iterator[tuple[str, Callable[[], Task]]]:
    for found in matching(path, field):
        folders = harbor.folders(found) if found.is_dir() else []
        inside = [] if folders else [file for file in row_files([found]) if not _is_beside(file.relative_to(found))]
        if not folders and not inside:
            raise UserError(f"{field}: {found}: holds no tasks; allowed: *.jsonl, *.ndjson, *.json (also .gz or .zst), "
                            f"*.parquet, folders of these, and Harbor's folders, which hold a task.toml")
        for folder in folders:
            yield str(folder), lambda folder=folder: harbor.read_task(folder)
        for file in inside:
            for place, row in _rows(file, findings):
                yield place, lambda row=row, place=place: _of_row(row, place, instances)


def _of_row(row: dict[str, Any], place: str, instances: dict[str, Instance]) -> Task:
    task = formats.from_row(row, place)
    if formats.detect(row) == "swebench5":
        instances[task.instance_id] = Instance.from_row(row, place)
    return task


def _is_beside(file: pathlib.Path) -> bool:
    return file.name.endswith(_BESIDE) or any(part.endswith(_WORK) for part in file.parts[:-1])


def _rows(file: pathlib.Path, findings: Findings) -> Iterator[tuple[str, dict[str, Any]]]:
    if file.suffix == ".json" and _begins_list(file):
        for number, row in formats.numbered(file):
            if isinstance(row, dict):
                yield f"{file}:{number}", row
            else:
                findings.row(f"{file}:{number}", f"expected a JSON object, got {type(row).__name__}")
        return
    for place, row in read_rows(file, findings):
        yield place, {name: value.isoformat() if isinstance(value, datetime.date) else value
                      for name, value in row.items()}


def _begins_list(file: pathlib.Path) -> bool:
    with open(file, "rb") as stream:
        return stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
