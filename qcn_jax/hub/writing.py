"""Weights out: the parameter tree streamed, piece by piece, into safetensors files with published names.

Host memory holds one piece (PIECE_BYTES) and its transposed copy beside the parameters themselves. The folder
appears under its name only when it is complete.
"""

import functools
import json
import math
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from qcn_jax import files
from qcn_jax.config import ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.hub import layout
from qcn_jax.chat.jinja_template import CHAT_TEMPLATE_FILE, chat_template
from qcn_jax.hub.configuration import CONFIG_FILE, config_to_hf
from qcn_jax.hub.reading import PIECE_BYTES
from qcn_jax.hub.stored import DTYPES, INDEX_FILE, SINGLE_FILE
from qcn_jax.chat.tokenizer import END_OF_TEXT, TURN_END, Tokenizer

SHARD_BYTES = 5_000_000_000  # as transformers writes by default
_ALIGNMENT = 8  # of the first tensor's bytes, as the safetensors library writes
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def save(path: files.Path, config: ModelConfig, params: Mapping[str, Any], tokenizer: Tokenizer | None = None,
         shard_bytes: int = SHARD_BYTES, progress: bool = False) -> None:
    """Writes a Hugging Face folder: config.json, safetensors (with an index where there are several), tokenizer.

    Args:
      path: the folder; it appears complete or not at all, and replaces an earlier model there.
      config: the architecture; MTP weights are written where num_nextn_predict_layers says so.
      params: the tree under "params", of NumPy or JAX arrays (also sharded over processes: every process must
        call this, the first writes).
      tokenizer: also written, with the ids that end a turn.
      shard_bytes: a file is closed before it would exceed this.
      progress: show a bar on stderr.

    Raises:
      UserError: an array is missing, surplus or of a wrong shape or dtype; the folder holds something else; the
        disk is full.
    """
    leaves = _check(config, params)
    shards = _shards(config, leaves, shard_bytes)
    total = sum(leaf.size for leaf in leaves.values())
    with tqdm.tqdm(total=total, unit="p", unit_scale=True, desc=f"saving {path}", disable=not progress) as bar:
        if jax.process_index() == 0:
            _write_folder(path, config, leaves, shards, tokenizer, bar)
        else:  # takes part in gathering what is spread over processes
            for tensors in shards.values():
                for _ in _rows(tensors, leaves, bar):
                    pass
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {path}")


def _write_folder(path: files.Path, config: ModelConfig, leaves: Mapping[layout.Path, Any],
                  shards: Mapping[str, list[layout.Tensor]], tokenizer: Tokenizer | None, bar: Any) -> None:
    with files.atomic_directory(path, replaceable=CONFIG_FILE) as folder:
        for name, tensors in shards.items():
            _write_shard(folder / name, tensors, leaves, bar)
        if SINGLE_FILE not in shards:
            _write_index(folder, shards, leaves)
        dtype = np.dtype(leaves["embed_tokens", "embedding"].dtype).name
        files.write_json(folder / CONFIG_FILE, config_to_hf(config) | {"dtype": dtype} | _token_ids(tokenizer))
        if tokenizer is not None:
            _write_tokenizer(folder, tokenizer)


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
    surplus = sorted(set(leaves) - set(shapes))
    if surplus:
        raise UserError(f"params: {'/'.join(surplus[0])} is not part of this model")
    return leaves


def _shards(config: ModelConfig, leaves: Mapping[layout.Path, Any], limit: int) -> dict[str, list[layout.Tensor]]:
    """File name -> tensors, in published order."""
    groups: list[list[layout.Tensor]] = [[]]
    used = 0
    for tensor in layout.tensors(config):
        size = _bytes(tensor, leaves)
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += size
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _bytes(tensor: layout.Tensor, leaves: Mapping[layout.Path, Any]) -> int:
    return math.prod(tensor.shape) * np.dtype(leaves[tensor.leaf].dtype).itemsize


def _write_shard(path: pathlib.Path, tensors: list[layout.Tensor], leaves: Mapping[layout.Path, Any], bar: Any) -> None:
    """One safetensors file: length of the header, header, then the tensors' bytes in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say so
    position = 0
    for tensor in tensors:
        end = position + _bytes(tensor, leaves)
        header[tensor.name] = {"dtype": _CODES[np.dtype(leaves[tensor.leaf].dtype)], "shape": list(tensor.shape),
                               "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with files.atomic_open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for rows in _rows(tensors, leaves, bar):
            stream.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)


def _rows(tensors: list[layout.Tensor], leaves: Mapping[layout.Path, Any], bar: Any) -> Iterator[np.ndarray]:
    """The tensors' rows as published, in pieces of at most PIECE_BYTES."""
    for tensor in tensors:
        leaf = leaves[tensor.leaf]
        step = max(1, PIECE_BYTES // max(1, _bytes(tensor, leaves) // tensor.shape[0]))
        lead = tuple(slice(i, i + 1) for i in tensor.index)
        for start in range(0, tensor.shape[0], step):
            box = tensor.box(start, min(start + step, tensor.shape[0]))
            part = _fetch(leaf, (*lead, *box))
            bar.update(part.size)
            yield tensor.body_to_rows(part.reshape(part.shape[len(lead):]))


def _fetch(leaf: Any, box: tuple[slice, ...]) -> np.ndarray:
    """A box of a leaf on the host; a whole leaf is brought over only where it already lies in host memory."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf[box])
    if leaf.is_fully_addressable and len(leaf.sharding.device_set) == 1 and leaf.device.platform == "cpu":
        return np.asarray(leaf)[box]  # a view, no copy
    sizes = tuple(part.stop - part.start for part in box)
    part = _slicer(sizes, leaf.sharding)(leaf, [part.start for part in box])
    return np.asarray(part.addressable_data(0))


@functools.lru_cache(maxsize=256)
def _slicer(sizes: tuple[int, ...], sharding: jax.sharding.Sharding) -> Any:
    """Cuts a box out of a sharded array and gives all of it to every device."""
    whole = sharding if not isinstance(sharding, jax.sharding.NamedSharding) else jax.sharding.NamedSharding(
        sharding.mesh, jax.sharding.PartitionSpec())
    return jax.jit(lambda leaf, start: jax.lax.dynamic_slice(leaf, start, sizes), out_shardings=whole)


def _write_index(folder: pathlib.Path, shards: Mapping[str, list[layout.Tensor]],
                 leaves: Mapping[layout.Path, Any]) -> None:
    total = sum(_bytes(tensor, leaves) for tensors in shards.values() for tensor in tensors)
    names = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    files.write_json(folder / INDEX_FILE, index)


def _token_ids(tokenizer: Tokenizer | None) -> dict[str, int]:
    """eos and pad as Qwen's instruct models have them."""
    known = tokenizer.added_tokens if tokenizer is not None else {}
    pairs = {"eos_token_id": TURN_END, "pad_token_id": END_OF_TEXT, "bos_token_id": END_OF_TEXT}
    return {name: known[token] for name, token in pairs.items() if token in known}


def _write_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json, the chat template, and the little that transformers' AutoTokenizer wants beside them."""
    tokenizer.save(folder)
    files.write_text(folder / CHAT_TEMPLATE_FILE, chat_template())
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, token in (("eos_token", TURN_END), ("pad_token", END_OF_TEXT)):
        if token in tokenizer.added_tokens:
            values[name] = token
    files.write_json(folder / "tokenizer_config.json", values)
