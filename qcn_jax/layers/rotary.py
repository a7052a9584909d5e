"""Rotary position embedding of the first `rotary_dim` channels of each head (NeoX halves)."""

import jax
import jax.numpy as jnp

Array = jax.Array


def rotary_dim(head_dim: int, partial_rotary_factor: float) -> int:
    """Number of rotated channels; the others pass untouched."""
    return int(head_dim * partial_rotary_factor)


def rotary_angles(
    positions: Array, dim: int, theta: float, dtype: jnp.dtype = jnp.float32
) -> tuple[Array, Array]:
    """cos and sin, each [B, T, dim / 2] in `dtype`, for `positions` [B, T]."""
    frequency = theta ** (-jnp.arange(0, dim, 2, dtype=dtype) / dim)
    angle = positions.astype(dtype)[..., None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def apply_rotary(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the first channels of x [B, T, heads, H] by angles [B, T, dim / 2], in x's dtype."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
    first, second = x[..., :half], x[..., half : 2 * half]
    rotated = (first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :])
    return jnp.concatenate(rotated, axis=-1)
