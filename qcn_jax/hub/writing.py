"""Weights out: the parameter tree streamed, slab by slab, into safetensors files with published names.

Each of several processes writes files of its own. Host memory holds one slab and its transposed copy beside the
parameters themselves. The folder appears under its name only when it is complete.
"""

import collections
import itertools
import json
import math
import os
import pathlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from jax.sharding import NamedSharding

from qcn_jax import files
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.config import ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.hub import layout, slabs
from qcn_jax.hub.description import surplus, write_description
from qcn_jax.hub.reading import PIECE_BYTES
from qcn_jax.hub.stored import DTYPES, INDEX_FILE, SINGLE_FILE
from qcn_jax.sharding import distributed

SHARD_BYTES = 5_000_000_000  # as transformers writes by default
GATHERED_BYTES = 8 << 20  # of a slab that is put together on every device of every host
_ALIGNMENT = 8  # of the first tensor's bytes, as the safetensors library writes
_CODES = {dtype: code for code, dtype in DTYPES.items() if code != "F64"}  # nobody publishes in float64


def save(path: files.Path, config: ModelConfig, params: Mapping[str, Any], tokenizer: Tokenizer | None = None,
         shard_bytes: int = SHARD_BYTES, progress: bool = False, source: files.Path | None = None) -> None:
    """Writes a Hugging Face folder: config.json, safetensors (with an index where there are several), tokenizer.

    Of several processes every one must call this, with the same arguments and outside of
    `distributed.first_before_others`. Each writes files of its own into the same folder.

    Args:
      path: the folder, on a disk that all processes share; it appears complete or not at all, and replaces an earlier
        model there.
      config: the architecture; MTP weights are written where num_nextn_predict_layers says so.
      params: the tree under "params", of NumPy or JAX arrays; these may be spread over processes by NamedShardings.
      tokenizer: also written, with the ids that end a turn.
      shard_bytes: a file is closed before it would exceed this; it is less where there would be fewer files than
        processes.
      progress: show a bar on stderr.
      source: a folder of the same model; what it holds beside its weights is kept, see `write_description`.

    Raises:
      UserError: an array is missing, surplus or of a wrong shape, dtype or layout; the folder holds something else;
        the disk is full. Where it is one process's alone, the others say that it is another's.
    """
    leaves = _check(config, params)
    processes = 1 if distributed.alone() else jax.process_count()
    plan = _plan(config, leaves, shard_bytes, processes)
    total = sum(leaf.size for leaf in leaves.values())
    with distributed.shared_directory(path, surplus) as folder:
        with tqdm.tqdm(total=total, unit="p", unit_scale=True, desc=f"saving {path}", disable=not progress) as bar:
            _write_weights(folder, leaves, plan, bar)
        if distributed.is_first():
            dtype = np.dtype(leaves["embed_tokens", "embedding"].dtype).name
            if len(plan) > 1:
                _write_index(folder, plan, leaves)
            write_description(folder, config, dtype, tokenizer, source)


def _check(config: ModelConfig, params: Mapping[str, Any]) -> dict[layout.Path, Any]:
    """The arrays by path, after checking that they are exactly those of `config`."""
    leaves: dict[layout.Path, Any] = {}

    def collect(node: Any, path: layout.Path) -> None:
        if isinstance(node, Mapping):
            for key, child in node.items():
                collect(child, (*path, key))
        else:
            leaves[path] = node

    collect(params, ())
    shapes = layout.leaf_shapes(config)
    for path, shape in shapes.items():
        name = "/".join(path)
        if path not in leaves:
            raise UserError(f"params: {name} is missing")
        if tuple(leaves[path].shape) != shape:
            raise UserError(f"params: {name} has shape {list(leaves[path].shape)}, expected {list(shape)}")
        if np.dtype(leaves[path].dtype) not in _CODES:
            supported = ", ".join(dtype.name for dtype in _CODES)
            raise UserError(f"params: {name} has dtype {leaves[path].dtype}, supported: {supported}")
        sharding = getattr(leaves[path], "sharding", None)
        if sharding is not None and not isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated:
            raise UserError(f"params: {name} is split by a {type(sharding).__name__}, supported: NamedSharding")
    surplus = sorted(set(leaves) - set(shapes))
    if surplus:
        raise UserError(f"params: {'/'.join(surplus[0])} is not part of this model")
    return leaves


class _File:
    """One safetensors file, filled in any order; it is closed, and on the disk, when the last byte has come."""

    def __init__(self, name: str, owner: int, tensors: Sequence[layout.Tensor], sizes: Mapping[str, int],
                 leaves: Mapping[layout.Path, Any]) -> None:
        self.name, self.owner, self.tensors = name, owner, tensors
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say so
        self._left = 0
        for tensor in tensors:
            end = self._left + sizes[tensor.name]
            header[tensor.name] = {"dtype": _CODES[np.dtype(leaves[tensor.leaf].dtype)], "shape": list(tensor.shape),
                                   "data_offsets": [self._left, end]}
            self._left = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._header = struct.pack("<Q", len(text)) + text
        self._starts = {name: len(self._header) + entry["data_offsets"][0]
                        for name, entry in header.items() if name != "__metadata__"}
        self._descriptor: int | None = None

    def write(self, folder: pathlib.Path, tensor: layout.Tensor, row: int, rows: np.ndarray) -> None:
        """Writes `rows` of `tensor`, as published, from number `row` on; raises OSError."""
        if self._descriptor is None:
            self._descriptor = os.open(folder / self.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            _write_at(self._descriptor, memoryview(self._header), 0)
        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        _write_at(self._descriptor, data, self._starts[tensor.name] + row * (len(data) // len(rows)))
        self._left -= len(data)
        if not self._left:
            os.fsync(self._descriptor)
            self.close()

    def close(self) -> None:
        """Gives the file up, complete or not."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _plan(config: ModelConfig, leaves: Mapping[layout.Path, Any], limit: int, processes: int) -> list[_File]:
    """The files: tensors in published order, owners in turn, no fewer files than processes."""
    sizes = {tensor.name: math.prod(tensor.shape) * np.dtype(leaves[tensor.leaf].dtype).itemsize
             for tensor in layout.tensors(config)}
    limit = min(limit, -(-sum(sizes.values()) // processes))
    groups: list[list[layout.Tensor]] = [[]]
    used = 0
    for tensor in layout.tensors(config):
        if groups[-1] and used + sizes[tensor.name] > limit:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += sizes[tensor.name]
    name = SINGLE_FILE if len(groups) == 1 else f"model-{{:05d}}-of-{len(groups):05d}.safetensors"
    return [_File(name.format(number + 1), number % processes, group, sizes, leaves)
            for number, group in enumerate(groups)]


def _write_weights(folder: pathlib.Path, leaves: Mapping[layout.Path, Any], plan: Sequence[_File], bar: Any) -> None:
    """Cuts all parameters into slabs; every process takes part in gathering them and writes those that are its own.

    Raises:
      OSError: this process could not write, said when all slabs have been gathered: the others wait for its part.
    """
    this = 0 if distributed.alone() else jax.process_index()
    files_of = {tensor.name: file for file in plan for tensor in file.tensors}
    tensors = {(tensor.leaf, tensor.index): tensor for file in plan for tensor in file.tensors}
    failure: OSError | None = None
    try:
        for wave in _waves(leaves, tensors, files_of):
            mine = []
            for slab in wave:
                wanted = any(files_of[tensors[slab.leaf, index].name].owner == this for _, index in slab.indices())
                values = slabs.fetch(leaves[slab.leaf], slab, wanted)
                mine += [] if values is None else [(slab, values)]
                bar.update(math.prod(slab.shape))
            for slab, values in mine if failure is None else ():
                try:
                    for tensor, row, rows in slab.pieces(values, tensors):
                        if files_of[tensor.name].owner == this:
                            files_of[tensor.name].write(folder, tensor, row, rows)
                except OSError as error:
                    failure = error
            if failure is not None and distributed.alone():
                break
    finally:
        for file in plan:
            file.close()
    if failure is not None:
        raise failure


def _waves(leaves: Mapping[layout.Path, Any], tensors: slabs.Tensors, files_of: Mapping[str, _File]
           ) -> Iterator[list[slabs.Slab]]:
    """All slabs, in published order but for taking one of every owner's at a time: owners write side by side."""
    order = {key: number for number, key in enumerate(tensors)}
    first_index = lambda slab: next(slab.indices())[1]
    found: list[slabs.Slab] = []
    for leaf, tensor in {leaf: tensor for (leaf, _), tensor in reversed(list(tensors.items()))}.items():
        array = leaves[leaf]
        limit = GATHERED_BYTES if slabs.is_split(array) else PIECE_BYTES
        found += slabs.cut(array, tensor, limit)
    found.sort(key=lambda slab: order[slab.leaf, first_index(slab)])
    queues: dict[int, list[slabs.Slab]] = collections.defaultdict(list)
    for slab in found:
        queues[files_of[tensors[slab.leaf, first_index(slab)].name].owner].append(slab)
    for wave in itertools.zip_longest(*queues.values()):
        yield [slab for slab in wave if slab is not None]


def _write_index(folder: pathlib.Path, plan: Sequence[_File], leaves: Mapping[layout.Path, Any]) -> None:
    total = sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in leaves.values())
    names = {tensor.name: file.name for file in plan for tensor in file.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    files.write_json(folder / INDEX_FILE, index)
