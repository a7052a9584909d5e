"""The short convolution and its window across documents, padding and calls."""

import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.layers.context import segment_positions
from qcn_jax.layers.gated_delta_net import causal_conv, next_window

B, T = 2, 11


def reference(x, kernel, window, segments):
    taps, out = len(kernel), np.zeros_like(x)
    for b, t, i in np.ndindex(B, T, taps):
        s = t - (taps - 1) + i
        if s >= 0 and (segments is None or segments[b, s] == segments[b, t]):
            out[b, t] += kernel[i] * x[b, s]
        elif s < 0 and window is not None:
            out[b, t] += kernel[i] * window[b, s]
    return out


@pytest.mark.parametrize("taps", [1, 2, 4, 5])
@pytest.mark.parametrize("case", ["plain", "window", "documents"])
def test_convolution(taps, case):
    rng = np.random.default_rng(taps)
    x, kernel = rng.standard_normal((B, T, 2, 3)), rng.standard_normal((taps, 2, 3))
    window = rng.standard_normal((B, taps - 1, 2, 3)) if case == "window" else None
    segments = np.array([[1, 2, 2, 3, 3, 3, 3, 4, 5, 6, 6], [0, 0, 0, 7, 7, 7, 7, 7, 7, 7, 7]]) if case == "documents" else None
    as_jax = lambda value: None if value is None else jnp.asarray(value, jnp.int32 if value is segments else jnp.float32)
    out = causal_conv(as_jax(x), as_jax(kernel), as_jax(window), as_jax(segments))
    np.testing.assert_allclose(out, reference(x, kernel, window, segments), atol=1e-5)


def test_window_holds_the_last_real_inputs():
    x, window = np.arange(1, 23.0).reshape(B, T, 1), -np.arange(1, 7.0).reshape(B, 3, 1)
    whole = np.concatenate([window, x], axis=1)
    np.testing.assert_array_equal(next_window(jnp.asarray(x), jnp.asarray(window), None), x[:, -3:])
    lengths = np.array([0, 2])
    expected = np.stack([whole[b, n : n + 3] for b, n in enumerate(lengths)])
    np.testing.assert_array_equal(next_window(jnp.asarray(x), jnp.asarray(window), jnp.asarray(lengths)), expected)


def test_positions_begin_anew_with_every_document():
    segments = jnp.asarray([[0, 0, 1, 1, 1, 2, 1], [3, 3, 3, 3, 3, 3, 3]])
    np.testing.assert_array_equal(segment_positions(segments), [[0, 1, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5, 6]])
