"""Mesh sizes, rules and their refusals; the rules fit every parameter of the published model."""

import dataclasses
import json
import math
import re

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from qcn_jax.config import MeshConfig, ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.model import abstract_params, logical_axes
from qcn_jax.sharding.mesh import AXES, axis_sizes
from qcn_jax.sharding.parallel import Parallel
from qcn_jax.sharding.rules import AxisRules


def test_axis_sizes():
    assert axis_sizes(MeshConfig(expert=4, tensor=2), 16) == (1, 2, 4, 2, 1)
    assert axis_sizes(MeshConfig(data=-1, fsdp=1), 6) == (6, 1, 1, 1, 1)
    for wrong in ({"data": -1}, {"fsdp": 0}, {"fsdp": -2}, {"expert": 3}, {"fsdp": 4}):
        with pytest.raises(UserError, match="--config.mesh"):
            axis_sizes(MeshConfig(**wrong), 8)


def test_spec():
    rules = AxisRules()
    assert rules.spec(("blocks", "embed", "heads")) == PartitionSpec(None, ("fsdp", "expert", "context"), "tensor")
    assert rules.spec(("embed", None), within=("expert",)) == PartitionSpec("expert", None)
    with pytest.raises(UserError, match="collide on mesh axis 'expert'"):
        rules.spec(("expert", "embed"))
    with pytest.raises(UserError, match="'embedding' has no rule; known: embed"):
        rules.spec(("embedding",))
    with pytest.raises(UserError, match="'spec' has no rule"):  # a method is no rule
        rules.spec(("spec",))


def _parallel(**sizes: int) -> Parallel:
    return Parallel(AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES))


@pytest.mark.parametrize("sizes", [
    {"fsdp": 64}, {"fsdp": 16, "expert": 16}, {"expert": 64}, {"fsdp": 4, "expert": 16, "tensor": 2, "context": 2}])
def test_published_model_divides(sizes):
    """Every parameter has rules that divide it, and nothing large is left whole."""
    config = dataclasses.replace(ModelConfig(), num_nextn_predict_layers=1)
    parallel = _parallel(**sizes)
    names = logical_axes(config)

    def check(shape: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> None:
        parallel.spec(*axes)
        parts = [parallel.size(name) for name in axes]
        assert all(size % part == 0 for size, part in zip(shape.shape, parts, strict=True)), axes
        assert shape.size < 2**24 or math.prod(parts) >= 16, axes

    jax.tree.map(check, abstract_params(config), names)


def test_parallel_leaves_out_axes_of_one_device():
    parallel = _parallel(expert=4, tensor=2)
    assert parallel.axes("embed") == ("expert",) and parallel.size("activation_batch", "heads") == 8
    assert parallel.spec("activation_batch", "activation_length", None) == PartitionSpec("expert", None, None)


def bad_inputs() -> None:
    """Prints the refusals of sizes that do not divide."""
    import jax.numpy as jnp

    from qcn_jax.model import Qwen3Next
    from qcn_jax.sharding.mesh import make_parallel

    config = ModelConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=2, full_attention_interval=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, linear_num_key_heads=2, linear_key_head_dim=4, linear_num_value_heads=2,
        linear_value_head_dim=4, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=8,
        shared_expert_intermediate_size=8)
    cases = {
        "expert": (MeshConfig(expert=4, fsdp=1), 4, 8), "rows": (MeshConfig(fsdp=4), 3, 8),
        "length": (MeshConfig(fsdp=1, context=4), 4, 10), "halo": (MeshConfig(fsdp=1, context=4), 4, 8),
        "attention": (MeshConfig(fsdp=1, context=2, tensor=2), 4, 8), "keys": (MeshConfig(fsdp=1, tensor=4), 4, 8),
        "form": (MeshConfig(fsdp=4, dispatch="rugged"), 4, 8),
    }
    messages = {}
    for name, (mesh, rows, length) in cases.items():
        parallel = make_parallel(mesh, jax.devices()[:4])
        fewer = dataclasses.replace(config, num_attention_heads=2)
        model = Qwen3Next(fewer if name == "attention" else config, parallel=parallel)
        params = abstract_params(model.config)
        try:
            jax.eval_shape(lambda p, t, model=model: model.apply({"params": p}, t), params,
                           jax.ShapeDtypeStruct((rows, length), jnp.int32))
            messages[name] = "accepted"
        except UserError as error:
            messages[name] = str(error)
    print(json.dumps(messages))


def test_refusals_name_the_field(run_with_devices):
    messages = json.loads(run_with_devices(bad_inputs, 4).splitlines()[-1])
    expected = {
        "expert": "--config.mesh.expert: 4 parts do not divide 6 experts", "rows": "3 along 'activation_batch'",
        "length": "10 along 'activation_length'", "halo": "--config.mesh.context: 2 tokens",
        "attention": "do not divide 2 attention heads", "keys": "--config.mesh.tensor: 4 parts do not divide 2 key heads",
        "form": "--config.mesh.dispatch: unknown form 'rugged'; allowed: ragged, capacity, gather"}
    for name, message in expected.items():
        assert message in messages[name], (name, messages[name])


def gathered_on_devices():
    """In a child: a kernel split over two axes of tokens and one of heads is put together axis by axis."""
    import jax.numpy as jnp
    import numpy as np

    from qcn_jax.sharding.mesh import make_mesh

    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    parallel = Parallel(mesh)
    sharding = jax.sharding.NamedSharding(mesh, parallel.spec("embed", "heads"))
    weight = jnp.arange(8.0 * 6).reshape(8, 6)
    spread = jax.device_put(weight, sharding)
    gather = jax.jit(lambda w: parallel.gathered(w, "embed", "heads"))
    whole = gather(spread)
    np.testing.assert_array_equal(whole, weight)
    assert whole.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, PartitionSpec(None, "tensor")), 2)
    text = gather.lower(spread).compile().as_text()
    assert len(re.findall(r" all-gather\(", text)) == 2 and "all-reduce" not in text
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(parallel.gathered(w, "embed", "heads") ** 2)))(spread)
    np.testing.assert_array_equal(gradient, 2 * weight)


def test_weights_are_gathered_one_axis_at_a_time(run_with_devices):
    run_with_devices(gathered_on_devices, 8)
