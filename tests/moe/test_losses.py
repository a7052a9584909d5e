"""Router statistics and the pooled balance loss."""

import jax
import jax.numpy as jnp
import numpy as np

from qcn_jax.config import ModelConfig
from qcn_jax.moe.losses import balance_loss, max_violation
from qcn_jax.moe.router import Router, RouterStatistics

CONFIG = ModelConfig(hidden_size=6, num_experts=5, num_experts_per_tok=2, dtype="float32")


def route(x, valid=None, config=CONFIG):
    kernel = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    return Router(config).apply({"params": {"kernel": kernel}}, x, valid)


def test_weights_are_the_largest_probabilities_normalised():
    x = np.random.default_rng(1).standard_normal((9, 6)).astype(np.float32)
    weights, experts, statistics = route(x)
    kernel = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    p = np.exp(x @ kernel) / np.exp(x @ kernel).sum(1, keepdims=True)
    order = np.argsort(-p, axis=1)[:, :2]
    top = np.take_along_axis(p, order, 1)
    np.testing.assert_array_equal(experts, order)
    np.testing.assert_allclose(weights, top / top.sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(statistics.probabilities, p.sum(0), rtol=1e-5)
    np.testing.assert_array_equal(statistics.counts, np.bincount(order.reshape(-1), minlength=5))


def test_padding_is_not_counted():
    x = np.random.default_rng(2).standard_normal((8, 6)).astype(np.float32)
    real = np.arange(8) < 5
    padded, short = route(x, jnp.asarray(real))[2], route(x[:5])[2]
    for a, b in zip(jax.tree.leaves(padded), jax.tree.leaves(short)):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_loss_pools_layers_before_the_product_and_is_top_k_when_balanced():
    even = RouterStatistics(jnp.full((3, 5), 8.0), jnp.full((3, 5), 4.0), jnp.full(3, 20.0))
    np.testing.assert_allclose(balance_loss(even), 2.0, rtol=1e-6)
    # Two layers, each collapsed on another expert: balanced when pooled over two experts of two.
    opposite = RouterStatistics(jnp.asarray([[10.0, 0], [0, 10]]), jnp.asarray([[10.0, 0], [0, 10]]), jnp.full(2, 10.0))
    np.testing.assert_allclose(balance_loss(opposite), 1.0, rtol=1e-6)
    np.testing.assert_allclose(max_violation(opposite), [1.0, 1.0])


def test_shares_of_parts_add_up_to_the_loss_of_the_whole_batch():
    """Value and gradient against E * sum f P written out in float64, on parts that load other experts."""
    x = np.random.default_rng(4).standard_normal((12, 6)) + 3 * np.repeat(np.eye(6)[:3], 4, axis=0)
    kernel = np.random.default_rng(0).standard_normal((6, 5))
    p = np.exp(x @ kernel) / np.exp(x @ kernel).sum(1, keepdims=True)
    f = np.bincount(np.argsort(-p, axis=1)[:, :2].reshape(-1), minlength=5) / 12
    slope = x.T @ (p * (f - (p * f).sum(1, keepdims=True))) * 5 / 12
    parts = np.split(x.astype(np.float32), 3)
    whole = route(x.astype(np.float32))[2]

    def share(kernel, part):
        return balance_loss(Router(CONFIG).apply({"params": {"kernel": kernel}}, part, None)[2], whole)

    values, slopes = zip(*(jax.value_and_grad(share)(jnp.float32(kernel), part) for part in parts))
    np.testing.assert_allclose(sum(values), 5 * (f * p.mean(0)).sum(), rtol=1e-5)
    np.testing.assert_allclose(sum(slopes), slope, rtol=1e-4, atol=1e-5 * np.abs(slope).max())
    apart = np.mean([float(balance_loss(route(part)[2])) for part in parts])
    assert apart > 1.1 * sum(values)  # a mean of the parts' own losses is another number


def test_gradient_reaches_probabilities_and_not_counts():
    x = np.random.default_rng(3).standard_normal((9, 6)).astype(np.float32)

    def loss(kernel):
        return balance_loss(Router(CONFIG).apply({"params": {"kernel": kernel}}, x, None)[2])

    kernel = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    f = np.asarray(route(x)[2].counts) / 9

    def expected(kernel):
        return 5 * jnp.sum(f * jnp.mean(jax.nn.softmax(x @ kernel), axis=0))

    np.testing.assert_allclose(jax.grad(loss)(kernel), jax.grad(expected)(kernel), rtol=1e-4, atol=1e-6)
