"""The chunked head against the whole one: values, every gradient, tokens that fill no chunk, meshes, bytes moved."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.pipeline.rl import objectives
from qcn_jax.pipeline.train.head import over_vocabulary, project
from qcn_jax.pipeline.train.losses import predicted

ROWS, LENGTH, WIDTH, VOCABULARY = 8, 8, 16, 48


def _inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 6)
    normal = lambda key, *shape: jax.random.normal(key, shape, dtype)
    return {
        "kernel": normal(keys[0], WIDTH, VOCABULARY), "teacher": normal(keys[1], WIDTH, VOCABULARY),
        "hidden": normal(keys[2], ROWS, LENGTH, WIDTH), "taught": normal(keys[3], ROWS, LENGTH, WIDTH),
        "targets": jax.random.randint(keys[4], (ROWS, LENGTH), 0, VOCABULARY),
        "weights": jax.random.uniform(keys[5], (ROWS, LENGTH)),
    }


def _divergence(kernels, hidden, taught):
    return objectives.reverse_kl(project(hidden, kernels[0]), project(taught, kernels[1]))


def _loss(kernel, teacher, hidden, taught, inputs, **options):
    """Cross entropy of one head plus a divergence between two, weighted unevenly."""
    losses, right = over_vocabulary(predicted, (kernel,), hidden, inputs["targets"], **options)
    apart = over_vocabulary(_divergence, (kernel, teacher), hidden, taught, **options)
    return jnp.sum(inputs["weights"] * (losses + 0.5 * apart)), jnp.sum(right)


def _whole(kernel, teacher, hidden, taught, inputs):
    """The same from all logits at once, by plain automatic differentiation in float64-free textbook form."""
    scores = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", hidden, kernel))
    other = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", taught, teacher))
    losses = -jnp.sum(jax.nn.one_hot(inputs["targets"], VOCABULARY) * scores, axis=-1)
    apart = jnp.sum(jnp.exp(scores) * (scores - other), axis=-1)
    return jnp.sum(inputs["weights"] * (losses + 0.5 * apart)), jnp.sum(jnp.argmax(scores, -1) == inputs["targets"])


def _gradients(function, inputs, **options):
    names = ("kernel", "teacher", "hidden", "taught")
    run = jax.jit(jax.value_and_grad(lambda *moving: function(*moving, inputs, **options), (0, 1, 2, 3), has_aux=True))
    return run(*(inputs[name] for name in names))


def _same(got, want, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.all(np.isfinite(a)) and np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-3)


@pytest.mark.parametrize("chunk", [None, 7, 64])  # plain; a last chunk of one token; one chunk
def test_chunks_give_the_whole(chunk):
    inputs = _inputs()
    _same(_gradients(_loss, inputs, chunk=chunk), _gradients(_whole, inputs))


def test_bfloat16_gradients_are_as_near_as_rounding_allows():
    low, exact = _inputs(jnp.bfloat16), _inputs()
    exact |= {name: low[name].astype(jnp.float32) for name in ("kernel", "teacher", "hidden", "taught")}
    low["weights"] = exact["weights"]
    (_, got), (_, want) = _gradients(_loss, low, chunk=7), _gradients(_whole, exact)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        error = np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()
        assert error < 0.03, error


def _on_meshes():
    """Runs in a child with 8 devices."""
    from qcn_jax.config import MeshConfig
    from qcn_jax.sharding.mesh import make_mesh
    from qcn_jax.sharding.parallel import Parallel

    inputs = _inputs()
    want = _gradients(_whole, inputs)
    for sizes in ({"fsdp": 8}, {"fsdp": 2, "tensor": 2, "context": 2}, {"data": 2, "expert": 4}):
        parallel = Parallel(make_mesh(MeshConfig(**({"fsdp": 1} | sizes))))
        _same(_gradients(_loss, inputs, parallel=parallel, chunk=3), want)
    parallel = Parallel(make_mesh(MeshConfig(fsdp=4, tensor=2)))
    place = lambda x, *names: jax.device_put(x, jax.NamedSharding(parallel.mesh, parallel.spec(*names)))
    kernel = place(inputs["kernel"], "embed", "vocab")
    hidden = place(inputs["hidden"], "activation_batch", None, None)
    loss = lambda kernel, hidden: jnp.sum(
        over_vocabulary(predicted, (kernel,), hidden, inputs["targets"], parallel=parallel, chunk=2)[0])
    gradient = jax.jit(jax.grad(loss, (0, 1)), out_shardings=(kernel.sharding, hidden.sharding))
    print(gradient.lower(kernel, hidden).compile().as_text())


def test_on_a_mesh_the_kernel_gradient_is_reduced_once_and_never_whole(run_with_devices):
    """Four chunks a device; the whole gradient takes 3 KiB, and is reduced by a scatter along each dimension."""
    from qcn_jax.compile import hlo

    text = run_with_devices(_on_meshes, 8)
    summary = hlo.summarize(text)
    whole = 4 * WIDTH * VOCABULARY
    assert not re.search(rf"f32\[{ROWS * LENGTH // 8},\d+\].*all-reduce", text)
    reduced = summary.collective_bytes["reduce-scatter"] + summary.collective_bytes["all-reduce"]
    # XLA for CPU may lower a reduce-scatter as an all-reduce; either way the whole gradient travels once along
    # fsdp, a quarter of it along tensor, and nothing but scalars besides.
    assert whole <= reduced <= 1.5 * whole + 256, dict(summary.collective_bytes)
