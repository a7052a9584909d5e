"""Optimizers: what decays, what Muon takes, and the schedule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qcn_jax.config import OptimizerConfig
from qcn_jax.errors import UserError
from qcn_jax.model import abstract_params
from qcn_jax.pipeline.train import optimizer
from tests.pipeline.micro import MODEL

CONFIG = OptimizerConfig(learning_rate=0.1, warmup_steps=4, final_fraction=0.1, weight_decay=0.5, clip_norm=1e9)


def _names(tree, wanted):
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None or hasattr(x, "output_axis"))[0]
    return {optimizer.parameter_name(path) for path, leaf in leaves if wanted(leaf)}


def test_schedule_warms_up_peaks_and_ends_where_it_says():
    rate = optimizer.schedule(CONFIG, 20)
    assert [float(rate(step)) for step in (0, 2, 4, 20, 50)] == pytest.approx([0, 0.05, 0.1, 0.01, 0.01])
    short = optimizer.schedule(CONFIG, 2)  # warm-up longer than the run
    assert float(short(1)) == pytest.approx(0.1)
    assert float(optimizer.schedule(dataclasses.replace(CONFIG, warmup_steps=0), 5)(0)) == pytest.approx(0.1)


def test_decay_reaches_zero_centred_norms_and_not_the_decay_parameters():
    spared = _names(optimizer.decay_mask(abstract_params(MODEL)), lambda decays: not decays)
    assert spared == {"blocks/linear/linear_attn/A_log", "blocks/linear/linear_attn/dt_bias",
                      "blocks/linear/linear_attn/norm/weight"}


def test_muon_takes_the_matrices_of_mixers_and_experts():
    params = abstract_params(dataclasses.replace(MODEL, num_nextn_predict_layers=1))
    taken = _names(optimizer.muon_dimensions(params), lambda leaf: leaf is not None)
    assert {"blocks/full/self_attn/q_proj/kernel", "blocks/linear/linear_attn/in_proj_qkvz/kernel",
            "blocks/linear/mlp/experts/down_proj", "mtp/fc/kernel", "mtp/layer/mlp/shared_expert/up_proj/kernel"} <= taken
    for name in taken:
        assert not name.startswith(("embed_tokens", "lm_head")) and "norm" not in name and "conv1d" not in name
        assert not name.endswith(("mlp/gate/kernel", "A_log", "dt_bias", "shared_expert_gate/kernel"))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_alone_shrinks_by_the_learning_rate(name):
    params = {"embed_tokens": {"embedding": jnp.ones((3, 2))}, "layer": {"q_proj": {"kernel": jnp.ones((4, 2, 3))},
              "A_log": jnp.ones(2), "input_layernorm": {"weight": jnp.ones(2)}}}
    rule = optimizer.make_optimizer(dataclasses.replace(CONFIG, name=name, warmup_steps=0), 10)
    updates, _ = rule.update(jax.tree.map(jnp.zeros_like, params), rule.init(params), params)
    np.testing.assert_allclose(updates["embed_tokens"]["embedding"], -0.1 * 0.5, rtol=1e-5)
    np.testing.assert_allclose(updates["layer"]["q_proj"]["kernel"], -0.1 * 0.5, rtol=1e-5)
    np.testing.assert_allclose(updates["layer"]["input_layernorm"]["weight"], -0.1 * 0.5, rtol=1e-5)
    np.testing.assert_allclose(updates["layer"]["A_log"], 0.0)


def test_muon_updates_are_orthogonal_per_matrix_and_as_large_as_adams():
    gradient = {"layer": {"q_proj": {"kernel": jax.random.normal(jax.random.key(0), (3, 8, 8))}}}
    params = jax.tree.map(jnp.zeros_like, gradient)
    config = dataclasses.replace(CONFIG, name="muon", warmup_steps=0, weight_decay=0.0)
    rule = optimizer.make_optimizer(config, 10)
    updates, _ = rule.update(gradient, rule.init(params), params)
    update = np.asarray(updates["layer"]["q_proj"]["kernel"], np.float64)
    for matrix, g in zip(update, np.asarray(gradient["layer"]["q_proj"]["kernel"], np.float64)):
        singular = np.linalg.svd(matrix, compute_uv=False)
        # Five Newton-Schulz steps bring singular values near one, not to it.
        assert singular.max() / singular.min() < 2.5
        assert np.sum(matrix * g) < 0  # descent
        # Root mean square 0.2 of the learning rate: AdamW's usual size.
        assert 0.1 < np.sqrt(np.mean(matrix**2)) / (0.2 * 0.1) < 2
    assert np.abs(update[0] - update[1]).max() > 1e-4


def _adamw(gradients, config):
    """Loshchilov and Hutter's AdamW in float64, of one parameter from 1.0 at a constant rate: its values by step."""
    x, m, v, path = np.ones_like(gradients[0]), 0.0, 0.0, []
    for t, g in enumerate(gradients, 1):
        m, v = config.b1 * m + (1 - config.b1) * g, config.b2 * v + (1 - config.b2) * g**2
        step = m / (1 - config.b1**t) / (np.sqrt(v / (1 - config.b2**t)) + config.eps)
        x = x - config.learning_rate * (step + config.weight_decay * x)
        path.append(x)
    return np.stack(path)


@pytest.mark.parametrize("eps", [1e-8, 0.3])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_adamw_takes_follows_the_published_rule(name, eps):
    """The embedding, which Muon leaves to AdamW, moves alike under both names: with eps, without Nesterov's momentum."""
    config = dataclasses.replace(CONFIG, name=name, eps=eps, warmup_steps=0, final_fraction=1.0)
    rule = optimizer.make_optimizer(config, 10)
    gradients = np.random.default_rng(0).normal(size=(5, 3, 2))
    params = {"embed_tokens": {"embedding": jnp.ones((3, 2))}, "layer": {"q_proj": {"kernel": jnp.ones((2, 2))}}}
    state, update = rule.init(params), jax.jit(rule.update)
    for gradient, want in zip(gradients, _adamw(gradients, config)):
        grads = {"embed_tokens": {"embedding": jnp.float32(gradient)}, "layer": {"q_proj": {"kernel": jnp.ones((2, 2))}}}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["embed_tokens"]["embedding"], want, rtol=1e-5, atol=1e-6)


def test_muons_update_does_not_shrink_with_eps():
    gradient = {"q_proj": {"kernel": 1e-6 * jax.random.normal(jax.random.key(0), (8, 8))}}
    sizes = []
    for eps in (1e-8, 0.3):
        config = dataclasses.replace(CONFIG, name="muon", eps=eps, warmup_steps=0, weight_decay=0.0)
        rule = optimizer.make_optimizer(config, 10)
        updates, _ = rule.update(gradient, rule.init(gradient), gradient)
        sizes.append(float(jnp.linalg.norm(updates["q_proj"]["kernel"])))
    assert sizes[0] == sizes[1] > 0


def test_clipping_is_by_global_norm():
    config = dataclasses.replace(CONFIG, clip_norm=1.0, warmup_steps=0)
    rule = optimizer.make_optimizer(config, 10)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    big, small = {"a": jnp.array([30.0, 40.0]), "b": jnp.zeros(2)}, {"a": jnp.array([0.6, 0.8]), "b": jnp.zeros(2)}
    _, one = rule.update(big, rule.init(params), params)
    _, other = rule.update(small, rule.init(params), params)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_large_eps_is_plain_descent():
    config = dataclasses.replace(CONFIG, eps=100.0, warmup_steps=0, weight_decay=0.0, final_fraction=1.0)
    rule = optimizer.make_optimizer(config, 10)
    grads, params = {"a": jnp.array([0.02, -1.0, 3.0])}, {"a": jnp.zeros(3)}
    updates, _ = rule.update(grads, rule.init(params), params)
    np.testing.assert_allclose(updates["a"], -config.learning_rate * grads["a"] / config.eps, rtol=0.05)


def test_unknown_optimizer_is_one_line():
    with pytest.raises(UserError, match="unknown optimizer 'sgd'; allowed: adamw, muon"):
        optimizer.make_optimizer(dataclasses.replace(CONFIG, name="sgd"), 10)


def _walk(config, dtype, steps=40):
    """Parameters after some steps towards a target with small gradients, and the optimizer's last state."""
    rule = optimizer.make_optimizer(config, 1000)
    params = {"q_proj": {"kernel": jnp.asarray(START, dtype)}}
    state = rule.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda p: (1e-3 * p).astype(p.dtype), params)
        updates, state = rule.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return np.asarray(params["q_proj"]["kernel"], np.float64), state


START = np.random.default_rng(0).uniform(0.5, 2.0, (8, 4))
SMALL = dataclasses.replace(CONFIG, learning_rate=2e-4, warmup_steps=0, weight_decay=0.0)


def _moments(state, *fields):
    return {str(leaf.dtype) for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
            if any(getattr(key, "name", "") in fields for key in path)}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_are_kept_in_the_dtypes_asked_for(name):
    config = dataclasses.replace(SMALL, name=name, learning_rate=0.01)
    exact, _ = _walk(config, jnp.float32)
    low, state = _walk(dataclasses.replace(config, mu_dtype="bfloat16", nu_dtype="bfloat16"), jnp.float32)
    assert _moments(state, "mu", "nu") == {"bfloat16"}
    assert 0 < np.abs(low - exact).max() < 0.1 * np.abs(exact - START).max()
    mixed = optimizer.make_optimizer(dataclasses.replace(config, mu_dtype="bfloat16"), 10).init(
        {"q_proj": {"kernel": jnp.ones((4, 4), jnp.bfloat16)}, "A_log": jnp.ones(4, jnp.bfloat16)})
    assert _moments(mixed, "mu") == {"bfloat16"} and _moments(mixed, "nu") == {"float32"}
    with pytest.raises(UserError, match=r"mu_dtype: 'int8'; allowed: float32, bfloat16"):
        optimizer.make_optimizer(dataclasses.replace(config, mu_dtype="int8"), 10)


@pytest.mark.parametrize("b2", [0.95, 0.999])
def test_bfloat16_second_moments_forget_and_learn_as_float32_ones(b2):
    """Their mean over many entries against the moving average in float64: a burst, then silence, then a small gradient."""
    config = dataclasses.replace(CONFIG, b2=b2, nu_dtype="bfloat16", mu_dtype="bfloat16", warmup_steps=0)
    rule, count = optimizer.make_optimizer(config, 10), 4096
    params, sizes = {"a": jnp.zeros(count)}, np.repeat([1.0, 0.0, 0.3], [3, 400, 400])

    @jax.jit
    def run(sizes):
        def step(state, size):
            _, state = rule.update({"a": jnp.full(count, size)}, state, params)
            moments = {path[-2].name: leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
                       if isinstance(path[-1], jax.tree_util.DictKey)}
            return state, [jnp.mean(moments[name].astype(jnp.float32)) for name in ("mu", "nu")]
        return jax.lax.scan(step, rule.init(params), sizes)[1]

    want = np.zeros(2)
    for step, (size, *got) in enumerate(zip(sizes, *map(np.asarray, run(jnp.float32(sizes)))), 1):
        want = want * [config.b1, b2] + np.asarray([size, size**2]) * [1 - config.b1, 1 - b2]
        # Every rounding is off by 2**-7 at most, without bias: `step` of them add up at random, over `count` entries.
        np.testing.assert_allclose(got, want, rtol=5 * 2.0**-8 * np.sqrt(step / count) + 1e-4)


def test_rounding_to_bfloat16_keeps_what_fits_and_what_is_not_finite():
    x = jnp.float32([0.0, -0.0, 1.5, -3.0, jnp.inf, -jnp.inf, jnp.nan])
    kept = optimizer.rounded(x, jnp.dtype(jnp.bfloat16), jax.random.key(1))
    np.testing.assert_array_equal(np.asarray(kept, np.float32), x)
    low, high = 1.0, 1.0 + 2.0**-7
    found = optimizer.rounded(jnp.full(10_000, 1.0 + 2.0**-9), jnp.dtype(jnp.bfloat16), jax.random.key(2))
    assert set(np.asarray(found, np.float64).tolist()) == {low, high}
    assert np.mean(np.asarray(found, np.float64) == high) == pytest.approx(0.25, abs=0.02)


def test_a_master_copy_collects_steps_that_bfloat16_would_lose():
    exact, _ = _walk(SMALL, jnp.float32)
    low, _ = _walk(SMALL, jnp.bfloat16)
    kept, state = _walk(dataclasses.replace(SMALL, master_copy=True), jnp.bfloat16)
    master = np.asarray(state.master["q_proj"]["kernel"], np.float64)
    moved = np.abs(exact - START).max()
    begin = np.asarray(jnp.asarray(START, jnp.bfloat16), np.float64)
    assert np.abs((master - begin) - (exact - START)).max() < 0.02 * moved
    assert np.abs(kept - master).max() <= 2.0**-8  # the parameters are the master copy, rounded
    large = START > 1
    assert np.all(low[large] == begin[large]) and np.any(kept[large] != begin[large])


def test_state_lies_as_its_parameters_do():
    shapes = abstract_params(dataclasses.replace(MODEL, num_nextn_predict_layers=1))
    names = jax.tree_util.tree_map_with_path(lambda path, _: optimizer.parameter_name(path), shapes)
    for config in (CONFIG, dataclasses.replace(CONFIG, name="muon", master_copy=True)):
        rule = optimizer.make_optimizer(config, 10)
        places = optimizer.state_like(rule, shapes, names, "elsewhere")
        state = jax.eval_shape(rule.init, shapes)
        leaves = jax.tree_util.tree_flatten_with_path(state)[0]
        for (path, leaf), place in zip(leaves, jax.tree.leaves(places), strict=True):
            if place == "elsewhere":
                assert not any(isinstance(key, jax.tree_util.DictKey) and key.key in shapes for key in path), path
            else:
                assert optimizer.parameter_name(path).endswith(place)
        assert set(jax.tree.leaves(names)) <= set(jax.tree.leaves(places))
