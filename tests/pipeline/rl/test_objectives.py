"""RL and distillation losses against loops over plain Python floats, gradients against finite differences."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.config import ExpertsConfig
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


def test_baselines_and_scales_of_groups() -> None:
    rewards, groups, counted = [1.0, 0.0, 0.0, 0.5, 7.0], [0] * 5, [True] * 4 + [False]
    of = lambda *options: objectives.group_advantages(rewards, groups, counted, *options)
    apart = np.array([1.0, 0.0, 0.0, 0.5]) - 0.375
    np.testing.assert_allclose(of("mean", "none")[:4], apart)
    np.testing.assert_allclose(of("mean", "std")[:4], apart / np.std([1.0, 0.0, 0.0, 0.5]))
    others = [1 - 0.5 / 3, -0.5, -0.5, 0.5 - 1 / 3]  # less the mean of the three others
    np.testing.assert_allclose(of("leave_one_out", "none")[:4], others)
    assert not of("leave_one_out", "std")[4]


def rows(seed: int = 0) -> objectives.PolicyTokens:
    """Two rows of several episodes, with padding, uncounted positions, and ratios on both sides of every bound."""
    rng = np.random.default_rng(seed)
    episodes = np.array([[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 2, 2, 2, 2]])
    old = -rng.random((2, 8)) * 3
    counted = (episodes > 0) & (rng.random((2, 8)) < 0.8)
    advantages = np.where(episodes == 1, 1.5, -0.7) * np.array([[1], [-1]])
    logprobs, proximal = old + rng.normal(size=(2, 8)) * 0.6, old + rng.normal(size=(2, 8)) * 0.5
    return objectives.PolicyTokens(*map(jnp.asarray, (logprobs, old, advantages, counted, episodes, proximal)))


def by_episode(tokens, values) -> dict[tuple[int, int], float]:
    """(row, episode) -> mean of values over its counted positions, in plain loops."""
    found: dict[tuple[int, int], list[float]] = {}
    for (row, column), episode in np.ndenumerate(np.asarray(tokens.episodes)):
        if tokens.counted[row, column]:
            found.setdefault((row, episode), []).append(float(values[row, column]))
    return {key: sum(each) / len(each) for key, each in found.items()}


def plain_weight(name: str, tokens, place, config) -> float:
    """What multiplies -A dlog p of a token in the objective's gradient."""
    ratio = math.exp(float(tokens.logprobs[place] - tokens.old_logprobs[place]))
    advantage, low, high = float(tokens.advantages[place]), 1 - config.clip_low, 1 + config.clip_high
    if name == "cispo":
        return min(max(ratio, low), high)
    if name == "reinforce":
        return min(ratio, config.ratio_cap)
    behind = 1.0
    if name == "decoupled":
        behind = min(math.exp(float(tokens.proximal[place] - tokens.old_logprobs[place])), config.ratio_cap)
        ratio = math.exp(float(tokens.logprobs[place] - tokens.proximal[place]))
    if name == "gspo":
        means = by_episode(tokens, np.asarray(tokens.logprobs - tokens.old_logprobs))
        ratio = math.exp(means[place[0], int(tokens.episodes[place])])
    clipped = min(max(ratio, low), high) * advantage
    return 0.0 if clipped < ratio * advantage else behind * ratio


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_objectives_are_their_formulas_token_by_token(name: str) -> None:
    config, objective = ExpertsConfig(ratio_cap=1.6), objectives.OBJECTIVES.resolve(name, "objective")
    weighed = 0
    for seed in range(4):
        tokens = rows(seed)
        loss = lambda logprobs: jnp.sum(jnp.where(tokens.counted, objective(tokens.replace(logprobs=logprobs), config)[0], 0.0))
        slope, (losses, cut) = jax.grad(loss)(tokens.logprobs), objective(tokens, config)
        for place in zip(*np.nonzero(np.asarray(tokens.counted))):
            weight, advantage = plain_weight(name, tokens, place, config), float(tokens.advantages[place])
            assert float(slope[place]) == pytest.approx(-weight * advantage, abs=1e-9)
            ratio = math.exp(float(tokens.logprobs[place] - tokens.old_logprobs[place]))
            if name in ("cispo", "reinforce"):
                assert float(losses[place]) == pytest.approx(-weight * advantage * float(tokens.logprobs[place]), abs=1e-9)
                assert bool(cut[place]) == (abs(weight - ratio) > 1e-12)
            else:
                assert bool(cut[place]) == (weight == 0.0)
            weighed += bool(cut[place])
    assert weighed > 2  # the bounds were met


def test_tokens_far_from_the_policy_that_drew_them_are_left_out() -> None:
    left_out = 0
    for tokens in map(rows, range(4)):
        ratio = np.exp(np.asarray(tokens.logprobs - tokens.old_logprobs))
        assert bool(objectives.kept(tokens, ExpertsConfig()).all())
        near = objectives.kept(tokens, ExpertsConfig(ratio_bounds=(0.7, 1.4)))
        np.testing.assert_array_equal(near, (ratio >= 0.7) & (ratio <= 1.4))
        fallen = by_episode(tokens, np.asarray(tokens.old_logprobs - tokens.logprobs))
        near = objectives.kept(tokens, ExpertsConfig(negative_bound=0.05))
        for (row, column), episode in np.ndenumerate(np.asarray(tokens.episodes)):
            if tokens.counted[row, column]:
                out = tokens.advantages[row, column] < 0 and fallen[row, episode] > 0.05
                assert bool(near[row, column]) == (not out)
                left_out += out
    assert 3 < left_out < 30


def exact_gradient(name: str, cap: float, old: np.ndarray, new: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """The expectation, over the actions of `old`, of an objective's gradient by the logits of `new`."""
    config, objective = ExpertsConfig(ratio_cap=cap, clip_low=0.2, clip_high=0.2), objectives.OBJECTIVES.resolve(name, "")
    total = np.zeros(len(new))
    for action, probability in enumerate(softmax(old)):
        def loss(logits, action=action):
            logprob = jax.nn.log_softmax(logits)[action].reshape(1, 1)
            tokens = objectives.PolicyTokens(
                logprob, jnp.full((1, 1), math.log(softmax(old)[action])), jnp.full((1, 1), rewards[action]),
                jnp.ones((1, 1), bool), jnp.ones((1, 1), jnp.int32))
            return objective(tokens, config)[0].sum()

        total += probability * np.asarray(jax.grad(loss)(jnp.asarray(new)))
    return total


def test_untruncated_correction_is_unbiased_and_truncation_less_so_the_lower_it_is() -> None:
    rng = np.random.default_rng(0)
    old, new, rewards = rng.normal(size=5), rng.normal(size=5), rng.normal(size=5)
    p = np.array(softmax(new))
    want = -p * (rewards - p @ rewards)  # of -E[r], by the logits
    bias = [np.linalg.norm(exact_gradient("reinforce", cap, old, new, rewards) - want) for cap in (math.inf, 4.0, 1.5, 0.7)]
    assert bias[0] < 1e-9 and bias[0] <= bias[1] < bias[2] < bias[3]


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_every_objective_solves_a_bandit_with_a_stale_policy(name: str) -> None:
    """Four updates on what one policy drew, then fresh draws: the best arm is found."""
    rng, rewards = np.random.default_rng(1), np.array([0.1, 0.9, 0.3, 0.5])
    config, objective = ExpertsConfig(), objectives.OBJECTIVES.resolve(name, "objective")

    @jax.jit
    def move(logits, old, actions, advantages):
        drew = jax.nn.log_softmax(old)[actions][None]

        def loss(logits):
            tokens = objectives.PolicyTokens(
                jax.nn.log_softmax(logits)[actions][None], drew, advantages[None],
                jnp.ones((1, len(actions)), bool), jnp.arange(1, len(actions) + 1)[None], drew)
            return objective(tokens, config)[0].mean()

        return logits - 0.5 * jax.grad(loss)(logits)

    logits = jnp.zeros(4)
    for _ in range(60):
        old, actions = logits, rng.choice(4, 32, p=np.asarray(jax.nn.softmax(logits)))
        advantages = jnp.asarray(objectives.group_advantages(rewards[actions], [0] * 32, [True] * 32, "leave_one_out", "none"))
        for _ in range(4):
            logits = move(logits, old, jnp.asarray(actions), advantages)
    assert jax.nn.softmax(logits)[1] > 0.9


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
