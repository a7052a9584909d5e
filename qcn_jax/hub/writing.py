"""Weights out: the parameter tree streamed, slab by slab, into safetensors files with published names.

Each of several processes writes files of its own. Host memory holds one slab and its transposed copy beside the
parameters themselves. The folder appears under its name only when it is complete.
"""

import collections
import itertools
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import NamedSharding

from qcn_jax import files
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.config import ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.hub import layout, slabs, vision
from qcn_jax.hub.configuration import CONFIG_FILE, is_within
from qcn_jax.hub.description import surplus, write_description
from qcn_jax.hub.reading import PIECE_BYTES
from qcn_jax.hub.safetensors_file import Entry, File, copied
from qcn_jax.hub.stored import DTYPES, INDEX_FILE, SINGLE_FILE, name_within
from qcn_jax.sharding import distributed

SHARD_BYTES = 5_000_000_000  # as transformers writes by default
GATHERED_BYTES = 8 << 20  # of a slab that is put together on every device of every host
_PUBLISHED = [dtype for code, dtype in DTYPES.items() if code != "F64"]  # nobody publishes in float64


def save(path: files.Path, config: ModelConfig, params: Mapping[str, Any], tokenizer: Tokenizer | None = None,
         shard_bytes: int = SHARD_BYTES, progress: bool = False, source: files.Path | None = None,
         with_vision: bool = True, chat_template: str | None = None, beside: Mapping[str, Any] = {}) -> None:
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
      source: a folder of the same model; what it holds beside its weights is kept, see `write_description`. Where that
        model has an encoder of images, so has the one written: its tensors are copied, in pieces, as they are.
      with_vision: False leaves the encoder out and writes a model of text alone.
      chat_template: Jinja to write instead of that of `source`, or of Qwen3-Coder's.
      beside: JSON objects to write, by the name of their file, one of `description.COMPANIONS`.

    Raises:
      UserError: an array is missing, surplus or of a wrong shape, dtype or layout; the folder holds something else;
        the disk is full. Where it is one process's alone, the others say that it is another's.
    """
    leaves = _check(config, params)
    processes = 1 if distributed.alone() else jax.process_count()
    within = source is not None and with_vision and is_within(files.read_object(pathlib.Path(source) / CONFIG_FILE))
    entries = _entries(config, leaves, within)
    if within and source is not None:
        entries += copied(vision.tensors(source))
    plan = _plan(entries, shard_bytes, processes)
    total = sum(math.prod(entry.shape) for entry in entries)
    with distributed.shared_directory(path, surplus) as folder:
        with tqdm.tqdm(total=total, unit="p", unit_scale=True, desc=f"saving {path}", disable=not progress) as bar:
            _write_weights(folder, config, leaves, plan, bar)
        if distributed.is_first():
            dtype = np.dtype(leaves["embed_tokens", "embedding"].dtype).name
            if len(plan) > 1:
                _write_index(folder, plan)
            write_description(folder, config, dtype, tokenizer, source, within, chat_template)
            for name, value in beside.items():
                files.write_json(folder / name, value)


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
        if np.dtype(leaves[path].dtype) not in _PUBLISHED:
            supported = ", ".join(dtype.name for dtype in _PUBLISHED)
            raise UserError(f"params: {name} has dtype {leaves[path].dtype}, supported: {supported}")
        sharding = getattr(leaves[path], "sharding", None)
        if sharding is not None and not isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated:
            raise UserError(f"params: {name} is split by a {type(sharding).__name__}, supported: NamedSharding")
    surplus = sorted(set(leaves) - set(shapes))
    if surplus:
        raise UserError(f"params: {'/'.join(surplus[0])} is not part of this model")
    return leaves


def _entries(config: ModelConfig, leaves: Mapping[layout.Path, Any], within: bool) -> list[Entry]:
    """The text model's tensors in published order; `within` gives them the names they have beside an encoder."""
    found: dict[str, Entry] = {}
    for tensor in layout.tensors(config):
        dtype = np.dtype(leaves[tensor.leaf].dtype)
        if tensor.name in found:  # arrays that are apart here and one tensor there may differ
            dtype = np.dtype(jnp.promote_types(dtype, found[tensor.name].dtype))
        written = name_within(tensor.name) if within else tensor.name
        found[tensor.name] = Entry(tensor.name, written, tensor.published, dtype)
    return list(found.values())


def _plan(entries: Sequence[Entry], limit: int, processes: int) -> list[File]:
    """The files: tensors in their order, owners in turn, no fewer files than processes."""
    limit = min(limit, -(-sum(entry.size for entry in entries) // processes))
    groups: list[list[Entry]] = [[]]
    used = 0
    for entry in entries:
        if groups[-1] and used + entry.size > limit:
            groups.append([])
            used = 0
        groups[-1].append(entry)
        used += entry.size
    name = SINGLE_FILE if len(groups) == 1 else f"model-{{:05d}}-of-{len(groups):05d}.safetensors"
    return [File(name.format(number + 1), number % processes, group) for number, group in enumerate(groups)]


def _write_weights(folder: pathlib.Path, config: ModelConfig, leaves: Mapping[layout.Path, Any],
                   plan: Sequence[File], bar: Any) -> None:
    """Cuts all parameters into slabs; every process takes part in gathering them and writes those that are its own.

    What is copied from another folder comes last, so that nobody waits for it.

    Raises:
      OSError: this process could not write, said when all slabs have been gathered: the others wait for its part.
      UserError: a file that is copied from is truncated.
    """
    this = 0 if distributed.alone() else jax.process_index()
    files_of = {entry.name: file for file in plan for entry in file.entries}
    tensors: dict[tuple[layout.Path, layout.Shape], list[layout.Tensor]] = {}
    for tensor in layout.tensors(config):
        tensors.setdefault((tensor.leaf, tensor.index), []).append(tensor)
    failure: OSError | None = None
    try:
        for wave in _waves(leaves, tensors, files_of):
            mine = []
            for slab in wave:
                runs = (run for _, index in slab.indices() for run in tensors[slab.leaf, index])
                wanted = any(files_of[run.name].owner == this for run in runs)
                values = slabs.fetch(leaves[slab.leaf], slab, wanted)
                mine += [] if values is None else [(slab, values)]
                bar.update(math.prod(slab.shape))
            for slab, values in mine if failure is None else ():
                try:
                    for tensor, row, rows in slab.pieces(values, tensors):
                        if files_of[tensor.name].owner == this:
                            files_of[tensor.name].write(folder, tensor.name, tensor.row + row, rows)
                except OSError as error:
                    failure = error
            if failure is not None and distributed.alone():
                break
        for file in plan if failure is None else ():
            if file.owner == this:
                file.copy(folder, bar.update)
    finally:
        for file in plan:
            file.close()
    if failure is not None:
        raise failure


def _waves(leaves: Mapping[layout.Path, Any], tensors: slabs.Tensors, files_of: Mapping[str, File]
           ) -> Iterator[list[slabs.Slab]]:
    """All slabs, in published order but for taking one of every owner's at a time: owners write side by side."""
    order = {key: number for number, key in enumerate(tensors)}
    first_index = lambda slab: next(slab.indices())[1]
    found: list[slabs.Slab] = []
    for leaf, tensor in {leaf: runs[0] for (leaf, _), runs in reversed(list(tensors.items()))}.items():
        array = leaves[leaf]
        limit = GATHERED_BYTES if slabs.is_split(array) else PIECE_BYTES
        found += slabs.cut(array, tensor, limit)
    found.sort(key=lambda slab: order[slab.leaf, first_index(slab)])
    queues: dict[int, list[slabs.Slab]] = collections.defaultdict(list)
    for slab in found:
        queues[files_of[tensors[slab.leaf, first_index(slab)][0].name].owner].append(slab)
    for wave in itertools.zip_longest(*queues.values()):
        yield [slab for slab in wave if slab is not None]


def _write_index(folder: pathlib.Path, plan: Sequence[File]) -> None:
    total = sum(entry.size for file in plan for entry in file.entries)
    names = {entry.written: file.name for file in plan for entry in file.entries}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    files.write_json(folder / INDEX_FILE, index)
