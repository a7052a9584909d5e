"""Rows on disk by key, one a line, appended as they come; a line that a crash cut short is dropped."""

import json
import os
import pathlib
from typing import Any

from qcn_jax.errors import UserError


class Rows:
    """What is known by key, and its file.

    Raises:
      UserError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self.known: dict[str, Any] = {}
        whole = 0
        if self.path.exists():
            for line in self.path.read_bytes().splitlines(keepends=True):
                try:
                    row = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                self.known[row["key"]] = row["value"]
                whole += len(line)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = open(self.path, "ab")
            self._stream.truncate(whole)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error

    def add(self, key: str, value: Any) -> None:
        """Appends one row; `value` is JSON-ready."""
        self.known[key] = value
        line = json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n"
        try:
            self._stream.write(line.encode())
            self._stream.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
