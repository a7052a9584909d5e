"""Blockwise attention against the definition in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.layers.flash import MIN_BLOCK, causal_attention

B, K, R, H = 2, 2, 3, 8


def inputs(length, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    q, k, v = 3 * normal(B, K, R, length, H), normal(B, K, length, H), normal(B, K, length, H)
    segments = np.sort(rng.integers(0, 5, (B, length)), axis=1).astype(np.int32)
    return q, k, v, segments


def reference(q, k, v, segments):
    """Softmax over the visible keys, all at once; works on NumPy float64 and on traced arrays."""
    length = q.shape[3]
    visible = np.tril(np.ones((length, length), bool))[None]
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None])
    logits = jnp.einsum("bkrth,bksh->bkrts", q, k) / np.sqrt(H)
    return jnp.einsum("bkrts,bksh->bkrth", jax.nn.softmax(jnp.where(visible[:, None, None], logits, -jnp.inf)), v)


@pytest.mark.parametrize("length", [1, 50, 2 * MIN_BLOCK + 9])
@pytest.mark.parametrize("documents", [False, True])
def test_output_and_gradients(length, documents):
    q, k, v, segments = inputs(length)
    segments = segments if documents else None
    weight = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, q, k, v):
        return jax.value_and_grad(lambda *x: jnp.sum(function(*x, segments) * weight), argnums=(0, 1, 2))(q, k, v)

    value, gradients = run(causal_attention, q, k, v)
    with jax.enable_x64(True):
        expected, wanted = run(reference, *(x.astype(np.float64) for x in (q, k, v)))
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-3)
    for got, want in zip(map(np.asarray, gradients), map(np.asarray, wanted)):
        assert np.abs(got - want).max() < 2e-5 * max(1, np.abs(want).max())


def test_bfloat16_keeps_its_dtype_and_reduces_in_float32():
    q, k, v, segments = inputs(300, 2)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    out = jax.jit(causal_attention)(*rounded, segments)
    assert out.dtype == jnp.bfloat16
    expected = reference(*(np.asarray(x, np.float32) for x in rounded), segments)
    assert np.abs(out.astype(jnp.float32) - expected).max() < 0.03  # values up to 4, of 8 bits


@pytest.mark.parametrize("length", [MIN_BLOCK, MIN_BLOCK + 9])
def test_gradients_hold_no_array_without_elements(length):
    """The smallest program that killed the CPU compiler of JAX 0.11 (signal 11 in Shardy's import) was

        jax.jit(jax.shard_map(lambda x: jnp.zeros_like(x).at[:, :].add(x), mesh=..., in_specs=P("c"), out_specs=P("c")))

    as `[:, :]` is an index of no elements, a constant, which becomes an argument of the program of each device.
    """
    q, k, v, segments = inputs(length)
    gradients = jax.jit(jax.grad(lambda *x: jnp.sum(causal_attention(*x, segments)), argnums=(0, 1, 2)))
    constants = jax.jit(lambda x: x.at[:, :, :].add(x)).lower(k).as_text().count("dense<> : tensor<0x")
    assert constants == 1  # so would such an index be seen
    assert "dense<> : tensor<0x" not in gradients.lower(q, k, v).as_text()
