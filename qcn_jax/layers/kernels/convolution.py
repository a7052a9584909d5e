"""The depthwise causal convolution of one chunk on values that lie in VMEM, forward and backward.

Axes: C tokens of a chunk; channels in the lanes. Taps lie in the rows of one tile [8, *], the last is the token itself.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array
SUBLANES = 8


def tap_masks(position: Array, taps: int) -> list[Array]:
    """For 0 .. taps - 1 tokens back: [C, 1], 1 where that token is of the same document.

    `position` [C, 1] is the number of tokens of the same document before each token.
    """
    return [(position >= back).astype(jnp.float32) for back in range(taps)]


def _shifted(halo: Array, x: Array, back: int) -> Array:
    """x [C, *] `back` rows earlier, with halo [8, *] before it."""
    if back == 0:
        return x
    return pltpu.roll(jnp.concatenate([halo, x]), back, 0)[SUBLANES:]


def convolved(halo: Array, x: Array, kernel: Array, masks: list[Array]) -> Array:
    """Depthwise causal convolution: x [C, *], halo [8, *] before it, kernel [8, *] (taps, then zeros)."""
    taps = len(masks)
    out = x * kernel[taps - 1 : taps]
    for back in range(1, taps):
        out = out + _shifted(halo, x, back) * masks[back] * kernel[taps - 1 - back : taps - back]
    return out


def convolution_gradients(
    d_out: Array, halo: Array, x: Array, kernel: Array, masks: list[Array]
) -> tuple[Array, Array, Array]:
    """Gradients of `convolved`: d_halo [8, *], dx [C, *], d_kernel [8, *]."""
    taps, (size, width) = len(masks), x.shape
    extended = jnp.zeros((SUBLANES + size, width), jnp.float32)
    zeros, d_taps = jnp.zeros((SUBLANES, width), jnp.float32), []
    for back in range(taps):
        masked = d_out * masks[back] if back else d_out
        d_taps.append(jnp.sum(masked * _shifted(halo, x, back), axis=0, keepdims=True))
        earlier = jnp.concatenate([zeros, masked * kernel[taps - 1 - back : taps - back]])
        extended = extended + (pltpu.roll(earlier, SUBLANES + size - back, 0) if back else earlier)
    line = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, width), 0)
    d_kernel = zeros
    for back, d_tap in enumerate(d_taps):
        d_kernel = jnp.where(line == taps - 1 - back, d_tap, d_kernel)
    return extended[:SUBLANES], extended[SUBLANES:], d_kernel
