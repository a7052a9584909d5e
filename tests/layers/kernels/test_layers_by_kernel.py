"""Mixers whose configuration asks for kernels, against the same layers without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.config import ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.layers.attention import GatedAttention
from qcn_jax.layers.context import TokenContext
from qcn_jax.layers.gated_delta_net import GatedDeltaNet
from qcn_jax.layers.rotary import rotary_angles, rotary_dim
from qcn_jax.model import Qwen3Next

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    linear_num_key_heads=1, linear_key_head_dim=8, linear_num_value_heads=2, linear_value_head_dim=8, num_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8, dtype="float32", chunk_size=16,
    initializer_range=0.3)
BY_KERNEL = dataclasses.replace(CONFIG, delta_rule="pallas", attention="splash")
B, T = 2, 37


@pytest.mark.parametrize("layer", [GatedDeltaNet, GatedAttention])
def test_same_parameters_outputs_and_gradients(layer):
    rng = np.random.default_rng(0)
    x, cotangent = (rng.standard_normal((B, T, CONFIG.hidden_size)).astype(np.float32) for _ in range(2))
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (B, T)), axis=1), jnp.int32)
    valid = jnp.asarray(np.arange(T) < np.array([[T], [T - 5]]))
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    cos, sin = rotary_angles(positions, rotary_dim(CONFIG.head_dim, CONFIG.partial_rotary_factor), CONFIG.rope_theta)
    context = TokenContext(cos, sin, segments, valid)
    params = jax.jit(layer(CONFIG).init)(jax.random.key(0), x, context)

    def run(config):
        def loss(params, x):
            y = layer(config).apply(params, x, context)[0]
            return jnp.sum(jnp.where(valid[..., None], y * cotangent, 0)), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    for a, b in zip(jax.tree.leaves(run(BY_KERNEL)), jax.tree.leaves(run(CONFIG)), strict=True):
        assert np.isfinite(a).all()
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b) + 1e-6


@pytest.mark.parametrize("field, value", [("delta_rule", "palas"), ("attention", "flash"), ("chunk_size", 48)])
def test_forms_that_do_not_exist_are_refused_by_name(field, value):
    config = dataclasses.replace(BY_KERNEL, **{field: value})
    with pytest.raises(UserError, match=f"model.{field}"):
        Qwen3Next(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
