"""The triangular inverse against float64, on the keys that break the quick methods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.layers.triangular import unit_lower_inverse


def system(kind, size, seed=0):
    """Strictly lower matrices beta_i k_i . k_j of 8 heads, as the delta rule forms them."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((8, size, 32))
    if kind == "correlated":
        keys = rng.standard_normal((8, 1, 32)) + 0.1 * keys
    elif kind == "repeated":
        keys = keys[:, np.arange(size) // 16]
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    beta = rng.uniform(0.3, 1, (8, size, 1))
    return np.tril(beta * (keys @ keys.transpose(0, 2, 1)), -1).astype(np.float32)


@pytest.mark.parametrize("kind", ["random", "correlated", "repeated"])
@pytest.mark.parametrize("size", [1, 8, 16, 24, 32, 64])
def test_no_worse_than_substitution(kind, size):
    a = system(kind, size)
    exact = np.linalg.inv(np.eye(size) + a.astype(np.float64))
    inverse = np.asarray(unit_lower_inverse(jnp.asarray(a)))
    assert np.abs(inverse - exact).max() < 5e-7
    assert not np.triu(inverse, 1).any()


def test_upper_part_is_ignored_and_gradient_is_that_of_an_inverse():
    a = system("correlated", 32)
    full = a + np.triu(np.ones_like(a))
    np.testing.assert_array_equal(unit_lower_inverse(jnp.asarray(full)), unit_lower_inverse(jnp.asarray(a)))
    weight = np.random.default_rng(1).standard_normal(a.shape)
    got = jax.grad(lambda x: jnp.sum(unit_lower_inverse(x) * weight.astype(np.float32)))(jnp.asarray(full))
    inverse = np.linalg.inv(np.eye(32) + a.astype(np.float64))
    transposed = inverse.transpose(0, 2, 1)
    expected = -np.tril(transposed @ weight @ transposed, -1)
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
