"""Weights in: published tensors streamed, piece by piece, into the stacked and sharded parameter tree.

Host memory holds one piece of a tensor (PIECE_BYTES) and its transposed copy beside the destination. Arrays of at
most STAGED_BYTES are put together on the host and sent whole; larger ones are allocated on the devices first and
filled in place by donated updates.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from qcn_jax import files
from qcn_jax.config import ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.hub import configuration, layout, orbax_folder, vision
from qcn_jax.hub.stored import Folder, Source
from qcn_jax.sharding import distributed

PIECE_BYTES = 64 << 20
STAGED_BYTES = 256 << 20
Box = tuple[slice, ...]
Allocate = Callable[[layout.Path, layout.Shape, np.dtype], np.ndarray]


def inspect(path: files.Path) -> ModelConfig:
    """The config that `load` gives, without reading weights."""
    config = configuration.load_config(path)
    if orbax_folder.is_orbax(path):
        return config
    return dataclasses.replace(config, num_nextn_predict_layers=int("mtp.fc.weight" in Folder(path).table))


def identity(path: files.Path) -> str:
    """SHA-256 over config.json, the index, and names and sizes of the files of weights: a few KB, whatever the size.

    Raises:
      UserError: the folder holds no checkpoint.
    """
    path = pathlib.Path(path)
    if orbax_folder.is_orbax(path):
        weights = [file for file in (path / orbax_folder.PARAMS).rglob("*") if file.is_file()]
        index = None
    else:
        folder = Folder(path)
        weights, index = sorted({source.file for source in folder.table.values()}), folder.index
    small = [file for file in (path / configuration.CONFIG_FILE, index) if file is not None and file.is_file()]
    sizes = sorted((str(file.relative_to(path)), file.stat().st_size) for file in weights)
    found = [[file.name, file.read_text(encoding="utf-8")] for file in small], sizes
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def load(path: files.Path, dtype: str | None = None, shardings: Any = None, allocate: Allocate | None = None,
         progress: bool = False) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a Hugging Face folder (config.json and safetensors, per-expert or stacked), or one in Orbax form.

    Args:
      path: the folder.
      dtype: of all parameters, e.g. "bfloat16"; None keeps each as stored (bit for bit). Layers that were stored in
        several dtypes become the narrowest that holds all of them, float64 becomes float32 where JAX has no other.
      shardings: a tree of `jax.sharding.Sharding` like the parameters (or one for all); each process reads what
        its devices hold. None puts everything on this process's first device.
      allocate: makes a host array for (path in the tree, shape, dtype), e.g. memory-mapped; the parameters are
        then these arrays. Not for Orbax form.
      progress: show a bar on stderr.

    Returns:
      The config, whose num_nextn_predict_layers says whether the checkpoint holds MTP weights, and the tree
      under "params" (see qcn_jax.model).

    Raises:
      UserError: one line that names the file, option or tensor at fault. All names and shapes are checked
        before any weight is read.
    """
    if orbax_folder.is_orbax(path) and allocate is None:
        return orbax_folder.load(path, dtype, shardings)
    config = inspect(path)
    leaves = _resolve(config, Folder(path))
    wanted = None if dtype is None else np.dtype(jnp.dtype(dtype))
    shapes = layout.leaf_shapes(config)
    sharding_of = _sharding_lookup(shardings)
    total = sum(math.prod(tensor.shape) for parts in leaves.values() for tensor, _ in parts)
    tree: dict[str, Any] = {}
    with tqdm.tqdm(total=total, unit="p", unit_scale=True, desc=f"loading {path}", disable=not progress) as bar:
        for leaf, parts in leaves.items():
            kind = wanted or _dtype(parts)
            array: Any
            if allocate is not None:
                array = allocate(leaf, shapes[leaf], kind)
                for box, piece in _pieces(parts, kind, bar, lambda box: True):
                    array[box] = piece
            else:
                pieces = functools.partial(_pieces, parts, kind, bar)
                array = _to_devices(shapes[leaf], kind, sharding_of(leaf), pieces)
            _insert(tree, leaf, array)
    return dataclasses.replace(config, param_dtype=tree["embed_tokens"]["embedding"].dtype.name), tree


def _resolve(config: ModelConfig, folder: Folder) -> dict[layout.Path, list[tuple[layout.Tensor, Source]]]:
    """Each leaf's tensors and where they are stored; checks names and shapes of the whole checkpoint."""
    leaves: dict[layout.Path, list[tuple[layout.Tensor, Source]]] = {}
    used = set()
    for tensor in layout.tensors(config):
        name, source = folder.source(tensor)
        used.add(name)
        leaves.setdefault(tensor.leaf, []).append((tensor, source))
    if config.tie_word_embeddings:
        used.add("lm_head.weight")  # some writers store the shared matrix twice
    if config.model_type != "qwen3_next":
        used |= vision.tensors(folder).keys()
    surplus = sorted(set(folder.table) - used)
    if surplus:
        more = f" (and {len(surplus) - 1} more)" if len(surplus) > 1 else ""
        raise UserError(f"{folder.table[surplus[0]].file}: {surplus[0]} is not part of this model{more}")
    _check_stacked(leaves, folder, config)
    return leaves


def _dtype(parts: list[tuple[layout.Tensor, Source]]) -> np.dtype:
    """The narrowest dtype that JAX has and that holds every part of a leaf without rounding."""
    kind = functools.reduce(jnp.promote_types, dict.fromkeys(source.dtype for _, source in parts))
    return np.dtype(jnp.dtype(configuration.held_dtype(np.dtype(kind).name)))


def _check_stacked(leaves: Mapping, folder: Folder, config: ModelConfig) -> None:
    """Stacked expert tensors must hold no more experts than the config has."""
    for name, source in folder.table.items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")) and source.shape[0] != config.num_experts:
            raise UserError(
                f"{source.file}: {name} has {source.shape[0]} experts, config.json says {config.num_experts}")


def _pieces(parts: list[tuple[layout.Tensor, Source]], dtype: np.dtype, bar: Any,
            wanted: Callable[[Box], bool]) -> Iterator[tuple[Box, np.ndarray]]:
    """A leaf in pieces: the box each fills, stacking axes included, and its values in that box's shape.

    Only boxes that are `wanted` are read: a process reads its own experts and layers, not those of others.
    """
    for tensor, source in parts:
        row_bytes = max(1, math.prod(tensor.shape[1:]) * source.dtype.itemsize)
        step = max(1, PIECE_BYTES // row_bytes)
        lead = tuple(slice(i, i + 1) for i in tensor.index)
        for start in range(0, tensor.shape[0], step):
            stop = min(start + step, tensor.shape[0])
            box = (*lead, *tensor.box(start, stop))
            bar.update((stop - start) * math.prod(tensor.shape[1:]))
            if wanted(box):
                piece = tensor.rows_to_body(source.rows(start, stop).astype(dtype, copy=False))
                yield box, piece.reshape((1,) * len(lead) + piece.shape)


def _to_devices(shape: layout.Shape, dtype: np.dtype, sharding: jax.sharding.Sharding,
                pieces: Callable[[Callable[[Box], bool]], Iterator[tuple[Box, np.ndarray]]]) -> jax.Array:
    """An array of `shape` under `sharding`, filled from pieces; each piece is read once for all local devices."""
    regions: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        regions.setdefault(bounds, []).append(device)
    sizes = {bounds: tuple(stop - start for start, stop in bounds) for bounds in regions}
    staged = sum(math.prod(size) for size in sizes.values()) * dtype.itemsize <= STAGED_BYTES
    if staged:
        buffers: dict = {bounds: np.empty(size, dtype) for bounds, size in sizes.items()}
    else:
        buffers = {(bounds, device): jnp.zeros(sizes[bounds], dtype, device=device)
                   for bounds, devices in regions.items() for device in devices}
    for box, piece in pieces(lambda box: any(_overlap(box, bounds) for bounds in regions)):
        for bounds, devices in regions.items():
            overlap = _overlap(box, bounds)
            if overlap is None:
                continue
            source, target = overlap
            if staged:
                buffers[bounds][target] = piece[source]
                continue
            values, start = np.ascontiguousarray(piece[source]), [part.start for part in target]
            for device in devices:
                buffers[bounds, device] = _update(buffers[bounds, device], jax.device_put(values, device), start)
    if staged:
        buffers = {(bounds, device): jax.device_put(buffers[bounds], device)
                   for bounds, devices in regions.items() for device in devices}
    return jax.make_array_from_single_device_arrays(shape, sharding, list(buffers.values()))


@functools.partial(jax.jit, donate_argnums=0)
def _update(buffer: jax.Array, values: jax.Array, start: list[int]) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, values, start)


def _overlap(box: Box, bounds: tuple[tuple[int, int], ...]) -> tuple[Box, Box] | None:
    """Where `box` and a shard meet: as slices of the box's piece, and of the shard; None where they do not."""
    source, target = [], []
    for part, (low, high) in zip(box, bounds):
        start, stop = max(part.start, low), min(part.stop, high)
        if start >= stop:
            return None
        source.append(slice(start - part.start, stop - part.start))
        target.append(slice(start - low, stop - low))
    return tuple(source), tuple(target)


def _sharding_lookup(shardings: Any) -> Callable[[layout.Path], jax.sharding.Sharding]:
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(distributed.first_device())
    if isinstance(shardings, jax.sharding.Sharding):
        return lambda leaf: shardings

    def find(leaf: layout.Path) -> jax.sharding.Sharding:
        node = shardings
        for key in leaf:
            node = node[key]
        return node

    return find


def _insert(tree: dict[str, Any], leaf: layout.Path, value: Any) -> None:
    for key in leaf[:-1]:
        tree = tree.setdefault(key, {})
    tree[leaf[-1]] = value
