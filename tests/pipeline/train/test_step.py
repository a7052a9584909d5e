"""A step over slices against one plain optax step over the undivided batch, and what stages compile against each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qcn_jax.pipeline.train.step import BatchShape, TrainState, make_step

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
SHAPE = BatchShape(slices=3, rows=2, length=4, padded=True)
SECTIONS = dataclasses.replace(SHAPE, sections=("a", "b"))


def loss(params, batch, scale=2.0):
    errors = (batch["tokens"] * params["a"] + params["b"] - 1.0) ** 2 * batch["weights"] / batch["weight_sum"] * scale
    return errors.sum(), {"error": errors.sum(), "share": batch["fraction"]}


def arrays(slices: int, of: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """[of, 2, 4] arrays, `slices` of them filled."""
    rng = np.random.default_rng(seed)
    filled = (np.arange(of) < slices)[:, None, None]
    return {
        "tokens": (rng.integers(0, 5, (of, 2, 4)) * filled).astype(np.int32),
        "weights": (rng.random((of, 2, 4)) * filled).astype(np.float32),
        "segment_ids": np.ones((of, 2, 4), np.int32), "positions": np.zeros((of, 2, 4), np.int32),
    }  # fmt: skip


def fresh() -> TrainState:
    return TrainState.create({"a": jnp.float32(0.3), "b": jnp.float32(-0.2)}, OPTIMIZER)


def test_any_number_of_slices_is_one_step_over_all_of_them() -> None:
    step = make_step(loss, OPTIMIZER, SHAPE)
    state, want = fresh(), fresh()
    for slices in (1, 3, 2):
        batch = arrays(slices, seed=slices)
        mean = lambda p: loss(p, batch | {"weight_sum": batch["weights"].sum(), "fraction": 1.0})[0]
        value, gradient = jax.value_and_grad(mean)(want.params)
        updates, opt_state = OPTIMIZER.update(gradient, want.opt_state, want.params)
        want = TrainState(want.step + 1, optax.apply_updates(want.params, updates), opt_state)
        state, metrics = step(state, batch)
        assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5) == float(metrics["error"])
        assert float(metrics["grad_norm"]) == pytest.approx(float(optax.global_norm(gradient)), rel=1e-5)
        assert float(metrics["share"]) == pytest.approx(1.0)  # a mean over as many slices as there are
    assert int(state.step) == 3 and step._cache_size() == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state, want)


def test_sections_have_their_own_frozen_parameters_and_metrics() -> None:
    step = make_step(loss, OPTIMIZER, SECTIONS, frozen=2)
    batch = arrays(3) | {"section": np.asarray([0, 1, 1], np.int32)}
    scales, params = (jnp.float32(1.0), jnp.float32(3.0)), fresh().params
    sums = [float(loss(params, {k: v[i] for k, v in batch.items()} | {"weight_sum": 1.0, "fraction": 1.0},
                       scales[batch["section"][i]])[0]) for i in range(3)]
    weights = batch["weights"].sum((1, 2))
    _, metrics = step(fresh(), batch, scales)
    assert float(metrics["loss"]) == pytest.approx(sum(sums) / weights.sum(), rel=1e-5)
    assert float(metrics["loss/a"]) == pytest.approx(sums[0] / weights[0], rel=1e-5)
    assert float(metrics["error/b"]) == pytest.approx((sums[1] + sums[2]) / weights[1:].sum(), rel=1e-5)


def test_frozen_parameters_are_not_donated_and_one_serves_all_slices() -> None:
    step = make_step(loss, OPTIMIZER, SHAPE, frozen=1)
    scale = jnp.float32(2.0)
    state, metrics = step(fresh(), arrays(2), (scale,))
    _, want = make_step(loss, OPTIMIZER, SHAPE)(fresh(), arrays(2))
    assert float(scale) == 2.0 and float(metrics["loss"]) == float(want["loss"])


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    state, metrics = make_step(loss, OPTIMIZER, SHAPE, frozen=1)(fresh(), arrays(2), (jnp.float32(np.inf),))
    assert not metrics["finite"] and int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (fresh().params, fresh().opt_state))
