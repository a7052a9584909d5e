"""The DeltaNet mixer as one kernel, in Pallas' interpreter, against the layer's own parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.layers.gated_delta_net import next_window
from qcn_jax.layers.kernels.mixer import continued_delta_net, delta_net
from tests.layers.mixer_by_parts import by_parts

B, T, H, R, DK, DV, CHUNK, TAPS = 2, 75, 2, 2, 16, 24, 32, 4
# A document's first outputs are nearly zero where q and k are nearly orthogonal, and the norm magnifies their rounding
# without limit; a large eps sets one, so that bfloat16 can be held to a bound.
EPS, LARGE_EPS = 1e-6, 0.05
NAMES = ("qkvz", "kernel", "g", "beta", "weight")
# Document starts around chunk edges and closer together than the taps of the convolution.
BOUNDARIES = ([1, 3, 31, 32, 48], [2, 33, 34, 64, T - 1])
SEGMENTS = np.stack([np.searchsorted(ends, np.arange(T), side="right") for ends in BOUNDARIES]).astype(np.int32)


def inputs(seed=0, repeats=R):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    g, beta = -np.log1p(np.exp(normal(B, T, H, repeats) - 1)), 1 / (1 + np.exp(-normal(B, T, H, repeats)))
    mixed = 2 * DK + repeats * DV
    return (normal(B, T, H * (mixed + repeats * DV)), normal(TAPS, H, mixed), g, beta, 1 + 0.3 * normal(DV)), normal(
        B, T, H * repeats * DV)


def as_kernel(eps, qkvz, kernel, g, beta, weight, segment_ids):
    return delta_net(qkvz, kernel, g, beta, weight, segment_ids, eps=eps, chunk_size=CHUNK, key_dim=DK)


@functools.cache
def with_gradients(mixer, eps, dtype=jnp.float32):
    def loss(qkvz, kernel, g, beta, weight, segment_ids, cotangent):
        y = mixer(eps, qkvz.astype(dtype), kernel.astype(dtype), g, beta, weight, segment_ids)
        return jnp.sum(y.astype(jnp.float32) * cotangent), y

    run = jax.jit(jax.value_and_grad(loss, argnums=range(5), has_aux=True))

    def call(*arrays):
        (_, y), gradients = run(*arrays)
        return y, gradients

    return call


@pytest.mark.parametrize("segments, repeats", [
    (SEGMENTS, R), (np.zeros_like(SEGMENTS), R), (SEGMENTS, 1), (SEGMENTS, 3)],
    ids=["packed", "whole", "one value head to a key head", "three"])
def test_output_and_gradients(segments, repeats):
    arrays, cotangent = inputs(repeats=repeats)
    y, gradients = with_gradients(as_kernel, EPS)(*arrays, segments, cotangent)
    expected, expected_gradients = with_gradients(by_parts, EPS)(*arrays, segments, cotangent)
    assert y.shape == expected.shape and y.dtype == expected.dtype
    # Norms of outputs near zero (tokens at a document's start) magnify rounding.
    assert np.linalg.norm(y - expected) < 1e-5 * np.linalg.norm(expected)
    for name, a, b in zip(NAMES, gradients, expected_gradients):
        assert a.shape == b.shape and np.isfinite(a).all(), name
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b), name


def test_bfloat16():
    arrays, cotangent = inputs(1)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)) for x in arrays[:2]]
    arrays = (*rounded, *arrays[2:4], np.asarray(jnp.asarray(arrays[4], jnp.bfloat16).astype(jnp.float32)))
    y, gradients = with_gradients(as_kernel, LARGE_EPS, jnp.bfloat16)(*arrays, SEGMENTS, cotangent)
    expected, expected_gradients = with_gradients(by_parts, LARGE_EPS)(*arrays, SEGMENTS, cotangent)
    assert y.dtype == jnp.bfloat16
    assert np.linalg.norm(y.astype(jnp.float32) - expected) < 0.02 * np.linalg.norm(expected)
    for name, a, b in zip(NAMES, gradients, expected_gradients):
        assert np.isfinite(a).all(), name
        assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b), name


def test_pieces_of_different_lengths_go_on_from_state_and_window():
    """Sequences taken in by pieces of one shape, padded to it, against the layer's parts of them whole."""
    (qkvz, kernel, g, beta, weight), _ = inputs(2)
    expected = by_parts(EPS, qkvz, kernel, g, beta, weight, None)
    mix = jax.jit(functools.partial(continued_delta_net, eps=EPS, chunk_size=CHUNK, key_dim=DK))
    window = jnp.zeros((B, TAPS - 1, H, kernel.shape[-1]))
    state = jnp.zeros((B, H, R, DK, DV))
    done, size, y = np.zeros(B, int), 40, np.zeros(expected.shape)
    for lengths in ([40, 1], [2, 37], [33, 0], [0, 37]):  # T in all, of both
        at = np.minimum(done[:, None] + np.arange(size), T - 1)
        piece = lambda x: np.take_along_axis(x, at.reshape(B, size, *[1] * (x.ndim - 2)), axis=1)
        real = np.arange(size) < np.asarray(lengths)[:, None]
        gates = [np.where(real[..., None, None], piece(x), 0).astype(np.float32) for x in (g, beta)]
        out, state = mix(piece(qkvz), kernel, *gates, weight, window, state)
        inputs_of = piece(qkvz).reshape(B, size, H, -1)[..., : kernel.shape[-1]]
        window = next_window(jnp.asarray(inputs_of), window, jnp.asarray(lengths))
        for row, length in enumerate(lengths):
            y[row, done[row] : done[row] + length] = out[row, :length]
        done += lengths
    assert (done == T).all() and np.linalg.norm(y - expected) < 1e-5 * np.linalg.norm(expected)
