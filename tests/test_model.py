"""The model as a whole: parameters, packing, caches of any chunking, multi-token prediction, layouts."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from qcn_jax.config import ModelConfig, from_config_dict
from qcn_jax.errors import UserError
from qcn_jax.inference.cache import cache_put, cache_reset, cache_take
from qcn_jax.model import Qwen3Next, abstract_params, logical_axes, parameter_count, unroll
from qcn_jax.pipeline.train.losses import mtp_weights

SMALL = ModelConfig(
    vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    linear_num_key_heads=2, linear_key_head_dim=8, linear_num_value_heads=4, linear_value_head_dim=12, num_experts=6,
    num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=20, full_attention_interval=2,
    dtype="float32", chunk_size=16, num_nextn_predict_layers=1)  # one block of two layers and a tail of one
MODEL = Qwen3Next(SMALL)
CAPACITY = 48
run = jax.jit(MODEL.apply, static_argnames="with_logits")


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype), abstract_params(config))


VARIABLES = {"params": random_params(SMALL)}


def random_tokens(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, SMALL.vocab_size, shape), jnp.int32)


@pytest.mark.parametrize("mtp, count", [(0, 79_674_391_296), (1, 79_674_391_296 + 1_650_471_424)])
def test_published_parameter_count(mtp, count):
    run_config = importlib.import_module("configs.qwen3_coder_next").get_config()
    config = from_config_dict(ModelConfig, run_config.model)
    assert parameter_count(dataclasses.replace(config, num_nextn_predict_layers=mtp)) == count


def test_initialisation_is_the_published_one():
    config = dataclasses.replace(SMALL, hidden_size=64, linear_num_key_heads=16, linear_num_value_heads=64)
    params = jax.jit(Qwen3Next(config).init)(jax.random.key(0), random_tokens(1, 2))["params"]
    layer = params["blocks"]["linear"]
    assert not np.any(layer["input_layernorm"]["weight"])
    assert np.all(layer["linear_attn"]["norm"]["weight"] == 1) and np.all(layer["linear_attn"]["dt_bias"] == 1)
    rate = np.exp(layer["linear_attn"]["A_log"])
    assert rate.min() >= 0.01 and rate.max() <= 16 and 6 < rate.mean() < 10
    for kernel in (layer["mlp"]["experts"]["down_proj"], layer["mlp"]["gate"]["kernel"], params["lm_head"]["kernel"]):
        np.testing.assert_allclose(np.std(kernel), 0.02, rtol=0.15)


@pytest.mark.parametrize("change", [
    {}, {"tie_word_embeddings": True, "num_nextn_predict_layers": 0}, {"num_hidden_layers": 4}, {"full_attention_interval": 1}])
def test_axis_names_match_shapes(change):
    config = dataclasses.replace(SMALL, **change)
    axes, params = logical_axes(config), abstract_params(config)
    names = jax.tree.map(lambda leaf, axis: len(axis) == leaf.ndim, params, axes)
    assert all(jax.tree.leaves(names))
    assert axes["blocks"]["full"]["mlp"]["experts"]["gate_proj"] == ("blocks", "expert", "expert_embed", "mlp")
    assert ("tail" in params) == (config.num_hidden_layers % config.full_attention_interval > 0)
    assert ("lm_head" in params) != config.tie_word_embeddings
    assert ("mtp" in params) == bool(config.num_nextn_predict_layers)


def test_packed_equals_separate():
    lengths = [(5, 30, 9), (17, 1, 26)]
    tokens = random_tokens(2, 44)
    segments = jnp.asarray([np.repeat([1, 2, 3], row) for row in lengths], jnp.int32)
    packed = run(VARIABLES, tokens, segment_ids=segments, mtp_tokens=jnp.roll(tokens, -1, axis=1))
    for row, parts in enumerate(lengths):
        start = 0
        for part in parts:
            alone = jnp.zeros((2, 44), jnp.int32).at[0, :part].set(tokens[row, start : start + part])
            following = jnp.zeros((2, 44), jnp.int32).at[0, :part].set(jnp.roll(tokens, -1, axis=1)[row, start : start + part])
            out = run(VARIABLES, alone, segment_ids=jnp.ones_like(segments), mtp_tokens=following)
            assert np.abs(out.logits[0, :part] - packed.logits[row, start : start + part]).max() < 1e-5
            assert np.abs(out.mtp_hidden[0, 0, :part] - packed.mtp_hidden[0, row, start : start + part]).max() < 1e-5
            start += part


def test_an_id_that_comes_again_is_another_document():
    tokens = random_tokens(2, 12)
    again = jnp.asarray([[1, 1, 2, 2, 1, 1, 1, 2, 1, 1, 2, 2], [1, 1, 0, 1, 1, 0, 0, 1, 2, 1, 0, 0]], jnp.int32)
    apart = jnp.asarray([[1, 1, 2, 2, 3, 3, 3, 4, 5, 5, 6, 6], [1, 1, 0, 2, 2, 0, 0, 3, 4, 5, 0, 0]], jnp.int32)
    ahead = jnp.roll(tokens, -1, axis=1)
    ours, right = (run(VARIABLES, tokens, segment_ids=ids, mtp_tokens=ahead) for ids in (again, apart))
    real = np.asarray(again) > 0
    for a, b in ((ours.logits, right.logits), (ours.mtp_hidden[0], right.mtp_hidden[0])):
        np.testing.assert_array_equal(np.asarray(a)[real], np.asarray(b)[real])
    for step in range(3):
        weights = jnp.ones(again.shape)
        np.testing.assert_array_equal(mtp_weights(weights, again, step)[real], mtp_weights(weights, apart, step)[real])


def test_left_padding_equals_none():
    tokens = random_tokens(2, 44, seed=1)
    expected = run(VARIABLES, tokens, segment_ids=jnp.ones_like(tokens), mtp_tokens=tokens)
    padded = jnp.roll(tokens, 9, axis=1)
    real = jnp.broadcast_to(jnp.arange(44) >= 9, tokens.shape).astype(jnp.int32)
    out = run(VARIABLES, padded, segment_ids=real, mtp_tokens=tokens)
    assert np.abs(out.logits[:, 9:] - expected.logits[:, :35]).max() < 1e-5
    np.testing.assert_array_equal(out.aux.tokens, 2 * 35)


@functools.cache
def one_pass():
    tokens = random_tokens(3, 40, seed=2)
    return tokens, run(VARIABLES, tokens)


@pytest.mark.parametrize("unrolled", [False, True])
def test_right_padded_pieces_then_single_tokens_equal_one_pass(unrolled):
    """Pieces of at most 16 tokens, of a different length for every sequence, then one token at a time."""
    tokens, expected = one_pass()
    model = Qwen3Next(SMALL, unrolled=unrolled)
    variables = {"params": unroll(SMALL, VARIABLES["params"])} if unrolled else VARIABLES
    append = jax.jit(model.apply, donate_argnames="cache")
    cache, done = model.init_cache(3, CAPACITY), np.zeros(3, int)
    for step in [(16, 1, 0), (3, 16, 7), (0, 2, 16), *[(1, 1, 1)] * 10, *[(0, 1, 1)] * 3, (1, 0, 0)]:
        width = 1 if max(step) == 1 else 16
        piece = np.full((3, width), 5, np.int32)  # padding is a real token's id, not zero
        for row, count in enumerate(step):
            piece[row, :count] = tokens[row, done[row] : done[row] + count]
        out = append(variables, jnp.asarray(piece), cache=cache, lengths=jnp.asarray(step, jnp.int32))
        cache = out.cache
        for row, count in enumerate(step):
            want = expected.logits[row, done[row] : done[row] + count]
            assert np.abs(out.logits[row, :count] - want).max(initial=0) < 2e-5
        done += step
    np.testing.assert_array_equal(cache.length, done)


@pytest.mark.parametrize("unrolled", [False, True])
def test_cache_slots_fork_move_and_reset(unrolled):
    tokens, expected = one_pass()
    model = Qwen3Next(SMALL, unrolled=unrolled)
    variables = {"params": unroll(SMALL, VARIABLES["params"])} if unrolled else VARIABLES
    append = jax.jit(model.apply)
    cache = append(variables, tokens[:, :16], cache=model.init_cache(3, CAPACITY)).cache
    forked = cache_take(cache, jnp.asarray([2, 0, 2]))
    out = append(variables, tokens[jnp.asarray([2, 0, 2]), 16:32], cache=forked)
    assert np.abs(out.logits - expected.logits[jnp.asarray([2, 0, 2]), 16:32]).max() < 2e-5
    # Sequence 0's cache into slot 1; index 3 does not exist and is skipped; then slot 2 starts anew.
    moved = cache_put(cache, jnp.asarray([1, 3]), cache_take(cache, jnp.asarray([0, 1])))
    moved = cache_reset(moved, jnp.asarray([False, False, True]))
    np.testing.assert_array_equal(moved.length, [16, 16, 0])
    piece = jnp.stack([tokens[0, 16:32], tokens[0, 16:32], tokens[1, :16]])
    out = append(variables, piece, cache=moved)
    for row, want in enumerate([expected.logits[0, 16:32], expected.logits[0, 16:32], expected.logits[1, :16]]):
        assert np.abs(out.logits[row] - want).max() < 2e-5


def test_what_outgrows_the_cache_is_nan_and_its_neighbours_are_not():
    tokens, cache = random_tokens(2, 8), MODEL.init_cache(2, 8)
    out = run(VARIABLES, tokens, cache=cache, lengths=jnp.asarray([8, 4]))
    assert np.isfinite(out.logits).all()
    out = run(VARIABLES, tokens[:, :4], cache=out.cache, lengths=jnp.asarray([1, 4]))
    assert np.isnan(out.logits[0, 0]).all() and np.isfinite(out.logits[1]).all()
    with pytest.raises(ValueError, match="9 tokens for a cache of 8 a sequence"):
        MODEL.apply(VARIABLES, random_tokens(2, 9), cache=cache)


def test_a_cache_given_by_position_is_used():
    apart = Qwen3Next(dataclasses.replace(SMALL, scan_layers=False))
    tokens = random_tokens(1, 4)
    by_name = apart.apply(VARIABLES, tokens, cache=apart.init_cache(1, 8))
    by_position = apart.apply(VARIABLES, tokens, None, None, apart.init_cache(1, 8))
    jax.tree.map(np.testing.assert_array_equal, by_name, by_position)
    assert int(by_position.cache.length[0]) == 4


def test_key_limit_changes_nothing_it_should_not():
    tokens, expected = one_pass()
    out = jax.jit(MODEL.apply, static_argnames="key_limit")(
        VARIABLES, tokens[:, :16], cache=MODEL.init_cache(3, CAPACITY), key_limit=16)
    assert np.abs(out.logits - expected.logits[:, :16]).max() < 2e-5


def test_multi_token_prediction_wiring():
    """The block written out from its published description, two steps deep."""
    tokens = random_tokens(2, 20, seed=3)
    ahead = jnp.stack([jnp.roll(tokens, -1, axis=1), jnp.roll(tokens, -2, axis=1)], axis=-1)
    out = jax.jit(MODEL.apply)(VARIABLES, tokens, mtp_tokens=ahead)
    params = VARIABLES["params"]

    def norm(x, weight):
        return x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6) * (1 + weight["weight"])

    # The layer itself is that of a one-layer model with full attention, whose embedding is x.
    layer = dataclasses.replace(SMALL, num_hidden_layers=1, full_attention_interval=1, num_nextn_predict_layers=0)
    hidden = np.asarray(out.hidden)
    for step in range(2):
        embedded = np.asarray(params["embed_tokens"]["embedding"])[np.asarray(ahead[..., step])]
        pair = [norm(embedded, params["mtp"]["pre_fc_norm_embedding"]), norm(hidden, params["mtp"]["pre_fc_norm_hidden"])]
        x = np.concatenate(pair, axis=-1) @ params["mtp"]["fc"]["kernel"]
        tree = {
            "embed_tokens": {"embedding": x.reshape(-1, 32)}, "norm": params["mtp"]["norm"], "lm_head": params["lm_head"],
            "blocks": {"full": jax.tree.map(lambda leaf: leaf[None], params["mtp"]["layer"])}}
        layer_model = Qwen3Next(dataclasses.replace(layer, vocab_size=40))
        tree["lm_head"] = {"kernel": jnp.zeros((32, 40))}
        hidden = np.asarray(layer_model.apply({"params": tree}, jnp.arange(40).reshape(2, 20)).hidden)
        assert np.abs(out.mtp_hidden[step] - hidden).max() < 1e-5
    assert out.aux.counts.shape == (SMALL.num_hidden_layers + 2, SMALL.num_experts)


def test_cached_drafting_equals_training_form():
    tokens, out = one_pass()
    following = jnp.roll(tokens, -1, axis=1)
    expected = run(VARIABLES, tokens, mtp_tokens=following).mtp_hidden[0]
    draft = jax.jit(functools.partial(MODEL.apply, method="mtp_step"))
    first, cache = draft(VARIABLES, out.hidden[:, :32], following[:, :32], MODEL.init_mtp_cache(3, CAPACITY))
    second, _ = draft(VARIABLES, out.hidden[:, 32:], following[:, 32:], cache)
    assert np.abs(jnp.concatenate([first, second], axis=1) - expected).max() < 1e-5


def test_head_in_pieces_equals_logits():
    tokens, out = one_pass()
    hidden_only = run(VARIABLES, tokens, with_logits=False)
    assert hidden_only.logits is None
    np.testing.assert_allclose(MODEL.head(VARIABLES["params"], hidden_only.hidden), out.logits, atol=1e-5)
    tied = dataclasses.replace(SMALL, tie_word_embeddings=True, num_nextn_predict_layers=0)
    params = random_params(tied)
    out = jax.jit(Qwen3Next(tied).apply)({"params": params}, tokens[:, :8])
    np.testing.assert_allclose(out.hidden @ params["embed_tokens"]["embedding"].T, out.logits, atol=1e-5)


def test_rematerialisation_and_back_ends_change_no_gradient():
    tokens = random_tokens(2, 24, seed=4)

    def gradient(**change):
        model = Qwen3Next(dataclasses.replace(SMALL, num_hidden_layers=2, num_nextn_predict_layers=0, **change))
        params = {name: tree for name, tree in VARIABLES["params"].items() if name not in ("tail", "mtp")}
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, tokens).logits))))(params)

    expected = gradient()
    for change in ({"remat": "full", "moe": "ragged"}, {"remat": "dots", "delta_rule": "recurrent", "moe": "dense"}):
        for got, want in zip(jax.tree.leaves(gradient(**change)), jax.tree.leaves(expected)):
            assert np.linalg.norm(got - want) < 1e-4 * np.linalg.norm(want) + 1e-7, change


def test_bfloat16_compute_keeps_what_must_be_float32():
    config = dataclasses.replace(SMALL, dtype="bfloat16", param_dtype="bfloat16", num_nextn_predict_layers=0)
    shapes = abstract_params(config)
    mixer = shapes["blocks"]["linear"]["linear_attn"]
    assert mixer["A_log"].dtype == mixer["dt_bias"].dtype == jnp.float32
    assert mixer["out_proj"]["kernel"].dtype == jnp.bfloat16
    params = jax.tree.map(
        lambda leaf, shape: leaf.astype(shape.dtype),
        {name: tree for name, tree in VARIABLES["params"].items() if name != "mtp"}, shapes)
    tokens, expected = one_pass()
    model = Qwen3Next(config)
    out = jax.jit(model.apply)({"params": params}, tokens, cache=model.init_cache(3, CAPACITY))
    assert out.logits.dtype == out.aux.probabilities.dtype == jnp.float32 and out.hidden.dtype == jnp.bfloat16
    assert out.cache.layers["tail"]["state"].dtype == jnp.float32
    assert out.cache.layers["blocks"]["full"]["k"].dtype == jnp.bfloat16
    correlation = np.corrcoef(np.ravel(out.logits), np.ravel(expected.logits))[0, 1]
    assert correlation > 0.97  # routing flips on near ties; a wrong cast or axis would give about zero


@pytest.mark.parametrize("change, line", [
    ({"num_key_value_heads": 3}, "model.num_attention_heads: 4 is not a multiple of num_key_value_heads, 3"),
    ({"linear_num_key_heads": 3}, "model.linear_num_value_heads: 4 is not a multiple of linear_num_key_heads, 3"),
    ({"num_experts_per_tok": 7}, "model.num_experts_per_tok: 7 is more than num_experts, 6"),
    ({"num_nextn_predict_layers": 2}, "model.num_nextn_predict_layers: 2; allowed: 0, 1"),
    ({"remat": "some"}, "model.remat: 'some'; allowed: none, full, dots"),
])
def test_bad_configurations_name_the_field(change, line):
    with pytest.raises(UserError, match=line):
        abstract_params(dataclasses.replace(SMALL, **change))


def test_segments_and_cache_exclude_each_other():
    tokens = random_tokens(1, 4)
    with pytest.raises(ValueError, match="segment_ids cannot be given with a cache"):
        MODEL.apply(VARIABLES, tokens, segment_ids=tokens, cache=MODEL.init_cache(1, 8))


def test_layers_apart_compute_what_a_scan_does():
    """`scan_layers` changes the program, not the parameters, their gradients or the result."""
    tokens = random_tokens(2, 21)

    def loss(config):
        apart = Qwen3Next(dataclasses.replace(SMALL, scan_layers=config))
        return lambda params: jnp.sum(jnp.sin(apart.apply({"params": params}, tokens, mtp_tokens=tokens).logits))

    scanned, apart = (jax.jit(jax.value_and_grad(loss(scan)))(VARIABLES["params"]) for scan in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), scanned, apart)


def test_unrolled_parameters_are_those_of_the_unrolled_model():
    unrolled = Qwen3Next(SMALL, unrolled=True)
    shapes = jax.eval_shape(lambda: nn.unbox(nn.Module.init(unrolled, jax.random.key(0), random_tokens(1, 2))))["params"]
    ours = jax.eval_shape(lambda: unroll(SMALL, VARIABLES["params"]))
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, ours)
