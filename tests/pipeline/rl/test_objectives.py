"""RL and distillation losses against loops over plain Python floats, gradients against finite differences."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.pipeline.rl import objectives


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def softmax(row: np.ndarray) -> list[float]:
    top = max(row)
    mass = [math.exp(x - top) for x in row]
    return [m / sum(mass) for m in mass]


def finite_difference(function, x: np.ndarray, step: float = 1e-3) -> np.ndarray:
    """Central differences of a scalar function, entry by entry."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        delta = np.zeros_like(x)
        delta[index] = step
        gradient[index] = (float(function(x + delta)) - float(function(x - delta))) / (2 * step)
    return gradient


def test_group_advantages_are_standard_scores_within_a_prompt() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5, -0.2, 9.0]
    groups = [7, 7, 7, 7, 2, 2, 3, 3, 3]
    counted = [True] * 8 + [False]
    got = objectives.group_advantages(rewards, groups, counted)
    np.testing.assert_allclose(got[:4], [1, -1, -1, 1])
    np.testing.assert_allclose(got[4:6], 0)  # every sample got the same: nothing to learn
    np.testing.assert_allclose(got[6:8], [1, -1])
    assert got[8] == 0  # infrastructure failure: neither counted nor pushed
    assert objectives.group_advantages([1.0, 3.0], [0, 0], [True, False]).tolist() == [0, 0]


LENGTHS = [[5, 50], [0, 3, 8, 1], [0, 0]]  # of episodes by group; those of 0 were taken greedily to their end


def test_episode_average_is_grpos() -> None:
    """Weights against the nested means of Shao et al. 2024: over groups, episodes, tokens."""
    rng = np.random.default_rng(0)
    losses = [[rng.normal(size=length) for length in group] for group in LENGTHS]
    weights = objectives.token_weights(LENGTHS, "episode")
    sums = [sum(w * episode.sum() for w, episode in zip(*pair)) for pair in zip(weights, losses)]
    total = sum(w * length for ws, group in zip(weights, LENGTHS) for w, length in zip(ws, group))
    means = [np.mean([episode.mean() for episode in group if len(episode)]) for group in losses if any(map(len, group))]
    assert sum(sums) / total == pytest.approx(np.mean(means), rel=1e-12)
    assert total == pytest.approx(67)  # a token weighs 1 on average


def test_token_average_is_dapos() -> None:
    assert [w.tolist() for w in objectives.token_weights(LENGTHS, "token")] == [[1, 1], [0, 1, 1, 1], [0, 0]]
    assert not any(w.any() for w in objectives.token_weights([[0], []], "episode"))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_statistics(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(size=(2, 3, 7)) * 3
    targets = np.array([[0, 6, 3], [2, 2, 5]])
    logprobs, entropy = objectives.token_statistics(jnp.asarray(logits), jnp.asarray(targets), temperature)
    for index in np.ndindex(2, 3):
        p = softmax(logits[index] / temperature)
        assert logprobs[index] == pytest.approx(math.log(p[targets[index]]), abs=1e-5)
        assert entropy[index] == pytest.approx(-sum(q * math.log(q) for q in p), abs=1e-5)
    gradient = jax.grad(lambda x: objectives.token_statistics(x, jnp.asarray(targets))[1].sum())(jnp.asarray(logits))
    assert not np.any(gradient)


CASES = [  # log ratio, advantage, loss by hand with bounds 0.8 and 1.28, whether clipped
    (0.0, 2.0, -2.0, False),
    (math.log(1.5), 2.0, -2.56, True),
    (math.log(1.5), -1.0, 1.5, False),
    (math.log(0.5), -1.0, 0.8, True),
    (math.log(0.5), 1.0, -0.5, False),
    (math.log(1.27), 1.0, -1.27, False),
]


@pytest.mark.parametrize("log_ratio,advantage,loss,clipped", CASES)
def test_clipped_loss_by_hand(log_ratio: float, advantage: float, loss: float, clipped: bool) -> None:
    got, cut = objectives.clipped_policy_loss(
        jnp.asarray(-1.0 + log_ratio), jnp.asarray(-1.0), jnp.asarray(advantage), 0.2, 0.28
    )
    assert got == pytest.approx(loss, rel=1e-5) and bool(cut) == clipped
    gradient = jax.grad(lambda x: objectives.clipped_policy_loss(x, -1.0, advantage, 0.2, 0.28)[0])(-1.0 + log_ratio)
    assert gradient == pytest.approx(0.0 if clipped else -advantage * math.exp(log_ratio), rel=1e-5)


def test_unclipped_gradient_is_reinforce() -> None:
    """At ratio one the surrogate's gradient is that of -A log p, through the softmax and all."""
    rng = np.random.default_rng(1)
    logits, targets, advantages = rng.normal(size=(4, 6)), np.array([1, 5, 0, 2]), rng.normal(size=4)
    old = np.array([math.log(softmax(row)[t]) for row, t in zip(logits, targets)])

    def loss(x):
        logprobs = objectives.token_statistics(x, jnp.asarray(targets))[0]
        return objectives.clipped_policy_loss(logprobs, jnp.asarray(old), jnp.asarray(advantages), 0.2, 0.28)[0].sum()

    want = np.stack([(np.array(softmax(r)) - np.eye(6)[t]) * a for r, t, a in zip(logits, targets, advantages)])
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(logits)), want, atol=1e-5)


def test_k3_is_unbiased_and_never_negative() -> None:
    rng = np.random.default_rng(2)
    p, q = np.array(softmax(rng.normal(size=5))), np.array(softmax(rng.normal(size=5)))
    estimate = np.asarray(objectives.kl_estimate(jnp.log(p), jnp.log(q)))
    assert (estimate >= 0).all()
    assert (p * estimate).sum() == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)


@pytest.mark.parametrize("apart", [100.0, -100.0, 1e4, -1e4])
def test_tokens_that_do_not_count_may_be_anything(apart: float) -> None:
    """A weight of 0 leaves the value and the gradient of the tokens that count as they are, in float32."""
    logprobs, other = jnp.float32([-1.0, -1.0 - apart]), jnp.float32([-1.5, -1.0])
    weights = jnp.float32([1.0, 0.0])
    for function in (
        lambda x: objectives.kl_estimate(x, other), lambda x: objectives.kl_estimate(other, x),
        lambda x: objectives.clipped_policy_loss(x, other, jnp.float32([1.0, 3.0]), 0.2, 0.28)[0],
        lambda x: objectives.clipped_policy_loss(x, other, jnp.float32([-1.0, -3.0]), 0.2, 0.28)[0],
    ):  # fmt: skip
        value, gradient = jax.value_and_grad(lambda x: jnp.sum(weights * function(x)))(logprobs)
        alone, slope = jax.value_and_grad(lambda x: jnp.sum(function(jnp.append(x, other[1]))[0]))(logprobs[:1])
        assert value == pytest.approx(float(alone), rel=1e-6) and np.isfinite(value)
        np.testing.assert_allclose(gradient, [float(slope[0]), 0.0], rtol=1e-6)


def test_a_ratio_past_float32_is_clipped_without_gradient() -> None:
    value, slope = jax.value_and_grad(lambda x: objectives.clipped_policy_loss(x, jnp.float32(-200), 1.0, 0.2, 0.28)[0])(
        jnp.float32(-1.0))
    assert value == pytest.approx(-1.28, rel=1e-6) and slope == 0.0


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
def test_kl_and_its_gradient(name: str) -> None:
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(size=(3, 5)), rng.normal(size=(3, 5))

    def plain(s: np.ndarray) -> float:
        total = 0.0
        for s_row, t_row in zip(s, teacher):
            p, q = softmax(s_row), softmax(t_row)
            p, q = (p, q) if name == "reverse_kl" else (q, p)
            total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))
        return total

    function = getattr(objectives, name)
    got = function(jnp.asarray(student), jnp.asarray(teacher))
    assert got.shape == (3,) and got.sum() == pytest.approx(plain(student), rel=1e-5)
    gradient = jax.grad(lambda s: function(s, jnp.asarray(teacher)).sum())(jnp.asarray(student))
    np.testing.assert_allclose(gradient, finite_difference(plain, student, 1e-4), atol=1e-5)
