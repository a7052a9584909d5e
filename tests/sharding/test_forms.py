"""Loss and every gradient of the whole model in each parallel form equal the single-device result."""

import json

import numpy as np
import pytest

# name: MeshConfig over eight devices; what is left of them goes to `data`.
FORMS = {
    "fsdp": {"fsdp": 8},
    "expert, ragged": {"expert": 8, "dispatch_buffer": 0.5},
    "expert, capacity": {"expert": 4, "dispatch": "capacity", "dispatch_buffer": 0.0},
    "expert, gather": {"expert": 8, "dispatch": "gather"},
    "tensor": {"tensor": 2},
    "context": {"context": 4},
    "fsdp and expert": {"fsdp": 2, "expert": 4},
    "fsdp and tensor": {"fsdp": 4, "tensor": 2},
    "fsdp and context": {"fsdp": 2, "context": 4},
    "expert and tensor": {"expert": 4, "tensor": 2},
    "expert and context": {"expert": 4, "context": 2},
    "tensor and context": {"tensor": 2, "context": 2},
}
ROWS, LENGTH = 8, 20  # 20 = 4 stretches of 5: odd everywhere, and no multiple of the chunk


def small_config():
    """One block of a DeltaNet and an attention layer, and multi-token prediction."""
    from qcn_jax.config import ModelConfig

    return ModelConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=2, full_attention_interval=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=8, linear_num_key_heads=2, linear_key_head_dim=6, linear_num_value_heads=4,
        linear_value_head_dim=5, num_experts=16, num_experts_per_tok=3, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, router_aux_loss_coef=0.01, num_nextn_predict_layers=1, dtype="float32",
        chunk_size=4)


def packed_batch() -> dict[str, np.ndarray]:
    """Documents of all lengths, some crossing every device's stretch, and padding on both sides."""
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(1, 4, (ROWS, LENGTH)), axis=1)
    ids[0], ids[1, -3:], ids[2, :2] = 1, 0, 0
    starts = np.concatenate([np.ones((ROWS, 1), bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    index = np.arange(LENGTH)
    ends = np.concatenate([starts[:, 1:], np.ones((ROWS, 1), bool)], axis=1)
    return {
        "tokens": rng.integers(0, 48, (ROWS, LENGTH)).astype(np.int32),
        "segment_ids": np.where(ids > 0, ids % 2 + 1, 0).astype(np.int32),  # an id that comes again is another document
        "positions": (index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)).astype(np.int32),
        "weights": (rng.random((ROWS, LENGTH)) * (ids > 0) * ~ends).astype(np.float32),
    }


def lively(path: tuple, leaf):
    """Matrices larger than at initialisation, so that every gradient counts, and routers that prefer some experts."""
    name = "/".join(key.key for key in path)
    if name.endswith(("A_log", "dt_bias", "weight")):
        return leaf
    return 8 * leaf * (np.linspace(0, 2, leaf.shape[-1]) if name.endswith("mlp/gate/kernel") else 1)


def child() -> None:
    """What `compare` gives for all forms."""
    compare(small_config(), FORMS)


def compare(config, forms: dict[str, dict]) -> None:
    """Prints, per form, relative errors of the loss and of each gradient, and dropped choices."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from qcn_jax.config import MeshConfig
    from qcn_jax.model import Qwen3Next, logical_axes
    from qcn_jax.pipeline.train.losses import language_model_loss
    from qcn_jax.sharding.mesh import make_parallel

    batch = packed_batch()
    batch |= {"weight_sum": batch["weights"].sum(), "fraction": np.float32(1)}
    params = Qwen3Next(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    params = jax.tree_util.tree_map_with_path(lively, params)

    def evaluate(parallel):
        model = Qwen3Next(config, parallel=parallel)
        gradient = jax.value_and_grad(language_model_loss(model, mtp_coef=0.1), has_aux=True)
        if parallel is None:
            return jax.device_get(jax.jit(gradient)(params, batch))
        place = lambda names: NamedSharding(parallel.mesh, parallel.spec(*names))
        weights = jax.tree.map(place, logical_axes(config), is_leaf=lambda leaf: isinstance(leaf, tuple))
        tokens = place(("activation_batch", "activation_length"))
        batches = {name: tokens if np.ndim(array) == 2 else place(()) for name, array in batch.items()}
        run = jax.jit(gradient, in_shardings=(weights, batches), out_shardings=(None, weights))
        return jax.device_get(run(params, batch))

    (loss, want_metrics), want = evaluate(None)
    error = lambda a, b: float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
    results = {"smallest": min(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(want))}
    if config.num_experts:
        results["violation"] = float(want_metrics["load_violation"])
    for name, mesh in forms.items():
        (value, metrics), gradients = evaluate(make_parallel(MeshConfig(**{"data": -1, "fsdp": 1} | mesh)))
        leaves = jax.tree_util.tree_leaves_with_path(jax.tree.map(error, gradients, want))
        results[name] = {
            "loss": error(value, loss), "gradients": {jax.tree_util.keystr(path): value for path, value in leaves}}
        if config.num_experts:
            results[name] |= {"balance": error(metrics["balance"], want_metrics["balance"]),
                              "overflow": float(metrics["overflow"])}
    print(json.dumps(results))


@pytest.fixture(scope="module", name="results")
def _results(run_with_devices) -> dict:
    return json.loads(run_with_devices(child, 8).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_equals_one_device(results, form):
    errors = results[form]["gradients"]
    assert len(errors) > 50
    assert results[form]["loss"] < 1e-6 and results[form]["balance"] < 1e-6
    wrong = {name: error for name, error in errors.items() if not error < 1e-5}
    assert not wrong
    assert results[form]["overflow"] == 0


@pytest.mark.slow
def test_means_something(results):
    """Routing is unbalanced (the busiest expert has far more than the mean load) and no gradient vanishes."""
    assert results["violation"] > 0.7 and results["smallest"] > 1e-7
