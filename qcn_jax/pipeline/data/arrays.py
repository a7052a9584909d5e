"""Flat arrays in files: written a piece at a time, mapped when read."""

import pathlib
from typing import Any

import numpy as np

from qcn_jax.errors import UserError


def mapped(path: pathlib.Path, dtype: Any, count: int) -> np.ndarray:
    """Maps a file that holds `count` values of `dtype` and nothing else, [count], read only.

    Raises:
      UserError: it is missing, or longer or shorter; the line names it.
    """
    size = count * np.dtype(dtype).itemsize
    try:
        found = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; remove its folder, and it is made again") from error
    if found != size:
        raise UserError(f"{path}: has {found} bytes instead of {size}; remove its folder, and it is made again")
    # As a plain array: every slice of a memmap costs what a hundred values of it do.
    return np.memmap(path, dtype, "r", shape=(count,)).view(np.ndarray) if count else np.zeros(0, dtype)
