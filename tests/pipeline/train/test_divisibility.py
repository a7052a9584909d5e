"""Meshes that do not divide what they split: every dimension and axis by name, and nothing refused that runs."""

import dataclasses
import json
import math
import random

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from qcn_jax.config import (
    DistillConfig,
    ExpertsConfig,
    MeshConfig,
    MidtrainConfig,
    ModelConfig,
    RunConfig,
    SftConfig,
    TrainConfig,
)
from qcn_jax.errors import UserError
from qcn_jax.model import Qwen3Next, abstract_params, logical_axes
from qcn_jax.pipeline.train import divisibility
from qcn_jax.pipeline.train.losses import language_model_loss
from qcn_jax.sharding.mesh import AXES, make_parallel
from qcn_jax.sharding.parallel import Parallel

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, full_attention_interval=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, linear_num_key_heads=4, linear_key_head_dim=8, linear_num_value_heads=4,
    linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=16, num_nextn_predict_layers=1, dtype="float32", chunk_size=8)
TRAIN = TrainConfig(rows=8, sequence_length=32)
CONFIG = RunConfig(
    model=MODEL, midtrain=MidtrainConfig(train=TRAIN), sft=SftConfig(train=TRAIN),
    experts=ExpertsConfig(rows=8, sequence_length=32), distill=DistillConfig(rows=8, sequence_length=32))
STAGES = ("midtrain", "sft", "experts", "distill")


def configured(stage="midtrain", mesh=None, model=None, **settings):
    """CONFIG with another mesh, model, or batch shape of a stage."""
    config = dataclasses.replace(
        CONFIG, mesh=MeshConfig(**{"fsdp": 1, **(mesh or {})}), model=dataclasses.replace(MODEL, **(model or {})))
    group = getattr(config, stage)
    if stage in ("midtrain", "sft"):
        settings = {"train": dataclasses.replace(group.train, **settings)}
    return dataclasses.replace(config, **{stage: dataclasses.replace(group, **settings)})


CASES = [
    ({"tensor": 4}, {"linear_num_value_heads": 2, "linear_num_key_heads": 2}, "model.linear_num_value_heads: 2 ",
     "tensor 4"),
    ({"tensor": 4}, {"linear_num_value_heads": 4, "linear_num_key_heads": 2}, "model.linear_num_key_heads: 2 ",
     "tensor 4"),
    ({"tensor": 4}, {"num_attention_heads": 2, "num_key_value_heads": 1}, "model.num_attention_heads: 2 ", "tensor 4"),
    ({"tensor": 2, "context": 4}, {}, "model.num_attention_heads: 4 ", "tensor 2 x context 4"),
    ({"tensor": 2}, {"num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": 66}, None, None),
    ({"tensor": 4}, {"num_attention_heads": 12, "num_key_value_heads": 6}, "model.num_key_value_heads: 6 ", "tensor 4"),
    ({"tensor": 2}, {"vocab_size": 63}, "model.vocab_size: 63 ", "tensor 2"),
    ({"fsdp": 2, "context": 2}, {"hidden_size": 30}, "model.hidden_size: 30 ", "fsdp 2 x context 2"),
    ({"expert": 8}, {"num_experts": 4}, "model.num_experts: 4 ", "expert 8"),
    ({"tensor": 2}, {"moe_intermediate_size": 15}, "model.moe_intermediate_size: 15 ", "tensor 2"),
    ({"tensor": 2}, {"shared_expert_intermediate_size": 15}, "model.shared_expert_intermediate_size: 15 ", "tensor 2"),
]


@pytest.mark.parametrize("mesh, model, field, axes", CASES)
def test_dimensions_of_the_model_are_named_with_both_numbers(mesh, model, field, axes):
    config = configured(mesh=mesh, model=model)
    devices = math.prod(mesh.values())
    if field is None:
        divisibility.check_mesh(config, STAGES, devices)
        return
    with pytest.raises(UserError) as caught:
        divisibility.check_mesh(config, STAGES, devices)
    assert f"--config.{field}" in str(caught.value) and f"(--config.mesh: {axes})" in str(caught.value)


@pytest.mark.parametrize("stage, group", [("midtrain", "midtrain.train"), ("sft", "sft.train"), ("experts", "experts"),
                                          ("distill", "distill")])
def test_rows_and_lengths_of_every_stage_are_named(stage, group):
    def refused(mesh, **settings):
        with pytest.raises(UserError) as caught:
            divisibility.check_mesh(configured(stage, mesh, **settings), [stage], 4)
        return str(caught.value)

    line = refused({"data": 2, "fsdp": 2}, rows=6)
    assert f"--config.{group}.rows: 6 does not divide by 4 parts (--config.mesh: data 2 x fsdp 2)" in line
    line = refused({"context": 2, "tensor": 2}, sequence_length=30)
    assert f"--config.{group}.sequence_length: 30 does not divide by 4 parts" in line and "context 2 x tensor 2" in line
    line = refused({"context": 4}, sequence_length=8)
    assert f"--config.{group}.sequence_length: 8 in 4 parts" in line and "2 tokens" in line and "needs 3" in line


def test_slices_of_a_batch_count():
    with pytest.raises(UserError, match="midtrain.train.rows: 8 does not divide by 4 parts .* times accumulate, 4"):
        divisibility.check_mesh(configured(mesh={"fsdp": 4}, accumulate=4), STAGES, 4)


def test_a_mesh_of_another_number_of_devices():
    with pytest.raises(UserError, match="--config.mesh: .*'tensor': 4.* does not multiply to 6 devices"):
        divisibility.check_mesh(configured(mesh={"fsdp": -1, "tensor": 4}), STAGES, 6)
    with pytest.raises(UserError, match="does not multiply to 1 devices"):
        divisibility.check_mesh(configured(mesh={"fsdp": 4}), STAGES, 1)


def test_stages_that_train_nothing_take_any_mesh():
    config = configured(mesh={"fsdp": 4})
    divisibility.check_mesh(config, ("tasks", "report"), 1)
    without_control = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, sft_control=False))
    divisibility.check_mesh(without_control, ("evaluate",), 1)
    with pytest.raises(UserError, match="does not multiply to 1 devices"):
        divisibility.check_mesh(config, ("evaluate",), 1)


def test_fields_speak_for_every_parameter():
    """Over models and meshes: where the fields divide, every parameter does, and nothing else is split."""
    draw = random.Random(0)
    pick = lambda *choices: draw.choice(choices)
    passed = 0
    for _ in range(2):
        keys = pick(2, 3, 4)
        model = dataclasses.replace(
            MODEL, vocab_size=pick(64, 60, 63), hidden_size=pick(32, 24, 30), num_attention_heads=pick(4, 6, 8),
            num_key_value_heads=pick(1, 2), head_dim=pick(8, 16), linear_num_key_heads=keys,
            linear_num_value_heads=keys * pick(1, 2), num_experts=pick(4, 6), moe_intermediate_size=pick(16, 12, 15),
            shared_expert_intermediate_size=pick(16, 12, 15))
        leaves = jax.tree.leaves(abstract_params(model))
        names = jax.tree.leaves(logical_axes(model), is_leaf=lambda leaf: isinstance(leaf, tuple))
        for _ in range(100):
            parallel = Parallel(AbstractMesh(tuple(pick(1, 1, 2, 3, 4) for _ in AXES), AXES))
            if not list(divisibility._model(model, parallel)):
                passed += 1
                for leaf, axes in zip(leaves, names, strict=True):
                    parallel.check(leaf.shape, *axes)
    assert passed > 10


def traced():
    """Runs in a process with 8 devices: prints, for each mesh, whether the check lets it pass and whether it traces."""
    found = []
    for mesh, model in [*PASSING, *REFUSED]:
        config = configured(mesh=mesh, model=model)
        count = math.prod(mesh.values())
        attempts = (lambda: divisibility.check_mesh(config, ["midtrain"], count), lambda: _trace(config, count))
        found.append([_passes(attempt) for attempt in attempts])
    print(json.dumps(found))


PASSING = [({"tensor": 2, "context": 2}, {}), ({"expert": 4, "data": 2}, {})]
REFUSED = [(mesh, model) for mesh, model, field, _ in CASES if field and "hidden" not in field][::3]


def _passes(attempt):
    try:
        attempt()
        return True
    except Exception:  # JAX and the layers refuse sizes by exceptions of many kinds
        return False


def _trace(config, count):
    """The loss of a batch, laid out on the first `count` devices."""
    parallel = make_parallel(config.mesh, jax.devices()[:count])
    loss = language_model_loss(Qwen3Next(config.model, parallel=parallel))
    array = lambda dtype: jax.ShapeDtypeStruct((TRAIN.rows, TRAIN.sequence_length), dtype)
    batch = {name: array(jnp.int32) for name in ("tokens", "segment_ids", "positions")} | {
        "weights": array(jnp.float32), "weight_sum": 1.0, "fraction": 1.0}
    jax.eval_shape(loss, abstract_params(config.model), batch)


@pytest.mark.slow
def test_what_passes_is_what_runs(run_with_devices):
    found = json.loads(run_with_devices(traced, 8).splitlines()[-1])
    assert found == [[True, True]] * len(PASSING) + [[False, False]] * len(REFUSED)
