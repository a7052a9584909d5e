"""Qwen3-Coder-Next as published: 79,674,391,296 parameters, 3.9B active.

    qcn compile --config=configs/qwen3_coder_next.py --topology=v5p:4x4x4
"""

import ml_collections

from qcn_jax.config import ModelConfig, RunConfig, to_config_dict


def get_config() -> ml_collections.ConfigDict:
    """The run configuration; ModelConfig's defaults are the published architecture."""
    return to_config_dict(RunConfig(name="qwen3_coder_next", model=ModelConfig()))
