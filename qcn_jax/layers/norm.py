"""Root-mean-square norms of Qwen3-Next: zero-centred weight, gated, and the L2 norm of keys and queries."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from qcn_jax.layers.products import widened

Array = jax.Array
L2_EPS = 1e-6  # inside the root and on the sum of squares, as flash-linear-attention and transformers do


def l2_norm(x: Array) -> Array:
    """x / sqrt(sum(x^2) + 1e-6) over the last axis, in float32 at least; a zero vector stays zero."""
    x = widened(x)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + L2_EPS)


def _normalise(x: Array, eps: float) -> Array:
    x = widened(x)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
    """y = x * rsqrt(mean(x^2) + eps) * (1 + weight), computed in float32 at least and cast back to x's dtype.

    "Zero-centred" names the weight's parametrisation (initialised 0); no mean is subtracted.
    """

    eps: float
    axis_name: str = "norm"
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.zeros, (self.axis_name,))
        weight = self.param("weight", init, (x.shape[-1],), self.param_dtype)
        normalised = _normalise(x, self.eps)
        return (normalised * (1.0 + weight.astype(normalised.dtype))).astype(x.dtype)


class GatedRMSNorm(nn.Module):
    """weight * norm(x) * silu(gate) over the last axis; the gate and the last cast are as published:
    the norm is cast to the activation dtype before the weight, the gate acts in float32 at least."""

    eps: float
    axis_name: str = "head_dim"
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def weight(self, width: int) -> Array:
        """[width], the parameter."""
        init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis_name,))
        return self.param("weight", init, (width,), self.param_dtype)

    def __call__(self, x: Array, gate: Array) -> Array:
        dtype = gate.dtype
        y = self.weight(x.shape[-1]).astype(dtype) * _normalise(x, self.eps).astype(dtype)
        return (y * jax.nn.silu(widened(gate))).astype(dtype)
