"""Decoder layers, and the block of P layers (P - 1 DeltaNet, 1 attention) that the model scans over."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from qcn_jax.config import ModelConfig
from qcn_jax.layers.attention import GatedAttention
from qcn_jax.layers.context import TokenContext
from qcn_jax.layers.dense import SwiGLU
from qcn_jax.layers.gated_delta_net import GatedDeltaNet
from qcn_jax.layers.norm import RMSNorm
from qcn_jax.layers.remat import rematerialised
from qcn_jax.moe.block import SparseBlock
from qcn_jax.moe.router import RouterStatistics

Array = jax.Array


class DecoderLayer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), whose experts a model may have; `kind` names the mixer."""

    config: ModelConfig
    kind: Literal["linear", "full"]

    @nn.compact
    def __call__(self, x: Array, context: TokenContext, cache: Any = None, routes: Array | None = None
                 ) -> tuple[Array, Any]:
        """x [B, T, D], and routes [B, T, k] to replay -> (x, (router statistics or None, updated cache or None))."""
        cfg = self.config
        norm = lambda name: RMSNorm(cfg.rms_norm_eps, param_dtype=jnp.dtype(cfg.param_dtype), name=name)
        mixer = (GatedDeltaNet(cfg, name="linear_attn") if self.kind == "linear"
                 else GatedAttention(cfg, name="self_attn"))
        mixed, cache = mixer(norm("input_layernorm")(x), context, cache)
        x = _laid_out(x + mixed, context)
        normed = norm("post_attention_layernorm")(x)
        statistics: RouterStatistics | None = None
        if cfg.num_experts:
            y, statistics = SparseBlock(cfg, name="mlp")(
                normed, context.valid, context.parallel, routes, context.with_routes)
        else:
            y = SwiGLU(cfg, cfg.intermediate_size, name="mlp")(normed, context.whole_parallel)
        return _laid_out(x + y, context), (statistics, cache)


def _laid_out(x: Array, context: TokenContext) -> Array:
    return x if context.parallel is None else context.parallel.constrain_tokens(x)


def scanned(module: type[nn.Module], length: int, axis_name: str) -> type[nn.Module]:
    """`module` applied `length` times, its parameters, caches and routes stacked on a leading axis."""
    return nn.scan(
        module,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0, 0),
        out_axes=0,
        length=length,
        metadata_params={nn.PARTITION_NAME: axis_name},
        check_constancy_invariants=False,  # nothing is broadcast out; the check traces every body twice
    )


def linear_layers(config: ModelConfig, length: int, name: str | None = None) -> nn.Module:
    """`length` DeltaNet layers under one scan."""
    layer = rematerialised(DecoderLayer, config.remat)
    return scanned(layer, length, "layers")(config, "linear", name=name)


class Block(nn.Module):
    """P - 1 DeltaNet layers, scanned unless `unrolled`, and one attention layer."""

    config: ModelConfig
    unrolled: bool = False

    @nn.compact
    def __call__(self, x: Array, context: TokenContext, cache: Any = None, routes: Array | None = None
                 ) -> tuple[Array, Any]:
        """x [B, T, D], routes [P, B, T, k] -> (x, (router statistics [P, ...], the block's updated caches or None))."""
        cfg, old = self.config, cache or {}
        of = lambda index: None if routes is None else routes[index]
        count, statistics, new = cfg.full_attention_interval - 1, [], {}
        layer = rematerialised(DecoderLayer, cfg.remat)
        if self.unrolled:
            for i, name in enumerate(f"linear_{i}" for i in range(count)):
                x, (single, new[name]) = layer(cfg, "linear", name=name)(x, context, old.get(name), of(i))
                statistics.append(add_layer_axis(single))
        elif count:
            x, (stacked, new["linear"]) = linear_layers(cfg, count, "linear")(
                x, context, old.get("linear"), of(slice(count)))
            statistics.append(stacked)
        x, (single, new["full"]) = layer(cfg, "full", name="full")(x, context, old.get("full"), of(count))
        statistics.append(add_layer_axis(single))
        return x, (join_layers(statistics), new if cache is not None else None)


def add_layer_axis(statistics: RouterStatistics | None) -> RouterStatistics | None:
    """One layer's statistics, if it has any, with a leading layer axis."""
    return jax.tree.map(lambda leaf: leaf[None], statistics)


def join_layers(parts: list[RouterStatistics | None]) -> RouterStatistics | None:
    """Statistics of consecutive layers as one, joined on the leading layer axis."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
