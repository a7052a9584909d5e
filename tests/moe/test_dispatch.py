"""Every form of expert parallelism against the single-device block, in a process with eight devices."""

import json

import numpy as np
import pytest

WIDTH, NARROW, EXPERTS, CHOICES = 16, 8, 16, 3
# name: (mesh, form, buffer)
CASES = {
    "ragged": ({"expert": 8, "fsdp": 1}, "ragged", 0.0),
    "ragged in rounds": ({"expert": 4, "fsdp": 2}, "ragged", 0.25),
    "gather": ({"expert": 8, "fsdp": 1}, "gather", 0.0),
    "gather in rounds": ({"expert": 2, "fsdp": 2, "context": 2}, "gather", 0.25),
    "capacity": ({"expert": 4, "fsdp": 1, "tensor": 2}, "capacity", 0.0),
    "ragged, tensor, context": ({"expert": 2, "fsdp": 1, "tensor": 2, "context": 2}, "ragged", 1.25),
    "no exchange": ({"fsdp": 4, "data": 2}, "ragged", 1.25),
    "capacity overflows": ({"expert": 8, "fsdp": 1}, "capacity", 1.0),
}


def inputs(seed: int = 0) -> tuple[np.ndarray, ...]:
    """Tokens [8, 10, D], weights, experts and kernels; most tokens choose the first experts, some choose none."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(8, 10, WIDTH)).astype(np.float32)
    popularity = -0.6 * np.arange(EXPERTS) + rng.gumbel(size=(8, 10, EXPERTS))
    experts = np.argsort(-popularity, axis=-1)[..., :CHOICES].astype(np.int32)
    experts[0, :4] = EXPERTS
    weights = rng.random((8, 10, CHOICES)).astype(np.float32)
    shapes = [(EXPERTS, WIDTH, NARROW), (EXPERTS, WIDTH, NARROW), (EXPERTS, NARROW, WIDTH)]
    return x, weights, experts, [rng.normal(size=shape).astype(np.float32) / 3 for shape in shapes]


def reference(x, weights, experts, kernels, kept):
    """Output and gradients of its inner product with cos(output index), in float64, of the choices in `kept`."""
    import jax
    import jax.numpy as jnp

    def output(x, weights, kernels):
        gate, up, down = kernels
        hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
        scale = jnp.einsum("btk,btke->bte", weights * kept, jax.nn.one_hot(experts, EXPERTS, dtype=x.dtype))
        return jnp.einsum("btef,efd,bte->btd", hidden, down, scale)

    with jax.enable_x64(True):
        args = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (x, weights, kernels))
        out, pull = jax.vjp(output, *args)
        return jax.device_get((out, pull(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))))


def first_come(experts: np.ndarray, room: int) -> np.ndarray:
    """Which choices find room, where each row of the batch is a device's and every expert keeps `room` for each."""
    kept = np.ones(experts.shape, bool)
    for row, choices in enumerate(experts.reshape(8, -1)):
        seen = np.zeros(EXPERTS + 1, int)
        for i, expert in enumerate(choices):
            kept[row].reshape(-1)[i] = seen[expert] < room
            seen[expert] += 1
    return kept | (experts == EXPERTS)


def child() -> None:
    """Prints, per case, relative errors of output and gradients and the number of dropped choices."""
    import jax
    import jax.numpy as jnp

    from qcn_jax.config import MeshConfig
    from qcn_jax.moe.dispatch import dispatch_experts, ragged
    from qcn_jax.moe.grouped import ExpertWeights
    from qcn_jax.sharding.mesh import make_parallel

    # As on a TPU, where buffers hold anything and rows are exchanged in pieces.
    ragged.unfilled = lambda shape, dtype: jnp.full(shape, jnp.nan, dtype)
    ragged.PIECE = WIDTH // 2
    x, weights, experts, kernels = inputs()
    cotangent = np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape)
    errors = lambda got, want: [
        float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b)))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)]
    results = {}
    for name, (mesh, form, buffer) in CASES.items():
        parallel = make_parallel(MeshConfig(**mesh, dispatch=form, dispatch_buffer=buffer))

        @jax.jit
        def run(x, weights, kernels, parallel=parallel):
            apply = lambda x, weights, kernels: dispatch_experts(x, weights, experts, ExpertWeights(*kernels), parallel)
            (out, dropped), pull = jax.vjp(apply, x, weights, kernels)
            return out, dropped, pull((jnp.asarray(cotangent), jnp.zeros(())))

        out, dropped, gradients = run(x, weights, kernels)
        kept = first_come(experts, 8) if name == "capacity overflows" else np.ones(experts.shape, bool)
        want = reference(x, weights, experts, kernels, kept)
        results[name] = {"errors": errors((out, gradients), want), "dropped": float(dropped),
                         "expected": float((~kept).sum())}
    print(json.dumps(results))


@pytest.fixture(scope="module", name="results")
def _results(run_with_devices) -> dict[str, dict]:
    return json.loads(run_with_devices(child, 8).splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_equals_one_device(results, name):
    assert len(results[name]["errors"]) == 6  # output, tokens, weights, three kernels
    assert max(results[name]["errors"]) < 1e-5 and np.isfinite(results[name]["errors"]).all()


@pytest.mark.parametrize("name", CASES)
def test_drops_are_counted(results, name):
    assert results[name]["dropped"] == results[name]["expected"]
    assert (results[name]["expected"] > 0) == (name == "capacity overflows")


def test_rounds_are_needed():
    """The cases in rounds would not fit their buffers at once: their test means something."""
    experts = inputs()[2]
    for mesh, form, buffer in CASES.values():
        if buffer == 0.25:
            size = mesh["expert"]
            tokens = experts.size / 8 * buffer  # of one device, without alignment
            load = np.bincount(experts.reshape(-1), minlength=EXPERTS + 1)[: EXPERTS // size].sum() / (8 / size)
            assert load > 2 * tokens, form
