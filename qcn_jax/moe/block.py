"""The sparse block of every decoder layer: router, routed experts, gated shared expert."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from qcn_jax.config import ModelConfig
from qcn_jax.layers.dense import dense, normal_init
from qcn_jax.moe.experts import ExpertWeights, apply_experts
from qcn_jax.moe.router import Router, RouterStatistics

Array = jax.Array


class Experts(nn.Module):
    """Stacked expert weights and their application."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, weights: Array, experts: Array) -> Array:
        cfg = self.config
        wide, narrow = cfg.hidden_size, cfg.moe_intermediate_size

        def kernel(name: str, axes: tuple[str, ...], shape: tuple[int, int]) -> Array:
            init = nn.with_logical_partitioning(normal_init(cfg), axes)
            stacked = self.param(name, init, (cfg.num_experts, *shape), jnp.dtype(cfg.param_dtype))
            return stacked.astype(x.dtype)

        kernels = ExpertWeights(
            kernel("gate_proj", ("expert", "embed", "mlp"), (wide, narrow)),
            kernel("up_proj", ("expert", "embed", "mlp"), (wide, narrow)),
            kernel("down_proj", ("expert", "mlp", "embed"), (narrow, wide)),
        )
        return apply_experts(x, weights, experts, kernels, cfg.moe)


class SharedExpert(nn.Module):
    """The SwiGLU that every token passes."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.config
        width = cfg.shared_expert_intermediate_size
        gate = dense(cfg, width, ("embed", "mlp"), "gate_proj")(x)
        up = dense(cfg, width, ("embed", "mlp"), "up_proj")(x)
        return dense(cfg, cfg.hidden_size, ("mlp", "embed"), "down_proj")(jax.nn.silu(gate) * up)


class SparseBlock(nn.Module):
    """mlp of a decoder layer: x [B, T, D] -> [B, T, D] and router statistics."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, valid: Array | None) -> tuple[Array, RouterStatistics]:
        tokens = x.reshape(-1, x.shape[-1])
        weights, experts, statistics = Router(self.config, name="gate")(
            tokens, None if valid is None else valid.reshape(-1)
        )
        routed = Experts(self.config, name="experts")(tokens, weights, experts)
        shared = SharedExpert(self.config, name="shared_expert")(tokens)
        share = jax.nn.sigmoid(dense(self.config, 1, ("embed", "shared_gate"), "shared_expert_gate")(tokens))
        return (routed + share * shared).reshape(x.shape), statistics
