"""Grouped products: the TPU kernels' semantics in interpret mode, and what their gradient costs on a TPU."""

import functools
import importlib.util
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.moe.experts import sorted_experts, sorted_experts_vjp
from qcn_jax.moe.grouped import ExpertWeights, megablox_swiglu
from tests.conftest import ROOT

SIZES = np.asarray([5, 0, 90, 40, 0, 1], np.int32)  # empty experts, tiles of several experts
ROWS, WIDTH, NARROW = 200, 16, 8  # 64 rows belong to no expert


def inputs() -> tuple:
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    rows = normal(ROWS, WIDTH).at[SIZES.sum() :].set(0)
    kernels = ExpertWeights(normal(6, WIDTH, NARROW), normal(6, WIDTH, NARROW), normal(6, NARROW, WIDTH))
    return rows, normal(ROWS), jnp.asarray(SIZES), kernels


def reference(rows, weights, kernels):
    """Row by row with its own expert's matrices."""
    expert = np.minimum(np.repeat(np.arange(7), [*SIZES, ROWS - SIZES.sum()]), 5)
    gate, up, down = (kernel[expert] for kernel in kernels)
    product = lambda a, b: jnp.einsum("rd,rdf->rf", a, b, precision="highest")
    hidden = jax.nn.silu(product(rows, gate)) * product(rows, up)
    return product(hidden * weights[:, None], down)


def check(run, run_vjp):
    """Rows of no expert hold what was left in memory: nothing of it may reach another row or a weight's gradient."""
    rows, weights, sizes, kernels = inputs()
    count = SIZES.sum()
    cotangent = jnp.cos(jnp.arange(rows.size, dtype=jnp.float32)).reshape(rows.shape).at[count:].set(0)
    want, pull = jax.vjp(reference, rows, weights, kernels)
    spoiled = lambda x: x.at[count:].set(jnp.nan)
    arguments = (spoiled(rows), spoiled(weights), sizes, kernels)
    np.testing.assert_allclose(run(*arguments)[:count], want[:count], rtol=1e-5, atol=1e-4)
    *got, got_kernels = run_vjp(*arguments, spoiled(cotangent))
    *expected, expected_kernels = pull(cotangent)
    for a, b in zip([x[:count] for x in got] + [*got_kernels],
                    [x[:count] for x in expected] + [*expected_kernels], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_megablox_in_interpret_mode():
    run = functools.partial(megablox_swiglu, interpret=True)

    def run_vjp(rows, weights, sizes, kernels, cotangent):
        return jax.vjp(lambda rows, weights, kernels: run(rows, weights, sizes, kernels), rows, weights, kernels)[1](
            cotangent)

    check(run, run_vjp)


@pytest.mark.parametrize("backend", ["auto", "ragged"])
def test_sorted_rows_on_cpu(backend):
    check(functools.partial(sorted_experts, backend=backend), functools.partial(sorted_experts_vjp, backend=backend))


def flops_of_gradient(backend: str) -> float:
    """FLOPs of forward and gradients compiled for one v5e chip, kernels included, over those of nine products."""
    code = f"""
        import re
        import jax, jax.numpy as jnp
        from jax.experimental import topologies
        from jax.sharding import SingleDeviceSharding
        from qcn_jax.moe.experts import sorted_experts, sorted_experts_vjp
        from qcn_jax.moe.grouped import ExpertWeights
        from qcn_jax.compile.hlo import summarize

        rows, width, narrow, experts = 1024, 256, 128, 16
        device = topologies.get_topology_desc(
            platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=[1, 1, 1]).devices[0]
        place = SingleDeviceSharding(device)
        array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        up, down = array(experts, width, narrow), array(experts, narrow, width)
        args = (array(rows, width), array(rows, dtype=jnp.float32), array(experts, dtype=jnp.int32),
                ExpertWeights(up, up, down))

        def both(rows, weights, sizes, kernels, cotangent):
            out = sorted_experts(rows, weights, sizes, kernels, {backend!r})
            return out, sorted_experts_vjp(rows, weights, sizes, kernels, cotangent, {backend!r})

        program = jax.jit(both).trace(*args, array(rows, width)).lower(lowering_platforms=("tpu",)).compile().as_text()
        kernels = sum(float(flops) for flops in re.findall(r'custom-call.*?"flops":"?([0-9]+)', program))
        # Three products forward, of which the gradient shares gate and up, and two gradients of each.
        print((summarize(program).matmul_flops + kernels) / (9 * 2 * rows * width * narrow))
    """
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_LOG_DIR": "disabled", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True,
                          timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return float(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra `compile`)")
def test_gradient_costs_no_more_than_its_products():
    """The weight gradient of lax.ragged_dot multiplies every expert with every row on most TPUs; ours does not."""
    assert 0.95 < flops_of_gradient("auto") < 1.3
