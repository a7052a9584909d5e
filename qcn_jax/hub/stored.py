"""Tensors on disk: a folder of safetensors files as one table, read in pieces without mapping files into memory.

The safetensors library checks each file (header, offsets, length); the bytes are then read with `pread`, since
pages of a mapped file count as this process's memory until it is unmapped.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import struct
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import safetensors

from qcn_jax import files
from qcn_jax.errors import UserError
from qcn_jax.hub.layout import Shape, Tensor

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16),
          "F64": np.dtype("float64")}
# Frequencies that older writers stored beside the weights; they follow from config.json.
_DERIVED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
# How names begin in a folder of the model without its head, and where the model has an encoder of images beside it.
_BARE = ("embed_tokens.", "layers.", "norm.", "language_model.", "visual.")
_TEXT, _WITHIN = "model.", "model.language_model."


def text_name(name: str) -> str:
    """The name in a model of text alone, as `layout` has it, of a tensor of a model that has an encoder of images."""
    return _TEXT + name.removeprefix(_WITHIN) if name.startswith(_WITHIN) else name


def name_within(name: str) -> str:
    """The inverse of `text_name`."""
    return _WITHIN + name.removeprefix(_TEXT) if name.startswith(_TEXT) else name


@dataclasses.dataclass(frozen=True)
class Source:
    """Consecutive bytes of a file that hold an array of `shape` in C order."""

    file: pathlib.Path
    offset: int
    shape: Shape
    dtype: np.dtype

    def run(self, row: int, shape: Shape) -> "Source":
        """The array of `shape` that begins at row `row`, a row being as long as that array's."""
        length = math.prod(shape[1:]) * self.dtype.itemsize
        return dataclasses.replace(self, offset=self.offset + row * length, shape=shape)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop, in memory of their own; raises UserError where the file ends early."""
        row = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        result = np.empty((stop - start, *self.shape[1:]), self.dtype)
        view, done = result.reshape(-1).view(np.uint8).data, 0
        with open(self.file, "rb", buffering=0) as stream:
            while done < len(view):
                got = os.preadv(stream.fileno(), [view[done:]], self.offset + start * row + done)
                if not got:
                    raise UserError(f"{self.file}: is truncated")
                done += got
        return result


class Folder:
    """The safetensors files of a folder, as transformers takes them; opening it reads and checks headers only.

    `model.safetensors` is read where there is one, whatever an index beside it says. A tensor is read from the file
    that the index names, whatever other files hold under its name.
    """

    def __init__(self, folder: files.Path):
        """Raises UserError that names the file: none there, one missing, truncated or damaged."""
        self.path = pathlib.Path(folder)
        self.table: dict[str, Source] = {}
        self.index: pathlib.Path | None = None
        names: dict[str, str] = {}
        if files.is_file(self.path / SINGLE_FILE):
            tables = {SINGLE_FILE: read_header(self.path / SINGLE_FILE)}
        elif files.is_file(self.path / INDEX_FILE):
            self.index = self.path / INDEX_FILE
            names = _weight_map(self.index)
            tables = {file: read_header(self.path / file) for file in sorted(set(names.values()))}
        else:
            raise UserError(f"{self.path}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
        found = {name: source for table in tables.values() for name, source in table.items()}
        for name, file in names.items():
            if name not in tables[file]:
                raise UserError(f"{self.index}: {name} is not in {file}")
            found[name] = tables[file][name]
        for name, source in found.items():
            full = text_name(f"model.{name}" if name.startswith(_BARE) else name)
            if full in self.table or (full != name and full in found):
                raise UserError(f"{source.file}: {name} is there twice, under another name too")
            if not _DERIVED.fullmatch(full):
                self.table[full] = source

    def source(self, tensor: Tensor) -> tuple[str, Source]:
        """Where `tensor` lies: by its published name, or as its expert is called where experts are stored otherwise.

        Experts are found in all folders in both forms: a tensor each, or a layer's stacked in two tensors.

        Returns:
          The name and the bytes.

        Raises:
          UserError: it is missing, or of another shape.
        """
        if tensor.name in self.table:
            stored = self.table[tensor.name]
            if stored.shape != tensor.published:
                raise UserError(
                    f"{stored.file}: {tensor.name} has shape {list(stored.shape)}, expected {list(tensor.published)}")
            return tensor.name, stored.run(tensor.row, tensor.shape)
        if ".mlp.experts." in tensor.name:
            experts, expert, part = tensor.name.partition(".experts.")[0], tensor.index[-1], tensor.leaf[-1]
            name = f"{experts}.experts.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}"
            if name in self.table:
                return name, self._of_stacked(name, tensor)
            name = f"{experts}.experts.{expert}.{part}.weight"
            if name in self.table:
                return self.source(dataclasses.replace(tensor, name=name, row=0, whole=None))
        raise UserError(f"{self.path}: {tensor.name} is missing")

    def _of_stacked(self, name: str, tensor: Tensor) -> Source:
        """A slice of `experts.gate_up_proj` (E, 2F, D), gate rows first, or of `experts.down_proj` (E, D, F)."""
        stored, (rows, columns) = self.table[name], tensor.shape
        fused = name.endswith("gate_up_proj")
        if stored.shape[1:] != (rows * (1 + fused), columns) or stored.shape[0] <= tensor.index[-1]:
            raise UserError(
                f"{stored.file}: {name} has shape {list(stored.shape)}, expected experts of {list(tensor.shape)}")
        first = tensor.index[-1] * stored.shape[1] + (rows if tensor.leaf[-1] == "up_proj" else 0)
        return stored.run(first, tensor.shape)


def _weight_map(path: pathlib.Path) -> dict[str, str]:
    """Which file holds which tensor, as an index says; raises UserError that names it where it says nothing."""
    index = files.read_json(path)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{path}: expected a JSON object whose weight_map gives the file of every tensor")
    for name, file in names.items():
        if not isinstance(file, str) or pathlib.PurePath(file).name != file or not file.isprintable():
            raise UserError(f"{path}: weight_map gives {file!r} for {name}; allowed: the name of a file beside it")
    return names


def read_header(path: pathlib.Path) -> dict[str, Source]:
    """Every tensor of a safetensors file; raises UserError that names the file where it cannot be read."""
    if path.exists() and not path.is_file():  # opening a pipe would wait for somebody to write to it
        raise UserError(f"{path}: is no file")
    try:
        with open(path, "rb") as stream:
            # Opening checks header, offsets and length. It comes second: to it an unreadable file is a missing one.
            with safetensors.safe_open(path, framework="numpy"):
                pass
            length, = struct.unpack("<Q", stream.read(8))
            header: Mapping = json.loads(stream.read(length))
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        incomplete = "incomplete" in str(error).lower()  # more or less bytes than the header speaks of
        reason = "is truncated (its length does not fit its header)" if incomplete else f"is damaged: {error}"
        raise UserError(f"{path}: {reason}") from error
    table = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{path}: {name} has dtype {entry['dtype']}, supported: {', '.join(DTYPES)}")
        offset = 8 + length + entry["data_offsets"][0]
        table[name] = Source(path, offset, tuple(entry["shape"]), DTYPES[entry["dtype"]])
    return table
