"""Next-token, balance and MTP loss against sums written out in numpy; packing must not change them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qcn_jax.config import OptimizerConfig, TrainConfig
from qcn_jax.model import Qwen3Next
from qcn_jax.moe.losses import balance_loss
from qcn_jax.pipeline.data import packing
from qcn_jax.pipeline.train import diagnosis, fit, losses
from tests.pipeline.micro import MODEL

CONFIG = dataclasses.replace(MODEL, num_nextn_predict_layers=1, router_aux_loss_coef=0.02, num_hidden_layers=3)
NETWORK = Qwen3Next(CONFIG)
MTP_STEPS, MTP_COEF = 2, 0.3
LOSS = losses.language_model_loss(NETWORK, MTP_COEF, MTP_STEPS)


@functools.cache
def _params():
    return jax.jit(NETWORK.init)(jax.random.key(3), jnp.zeros((1, 4), jnp.int32))["params"]


def _documents():
    rng = np.random.default_rng(0)
    return [{"tokens": rng.integers(2, 30, n), "weights": rng.choice([0.0, 0.5, 1.0], n)} for n in (9, 5, 7, 11)]


def _batch(documents, length, rows):
    arrays = packing.pack(documents, length, rows=rows)
    return arrays | {"weight_sum": np.float32(arrays["weights"].sum()), "fraction": np.float32(1)}


_evaluate = jax.jit(LOSS)
_forward = jax.jit(lambda params, batch, ahead: NETWORK.apply(
    {"params": params}, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"],
    mtp_tokens=ahead))


def _log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


@pytest.fixture(name="packed", scope="module")
def _packed():
    batch = _batch(_documents(), 16, 2)
    return batch, _evaluate(_params(), batch)


def test_sums_over_documents(packed):
    batch, (loss, metrics) = packed
    tokens = batch["tokens"]
    ahead = np.stack([np.pad(tokens[:, i:], ((0, 0), (0, i))) for i in (1, 2)], axis=-1)
    out = _forward(_params(), batch, ahead)
    scores = _log_softmax(out.logits)
    drafted = [_log_softmax(NETWORK.head(_params(), hidden)) for hidden in out.mtp_hidden]
    ce = right = 0.0
    mtp = np.zeros(MTP_STEPS)
    for row, ids in enumerate(batch["segment_ids"]):
        for segment in range(1, ids.max() + 1):
            at = np.flatnonzero(ids == segment)
            for t in at[:-1]:
                weight = batch["weights"][row, t]
                ce -= weight * scores[row, t, tokens[row, t + 1]]
                right += weight * (np.argmax(out.logits[row, t]) == tokens[row, t + 1])
                for step in range(MTP_STEPS):
                    target = t + 2 + step
                    if target <= at[-1]:
                        mtp[step] -= batch["weights"][row, target - 1] * drafted[step][row, t, tokens[row, target]]
    total = batch["weights"].sum()
    assert float(metrics["ce"]) == pytest.approx(ce / total, rel=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(float(right / total), rel=1e-5)
    assert float(metrics["mtp"]) == pytest.approx(mtp.mean() / total, rel=1e-5)
    balance = float(balance_loss(out.aux))
    assert float(metrics["balance"]) == pytest.approx(balance, rel=1e-6) and 1.9 < balance < 3
    assert float(loss) == pytest.approx(ce / total + MTP_COEF * mtp.mean() / total + 0.02 * balance, rel=1e-5)


def test_packing_changes_nothing(packed):
    """One document a row gives the loss of the packed rows: nothing leaks, padding does not count."""
    _, (_, together) = packed
    apart = _evaluate(_params(), _batch([d for d in _documents()], 16, 2) | _one_a_row())[1]
    for name in ("ce", "mtp", "accuracy"):
        assert float(apart[name]) == pytest.approx(float(together[name]), rel=2e-5), name


def _one_a_row():
    rows = [packing.pack([document], 16) for document in _documents()]
    arrays = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
    return arrays | {"weight_sum": np.float32(arrays["weights"].sum())}


def test_slices_give_the_step_of_the_undivided_batch():
    """Rows of one token each load other experts in every slice; the balance loss is all there is but for a little."""
    config = dataclasses.replace(CONFIG, router_aux_loss_coef=1.0, num_hidden_layers=2)
    rule, length = OptimizerConfig(learning_rate=1.0, warmup_steps=0, weight_decay=0.0, eps=1e3, clip_norm=1e9), 8
    params = jax.jit(Qwen3Next(config).init)(jax.random.key(3), jnp.zeros((1, 4), jnp.int32))["params"]
    tokens = np.repeat(np.asarray([3, 3, 17, 29], np.int32), length).reshape(4, length)
    weights = np.where(np.arange(length) < length - 1, [[0.1], [1.0], [0.3], [1.0]], 0).astype(np.float32)
    batch = {"tokens": tokens, "weights": weights, "segment_ids": np.ones_like(tokens),
             "positions": np.tile(np.arange(length, dtype=np.int32), (4, 1))}
    found = []
    for slices in (1, 4):
        train = TrainConfig(steps=10, rows=4, sequence_length=length, mtp_coef=0.1, accumulate=slices,
                            optimizer=rule)
        trainer = fit.make_trainer(config, train, None, "midtrain.train")
        state, metrics = trainer.step(trainer.create(jax.tree.map(jnp.copy, params)), trainer.place(batch))
        found.append((jax.tree.map(lambda a, b: np.asarray(a - b), state.params, params), metrics))
    (moved, want), (parts, got) = found
    apart = optax.global_norm(jax.tree.map(np.subtract, parts, moved))
    assert float(apart) < 1e-4 * float(optax.global_norm(moved)) != 0
    for name in ("loss", "ce", "mtp", "balance", "load_violation", "accuracy", "grad_norm"):
        assert float(got[name]) == pytest.approx(float(want[name]), rel=1e-4), name
    routed = jax.jit(losses.routing(Qwen3Next(config), 0.1))
    alone = [balance_loss(routed(params, {name: array[None, row] for name, array in batch.items()})) for row in range(4)]
    # A mean of the slices' own losses is another number, by a hundred times what is allowed above.
    assert np.mean(alone) > 1.01 * float(want["balance"])


def test_cross_entropy_is_float32_whatever_the_logits_are():
    logits = 30 * jax.random.normal(jax.random.key(0), (5, 7))
    targets = jnp.arange(5)
    low = losses.cross_entropy(logits.astype(jnp.bfloat16), targets)
    assert low.dtype == jnp.float32
    want = -_log_softmax(logits.astype(jnp.bfloat16))[np.arange(5), np.arange(5)]
    np.testing.assert_allclose(low, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_non_finite_values_are_traced_to_where_they_begin(packed):
    batch, _ = packed
    explain = diagnosis.explain(CONFIG, LOSS)
    slices = {name: array[None] for name, array in batch.items() if np.ndim(array) == 2}
    params = _params()
    bad = jax.tree.map(lambda leaf: leaf, params)
    bad["tail"]["mlp"]["experts"]["down_proj"] = bad["tail"]["mlp"]["experts"]["down_proj"].at[0, 0].set(jnp.inf)
    assert explain(bad, slices) == "parameter tail/mlp/experts/down_proj holds a non-finite value"
    # Finite, but overflows in the attention layer (index 1).
    huge = jax.tree.map(lambda leaf: leaf, params)
    huge["blocks"]["full"]["self_attn"]["o_proj"]["kernel"] = jnp.full_like(
        params["blocks"]["full"]["self_attn"]["o_proj"]["kernel"], 3e38)
    assert explain(huge, slices) == "layer 1 (attention) is the first whose output is not finite"
    assert diagnosis.first_bad_layer(CONFIG, params, batch) is None


def test_truncated_models_are_the_first_layers():
    for layers in (1, 2, 3):
        config, params = diagnosis.truncated(CONFIG, _params(), layers)
        want = jax.eval_shape(Qwen3Next(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
        assert jax.tree.structure(params) == jax.tree.structure(want)
        assert [leaf.shape for leaf in jax.tree.leaves(params)] == [leaf.shape for leaf in jax.tree.leaves(want)]
