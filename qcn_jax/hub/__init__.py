"""Weights in and out: Hugging Face folders and Orbax folders. Names are bound on first use, which imports JAX."""

import importlib
from typing import Any

_LAZY = {
    "load": "qcn_jax.hub.reading",
    "inspect": "qcn_jax.hub.reading",
    "identity": "qcn_jax.hub.reading",
    "load_config": "qcn_jax.hub.configuration",
    "config_from_hf": "qcn_jax.hub.configuration",
    "config_to_hf": "qcn_jax.hub.configuration",
    "save": "qcn_jax.hub.writing",
}
_MODULES = ("configuration", "description", "layout", "orbax_folder", "reading", "safetensors_file", "slabs", "stored",
            "vision", "writing")
__all__ = [*_LAZY, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"qcn_jax.hub.{name}")
    raise AttributeError(f"module 'qcn_jax.hub' has no attribute {name!r}")
