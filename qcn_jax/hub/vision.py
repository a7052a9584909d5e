"""Tensors of an encoder of images, which this model does not have: handed from folder to folder as they are."""

import pathlib
from collections.abc import Mapping

from qcn_jax import files
from qcn_jax.hub.stored import Folder, Source, read_header

FILE = "vision.safetensors"  # in a folder in Orbax form
_PREFIX = "model.visual."


def tensors(folder: Folder | files.Path) -> Mapping[str, Source]:
    """Those of a folder in either form, by name; none where its model is of text alone.

    Raises:
      UserError: a file is missing, truncated or damaged.
    """
    if not isinstance(folder, Folder):
        path = pathlib.Path(folder)
        if files.is_dir(path / "params"):
            return read_header(path / FILE) if files.is_file(path / FILE) else {}
        folder = Folder(path)
    return {name: source for name, source in folder.table.items() if name.startswith(_PREFIX)}
