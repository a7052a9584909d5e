"""The model against transformers' Qwen3_5ForCausalLM and Qwen3_5MoeForCausalLM, in float64 as in test_model_parity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.model import Qwen3Next
from tests import rounding

pytestmark = pytest.mark.torch
oracle = pytest.importorskip("tests.oracle", exc_type=ImportError)
parity = pytest.importorskip("tests.test_model_parity", exc_type=ImportError)

SHAPE = (2, 70)
# What the published sizes differ in: experts, value heads of a key head, tied embeddings, layers behind the last block.
CASES = {
    "dense, ratio 3": {"linear_num_value_heads": 6},
    "dense, ratio 1, tied, a tail": {"linear_num_value_heads": 2, "tie_word_embeddings": True, "num_hidden_layers": 3},
    "experts, ratio 2": {"linear_num_value_heads": 4, "num_experts": 6},
    "experts, ratio 1, tied": {"linear_num_value_heads": 2, "num_experts": 6, "tie_word_embeddings": True},
}
FAST = ("dense, ratio 3", "experts, ratio 1, tied")


def config_of(case):
    """A tiny transformers config; its rotary sections are uneven, as the published ones."""
    import transformers

    values = {"num_hidden_layers": 2, **CASES[case]}
    experts = values.pop("num_experts", 0)
    layers = values["num_hidden_layers"]
    values |= dict(
        vocab_size=96, hidden_size=32, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=12, initializer_range=0.1,
        layer_types=["full_attention" if i % 2 else "linear_attention" for i in range(layers)],
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5,
                         "mrope_section": [2, 1, 1], "mrope_interleaved": True})
    if not experts:
        return transformers.Qwen3_5TextConfig(intermediate_size=40, **values)
    return transformers.Qwen3_5MoeTextConfig(
        num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=20,
        router_aux_loss_coef=0.02, **values)


@pytest.fixture(scope="module", params=[
    pytest.param(case, marks=[pytest.mark.slow] * (case not in FAST)) for case in CASES])
def pair(request, tmp_path_factory):
    """A reference model, and its conversion in float64."""
    model = parity.reference(config_of(request.param), 3)
    config, params = parity.converted(model, tmp_path_factory.mktemp("weights"))
    with jax.enable_x64(True):
        return model, *parity.in_float64(config, params)


def test_logits_losses_and_gradients(pair, tmp_path):
    model, config, params = pair
    rng = np.random.default_rng(0)
    tokens, judge = oracle.Oracle(model).untied(lambda: rng.integers(0, config.vocab_size, SHAPE))
    with jax.enable_x64(True):
        found = parity.ours(config, params, tokens, tmp_path / "gradients", type(model))
    assert len(found.gradients) == len(list(model.parameters()))
    errors = judge.errors(found, rounding.EPS64)
    wrong = {name: error for name, error in errors.items() if not error < rounding.ALLOWED}
    assert not wrong


def test_documents_of_a_row_do_not_see_each_other_nor_padding(pair):
    """A packed row gives what transformers gives for each document alone."""
    model, config, params = pair
    rng, lengths = np.random.default_rng(1), (17, 1, 25)
    documents = [rng.integers(1, config.vocab_size, length) for length in lengths]
    pad = np.zeros(4, int)
    tokens = np.concatenate([pad, *documents, pad])[None]
    segments = np.repeat([0, 1, 2, 3, 0], [4, *lengths, 4])[None]
    reference = oracle.Oracle(model)
    judges = [reference.judge(document[None], gradients=False) for document in documents]
    assert not any(judge.tied_rows().any() for judge in judges)
    with jax.enable_x64(True):
        run = jax.jit(lambda *arguments: Qwen3Next(config).apply(
            {"params": arguments[0]}, arguments[1], segment_ids=arguments[2]).logits)
        logits = np.asarray(run(params, jnp.asarray(tokens), jnp.asarray(segments)))
    start = len(pad)
    for length, judge in zip(lengths, judges):
        moved = [one.logits for one in judge.moved]
        part = logits[:, start : start + length]
        assert rounding.ratio(part, judge.exact.logits, moved, -1, rounding.EPS64) < rounding.ALLOWED
        start += length


def test_greedy_generation_with_a_cache(pair):
    import torch

    model, config, params = pair
    prompt, steps = np.random.default_rng(4).integers(1, config.vocab_size, (2, 13)), 60
    with oracle.float64(), oracle.recurrent():
        expected = oracle.Oracle(model).model.generate(
            torch.from_numpy(prompt), max_new_tokens=steps, min_new_tokens=steps, do_sample=False, use_cache=True,
            pad_token_id=0, eos_token_id=None)[:, prompt.shape[1]:].numpy()
    with jax.enable_x64(True):
        network = Qwen3Next(config)
        apply = functools.partial(network.apply, {"params": params})

        @jax.jit
        def generate(prompt):
            out = apply(prompt, cache=network.init_cache(2, 128))

            def step(carry, _):
                cache, token = carry
                out = apply(token[:, None], cache=cache)
                return (out.cache, jnp.argmax(out.logits[:, -1], axis=-1)), token

            return jax.lax.scan(step, (out.cache, jnp.argmax(out.logits[:, -1], axis=-1)), None, length=steps)[1]

        tokens = generate(jnp.asarray(prompt))
    np.testing.assert_array_equal(tokens.T, expected)
