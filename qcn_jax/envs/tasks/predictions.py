"""Predictions in SWE-bench's form, read and checked.

A prediction is `{"instance_id", "model_name_or_path", "model_patch"}`: one JSON object a line, a JSON list of them, or
an object of them by instance_id, as mini-swe-agent and older swebench write it.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from qcn_jax import files
from qcn_jax.envs import names
from qcn_jax.envs.tasks.schema import Task, read_rows
from qcn_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One model's answer to one task; an empty patch is an answer, too."""

    instance_id: str
    model: str
    patch: str


def read_predictions(path: str | os.PathLike[str], tasks: Mapping[str, Task],
                     faults: list[str] | None = None) -> list[Prediction]:
    """Reads predictions for `tasks` (by id).

    Raises:
      UserError: a field is missing or ill-typed, an id is unknown or comes twice; names the file and line. Where
        `faults` is given that becomes a line of it instead, and the other rows are read. Or several models are mixed.
    """
    def read(row: Mapping[str, Any], where: str) -> Prediction:
        for field in ("instance_id", "model_name_or_path"):
            if not isinstance(row.get(field), str):
                raise UserError(f"{where}: field {field} is missing or not a string")
        patch = row.get("model_patch")
        if "model_patch" not in row or not isinstance(patch, str | None):
            raise UserError(f"{where}: field model_patch is missing or not a string")
        name = row["instance_id"]
        if name not in tasks:
            raise UserError(f"{where}: instance_id {names.shown(name)} is not among the tasks")
        return Prediction(name, row["model_name_or_path"], patch or "")

    found = read_rows(path, _rows(path, faults), read, faults)
    models = {prediction.model for prediction in found}
    if len(models) > 1:
        raise UserError(f"{path}: predictions of several models ({', '.join(sorted(models))}); one file each, please")
    return found


def _rows(path: str | os.PathLike[str], faults: list[str] | None) -> list[tuple[int, Any]]:
    """Rows with their places, of one JSON document or of one a line."""
    try:
        value = files.read_json(path)
    except UserError:
        return files.read_numbered(path, faults)
    if isinstance(value, dict) and "instance_id" not in value:
        value = [{"instance_id": name, **row} if isinstance(row, dict) else row for name, row in value.items()]
    return list(enumerate(value if isinstance(value, list) else [value], 1))
