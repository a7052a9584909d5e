"""The loss of packed rows and its gradient: the published formulas, token by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.model import Qwen3Next
from qcn_jax.pipeline.rl import lessons
from qcn_jax.pipeline.rl.policy import Batches, make_trainer, policy_loss
from tests.pipeline.micro import MODEL, micro_params
from tests.pipeline.rl.formulas import CONFIG, apply, log_softmax, make_record, published


@pytest.fixture(scope="module")
def params():
    return micro_params()


def test_loss_of_packed_rows_is_the_formula_token_by_token(params) -> None:
    """The jitted loss against a loop over episodes, each passed through the model on its own, in float64."""
    rng = np.random.default_rng(0)
    specs = [(0, [2, 8], [4, 5, 1], 1.0, False), (0, [2, 8], [9, 31], 0.0, True), (1, [2, 9, 3], [7], 1.0, False),
             (1, [2, 9, 3], [8, 8, 8, 1], 0.3, False)]  # fmt: skip
    records = [
        make_record(g, opening, tokens, -rng.random(len(tokens)) * 4 - 1, reward, malformed)
        for g, opening, tokens, reward, malformed in specs
    ]
    rows = lessons.rows([records[:2], records[2:]], CONFIG)
    assert rows["tokens"].shape == (4, 64) and rows["weights"].sum() == 10
    batch = {name: jnp.asarray(array) for name, array in rows.items()}
    value, sums = jax.jit(policy_loss(MODEL, CONFIG))(params, batch | {"weight_sum": 1.0})

    want, clipped, apply = 0.0, 0, jax.jit(Qwen3Next(MODEL).apply)
    advantages = [1.0, -1.0, 1.0, -1.0]  # two samples a group: standard scores are plus and minus one
    for record, advantage in zip(records, advantages):
        padded = np.pad(record.tokens, (0, 8 - len(record.tokens)))[None]
        logits = np.asarray(apply({"params": params}, padded).logits[0], np.float64)
        scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        start, stop = record.turns[0].start, record.turns[0].stop
        for t in range(start, stop):
            ratio = np.exp(scores[t - 1, record.tokens[t]] - record.logprobs[t])
            a = advantage - (0.5 if record.turns[0].malformed else 0.0)
            surrogate = min(ratio * a, np.clip(ratio, 0.8, 1.28) * a)
            clipped += np.clip(ratio, 0.8, 1.28) * a < ratio * a
            want -= surrogate
    assert float(value) == pytest.approx(want, rel=1e-4)
    assert float(sums["clipped"]) == clipped > 0


@pytest.mark.parametrize("average,temperature,negative", [("episode", 1.0, 1.0), ("episode", 0.6, 0.2), ("token", 1.5, 1.0)])
def test_gradient_is_that_of_the_published_formulas(params, average, temperature, negative) -> None:
    """Shao et al. 2024, eq. 3 (episode) and Yu et al. 2025, eq. 8 (token), on episodes of very unequal length."""
    rollouts = dataclasses.replace(CONFIG.rollout, temperature=temperature)
    config = dataclasses.replace(CONFIG, average=average, negative_weight=negative, kl_coef=0.1, rollout=rollouts)
    rng, groups = np.random.default_rng(1), []
    for prompt, lengths in enumerate([(5, 50), (3, 1, 9)]):
        group = []
        for sample, length in enumerate(lengths):
            tokens = rng.integers(2, 32, length).tolist()
            record = make_record(prompt, [2, 8 + prompt], tokens, [0.0] * length, float(sample == 0))
            hidden = apply(params, record.tokens)
            logits = hidden @ np.asarray(params["lm_head"]["kernel"], np.float64) / temperature
            for t in range(2, length + 2):  # near enough for most ratios to lie within the bounds
                record.logprobs[t] = log_softmax(logits[t - 1])[record.tokens[t]] + rng.normal() * 0.2
            group.append(record)
        groups.append(group)
    reference = jax.tree.map(lambda x: x * 0.9, params)
    rows = lessons.rows(groups, config)
    assert rows["weights"].sum() == pytest.approx(68, rel=1e-6)  # a token weighs 1 on average
    batch = {name: jnp.asarray(array) for name, array in rows.items()} | {"weight_sum": rows["weights"].sum()}
    (value, _), slope = jax.jit(jax.value_and_grad(policy_loss(MODEL, config), has_aux=True))(params, batch, reference)
    want, want_slope = published(params, reference, groups, config)
    assert float(value) == pytest.approx(want, abs=1e-5)
    error = np.linalg.norm(np.asarray(slope["lm_head"]["kernel"], np.float64) - want_slope)
    assert error < 1e-4 * np.linalg.norm(want_slope)


def test_kl_term_holds_the_policy_to_its_reference(params) -> None:
    config = dataclasses.replace(CONFIG, kl_coef=0.5)
    rows = lessons.rows([[
        make_record(0, [2, 8], [4, 5, 1], [-3.0] * 3, 1.0), make_record(0, [2, 8], [9, 3], [-3.0] * 2, 0.0),
    ]], config)  # fmt: skip
    batch = {name: jnp.asarray(array) for name, array in rows.items()} | {"weight_sum": 1.0}
    loss = jax.jit(policy_loss(MODEL, config))
    same, sums = loss(params, batch, params)
    other = jax.tree.map(lambda x: x * 0.5, params)
    apart, held = loss(params, batch, other)
    assert float(sums["kl_reference"]) == pytest.approx(0.0, abs=1e-5) and float(held["kl_reference"]) > 0.01
    assert float(apart - same) == pytest.approx(0.5 * float(held["kl_reference"]), rel=1e-4)


def _sides() -> list:
    rng = np.random.default_rng(3)
    return [[make_record(0, [2, 8], rng.integers(4, 32, n).tolist(), -rng.random(n) - 3, float(n > 3)) for n in (2, 5)]]


def test_what_the_weights_before_an_update_say_is_told_to_all_its_minibatches(params) -> None:
    """Log-probabilities and routes of one pass are those of the model applied to each episode on its own."""
    config = dataclasses.replace(CONFIG, objective="decoupled", routing="first", minibatches=2)
    trainer = make_trainer(MODEL, config, None)
    batch = Batches(trainer, config).of(params, lessons.rows(_sides(), config))
    assert {name: array.shape for name, array in batch.items()} == {
        name: size for name, (size, _) in trainer.shape.arrays().items()}
    kernel = np.asarray(params["lm_head"]["kernel"], np.float64)
    flat = {name: np.asarray(array).reshape(-1, *array.shape[2:]) for name, array in batch.items()}
    for record in _sides()[0]:
        (row, place), = [(row, place) for row, place in np.argwhere(flat["positions"] == 0).tolist()
                         if flat["segment_ids"][row, place] > 0
                         and np.array_equal(flat["tokens"][row, place : place + len(record.tokens)], record.tokens)]
        hidden = apply(params, record.tokens)
        for t in range(2, len(record.tokens)):
            want = log_softmax(hidden[t - 1] @ kernel)[record.tokens[t]]
            assert flat["proximal"][row, place + t - 1] == pytest.approx(want, abs=1e-4)
        alone = np.pad(record.tokens, (0, 64 - len(record.tokens)))[None]
        routes = Qwen3Next(MODEL).apply({"params": params}, alone, with_routes=True, with_logits=False).routes
        np.testing.assert_array_equal(np.sort(flat["routes"][row, place : place + len(record.tokens)], -1),
                                      np.sort(np.moveaxis(routes, 0, 2)[0, : len(record.tokens)], -1))
    state, metrics = trainer.step(trainer.create(jax.tree.map(jnp.copy, params)), batch)
    ratio = [np.exp(flat["proximal"] - flat["old_logprobs"])[flat["weights"] > 0]][0].astype(np.float64)
    assert float(metrics["effective_sample"]) == pytest.approx(ratio.mean() ** 2 / (ratio**2).mean(), rel=1e-4)


def test_frozen_routers_do_not_learn_and_everything_else_does(params) -> None:
    config = dataclasses.replace(CONFIG, routing="frozen")
    rows = lessons.rows([[dataclasses.replace(record, routes=np.full((len(record.tokens), *_ROUTE), -1, np.int16))
                          for record in group] for group in _sides()], config)
    batch = {name: jnp.asarray(array) for name, array in rows.items()} | {"weight_sum": rows["weights"].sum()}
    for routing in ("frozen", "replay"):
        loss = policy_loss(MODEL, dataclasses.replace(config, routing=routing))
        slope = jax.jit(jax.grad(lambda tree, loss=loss: loss(tree, batch)[0]))(params)
        moved = {jax.tree_util.keystr(path): float(np.abs(leaf).max())
                 for path, leaf in jax.tree_util.tree_leaves_with_path(slope)}
        routers = [value for name, value in moved.items() if "['mlp']['gate']" in name]
        assert routers and all((value == 0) == (routing == "frozen") for value in routers)
        assert all(value > 0 for name, value in moved.items() if "experts" in name and "mtp" not in name)


_ROUTE = (MODEL.num_hidden_layers, MODEL.num_experts_per_tok)
