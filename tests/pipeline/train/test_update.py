"""Accumulated updates against one plain optax step over the undivided batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qcn_jax.errors import UserError
from qcn_jax.pipeline.train.loop import TrainState
from qcn_jax.pipeline.train.update import Part, Updater

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))


def loss(params, batch, scale):
    errors = (batch["tokens"] * params["a"] + params["b"] - 1.0) ** 2 * batch["weights"] * scale
    return errors.sum(), {"error": errors.sum()}


def arrays(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows)
    return {
        "tokens": rng.integers(0, 5, (rows, 4)).astype(np.int32),
        "weights": rng.random((rows, 4)).astype(np.float32),
    }


def fresh() -> TrainState:
    return TrainState.create({"a": jnp.float32(0.3), "b": jnp.float32(-0.2)}, OPTIMIZER)


def test_any_number_of_rows_is_one_step_over_all_of_them() -> None:
    updater = Updater(loss, OPTIMIZER, rows=2)
    state, want = fresh(), fresh()
    for rows in (2, 6, 4):
        batch = arrays(rows)
        mean = lambda p: loss(p, batch, 2.0)[0] / batch["weights"].sum()
        value, gradient = jax.value_and_grad(mean)(want.params)
        updates, opt_state = OPTIMIZER.update(gradient, want.opt_state, want.params)
        want = TrainState(want.step + 1, optax.apply_updates(want.params, updates), opt_state)
        state, metrics = updater(state, Part(batch, (2.0,)))
        assert metrics["loss"] == pytest.approx(float(value), rel=1e-5) == metrics["error"]
        assert metrics["grad_norm"] == pytest.approx(float(optax.global_norm(gradient)), rel=1e-5)
    assert int(state.step) == 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state, want)
    assert updater._step._cache_size() == 1


def test_parts_have_their_own_arguments_and_metrics() -> None:
    updater = Updater(loss, OPTIMIZER, rows=2)
    a, b = arrays(2), arrays(4)
    before = fresh()
    sums = [float(loss(before.params, part, scale)[0]) for part, scale in ((a, 1.0), (b, 3.0))]
    weights = [part["weights"].sum() for part in (a, b)]
    _, metrics = updater(before, Part(a, (1.0,), "a"), Part(b, (3.0,), "b"))
    assert metrics["loss"] == pytest.approx(sum(sums) / sum(weights), rel=1e-5)
    assert metrics["loss/a"] == pytest.approx(sums[0] / weights[0], rel=1e-5)
    assert metrics["error/b"] == pytest.approx(sums[1] / weights[1], rel=1e-5)


def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing() -> None:
    updater = Updater(loss, OPTIMIZER, rows=2)
    with pytest.raises(UserError, match="not finite"):
        updater(fresh(), Part(arrays(2), (np.inf,)))
