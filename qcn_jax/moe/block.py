"""The sparse block of every decoder layer: router, routed experts, gated shared expert."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from qcn_jax.config import ModelConfig
from qcn_jax.layers.dense import SwiGLU, dense, normal_init
from qcn_jax.moe.dispatch import dispatch_experts
from qcn_jax.moe.experts import ExpertWeights, apply_experts
from qcn_jax.moe.router import Router, RouterStatistics
from qcn_jax.sharding.parallel import Parallel

Array = jax.Array


class Experts(nn.Module):
    """Stacked expert weights and their application."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Array, weights: Array, experts: Array, parallel: Parallel | None = None
    ) -> tuple[Array, Array | None]:
        """The weighted sum of each token's experts, and with `parallel` how many choices were dropped."""
        cfg = self.config
        wide, narrow = cfg.hidden_size, cfg.moe_intermediate_size

        def kernel(name: str, axes: tuple[str, ...], shape: tuple[int, int]) -> Array:
            init = nn.with_logical_partitioning(normal_init(cfg), axes)
            stacked = self.param(name, init, (cfg.num_experts, *shape), jnp.dtype(cfg.param_dtype))
            return stacked.astype(x.dtype)

        kernels = ExpertWeights(
            kernel("gate_proj", ("expert", "expert_embed", "mlp"), (wide, narrow)),
            kernel("up_proj", ("expert", "expert_embed", "mlp"), (wide, narrow)),
            kernel("down_proj", ("expert", "mlp", "expert_embed"), (narrow, wide)),
        )
        if parallel is None:
            return apply_experts(x, weights, experts, kernels, cfg.moe), None
        return dispatch_experts(x, weights, experts, kernels, parallel, cfg.moe)


class SparseBlock(nn.Module):
    """mlp of a decoder layer: x [B, T, D] -> [B, T, D] and router statistics."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Array, valid: Array | None, parallel: Parallel | None = None, routes: Array | None = None,
        with_routes: bool = False,
    ) -> tuple[Array, RouterStatistics]:
        """`routes` [B, T, k] and `with_routes`: see Router."""
        router, experts = Router(self.config, name="gate"), Experts(self.config, name="experts")
        # Merging batch and length would mix up devices where both are split.
        tokens = x.reshape(-1, x.shape[-1]) if parallel is None else x
        if valid is not None:
            valid = jnp.broadcast_to(valid, x.shape[:-1]).reshape(tokens.shape[:-1])
        if routes is not None:
            routes = routes.reshape(*tokens.shape[:-1], -1)
        weights, chosen, statistics = router(tokens, valid, routes, with_routes)
        if with_routes:
            statistics = statistics.replace(routes=statistics.routes.reshape(*x.shape[:-1], -1))
        if parallel is not None and valid is not None:
            # All padding is alike and would crowd the same few experts: it goes to none.
            chosen = jnp.where(valid[..., None], chosen, self.config.num_experts)
        routed, dropped = experts(tokens, weights, chosen, parallel)
        if dropped is not None:
            statistics = statistics.replace(dropped=dropped)
        width = self.config.shared_expert_intermediate_size
        shared = SwiGLU(self.config, width, name="shared_expert")(tokens, parallel)
        share = dense(self.config, 1, ("embed", "shared_gate"), "shared_expert_gate", parallel)(tokens)
        return (routed + jax.nn.sigmoid(share) * shared).reshape(x.shape), statistics
