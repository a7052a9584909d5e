"""Small models whose weights the tests of this folder write and read."""

import dataclasses

import jax
import numpy as np

from qcn_jax.config import ModelConfig
from qcn_jax.model import abstract_params

SMALL = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_num_value_heads=4,
    linear_value_head_dim=12,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=20,
    dtype="float32",
    num_nextn_predict_layers=1,
    max_position_embeddings=512,
    rope_theta=12_345.0,
)

TINY = dataclasses.replace(SMALL, num_hidden_layers=2, full_attention_interval=2, num_nextn_predict_layers=0)


def random_params(config, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(jax.numpy.dtype(dtype)), abstract_params(config)
    )


def equal(one, other):
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other))
    )
