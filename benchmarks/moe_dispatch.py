"""Forms of expert parallelism beside each other: a sparse layer of the 80B model, both passes, for a TPU pod.

    python benchmarks/moe_dispatch.py --topology=v5p:4x4x4

Compiles the routed experts alone (512 experts of 2048 x 512, top 10, 8,192 tokens per chip, bfloat16) for the
topology without a TPU (needs the extra `compile`) and reads the optimised HLO: bytes of collectives per chip (the
larger side of each, buffers as allocated), bytes that balanced routing in fact sends, matrix FLOPs outside Pallas
kernels, arguments and temporaries. Nothing here is a time on hardware.
"""

import argparse
import os
import pathlib
import time

os.environ |= {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5p-128", "TPU_LOG_DIR": "disabled", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from qcn_jax import files
from qcn_jax.compile.aot import compile_with_text, libtpu_version
from qcn_jax.compile.hlo import summarize
from qcn_jax.config import MeshConfig, ModelConfig
from qcn_jax.moe.dispatch import dispatch_experts
from qcn_jax.moe.grouped import ExpertWeights
from qcn_jax.sharding.mesh import make_parallel

TOKENS = 8192  # per chip
# name: mesh without fsdp, which takes the rest
CASES = {
    "fsdp only": {},
    "ragged, expert 16": {"expert": 16, "dispatch": "ragged"},
    "capacity, expert 16": {"expert": 16, "dispatch": "capacity"},
    "gather, expert 16": {"expert": 16, "dispatch": "gather"},
    "ragged, expert 4": {"expert": 4, "dispatch": "ragged"},
    "gather, expert 4": {"expert": 4, "dispatch": "gather"},
    "ragged, expert 64": {"expert": 64, "dispatch": "ragged"},
}


def sent_bytes(config: ModelConfig, mesh: dict) -> float:
    """Bytes that a chip sends to others for tokens in one forward and backward pass when routing is balanced."""
    size, row = mesh.get("expert", 1), 2 * config.hidden_size
    others = (size - 1) / size
    slots = {"ragged": config.num_experts_per_tok, "gather": size, "capacity": config.num_experts_per_tok * 1.25}
    rows = TOKENS * slots[mesh.get("dispatch", "ragged")] * others
    return 5 * rows * row  # tokens out twice, results once, cotangents out and back


def measure(topology: str, mesh: dict, backend: str) -> dict:
    """Compiles one form and reads its program."""
    config = ModelConfig()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    parallel = make_parallel(MeshConfig(**mesh), devices)
    place = lambda *names: NamedSharding(parallel.mesh, parallel.spec(*names))
    array = lambda shape, dtype, *names: jax.ShapeDtypeStruct(shape, dtype, sharding=place(*names))
    rows = parallel.size("activation_batch")
    tokens = lambda width, dtype: array((rows, TOKENS, width), dtype, "activation_batch", "activation_length", None)
    wide, narrow, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    up = array((experts, wide, narrow), jnp.bfloat16, "expert", "expert_embed", "mlp")
    down = array((experts, narrow, wide), jnp.bfloat16, "expert", "mlp", "expert_embed")

    def step(x, weights, chosen, kernels, cotangent):
        apply = lambda x, weights, kernels: dispatch_experts(x, weights, chosen, kernels, parallel, backend)
        (out, dropped), pull = jax.vjp(apply, x, weights, kernels)
        return out, dropped, pull((cotangent, jnp.zeros(())))

    choices = config.num_experts_per_tok
    args = (tokens(wide, jnp.bfloat16), tokens(choices, jnp.float32), tokens(choices, jnp.int32),
            ExpertWeights(up, up, down), tokens(wide, jnp.bfloat16))
    began = time.time()
    compiled, text = compile_with_text(jax.jit(step).trace(*args).lower(lowering_platforms=("tpu",)))
    seconds = time.time() - began
    summary, memory = summarize(text), compiled.memory_analysis()
    return {
        "collectives": dict(summary.collective_bytes), "counts": dict(summary.collective_count),
        "sent": sent_bytes(config, mesh), "matmul_flops": summary.matmul_flops, "seconds": seconds,
        "arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
        "cycles": sum(summary.cycles.values()), "top": summary.top_cycles(12),
    }


def row(name: str, found: dict) -> str:
    """One form as a row of the table."""
    moved = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in found["collectives"].items() if size >= 5e6)
    return (f"| {name} | {found['temporaries'] / 2**30:.2f} | {moved} | {found['sent'] / 1e9:.2f} | "
            f"{found['matmul_flops'] / 1e12:.2f} | {found['cycles'] / 1e6:.1f} |")


def main() -> None:
    """Writes one row per form to results/moe_dispatch.md, and everything as JSON where --json says so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5p:4x4x4")
    parser.add_argument("--backend", default="auto", help="grouped product: auto, megablox, ragged")
    parser.add_argument("--cases", default=",".join(CASES).replace(", ", "/"), help="names with / for ', '")
    parser.add_argument("--json", help="file for all figures")
    args = parser.parse_args()
    lines = [
        f"{args.topology}, {TOKENS} tokens per chip, one layer forward + backward, libtpu {libtpu_version()}", "",
        "| form | temporaries, GiB | collectives, GB | rows sent to others when balanced, GB | "
        "products outside kernels, TFLOP | estimated cycles, 1e6 |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    results = {}
    for name in (case.replace("/", ", ") for case in args.cases.split(",")):
        results[name] = measure(args.topology, CASES[name], args.backend)
        lines.append(row(name, results[name]))
        print(lines[-1], flush=True)
    if list(results) == list(CASES):
        files.write_text(pathlib.Path(__file__).resolve().parent / "results" / "moe_dispatch.md", "\n".join(lines) + "\n")
    if args.json:
        files.write_json(args.json, results)


if __name__ == "__main__":
    main()
