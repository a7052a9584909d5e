"""Expert back ends against a loop over tokens, whatever the routing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.errors import UserError
from qcn_jax.moe.experts import BACKENDS, ExpertWeights, apply_experts
from qcn_jax.moe.permute import sorted_layout

N, E, CHOICES, D, F = 45, 7, 3, 12, 10


def inputs(kind):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    experts = np.argsort(rng.random((N, E)), axis=1)[:, :CHOICES].astype(np.int32)
    if kind == "one group":  # most experts get nothing, three get every token
        experts[:] = [5, 0, 2]
    kernels = ExpertWeights(normal(E, D, F), normal(E, D, F), normal(E, F, D))
    return normal(N, D), rng.random((N, CHOICES)).astype(np.float32), experts, kernels


def reference(x, weights, experts, kernels):
    x, weights, kernels = x.astype(np.float64), weights.astype(np.float64), [k.astype(np.float64) for k in kernels]
    out = np.zeros_like(x)
    for n, j in np.ndindex(experts.shape):
        gate, up, down = (kernel[experts[n, j]] for kernel in kernels)
        a = x[n] @ gate
        out[n] += weights[n, j] * ((a / (1 + np.exp(-a)) * (x[n] @ up)) @ down)
    return out


@pytest.mark.parametrize("kind", ["spread", "one group"])
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "megablox"])  # TPU; test_grouped
def test_backends_agree_with_a_loop(backend, kind):
    x, weights, experts, kernels = inputs(kind)
    for tokens in (N, 1):  # a single token has fewer slots than there are experts
        out = apply_experts(x[:tokens], weights[:tokens], experts[:tokens], kernels, backend)
        expected = reference(x[:tokens], weights[:tokens], experts[:tokens], kernels)
        assert np.abs(out - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["spread", "one group"])
def test_gradients_of_backends_agree(kind):
    x, weights, experts, kernels = inputs(kind)
    target = np.random.default_rng(1).standard_normal((N, D)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(backend, *differentiable):
        loss = lambda x, w, kernels: jnp.sum(apply_experts(x, w, jnp.asarray(experts), kernels, backend) * target)
        return jax.grad(loss, argnums=(0, 1, 2))(*differentiable)

    expected = gradient("dense", x, weights, kernels)  # plain autodiff of plain products
    for backend in ("blocked", "looped", "ragged"):
        for got, want in zip(jax.tree.leaves(gradient(backend, x, weights, kernels)), jax.tree.leaves(expected)):
            assert np.abs(got - want).max() < 1e-4 * np.abs(want).max() + 1e-6
    if kind == "spread":
        half = [jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), tree) for tree in (x, weights, kernels)]
        for got, want in zip(jax.tree.leaves(gradient("looped", *half)), jax.tree.leaves(expected)):
            assert got.dtype == jnp.bfloat16
            assert np.linalg.norm(np.asarray(got, np.float32) - want) < 0.01 * np.linalg.norm(want)


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("kind", ["spread", "one group"])
def test_layout_places_every_slot_once_in_its_experts_blocks(block, kind):
    experts = inputs(kind)[2]
    layout = jax.tree.map(np.asarray, sorted_layout(jnp.asarray(experts), E, block))
    flat = layout.row.reshape(-1)
    assert len(set(flat)) == flat.size
    np.testing.assert_array_equal(layout.source[flat], np.arange(flat.size))
    assert (np.delete(layout.source, flat) == flat.size).all()
    np.testing.assert_array_equal(layout.block_expert[flat // block], experts.reshape(-1))


def test_unknown_backend_names_the_field():
    with pytest.raises(UserError, match="model.moe: unknown back end 'fast'; allowed: auto, blocked"):
        apply_experts(*inputs("spread"), backend="fast")
    with pytest.raises(UserError, match="model.moe: megablox has kernels for TPU only, this is a cpu"):
        apply_experts(*inputs("spread"), backend="megablox")
