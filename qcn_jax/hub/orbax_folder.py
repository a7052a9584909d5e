"""Weights in Orbax form: a sharded array store in `params/` beside what a Hugging Face folder has.

The store is what large meshes restore fastest: every process reads only its shards, in the parameter tree's own
layout. `hub.load` reads such a folder like a Hugging Face one.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from qcn_jax import files
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.config import ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.hub import layout, vision
from qcn_jax.hub.configuration import CONFIG_FILE, is_within, load_config
from qcn_jax.hub.description import surplus, write_description
from qcn_jax.hub.safetensors_file import copy
from qcn_jax.sharding import distributed

PARAMS = "params"


def is_orbax(path: files.Path) -> bool:
    """Whether `path` is a folder that `save` wrote."""
    return files.is_file(pathlib.Path(path) / PARAMS / "_METADATA")


def save(path: files.Path, config: ModelConfig, params: Mapping[str, Any], tokenizer: Tokenizer | None = None,
         source: files.Path | None = None, with_vision: bool = True) -> None:
    """Writes the folder, atomically; it may replace an earlier model. Arguments are those of `writing.save`.

    Raises:
      UserError: the folder holds something else, or the disk is full.
    """
    with files.atomic_directory(path, surplus) as folder:
        dtype = jnp.dtype(params["embed_tokens"]["embedding"].dtype).name
        within = source is not None and with_vision and is_within(files.read_object(pathlib.Path(source) / CONFIG_FILE))
        write_description(folder, config, dtype, tokenizer, source, within)
        if within and source is not None:
            copy(folder / vision.FILE, vision.tensors(source))
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(folder.absolute() / PARAMS, dict(params))
        except ValueError as error:  # TensorStore's failures to write arrive as these
            raise UserError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from error


def load(path: files.Path, dtype: str | None = None, shardings: Any = None) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads the folder; arguments and result are those of `hub.load`.

    Raises:
      UserError: the arrays are not those of the folder's config.json, or the store is damaged.
    """
    config = load_config(path)
    store = pathlib.Path(path).absolute() / PARAMS
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(store).item_metadata
            if metadata is None:  # Orbax says so of a store without a readable manifest.ocdbt
                raise UserError(f"{store}/manifest.ocdbt: cannot be read: it is damaged, or this user may not read it")
            stored = metadata.tree
            abstract = _abstract(config, stored, dtype, shardings, path)
            params = checkpointer.restore(store, abstract)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{store}: cannot be restored: {str(error).splitlines()[0]}") from error
    return dataclasses.replace(config, param_dtype=params["embed_tokens"]["embedding"].dtype.name), params


def _abstract(config: ModelConfig, stored: Any, dtype: str | None, shardings: Any, path: files.Path) -> Any:
    """What to restore: shapes of `config`, dtypes as stored or as asked for, shardings as asked for."""
    shapes = layout.leaf_shapes(config)
    found = {tuple(key.key for key in keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(stored)}
    for leaf in sorted(set(shapes) ^ set(found)):
        raise UserError(f"{path}: {'/'.join(leaf)} is {'missing' if leaf in shapes else 'not part of this model'}")
    for leaf, shape in shapes.items():
        if tuple(found[leaf].shape) != shape:
            raise UserError(f"{path}: {'/'.join(leaf)} has shape {list(found[leaf].shape)}, expected {list(shape)}")
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(distributed.first_device())
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, stored)
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, jnp.dtype(dtype or leaf.dtype), sharding=sharding), stored, shardings)
