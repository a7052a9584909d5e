"""One safetensors file, written in any order: rows of parameters as they come, other files' tensors in pieces."""

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qcn_jax.hub.layout import Shape
from qcn_jax.hub.stored import DTYPES, Source

CODES = {dtype: code for code, dtype in DTYPES.items()}
_ALIGNMENT = 8  # of the first tensor's bytes, as the safetensors library writes
_COPIED_BYTES = 64 << 20  # of another file's, in memory at a time


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Attributes:
      name: that of `layout`.
      written: the name in the file.
      shape, dtype: in the file.
      source: where it is copied from; None of a parameter.
    """

    name: str
    written: str
    shape: Shape
    dtype: np.dtype
    source: Source | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def copied(sources: Mapping[str, Source]) -> list[Entry]:
    """Entries that are copied from where `sources`, by name, say."""
    return [Entry(name, name, source.shape, source.dtype, source) for name, source in sources.items()]


def copy(path: pathlib.Path, sources: Mapping[str, Source]) -> None:
    """Writes a safetensors file of tensors from other files, in pieces; raises OSError, or UserError where one ends."""
    file = File(path.name, 0, copied(sources))
    try:
        file.copy(path.parent)
    finally:
        file.close()


class File:
    """One safetensors file, filled in any order; it is closed, and on the disk, when the last byte has come."""

    def __init__(self, name: str, owner: int, entries: Sequence[Entry]) -> None:
        self.name, self.owner, self.entries = name, owner, entries
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say so
        starts: dict[str, int] = {}
        self._left = 0
        for entry in entries:
            starts[entry.name], self._left = self._left, self._left + entry.size
            header[entry.written] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape),
                                     "data_offsets": [starts[entry.name], self._left]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._header = struct.pack("<Q", len(text)) + text
        self._starts = {name: len(self._header) + start for name, start in starts.items()}
        self._dtypes = {entry.name: entry.dtype for entry in entries}
        self._descriptor: int | None = None

    def write(self, folder: pathlib.Path, name: str, row: int, rows: np.ndarray) -> None:
        """Writes `rows` of the tensor called `name`, as published, from number `row` on; raises OSError."""
        if self._descriptor is None:
            self._descriptor = os.open(folder / self.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            _write_at(self._descriptor, memoryview(self._header), 0)
        rows = np.ascontiguousarray(rows, self._dtypes[name])
        data = rows.reshape(-1).view(np.uint8).data
        _write_at(self._descriptor, data, self._starts[name] + row * (len(data) // len(rows)))
        self._left -= len(data)
        if not self._left:
            os.fsync(self._descriptor)
            self.close()

    def copy(self, folder: pathlib.Path, done: Callable[[int], Any] = lambda count: None) -> None:
        """Writes the entries that are copied; raises OSError, or UserError where a source ends early.

        Args:
          folder: the file's.
          done: is told of numbers that have been copied.
        """
        for entry in self.entries:
            if entry.source is None:
                continue
            source = entry.source if entry.shape else dataclasses.replace(entry.source, shape=(1,))
            step = max(1, _COPIED_BYTES * source.shape[0] // max(1, entry.size))
            for row in range(0, source.shape[0], step):
                rows = source.rows(row, min(row + step, source.shape[0]))
                self.write(folder, entry.name, row, rows)
                done(rows.size)

    def close(self) -> None:
        """Gives the file up, complete or not."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
