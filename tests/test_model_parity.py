"""The model against transformers' Qwen3NextForCausalLM in float32: logits, losses, every gradient, generation."""

import contextlib
import copy
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax import hub
from qcn_jax.model import Qwen3Next, unroll
from qcn_jax.moe.losses import balance_loss

pytestmark = pytest.mark.torch

TOLERANCES = {"logits": 3e-4, "losses": 1e-5, "gradients": 1e-3}  # see Measured.errors


def random_config(seed):
    """A tiny transformers config with sizes drawn at random, and a batch shape."""
    import transformers

    rng = np.random.default_rng(seed)
    pick = lambda *values: values[rng.integers(len(values))]
    kv_heads, key_heads, interval = pick(1, 2), pick(1, 2, 3), pick(2, 3, 4)
    layers = pick(interval, 2 * interval, 2 * interval + 1)
    experts = pick(4, 8, 13)
    config = transformers.Qwen3NextConfig(
        vocab_size=int(rng.integers(50, 320)), hidden_size=pick(32, 48, 64), num_hidden_layers=layers,
        layer_types=["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(layers)],
        num_attention_heads=kv_heads * pick(1, 2, 3), num_key_value_heads=kv_heads, head_dim=pick(16, 32),
        linear_num_key_heads=key_heads, linear_num_value_heads=key_heads * pick(1, 2, 4),
        linear_key_head_dim=pick(8, 16), linear_value_head_dim=pick(8, 16, 24), linear_conv_kernel_dim=pick(2, 3, 4),
        num_experts=experts, num_experts_per_tok=pick(1, 2, 3), moe_intermediate_size=pick(16, 24),
        shared_expert_intermediate_size=pick(16, 40), norm_topk_prob=pick(True, True, False),
        tie_word_embeddings=pick(False, False, True), initializer_range=0.1, router_aux_loss_coef=0.02,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": pick(0.25, 0.5)})
    return config, (int(rng.integers(1, 4)), int(rng.integers(2, 150))), pick(16, 32, 64)


def reference(config, seed):
    """A transformers model whose every parameter (norms and biases too) is random."""
    import torch
    import transformers

    torch.set_num_threads(1)  # spinning threads starve each other on a busy machine
    torch.manual_seed(seed)
    model = transformers.Qwen3NextForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "dt_bias" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def converted(model, folder, chunk_size=32):
    """(config, params) of a transformers model, by way of its files."""
    model.save_pretrained(folder)
    config, params = hub.load(folder)
    return dataclasses.replace(config, dtype="float32", chunk_size=chunk_size), params


@pytest.fixture(autouse=True)
def recurrent_reference(monkeypatch):
    """transformers computes its delta rule token by token.

    Its chunked form takes differences of large cumulative decays in float32, an error of its own that reaches 1e-3 on
    these logits; its recurrent form is the definition and has none of it. Our side stays chunked.
    """
    from transformers.models.qwen3_next import modeling_qwen3_next as reference_code

    def recurrent(*args, chunk_size=None, **kwargs):
        return reference_code.torch_recurrent_gated_delta_rule(*args, **kwargs)

    monkeypatch.setattr(reference_code, "torch_chunk_gated_delta_rule", recurrent)


class _Float64Torch:
    """The module torch with float64 under the name of float32."""

    def __getattr__(self, name):
        import torch

        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


@contextlib.contextmanager
def float64():
    """Both implementations compute in float64, also where their code says float32."""
    import torch
    from transformers.models.qwen3_next import modeling_qwen3_next

    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr(modeling_qwen3_next, "torch", _Float64Torch())
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(jnp, "float32", jnp.float64)
        yield


def in_float64(model):
    """A transformers model with the same weights, for use within `float64()`."""
    twin = copy.deepcopy(model).double()
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config=twin.config)  # its frequencies are rounded in float32
    twin.set_experts_implementation("eager")  # torch's grouped product knows no float64
    return twin


@functools.cache
def jitted(config, options=()):
    """Loss with gradient, logits and balance loss of a config, compiled once for all tests that share it."""
    model = Qwen3Next(config)

    def loss(params, tokens):
        out = model.apply({"params": params}, tokens)
        picked = jnp.take_along_axis(jax.nn.log_softmax(out.logits[:, :-1]), tokens[:, 1:, None], axis=-1)
        balance = balance_loss(out.aux)
        return -jnp.mean(picked) + config.router_aux_loss_coef * balance, (out.logits, balance)

    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=dict(options) or None)


@dataclasses.dataclass
class Measured:
    """What a model makes of a batch; gradients in our layout."""

    logits: np.ndarray
    balance: float
    loss: float
    gradients: Any

    def errors(self, exact):
        """Largest difference: of logits absolute, of losses relative, of a parameter's gradient relative in norm."""
        norm = lambda x: np.linalg.norm(np.asarray(x, np.float64))
        gradients = jax.tree.map(lambda a, b: norm(np.asarray(a, np.float64) - b) / max(norm(b), 1e-7),
                                 self.gradients, exact.gradients)
        losses = np.array([self.loss / exact.loss, self.balance / exact.balance]) - 1
        found = {"logits": np.abs(self.logits - exact.logits).max(), "losses": np.abs(losses).max(),
                 "gradients": np.max(jax.tree.leaves(gradients))}
        assert np.isfinite(list(found.values())).all(), found
        return found


def ours(config, params, tokens, options=()):
    (loss, (logits, balance)), gradients = jitted(config, options)(params, jnp.asarray(tokens, jnp.int32))
    return Measured(np.asarray(logits), float(balance), float(loss), gradients)


def measured(model, tokens, folder):
    """The same of a transformers model."""
    import torch

    model = copy.deepcopy(model)
    ids = torch.from_numpy(tokens)
    out = model(input_ids=ids, labels=ids, output_router_logits=True)
    out.loss.backward()
    # Gradients travel through the same files as weights, so that they come in our layout.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    gradients = converted(model.to(torch.float32), folder)[1]
    return Measured(out.logits.detach().numpy(), out.aux_loss.item(), out.loss.item(), gradients)


# Models that are ill-conditioned: a relative change of 6e-8 of their weights moves float64 logits by up to 3e-4, and
# transformers in float32 misses its own float64 result by up to 9e-4 (19, where ours misses it by 4e-5). Two float32 programs need not agree on them
# within the tolerances, so they are held against float64 alone.
ILL_CONDITIONED = (7, 13, 19)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 7, 12, 13, 19))])
def test_float64(seed, tmp_path):
    """In float64 the functions are the same; in float32 ours is about as near to it as transformers'."""
    hf_config, shape, chunk_size = random_config(seed)
    model = reference(hf_config, seed)
    config, params = converted(model, tmp_path / "weights", chunk_size)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, shape)
    with float64():
        exact = measured(in_float64(model), tokens, tmp_path / "exact")
        wide = dataclasses.replace(config, dtype="float64", param_dtype="float64")
        wide_params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), params)
        # Compilation is nearly all of this test's time, and what it makes runs once.
        found = ours(wide, wide_params, tokens, (("xla_backend_optimization_level", 0),))
    assert found.logits.dtype == exact.logits.dtype == np.float64
    errors = found.errors(exact)
    # The gradients travelled through files that hold float32.
    assert errors["logits"] < 1e-9 and errors["losses"] < 1e-10 and errors["gradients"] < 1e-6, errors

    here = ours(config, params, tokens).errors(exact)
    there = measured(model, tokens, tmp_path / "there").errors(exact)
    for name, tolerance in TOLERANCES.items():
        assert here[name] <= max(tolerance, 1.5 * there[name]), (name, here, there)


@pytest.mark.parametrize("seed", [
    pytest.param(seed, marks=[pytest.mark.slow] * (seed > 2)) for seed in range(20) if seed not in ILL_CONDITIONED])
def test_logits_losses_and_gradients(seed, tmp_path):
    hf_config, shape, chunk_size = random_config(seed)
    model = reference(hf_config, seed)
    config, params = converted(model, tmp_path / "weights", chunk_size)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, shape)
    errors = ours(config, params, tokens).errors(measured(model, tokens, tmp_path / "gradients"))
    for name, tolerance in TOLERANCES.items():
        assert errors[name] < tolerance, errors


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """A reference model with wide logits, and its conversion."""
    config, _, _ = random_config(0)
    model = reference(config, 5)
    return model, *converted(model, tmp_path_factory.mktemp("weights"))


def test_left_padding(generator):
    import torch

    model, config, params = generator
    tokens = np.random.default_rng(3).integers(1, config.vocab_size, (3, 40))
    pads = np.array([0, 7, 33])
    real = np.arange(40)[None] >= pads[:, None]
    out = jax.jit(Qwen3Next(config).apply)({"params": params}, jnp.asarray(tokens), segment_ids=jnp.asarray(real, jnp.int32))
    expected = model(
        input_ids=torch.from_numpy(tokens), attention_mask=torch.from_numpy(real.astype(np.int64)),
        output_router_logits=True)
    assert np.abs(out.logits - expected.logits.detach().numpy())[real].max() < TOLERANCES["logits"]
    np.testing.assert_allclose(balance_loss(out.aux), expected.aux_loss.item(), rtol=TOLERANCES["losses"])


@pytest.fixture(scope="module")
def generated(generator):
    """Two prompts and what the reference makes of them, 200 tokens each."""
    import torch

    model, config, _ = generator
    prompt = np.random.default_rng(4).integers(1, config.vocab_size, (2, 13))
    tokens = model.generate(
        torch.from_numpy(prompt), max_new_tokens=200, min_new_tokens=200, do_sample=False, use_cache=True,
        pad_token_id=0, eos_token_id=None)
    return prompt, tokens[:, 13:].numpy()


@pytest.mark.parametrize("unrolled", [False, True])
def test_greedy_generation(generator, generated, unrolled):
    (_, config, params), (prompt, expected) = generator, generated
    ours = Qwen3Next(config, unrolled=unrolled)
    variables = {"params": unroll(config, params) if unrolled else params}
    prefill = jax.jit(ours.apply)(variables, jnp.asarray(prompt), cache=ours.init_cache(2, 256))

    @jax.jit
    def decode(variables, cache, token):
        def step(carry, _):
            cache, token = carry
            out = ours.apply(variables, token[:, None], cache=cache)
            return (out.cache, jnp.argmax(out.logits[:, -1], axis=-1)), token

        return jax.lax.scan(step, (cache, token), None, length=200)[1]

    tokens = decode(variables, prefill.cache, jnp.argmax(prefill.logits[:, -1], axis=-1))
    np.testing.assert_array_equal(tokens.T, expected)
