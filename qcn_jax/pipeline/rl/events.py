"""The journal of a rollout: what happened, tick by tick, so that a run that was killed goes on where it was.

Two files in a folder: rows of JSON, and the arrays that they name (tokens, log-probabilities, routes), one behind the
other. Arrays are written before the row that names them; what a crash leaves behind the last whole row is cut off.
"""

import itertools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from qcn_jax import files, journal
from qcn_jax.errors import UserError

_AT, _DTYPE, _SHAPE = "at", "dtype", "shape"


class Events:
    """An open journal."""

    def __init__(self, folder: files.Path, writable: bool = True) -> None:
        """Opens the journal in `folder`, made where it is missing unless it is only to be read.

        Raises:
          UserError: a file cannot be written, or read.
        """
        self.folder = pathlib.Path(folder)
        path = self.folder / "arrays.bin"
        try:
            if writable:
                self.folder.mkdir(parents=True, exist_ok=True)
            self._arrays = open(path, "a+b" if writable else "rb")
        except OSError as error:
            what = "written" if writable else "read"
            raise UserError(f"{path}: cannot be {what}: {error.strerror or error}") from error
        self._path = self.folder / "events.jsonl"
        self._lines = journal.Lines(self._path) if writable else None
        self.keep(lambda row: True)

    def read(self) -> list[dict[str, Any]]:
        """All rows in order, their arrays named; see `load`."""
        held = self._arrays.seek(0, os.SEEK_END)
        rows = (row for _, row in journal.read(self._path))
        return list(itertools.takewhile(lambda row: _end(row) <= held, rows))

    def keep(self, fine: Callable[[dict[str, Any]], bool]) -> None:
        """Keeps the rows before the first that is not `fine`, and their arrays; not where it is only read."""
        if self._lines is None:
            return
        kept = list(itertools.takewhile(fine, self.read()))
        if len(kept) < sum(1 for _ in journal.read(self._path)):
            self._lines.close()
            files.write_jsonl(self._path, kept)
            self._lines = journal.Lines(self._path)
        self._arrays.truncate(max(map(_end, kept), default=0))

    def load(self, row: Any) -> Any:
        """A row, or part of one, with its arrays."""
        if isinstance(row, dict):
            if row.keys() == {_AT, _DTYPE, _SHAPE}:
                return self._array(row)
            return {name: self.load(value) for name, value in row.items()}
        return [self.load(value) for value in row] if isinstance(row, list) else row

    def _array(self, named: dict[str, Any]) -> np.ndarray:
        dtype, shape = np.dtype(named[_DTYPE]), tuple(named[_SHAPE])
        self._arrays.seek(named[_AT])
        data = self._arrays.read(dtype.itemsize * int(np.prod(shape, dtype=np.int64)))
        return np.frombuffer(data, dtype).reshape(shape)

    def add(self, row: dict[str, Any], durable: bool = False) -> None:
        """Appends a row, JSON-ready but for NumPy arrays in it.

        Args:
          row: what happened.
          durable: it is on disk when this returns.

        Raises:
          UserError: the disk is full.
        """
        try:
            named = self._named(row)
            self._arrays.flush()
            if durable:
                os.fsync(self._arrays.fileno())
            self._lines.add(named)
            if durable:
                self._lines.sync()
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written: {error.strerror or error}") from error

    def _named(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            at = self._arrays.seek(0, os.SEEK_END)
            self._arrays.write(value.tobytes())
            return {_AT: at, _DTYPE: value.dtype.str, _SHAPE: list(value.shape)}
        if isinstance(value, dict):
            return {str(name): self._named(part) for name, part in value.items()}
        return [self._named(part) for part in value] if isinstance(value, list | tuple) else value

    def close(self) -> None:
        """Closes both files."""
        if self._lines is not None:
            self._lines.close()
        self._arrays.close()


def _end(value: Any) -> int:
    """Where the last array that a row names ends."""
    if isinstance(value, dict):
        if value.keys() == {_AT, _DTYPE, _SHAPE}:
            count = int(np.prod(value[_SHAPE], dtype=np.int64))
            return value[_AT] + np.dtype(value[_DTYPE]).itemsize * count
        return max(map(_end, value.values()), default=0)
    return max(map(_end, value), default=0) if isinstance(value, list) else 0
