"""Seconds of the gated delta rule on an NVIDIA GPU, forward and backward, beside flash-linear-attention's kernels.

    python benchmarks/delta_rule_gpu.py [--lengths=8192,65536] [--forms="chunked 64,pallas 64"] [--json=FILE]

Needs a CUDA build of JAX; with PyTorch, Triton and flash-linear-attention installed, theirs is measured too, otherwise
ours alone. One layer of the 80B model on one device: 16 key heads x 128, 32 value heads x 128, one sequence, bfloat16
queries, keys and values that are normalised already, float32 gates, o and all five gradients.

Both sides in one process, turn by turn, and of each the fastest round of many queued calls, so that the host's time to
start kernels is hidden where a call takes longer than to start it. flash-linear-attention starts some fifteen kernels
from Python: the row "as a CUDA graph" replays the same kernels without that. Its backward pass refuses Triton 3.4 to
3.7.0 on Hopper.
The error is ||x - x*|| / ||x*|| from the float32 form at full precision, of o and of the worst gradient.
"""

import functools
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch has its memory on the same device

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from qcn_jax import files
from qcn_jax.layers.delta_rule import gated_delta_rule

LENGTHS = flags.DEFINE_list("lengths", ["8192", "65536"], "Tokens of the sequence.")
FORMS = flags.DEFINE_list("forms", ["chunked 64", "pallas 64"], "Ours: form and chunk size.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Measured rounds of each side.")
JSON = flags.DEFINE_string("json", None, "Also writes the table there.")

H, R, D = 16, 2, 128  # Qwen3-Coder-Next's linear attention
GRADIENTS = ("q", "k", "v", "g", "beta")


def inputs(length: int, seed: int = 0) -> list[np.ndarray]:
    """q (scaled), k, v, g, beta and o's cotangent, float32 that bfloat16 holds exactly where it is bfloat16."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    short = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))
    q, k = unit(normal(1, length, H, D)) * D**-0.5, unit(normal(1, length, H, D))
    g = -np.exp(normal(1, length, H, R)) * 0.1
    beta = 1 / (1 + np.exp(-normal(1, length, H, R)))
    return [short(q), short(k), short(normal(1, length, H, R, D)), g, beta, short(normal(1, length, H, R, D))]


def ours(form: str, chunk: int, arrays: list[np.ndarray]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward, and forward with backward, as calls that return device arrays: o; (o, gradients)."""
    q, k, v, g, beta, cotangent = (jnp.asarray(x) for x in arrays)
    q, k, v, cotangent = (x.astype(jnp.bfloat16) for x in (q, k, v, cotangent))
    rule = lambda *xs: gated_delta_rule(*xs, None, None, form, chunk)[0].astype(jnp.bfloat16)

    @jax.jit
    def both(arguments, cotangent):
        o, pull = jax.vjp(rule, *arguments)
        return o, pull(cotangent)

    forward = jax.jit(rule)
    arguments = (q, k, v, g, beta)
    return lambda: forward(*arguments), lambda: both(arguments, cotangent)


def exact(arrays: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """o and gradients of the XLA form, float32 products at full precision."""
    *arguments, cotangent = (jnp.asarray(x) for x in arrays)
    with jax.default_matmul_precision("highest"):
        rule = lambda *xs: gated_delta_rule(*xs, None, None, "chunked", 64)[0]
        o, pull = jax.jit(functools.partial(jax.vjp, rule))(*arguments)
        return np.asarray(o), [np.asarray(x) for x in pull(cotangent)]


def theirs(arrays: list[np.ndarray]) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """flash-linear-attention: from Python, and as CUDA graphs. Empty where it is not installed."""
    try:
        import torch
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        print(f"flash-linear-attention is not measured: {error}")
        return {}
    to = lambda x, dtype: torch.from_numpy(np.ascontiguousarray(x)).to("cuda", dtype)
    q, k, v, g, beta, cotangent = arrays
    flat = lambda x: x.reshape(1, x.shape[1], H * R, *x.shape[4:])
    arguments = [to(q, torch.bfloat16), to(k, torch.bfloat16), to(flat(v), torch.bfloat16),
                 to(flat(g), torch.float32), to(flat(beta), torch.float32)]
    cotangent = to(flat(cotangent), torch.bfloat16)
    arguments = [x.requires_grad_() for x in arguments]

    def forward():
        with torch.no_grad():
            return chunk_gated_delta_rule(*arguments, scale=1.0)[0]

    def both():
        o = chunk_gated_delta_rule(*arguments, scale=1.0)[0]
        return o, torch.autograd.grad(o, arguments, cotangent)

    def graph(call):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            out = call()

        def replay():
            recorded.replay()
            return out

        return replay

    sides = {"flash-linear-attention": (forward, both)}
    try:
        sides["the same as a CUDA graph"] = (graph(forward), graph(both))
    except Exception as error:  # whatever torch refuses to record
        print(f"no CUDA graph: {error}")
    return sides


def wait(result: Any) -> None:
    if isinstance(jax.tree.leaves(result)[0], jax.Array):
        jax.block_until_ready(result)
    else:
        import torch

        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = call()
    wait(result)
    return (time.perf_counter() - start) / calls


def error(measured: Any, expected: np.ndarray) -> float:
    if not isinstance(measured, jax.Array):
        measured = measured.detach().float().cpu().numpy()
    measured = np.asarray(measured, np.float64).reshape(expected.shape)
    return float(np.linalg.norm(measured - expected) / np.linalg.norm(expected))


def measure(length: int) -> list[dict[str, Any]]:
    arrays = inputs(length)
    o, gradients = exact(arrays)
    sides = {form: ours(form.split()[0], int(form.split()[1]), arrays) for form in FORMS.value}
    sides |= theirs(arrays)
    rows = []
    for name, (forward, both) in sides.items():
        start = time.perf_counter()
        wait(forward())
        got_o, got = both()
        wait((got_o, got))
        errors = {"o": error(got_o, o)} | {n: error(x, y) for n, x, y in zip(GRADIENTS, got, gradients)}
        rows.append({"side": name, "length": length, "first_call_s": time.perf_counter() - start, "errors": errors})
        print(f"{name}, {length} tokens: first calls {rows[-1]['first_call_s']:.1f} s", flush=True)
    for kind, which in (("forward", 0), ("both", 1)):
        best = {name: float("inf") for name in sides}
        for _ in range(ROUNDS.value):
            for name, calls in sides.items():
                once = seconds(calls[which], 2)
                best[name] = min(best[name], seconds(calls[which], max(3, min(100, int(0.1 / once)))))
        for row in rows:
            row[f"{kind}_ms"] = 1e3 * best[row["side"]]
    return rows


def main(argv: list[str]) -> None:
    del argv
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}")
    rows = [row for length in LENGTHS.value for row in measure(int(length))]
    print("| tokens | | forward, ms | forward + backward, ms | error of o | of the worst gradient |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        worst = max(GRADIENTS, key=row["errors"].get)
        print(f"| {row['length']:,} | {row['side']} | {row['forward_ms']:.2f} | {row['both_ms']:.2f} | "
              f"{row['errors']['o']:.1e} | {row['errors'][worst]:.1e} ({worst}) |")
    if JSON.value:
        files.write_json(pathlib.Path(JSON.value), {"device": device.device_kind, "jax": jax.__version__, "rows": rows})


if __name__ == "__main__":
    app.run(main)
