"""Mixers with heads and sequences spread over eight devices against one device: values and gradients."""

import json

import numpy as np
import pytest

# name: mesh. Lengths per device are odd or not a multiple of the chunk.
MESHES = {
    "context": {"context": 8, "fsdp": 1},
    "context, tensor": {"context": 4, "tensor": 2, "fsdp": 1},
    "context, fsdp": {"context": 2, "fsdp": 4},
    "tensor": {"tensor": 2, "fsdp": 4},
}
BATCH, LENGTH, CHUNK = 4, 40, 4
EPS = 0.05  # of the mixer's norm, which without it magnifies rounding of outputs near zero


def segments() -> np.ndarray:
    """Packed rows: documents that cross several devices, end on a boundary, have one token; padding on either side."""
    rows = [[1] * 40, [1] * 10 + [2] * 25 + [0] * 5, [0] * 3 + [7] * 2 + [1] + [5] * 34, [1] * 5 + [2] * 5 + [3] * 30]
    return np.asarray(rows, np.int32)


def _cases(parallel):
    """name -> (function of (arrays), arrays); `parallel` None gives the single-device form."""
    import jax.numpy as jnp

    from qcn_jax.config import ModelConfig
    from qcn_jax.layers.context import TokenContext
    from qcn_jax.layers.delta_rule import gated_delta_rule
    from qcn_jax.layers.embedding import sharded_lookup
    from qcn_jax.layers.gated_delta_net import by_kernel, causal_conv, sharded_conv
    from qcn_jax.layers.norm import l2_norm
    from qcn_jax.layers.sharded import sharded_attention, sharded_delta_rule
    from tests.layers.mixer_by_parts import by_parts

    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    ids = jnp.asarray(segments())

    def delta(ids, form="chunked", chunk=CHUNK):
        if form == "pallas" and parallel is not None and parallel.size("activation_length") not in (2, 4):
            return None  # interpreted kernels take long to compile

        def run(q, k, v, g, beta):
            q, k = l2_norm(q), l2_norm(k)
            if parallel is None:
                return gated_delta_rule(q, k, v, g, beta, None, ids, "recurrent")[0]
            return sharded_delta_rule(q, k, v, g, beta, ids, form, chunk, parallel)
        return run

    def mixer(ids, dtype=jnp.float32):
        """All between the layer's projections: by parts on one device, by kernels (in `dtype`) on many."""
        stretches = parallel.size("activation_length") if parallel is not None else 1
        plain = ids is not None and dtype == jnp.float32
        if stretches == 8 or (parallel is not None and not plain and stretches != 2):
            return None  # interpreted kernels take long to compile

        def by_kernels(qkvz, kernel, *arrays):
            config = ModelConfig(
                linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=6, linear_value_head_dim=5,
                rms_norm_eps=EPS, chunk_size=16)
            nothing = jnp.zeros(0)
            context = TokenContext(nothing, nothing, ids, parallel=parallel)
            return by_kernel(config, qkvz.astype(dtype), kernel.astype(dtype), *arrays, context).astype(jnp.float32)
        return by_kernels if parallel is not None else lambda *arrays: by_parts(EPS, *arrays, ids)

    def conv(ids):
        if parallel is None:
            return lambda x, kernel: causal_conv(x, kernel, None, ids)
        if parallel.size("activation_length") == 1:
            return None
        return lambda x, kernel: sharded_conv(x, kernel, ids, parallel)

    def lookup(table):
        words = jnp.asarray(tokens_of_rows)
        return table[words] if parallel is None else sharded_lookup(table, words, parallel)

    tokens_of_rows = rng.integers(0, 12, (BATCH, LENGTH))
    attention = lambda ids: lambda q, k, v: sharded_attention(q, k, v, ids, parallel)
    shape = (BATCH, LENGTH)
    tokens = [normal(*shape, 2, 6), normal(*shape, 2, 6), normal(*shape, 2, 3, 5),
              -np.abs(normal(*shape, 2, 3)) / 4, rng.random((*shape, 2, 3)).astype(np.float32)]
    heads = [normal(*shape, 8, 6), normal(*shape, 2, 6), normal(*shape, 2, 6)]
    taps = [normal(*shape, 2, 5), normal(4, 2, 5)]
    layer = [normal(*shape, 2 * (2 * 6 + 2 * 3 * 5)), normal(4, 2, 2 * 6 + 3 * 5), *tokens[3:], 1 + 0.3 * normal(5)]
    return {
        "delta packed": (delta(ids), tokens), "delta": (delta(None), tokens),
        "delta by kernels": (delta(ids, "pallas", 16), tokens),
        "mixer packed": (mixer(ids), layer), "mixer": (mixer(None), layer),
        "mixer in bfloat16": (mixer(ids, jnp.bfloat16), [jnp.round(layer[0] * 16) / 16, *layer[1:]]),
        "conv packed": (conv(ids), taps), "conv": (conv(None), taps),
        "attention packed": (attention(ids), heads), "attention": (attention(None), heads),
        "embedding": (lookup, [normal(12, 16)]),
    }


def child(mesh: str) -> None:
    """Prints relative errors of value and gradients on `mesh`: {case: [..]}."""
    import jax
    import jax.numpy as jnp

    from qcn_jax.config import MeshConfig
    from qcn_jax.sharding.mesh import make_parallel

    def evaluate(function, arrays):
        def run(*arrays):
            out, pull = jax.vjp(function, *arrays)
            return out, pull(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))
        return jax.device_get(jax.jit(run)(*arrays))

    one_device = _cases(None)
    error = lambda a, b: float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
    results = {}
    for name, (function, arrays) in _cases(make_parallel(MeshConfig(**MESHES[mesh]))).items():
        if function is not None:
            errors = jax.tree.map(error, evaluate(function, arrays), evaluate(*one_device[name]))
            results[name] = jax.tree.leaves(errors)
    print(json.dumps(results))


@pytest.mark.parametrize("mesh", MESHES)
def test_equals_one_device(run_with_devices, mesh):
    out = run_with_devices(f"from tests.layers import test_sharded; test_sharded.child({mesh!r})", 8)
    results = json.loads(out.splitlines()[-1])
    assert len(results) == {"tensor": 6, "context": 7, "context, tensor": 9}.get(mesh, 11)
    for case, errors in results.items():
        assert np.isfinite(errors).all() and max(errors) < (0.03 if "bfloat16" in case else 1e-5), (case, errors)
