"""Routes that are asked for and replayed, through scanned and unrolled layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.model import Qwen3Next
from tests.inference.test_engine import CONFIG, make_params

LAYERS, TOP = 5, CONFIG.num_experts_per_tok


@pytest.fixture(scope="module", name="pass_", params=["scanned", "unrolled"])
def _pass(request):
    """(params, tokens, routes or None) -> Output, of a model with layers behind the last whole block."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=LAYERS, scan_layers=request.param == "scanned")
    params, apply = make_params(config), jax.jit(Qwen3Next(config).apply, static_argnames="with_routes")
    return params, lambda params, tokens, routes=None: apply({"params": params}, tokens, routes=routes, with_routes=True)


@pytest.fixture(scope="module", name="tokens")
def _tokens():
    return jax.random.randint(jax.random.key(1), (2, 12), 0, CONFIG.vocab_size)


def test_replaying_a_models_own_routes_changes_nothing(pass_, tokens):
    params, apply = pass_
    free = apply(params, tokens)
    assert free.routes.shape == (LAYERS, 2, 12, TOP) and free.aux.routes is None
    replayed = apply(params, tokens, free.routes)
    np.testing.assert_array_equal(free.logits, replayed.logits)
    np.testing.assert_array_equal(free.aux.counts, replayed.aux.counts)


def test_a_perturbed_route_changes_what_comes_behind_it_and_nothing_before(pass_, tokens):
    params, apply = pass_
    free = apply(params, tokens)
    for layer in range(LAYERS):
        routes = free.routes.at[layer, 0, 7].set((free.routes[layer, 0, 7] + 1) % CONFIG.num_experts)
        moved = apply(params, tokens, routes)
        change = np.abs(np.asarray(moved.logits - free.logits)).max(-1)
        assert change[0, 7] > 1e-3 and not change[0, :7].any() and not change[1].any()
        np.testing.assert_array_equal(moved.routes[: layer + 1], free.routes[: layer + 1])  # the routers' own choice
        np.testing.assert_array_equal(moved.aux.counts[layer].sum(), free.aux.counts[layer].sum())


def test_negative_routes_are_free(pass_, tokens):
    params, apply = pass_
    free = apply(params, tokens)
    routes = jnp.where(jnp.arange(12)[None, None, :, None] % 2 == 0, free.routes, -1)
    np.testing.assert_array_equal(apply(params, tokens, routes).logits, free.logits)


def test_the_router_learns_under_replay(pass_, tokens):
    """Its gates are recomputed, so its weights have a gradient, of the experts that were replayed alone."""
    params, apply = pass_
    routes = jnp.broadcast_to(jnp.asarray([0, 2], jnp.int32), (LAYERS, 2, 12, TOP))
    gradient = jax.grad(lambda params: jnp.sum(apply(params, tokens, routes).logits ** 2))(params)
    gates = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradient) if any(
        entry.key == "gate" for entry in path)]
    experts = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradient) if any(
        entry.key == "experts" for entry in path)]
    assert gates and experts and all(np.abs(leaf).max() > 0 for leaf in gates)
    for leaf in experts:
        by_expert = np.abs(np.moveaxis(leaf, -3, 0)).reshape(CONFIG.num_experts, -1).max(1)
        assert (by_expert[[0, 2]] > 0).all() and not by_expert[[1, 3]].any()
