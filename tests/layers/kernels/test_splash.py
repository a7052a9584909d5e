"""Splash attention, in Pallas' interpreter, against the blockwise form it stands in for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.layers import flash
from qcn_jax.layers.kernels import splash

B, K, R, T, H = 2, 2, 3, 150, 16  # one whole block of 128 queries and a part


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    segments = np.sort(rng.integers(0, 5, (B, T)), axis=1).astype(np.int32)
    return 3 * normal(B, K, R, T, H), normal(B, K, T, H), normal(B, K, T, H), segments, normal(B, K, R, T, H)


@functools.partial(jax.jit, static_argnums=0)
def run(attention, q, k, v, segments, weight):
    loss = lambda *x: (jnp.sum(attention(*x, segments).astype(jnp.float32) * weight), attention(*x, segments))
    (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


@pytest.mark.parametrize("documents", [False, True])
def test_output_and_gradients(documents, monkeypatch):
    monkeypatch.setattr(splash, "MAX_BLOCK", 128)
    q, k, v, segments, weight = inputs()
    segments = segments if documents else None
    got = run(splash.causal_attention, q, k, v, segments, weight)
    expected = run(flash.causal_attention, q, k, v, segments, weight)
    for a, b in zip(got, expected):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert np.abs(a - b).max() < 3e-5 * max(1, np.abs(b).max())


def test_bfloat16_keeps_its_dtype():
    q, k, v, segments, weight = inputs(1)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    got = run(splash.causal_attention, *rounded, segments, weight)
    expected = run(flash.causal_attention, *(x.astype(jnp.float32) for x in rounded), segments, weight)
    for a, b in zip(got, expected):
        assert a.dtype == jnp.bfloat16
        assert np.linalg.norm(a.astype(jnp.float32) - b) < 0.02 * np.linalg.norm(b)


def test_blocks_of_the_mask():
    mask, whole = splash.CausalMask((60, 40)), np.tri(60, 40, dtype=bool)
    assert mask == splash.CausalMask((60, 40)) and hash(mask) == hash(splash.CausalMask((60, 40)))
    for rows in [slice(0, 60), slice(50, None), *(slice(i, i + 7) for i in range(0, 50, 7))]:
        for columns in [slice(None), *(slice(i, i + 5) for i in range(36))]:
            np.testing.assert_array_equal(mask[rows, columns], whole[rows, columns])
