"""Gated DeltaNet mixer: projections, short causal convolution, the delta rule, gated norm.

Axes as in layers.delta_rule: B batch, T tokens, H key heads, R value heads per key head.
Channels of projection, convolution and state stay grouped by key head, so that all of them shard by heads.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qcn_jax.config import ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.layers.context import TokenContext
from qcn_jax.layers.delta_rule import gated_delta_rule
from qcn_jax.layers.dense import Kernel, dense, normal_init, product
from qcn_jax.layers.norm import GatedRMSNorm, l2_norm
from qcn_jax.layers.products import accumulator, widened
from qcn_jax.layers.sharded import continued_delta_rule, sharded_delta_rule, with_halo
from qcn_jax.sharding.parallel import Parallel

Array = jax.Array


def _on_gpu(parallel: Parallel | None) -> bool:
    """Whether the program is for GPUs, for which there are kernels of the delta rule but none of the whole mixer."""
    platform = None if parallel is None else parallel.platform
    return (platform or jax.default_backend()) == "gpu"


def _conv_width(cfg: ModelConfig) -> int:
    """Convolution channels per key head: query, key and its value heads."""
    repeats = cfg.linear_num_value_heads // cfg.linear_num_key_heads
    return 2 * cfg.linear_key_head_dim + repeats * cfg.linear_value_head_dim


def init_delta_net_cache(config: ModelConfig, batch: int) -> dict[str, Array]:
    """Empty convolution window [B, kernel - 1, H, width] and state [B, H, R, dk, dv] in float32 at least."""
    heads, repeats = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    window = (batch, config.linear_conv_kernel_dim - 1, heads, _conv_width(config))
    state = (batch, heads, repeats, config.linear_key_head_dim, config.linear_value_head_dim)
    return {"conv": jnp.zeros(window, jnp.dtype(config.dtype)), "state": jnp.zeros(state, accumulator(config.dtype))}


def causal_conv(x: Array, kernel: Array, window: Array | None, segment_ids: Array | None) -> Array:
    """Depthwise causal convolution that never looks across a document's start.

    Args:
      x: [B, T, ...] inputs.
      kernel: [taps, ...]; the last tap is the token itself.
      window: [B, taps - 1, ...] inputs before the first token; None is zeros.
      segment_ids: [B, T] or None.

    Returns:
      [B, T, ...].
    """
    taps, length = kernel.shape[0], x.shape[1]
    if window is None:
        window = jnp.zeros((x.shape[0], taps - 1, *x.shape[2:]), x.dtype)
    padded = jnp.concatenate([window, x], axis=1)
    out = x * kernel[-1]
    for back in range(1, taps):
        shifted = padded[:, taps - 1 - back : taps - 1 - back + length]
        if segment_ids is not None:
            same = jnp.pad(segment_ids[:, back:] == segment_ids[:, :-back], ((0, 0), (min(back, length), 0)))
            shifted = shifted * same.reshape(*same.shape, *[1] * (x.ndim - 2)).astype(x.dtype)
        out = out + shifted * kernel[-1 - back]
    return out


def sharded_conv(x: Array, kernel: Array, segment_ids: Array | None, parallel: Parallel) -> Array:
    """`causal_conv` of x [B, T, H, width] whose length is split over devices."""
    axes, halo = parallel.axes("activation_length"), kernel.shape[0] - 1

    def local(x: Array, kernel: Array, segment_ids: Array | None) -> Array:
        if segment_ids is not None:
            segment_ids = with_halo(segment_ids, halo, axes)
        return causal_conv(with_halo(x, halo, axes), kernel, None, segment_ids)[:, halo:]

    tokens = ("activation_batch", "activation_length")
    spread = parallel.spec(*tokens, "activation_heads", None)
    specs = (spread, parallel.spec(None, "activation_heads", None), parallel.spec(*tokens))
    return parallel.per_device(local, specs, spread)(x, kernel, segment_ids)


def next_window(x: Array, window: Array, lengths: Array | None) -> Array:
    """The last taps - 1 real inputs of each sequence, after `lengths` [B] of the T tokens of x."""
    size = window.shape[1]
    padded = jnp.concatenate([window, x.astype(window.dtype)], axis=1)
    if lengths is None:
        return padded[:, padded.shape[1] - size :]
    index = lengths[:, None] + jnp.arange(size, dtype=lengths.dtype)
    return jnp.take_along_axis(padded, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def by_kernel(
    cfg: ModelConfig, qkvz: Array, kernel: Array, g: Array, beta: Array, weight: Array, context: TokenContext
) -> Array:
    """All between the projections by kernels on every device.

    Args:
      qkvz: [B, T, H * width]. kernel: [taps, H, width]. g, beta: [B, T, H, R] float32. weight: [dv].

    Returns:
      [B, T, H * R * dv].

    Raises:
      UserError: key heads that do not divide by the devices, or too few tokens per device for the convolution.
    """
    from qcn_jax.layers.kernels.mixer import delta_net  # Pallas takes a while to import

    mix = functools.partial(
        delta_net, eps=cfg.rms_norm_eps, chunk_size=cfg.chunk_size, key_dim=cfg.linear_key_head_dim)
    arrays, parallel = (qkvz, kernel, g, beta, weight, context.segment_ids), context.parallel
    if parallel is None:
        return mix(*arrays)
    parts = parallel.size("activation_heads")
    if cfg.linear_num_key_heads % parts:
        raise UserError(
            f"--config.mesh.tensor: {parts} parts do not divide {cfg.linear_num_key_heads} key heads of the delta rule")
    tokens = ("activation_batch", "activation_length")
    flat, gates = parallel.spec(*tokens, "activation_heads"), parallel.spec(*tokens, "activation_heads", None)
    taps = parallel.spec(None, "activation_heads", None)
    specs = (flat, taps, gates, gates, parallel.spec(None), parallel.spec(*tokens))
    mix = functools.partial(mix, context=parallel.axes("activation_length"))
    return parallel.per_device(mix, specs, flat)(*arrays)


def continued_by_kernel(
    cfg: ModelConfig, qkvz: Array, kernel: Array, g: Array, beta: Array, weight: Array, cache: dict[str, Array],
    parallel: Parallel | None,
) -> tuple[Array, Array]:
    """`by_kernel` of sequences that go on from a cache, each whole on a device.

    Returns:
      [B, T, H * R * dv] and the state [B, H, R, dk, dv] behind the last token.
    """
    from qcn_jax.layers.kernels.mixer import continued_delta_net

    mix = functools.partial(
        continued_delta_net, eps=cfg.rms_norm_eps, chunk_size=cfg.chunk_size, key_dim=cfg.linear_key_head_dim)
    arrays = (qkvz, kernel, g, beta, weight, cache["conv"], cache["state"])
    if parallel is None:
        return mix(*arrays)
    spec = functools.partial(parallel.spec, "activation_batch")
    flat, gates = spec(None, "activation_heads"), spec(None, "activation_heads", None)
    states = spec("activation_heads", None, None, None)
    taps = parallel.spec(None, "activation_heads", None)
    specs = (flat, taps, gates, gates, parallel.spec(None), spec(None, "activation_heads", None), states)
    return parallel.per_device(mix, specs, (flat, states))(*arrays)


class _ConvKernel(nn.Module):
    """conv1d/kernel [taps, channels], channels ordered all q, all k, all v; returned grouped by key head."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Array:
        cfg = self.config
        heads, taps = cfg.linear_num_key_heads, cfg.linear_conv_kernel_dim
        init = nn.with_logical_partitioning(normal_init(cfg), ("taps", "conv"))
        shape = (taps, heads * _conv_width(cfg))
        kernel = self.param("kernel", init, shape, jnp.dtype(cfg.param_dtype)).astype(jnp.dtype(cfg.dtype))
        keys = heads * cfg.linear_key_head_dim
        parts = (kernel[:, :keys], kernel[:, keys : 2 * keys], kernel[:, 2 * keys :])
        return jnp.concatenate([part.reshape(taps, heads, -1) for part in parts], axis=-1)


def _decay_init(rng: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """A_log: the logarithm of a decay rate uniform in (0.01, 16)."""
    return jnp.log(jax.random.uniform(rng, shape, dtype, 0.01, 16.0))


class GatedDeltaNet(nn.Module):
    """linear_attn of a DeltaNet layer: x [B, T, D] -> [B, T, D]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, context: TokenContext, cache: Any = None) -> tuple[Array, Any]:
        cfg = self.config
        heads, key_dim, value_dim = cfg.linear_num_key_heads, cfg.linear_key_head_dim, cfg.linear_value_head_dim
        repeats = cfg.linear_num_value_heads // heads
        batch, length, _ = x.shape
        values = repeats * value_dim
        parallel = context.whole_parallel
        project, axes = functools.partial(dense, cfg, parallel=parallel), ("embed", "heads")
        weight = Kernel(cfg, heads * (_conv_width(cfg) + values), axes, name="in_proj_qkvz")(x.shape[-1])
        weight = weight.astype(x.dtype)
        ba = project(heads * 2 * repeats, axes, "in_proj_ba")(x)
        ba = widened(ba.reshape(batch, length, heads, 2 * repeats))
        beta, g = self._gates(ba[..., :repeats], ba[..., repeats:], context.valid)

        kernel = _ConvKernel(cfg, name="conv1d")()
        norm = GatedRMSNorm(cfg.rms_norm_eps, param_dtype=jnp.dtype(cfg.param_dtype), name="norm")
        out = project(cfg.hidden_size, ("heads", "embed"), "out_proj")
        if cfg.delta_rule == "pallas" and length > 1 and not _on_gpu(context.parallel):
            arrays = product(x, weight, axes, parallel), kernel, g, beta, norm.weight(value_dim)
            if cache is None:
                return out(by_kernel(cfg, *arrays, context)), None
            y, state = continued_by_kernel(cfg, *arrays, cache, context.parallel)
            qkv = arrays[0].reshape(batch, length, heads, -1)[..., : _conv_width(cfg)]
            return out(y), {"conv": next_window(qkv, cache["conv"], context.lengths), "state": state}

        window, state = (None, None) if cache is None else (cache["conv"], cache["state"])
        qkv, q, k, v, z = self._mixed(x, weight, kernel, window, context)
        v = v.reshape(batch, length, heads, repeats, value_dim)
        q, k = l2_norm(q) * key_dim**-0.5, l2_norm(k)
        if context.parallel is None:
            o, state = gated_delta_rule(
                q, k, v, g, beta, state, context.segment_ids, cfg.delta_rule, cfg.chunk_size
            )
        elif cache is not None:
            o, state = continued_delta_rule(q, k, v, g, beta, state, cfg.delta_rule, cfg.chunk_size, context.parallel)
        else:
            o = sharded_delta_rule(
                q, k, v, g, beta, context.segment_ids, cfg.delta_rule, cfg.chunk_size, parallel
            )
        if cache is not None:
            cache = {"conv": next_window(qkv, window, context.lengths), "state": state}

        z = z.reshape(batch, length, heads, repeats, value_dim)
        o = norm(o.astype(x.dtype), z)
        return out(o.reshape(batch, length, heads * values)), cache

    def _mixed(
        self, x: Array, weight: Array, taps: Array, window: Array | None, context: TokenContext
    ) -> tuple[Array | None, Array, Array, Array, Array]:
        """[B, T, H, *]: what enters the convolution (None where nobody needs it), q, k and v behind it, and z."""
        cfg, parallel, axes = self.config, context.whole_parallel, ("embed", "heads")
        heads, key_dim, width = cfg.linear_num_key_heads, cfg.linear_key_head_dim, _conv_width(cfg)
        parts = functools.partial(jnp.split, indices_or_sections=[key_dim, 2 * key_dim, width], axis=-1)
        by_head = lambda x: x.reshape(*x.shape[:-1], heads, -1)
        if window is None and parallel is None:
            # Parts of the weights are cheaper to take, and their gradients to join, than those of all tokens.
            q, k, v, z = (
                by_head(product(x, part.reshape(len(part), -1), axes, None)) for part in parts(by_head(weight)))
            q, k, v = (
                jax.nn.silu(causal_conv(part, tap, None, context.segment_ids))
                for part, tap in zip((q, k, v), parts(taps)))
            return None, q, k, v, z
        qkvz = by_head(product(x, weight, axes, parallel))
        qkv, z = qkvz[..., :width], qkvz[..., width:]
        if parallel is not None and parallel.size("activation_length") > 1:
            mixed = sharded_conv(qkv, taps, context.segment_ids, parallel)
        else:
            mixed = causal_conv(qkv, taps, window, context.segment_ids)
        q, k, v, _ = parts(jax.nn.silu(mixed))
        return qkv, q, k, v, z

    def _gates(self, b: Array, a: Array, valid: Array | None) -> tuple[Array, Array]:
        """beta and g [B, T, H, R] in float32 at least, both zero at padding, which makes it inert."""
        cfg = self.config
        # Never narrower than float32, whatever param_dtype is: they act in exponents.
        shape, dtype = (cfg.linear_num_value_heads,), accumulator(cfg.param_dtype)
        grouped = lambda w: w.astype(a.dtype).reshape(cfg.linear_num_key_heads, -1)
        a_log = grouped(self.param("A_log", nn.with_logical_partitioning(_decay_init, ("heads",)), shape, dtype))
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("heads",))
        dt_bias = grouped(self.param("dt_bias", ones, shape, dtype))
        beta, g = jax.nn.sigmoid(b), -jnp.exp(a_log) * jax.nn.softplus(a + dt_bias)
        if valid is None:
            return beta, g
        real = valid[..., None, None]
        return jnp.where(real, beta, 0.0), jnp.where(real, g, 0.0)
