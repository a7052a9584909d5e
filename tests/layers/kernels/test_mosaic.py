"""The TPU compiler accepts the kernels: a reduced layer of each kind, forward and backward, sharded over four chips."""

import importlib.util
import subprocess
import sys

import pytest

from qcn_jax.compile import aot


def compile_layers(context: int, topology: str = "v5p:2x2x1") -> None:
    """Compiles both mixers by kernels at the published head sizes, rows split over `context` chips; prints the kernels
    in the programs."""
    import dataclasses
    import re

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from qcn_jax.config import ModelConfig
    from qcn_jax.layers.attention import GatedAttention, init_attention_cache
    from qcn_jax.layers.context import TokenContext
    from qcn_jax.layers.gated_delta_net import GatedDeltaNet, init_delta_net_cache
    from qcn_jax.sharding.mesh import AXES
    from qcn_jax.sharding.parallel import Parallel

    config = dataclasses.replace(
        ModelConfig(), num_attention_heads=4, linear_num_key_heads=2, linear_num_value_heads=4, hidden_size=256,
        param_dtype="bfloat16", delta_rule="pallas", chunk_size=128, attention="splash")
    devices = np.asarray(aot.topology_devices(topology)).reshape(1, -1, 1, 1, context)
    parallel = Parallel(Mesh(devices, AXES))
    array = lambda shape, dtype, *names: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(parallel.mesh, PartitionSpec(*names)))
    batch, length, tokens = devices.shape[1], 256 * context, ("fsdp", "context")
    x = array((batch, length, config.hidden_size), jnp.bfloat16, *tokens)
    ids = array((batch, length), jnp.int32, *tokens)
    angles = array((batch, length, 32), jnp.float32, *tokens)
    for layer in (GatedDeltaNet(config), GatedAttention(config)):

        def loss(params, x, ids, cos, sin, layer=layer):
            context = TokenContext(cos, sin, ids, parallel=parallel)
            return jnp.sum(layer.apply(params, x, context)[0].astype(jnp.float32) ** 2)

        alone = TokenContext(jnp.zeros((1, 1, 32)), jnp.zeros((1, 1, 32)))
        token = jnp.zeros((1, 1, config.hidden_size), jnp.bfloat16)
        params = jax.eval_shape(layer.init, jax.random.key(0), token, alone)
        params = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), params)
        step = jax.jit(jax.grad(loss, argnums=(0, 1)))
        text = step.trace(params, x, ids, angles, angles).lower(lowering_platforms=("tpu",)).compile().as_text()
        print(*re.findall(r"%(\w+)[\w.]* = [^\n]*tpu_custom_call", text), sep="\n")
        if context > 1:
            continue
        for pieces in (1, 256):  # of sequences that have a cache: decoding, prefill

            def go_on(params, x, cos, sin, start, cache, layer=layer):
                return layer.apply(params, x, TokenContext(cos, sin, start=start, parallel=parallel), cache)

            make = init_delta_net_cache if isinstance(layer, GatedDeltaNet) else init_attention_cache
            sizes = () if isinstance(layer, GatedDeltaNet) else (4096,)
            cache = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype, "fsdp"),
                                 jax.eval_shape(lambda: make(config, batch, *sizes)))
            given = (array((batch, pieces, config.hidden_size), jnp.bfloat16, "fsdp"),
                     *[array((batch, pieces, 32), jnp.float32, "fsdp")] * 2, array((batch,), jnp.int32, "fsdp"), cache)
            text = jax.jit(go_on, donate_argnums=5).trace(params, *given).lower(
                lowering_platforms=("tpu",)).compile().as_text()
            print(*re.findall(r"%(\w+)[\w.]* = [^\n]*tpu_custom_call", text), sep="\n")
            for leaf in jax.tree.leaves(cache) if sizes else ():  # written in place, in the order that the kernel reads
                held = "|".join(",".join(map(str, (leaf.shape[0] // parts, *leaf.shape[1:]))) for parts in (1, 4))
                print(*re.findall(rf"%(copy)[\w.]* = \w+\[(?:{held})\]", text), sep="\n")


@pytest.mark.slow
@pytest.mark.parametrize("context", [1, 2])
def test_compiler_accepts_the_kernels(context):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (pip install 'qcn_jax[compile]')")
    code = (f"import importlib.util; spec = importlib.util.spec_from_file_location('child', {__file__!r}); "
            f"module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
            f"module.compile_layers({context})")
    done = subprocess.run(
        [sys.executable, "-c", code], env=aot.worker_environment(), capture_output=True, text=True, timeout=900,
        check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = ["forward", "backward", *(["transfer", "first_gradient"] if context > 1 else ["continued"])]
    assert all(f"delta_net_{kernel}" in done.stdout for kernel in kernels), done.stdout
    assert "copy" not in done.stdout.split(), done.stdout
    assert done.stdout.count("cached_attention") == (2 if context == 1 else 0), done.stdout
    assert done.stdout.count("splash") >= 3, done.stdout  # forward, gradient of queries, gradient of keys and values
