"""The FLOPs formula against products counted in the compiled model, and against the parameters that act."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from qcn_jax.compile import hlo
from qcn_jax.config import ModelConfig
from qcn_jax.model import Qwen3Next, abstract_params
from qcn_jax.pipeline.train.flops import token_flops
from tests.pipeline.micro import MODEL


def test_projections_are_twice_the_active_parameters():
    flops = token_flops(ModelConfig(), 8192)
    # 3.253 billion act on a token besides embedding and head, the convolution and norms among them.
    dense = flops.delta_projections + flops.attention_projections + flops.experts + flops.router
    assert dense / 2 == pytest.approx(3.253e9, rel=2e-3)
    assert flops.head == 2 * 2048 * 151_936
    assert flops.training == 3 * flops.forward
    assert token_flops(ModelConfig(), 16_384).attention == 2 * flops.attention
    with_mtp = token_flops(ModelConfig(num_nextn_predict_layers=1), 8192, mtp=True)
    assert with_mtp.head == 2 * flops.head and with_mtp.attention == flops.attention * 13 / 12
    assert with_mtp.experts == flops.experts * 49 / 48


def test_the_compiled_model_multiplies_as_much():
    """One block of four layers, dense experts (so that the compiler's products are all routed and shared ones)."""
    config = dataclasses.replace(
        MODEL, hidden_size=32, num_hidden_layers=4, full_attention_interval=4, num_experts=4, num_experts_per_tok=4,
        moe="dense", linear_key_head_dim=16, linear_value_head_dim=16, head_dim=16)
    rows, length = 2, 64
    tokens = jnp.zeros((rows, length), jnp.int32)
    run = jax.jit(lambda params: Qwen3Next(config).apply({"params": params}, tokens).logits)
    counted = hlo.summarize(run.lower(abstract_params(config)).compile().as_text()).matmul_flops
    flops = token_flops(config, length)
    # Attention is compiled without leaving out masked pairs, the block inverse as substitution; both are small here.
    assert counted == pytest.approx(rows * length * flops.forward, rel=0.35)
    exact = flops.delta_projections + flops.attention_projections + flops.experts + flops.router + flops.head
    assert counted > rows * length * exact
