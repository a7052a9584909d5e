"""Rows appended to a file of JSON lines, such that a crash loses at most the row that was being written.

The half line that a killed writer leaves is passed over by `read` and cut off when the file is opened for writing.
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from qcn_jax import files
from qcn_jax.errors import UserError


def read(path: files.Path) -> Iterator[tuple[int, Any]]:
    """Yields (where its line begins in bytes, row) of every whole row; a missing file has none.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            begin = 0
            for line in stream:
                if line.endswith(b"\n"):
                    try:
                        row = json.loads(line)
                    except ValueError:
                        pass  # a line that a crash damaged
                    else:
                        yield begin, row
                begin += len(line)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


class Lines:
    """An open file of rows."""

    def __init__(self, path: files.Path, keep: Callable[[Any], bool] | None = None, durable: bool = False) -> None:
        """Opens the file at `path`, made where it is missing.

        Args:
          keep: rows for which this is false are removed; None keeps all.
          durable: every row is on disk, and not only with the operating system, when `add` returns.

        Raises:
          UserError: the file cannot be written.
        """
        self.path, self._durable = pathlib.Path(path), durable
        if keep is not None:
            files.write_jsonl(self.path, [row for _, row in read(self.path) if keep(row)])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = open(self.path, "a+b")
            self._stream.truncate(self._whole())
        except OSError as error:
            raise self._unwritable(error) from error

    def _whole(self) -> int:
        """Length in bytes up to the end of the last whole line."""
        self._stream.seek(0)
        return sum(len(line) for line in self._stream if line.endswith(b"\n"))

    def add(self, row: Any) -> int:
        """Appends a JSON-ready row, NaN refused; returns where its line begins.

        Raises:
          UserError: the file cannot be written, or the disk is full.
        """
        line = json.dumps(row, allow_nan=False) + "\n"  # ASCII: a surrogate in a test's output is kept as it is
        try:
            begin = self._stream.seek(0, os.SEEK_END)
            self._stream.write(line.encode())
            self._stream.flush()
            if self._durable:
                self.sync()
        except OSError as error:
            raise self._unwritable(error) from error
        return begin

    def sync(self) -> None:
        """Returns when all rows are on disk, and not only with the operating system."""
        os.fsync(self._stream.fileno())

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: cannot be written: {error.strerror or error}")

    def close(self) -> None:
        """Closes the file; its rows are on disk."""
        if not self._stream.closed:
            self.sync()
            self._stream.close()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Rows:
    """Values by key, kept in a file of rows {"key", "value"}; of a key that was written twice the later value holds.

    Attributes:
      path: the file.
      known: what is known, by key, in the order in which it was written first.
    """

    def __init__(self, path: files.Path, durable: bool = False) -> None:
        """Opens the file at `path`; see `Lines`."""
        self.path = pathlib.Path(path)
        self._lines = Lines(path, durable=durable)
        self.known: dict[str, Any] = {row["key"]: row["value"] for _, row in read(path)}

    def add(self, key: str, value: Any) -> None:
        """Appends a JSON-ready value."""
        self.known[key] = value
        self._lines.add({"key": key, "value": value})

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
