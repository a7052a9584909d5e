"""qcn_jax: the system of the Qwen3-Coder-Next report in JAX (arXiv 2603.00729).

The names below are loaded on first use, so that `qcn_jax.envs` can be used without importing JAX.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "ModelConfig": "qcn_jax.config",
    "Qwen3Next": "qcn_jax.model",
}
_MODULES = ("config", "envs", "hub", "inference", "layers", "model", "moe", "pipeline", "sharding")
__all__ = [*_LAZY, "hub"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"qcn_jax.{name}")
    raise AttributeError(f"module 'qcn_jax' has no attribute {name!r}")
