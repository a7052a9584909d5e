"""Sampling against plain numpy and against the frequencies it must reproduce."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.inference.sampling import History, Sampling, adjusted, adjustments, filter_logits, sample


def reference_filter(logits: np.ndarray, top_p: float, top_k: int) -> np.ndarray:
    """Per row and in float64: which ids stay."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k:
        order = order[:top_k]
    mass = np.exp(logits[order].astype(np.float64))
    mass /= mass.sum()
    kept, total = [], 0.0
    for index, share in zip(order, mass):
        if total >= top_p and top_p < 1.0:
            break
        kept.append(index)
        total += share
    out = np.full(len(logits), -np.inf)
    out[kept] = logits[kept]
    return out


@pytest.mark.parametrize("top_p,top_k", [(1.0, 0), (0.7, 0), (1.0, 3), (0.5, 4), (1e-6, 0), (0.9, 100)])
def test_filter_is_the_definition(top_p: float, top_k: int) -> None:
    logits = np.random.default_rng(0).normal(size=(5, 17)).astype(np.float32) * 3
    got = filter_logits(jnp.asarray(logits), jnp.full(5, top_p), jnp.full(5, top_k, jnp.int32))
    want = np.stack([reference_filter(row, top_p, top_k) for row in logits])
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    np.testing.assert_allclose(np.where(np.isfinite(want), got, 0), np.where(np.isfinite(want), want, 0))


def call(logits: np.ndarray, seeds, positions, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0):
    n = len(logits)
    return jax.jit(sample)(
        jnp.asarray(logits, jnp.float32),
        jnp.broadcast_to(jnp.asarray(seeds, jnp.uint32), n),
        jnp.broadcast_to(jnp.asarray(positions, jnp.int32), n),
        jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), n),
        jnp.broadcast_to(jnp.asarray(top_p, jnp.float32), n),
        jnp.broadcast_to(jnp.asarray(top_k, jnp.int32), n),
        jnp.broadcast_to(jnp.asarray(min_p, jnp.float32), n),
    )


@pytest.mark.parametrize("temperature,top_p,top_k", [(1.0, 1.0, 0), (0.5, 1.0, 0), (1.0, 0.8, 0), (1.3, 1.0, 2)])
def test_frequencies_follow_the_tempered_and_filtered_distribution(temperature, top_p, top_k) -> None:
    row = np.log(np.array([0.4, 0.3, 0.2, 0.08, 0.02]))
    n = 20_000
    tokens, logprobs, drawn = call(np.tile(row, (n, 1)), np.arange(n), 7, temperature, top_p, top_k)
    filtered = np.exp(reference_filter(row / temperature, top_p, top_k))
    want = filtered / filtered.sum()
    got = np.bincount(np.asarray(tokens), minlength=5) / n
    np.testing.assert_allclose(got, want, atol=4 * np.sqrt(0.25 / n))  # four standard errors
    np.testing.assert_allclose(logprobs, row[np.asarray(tokens)], rtol=1e-5)  # of the untempered policy
    tempered = row / temperature - np.log(np.exp(row / temperature).sum())
    np.testing.assert_allclose(drawn, tempered[np.asarray(tokens)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature, min_p, kept", [(1.0, 0.25, 3), (1.0, 0.1, 4), (0.5, 0.25, 3), (1.0, 1.0, 1)])
def test_min_p_keeps_what_is_not_much_less_probable_than_the_best(temperature, min_p, kept) -> None:
    row, n = np.log(np.array([0.4, 0.3, 0.2, 0.08, 0.02])), 4000
    tokens, *_ = call(np.tile(row, (n, 1)), np.arange(n), 7, temperature, min_p=min_p)
    shares = np.exp(row / temperature) / np.exp(row / temperature).max()
    assert (shares >= min_p * (1 - 1e-6)).sum() == kept
    want = np.where(np.arange(5) < kept, shares, 0)
    np.testing.assert_allclose(np.bincount(np.asarray(tokens), minlength=5) / n, want / want.sum(), atol=4 * np.sqrt(0.25 / n))


def reference_adjusted(logits: np.ndarray, sampling: Sampling, prompt, generated) -> np.ndarray:
    """One row in float64, token by token."""
    out = logits.astype(np.float64)
    for id_ in range(len(out)):
        count = list(generated).count(id_)
        if count or id_ in prompt:
            out[id_] = out[id_] / sampling.repetition_penalty if out[id_] > 0 else out[id_] * sampling.repetition_penalty
        out[id_] -= sampling.frequency_penalty * count + sampling.presence_penalty * (count > 0)
    for id_, amount in sampling.logit_bias:
        out[id_] += amount
    return out


def test_adjustments_are_the_definitions() -> None:
    draws = [Sampling(), Sampling(presence_penalty=0.5), Sampling(frequency_penalty=-0.3), Sampling(repetition_penalty=1.4),
             Sampling(1.0, 0.9, 0, 0.0, 0.2, 0.1, 0.8, ((3, 2.5), (0, -100.0)))]
    histories = [History([1, 2, 2], [4, 4, 5]), History([4], [4, 4]), History([], [7]), History([0, 9], [3]), History([3, 3], [5, 5])]
    logits = np.random.default_rng(0).normal(size=(5, 11)).astype(np.float32) * 2
    got = adjusted(jnp.asarray(logits), adjustments(draws, histories, 11))
    want = [reference_adjusted(row, draw, set(history.prompt), history.generated)
            for row, draw, history in zip(logits, draws, histories)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="logit_bias: 11 is no id below 11"):
        adjustments([Sampling(logit_bias=((11, 1.0),))], histories[:1], 11)


def test_streams_depend_on_seed_and_position_alone() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(6, 50))
    tokens, *_ = call(logits, np.arange(6), np.arange(6) + 10)
    other = rng.normal(size=(6, 50))
    other[4] = logits[2]
    moved, *_ = call(other, [9, 9, 9, 9, 2, 9], [0, 0, 0, 0, 12, 0])
    assert moved[4] == tokens[2]
    flat = np.zeros((200, 50))
    by_seed, *_ = call(flat, np.arange(200), 0)
    by_position, *_ = call(flat, 0, np.arange(200))
    assert len(set(np.asarray(by_seed).tolist())) > 40 and len(set(np.asarray(by_position).tolist())) > 40


def test_temperature_zero_is_argmax_even_beside_sampled_rows() -> None:
    logits = np.random.default_rng(2).normal(size=(4, 30))
    tokens, logprobs, drawn = call(logits, 0, 0, temperature=[0.0, 1.0, 0.0, 5.0])
    best = logits.argmax(-1)
    assert tokens[0] == best[0] and tokens[2] == best[2]
    np.testing.assert_array_equal(logprobs[:3], drawn[:3])  # nothing was tempered
    assert abs(logprobs[3] - drawn[3]) > 0.01


@pytest.mark.parametrize("temperature,top_k", [(0.0, 0), (1.0, 0), (1.0, 3)])
def test_rows_without_a_token_are_never_drawn_and_do_not_change_the_rest(temperature, top_k) -> None:
    logits = np.random.default_rng(3).normal(size=(400, 12)).astype(np.float32)
    logits[:, 7:] += 9.0  # the best by far, and no token's
    drawable = np.arange(12) < 7
    arguments = [jnp.full(400, value) for value in (temperature, 1.0)]
    tokens, logprobs, _ = sample(
        jnp.asarray(logits), jnp.arange(400, dtype=jnp.uint32), jnp.zeros(400, jnp.int32), *arguments,
        jnp.full(400, top_k, jnp.int32), jnp.zeros(400), jnp.asarray(drawable),
    )  # fmt: skip
    assert set(np.asarray(tokens).tolist()) <= set(range(7))
    if not temperature:
        np.testing.assert_array_equal(tokens, logits[:, :7].argmax(-1))
    whole = logits.astype(np.float64)
    want = whole - np.log(np.exp(whole).sum(-1, keepdims=True))  # the model's own, of all rows
    np.testing.assert_allclose(logprobs, want[np.arange(400), np.asarray(tokens)], rtol=1e-4)
