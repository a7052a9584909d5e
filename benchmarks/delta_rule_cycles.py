"""Cycles of the gated delta rule and of the whole DeltaNet mixer by the TPU compiler's estimates: XLA form and kernels.

    python benchmarks/delta_rule_cycles.py [--generations=v5p,v5e,v6e,tpu7x] [--length=8192] [--json=FILE]

Needs libtpu (pip install 'qcn_jax[compile]'), no TPU: programs are compiled ahead of time, nothing runs, and no figure
is a time. One layer of the 80B model on one device: 16 key heads x 128, 32 value heads x 128, bfloat16, packed documents,
forward and backward (jax.vjp) in one program. `stretch` is the mixer of rows that are split over the chips of a small
topology, with that many tokens on each: the XLA form, kernels of the rule alone (`parts`) and kernels of all of it.

How the figures are got, each program in a process of its own with one libtpu:
  XLA     sum of `estimated_cycles` of the compiled program's ops, loop trip counts applied.
  kernel  instruction bundles of the kernel's final schedule (dumped by libtpu: "total scheduled bundles") times grid
          steps, plus the XLA ops around it as above. A bundle takes one cycle unless it waits for memory. Code that runs
          once (first and last step of a sequence, start of the pipeline) is counted in every step: an upper bound.
`estimated_cycles` and bundles are both the compiler's static figures without waits for HBM; they come from different
parts of the compiler, so that ratios between them say which is cheaper, not by what a chip would be faster. On v5p,
whose two cores are one device, matrix products' `estimated_cycles` match the peak of both cores together, bundles count
one core.
"""

import functools
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qcn_jax.compile import aot, hlo
from qcn_jax.config import ModelConfig
from qcn_jax.layers.context import TokenContext
from qcn_jax.layers.norm import l2_norm
from qcn_jax.sharding.mesh import AXES
from qcn_jax.sharding.parallel import Parallel

GENERATIONS = flags.DEFINE_list("generations", ["v5p", "v5e", "v6e", "tpu7x"], "TPU generations.")
FORMS = flags.DEFINE_list(
    "forms", ["rule chunked 64", "rule chunked 128", "rule pallas 128", "mixer chunked 64", "mixer pallas 128",
              "stretch chunked 64", "stretch parts 128", "stretch pallas 128"],
    "Programs: what, form and chunk size.")
LENGTH = flags.DEFINE_integer("length", 8192, "Tokens of the one sequence.")
JSON = flags.DEFINE_string("json", None, "Also writes the table there.")
CASE = flags.DEFINE_string("case", None, "One program (set for the child processes): FORM,GENERATION.")

H, R, D, TAPS, EPS = 16, 2, 128, 4, 1e-6  # Qwen3-Coder-Next's linear attention
TOPOLOGIES = {"v5p": "v5p:1x1x1", "v5e": "v5e:1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}
STRETCHES = {"v5p": "v5p:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
_BUNDLES = re.compile(r"total scheduled bundles:\s+(\d+)")


def rule(form: str, chunk: int, q, k, v, g, beta, segment_ids):
    """The rule on normalised bfloat16 inputs [B, T, H, ...]."""
    from qcn_jax.layers.delta_rule import gated_delta_rule

    return gated_delta_rule(q, k, v, g, beta, None, segment_ids, form, chunk)[0].astype(jnp.bfloat16)


def mixer(form: str, chunk: int, qkvz, kernel, g, beta, weight, segment_ids):
    """All between the layer's two projections: qkvz [B, T, H * 6 D] -> [B, T, H * R * D]."""
    from qcn_jax.layers.gated_delta_net import causal_conv
    from qcn_jax.layers.kernels.mixer import delta_net

    if form == "pallas":
        return delta_net(qkvz, kernel, g, beta, weight, segment_ids, eps=EPS, chunk_size=chunk, key_dim=D)
    return _by_parts(
        lambda x: causal_conv(x, kernel, None, segment_ids),
        lambda q, k, v: rule(form, chunk, q, k, v, g, beta, segment_ids), qkvz, weight)


def stretch(parallel: Parallel, form: str, chunk: int, qkvz, kernel, g, beta, weight, segment_ids):
    """`mixer` of rows that are split over the devices of `parallel`."""
    from qcn_jax.layers.gated_delta_net import by_kernel, sharded_conv
    from qcn_jax.layers.sharded import sharded_delta_rule

    if form == "pallas":
        config, nothing = ModelConfig(chunk_size=chunk, rms_norm_eps=EPS), jnp.zeros(0)
        context = TokenContext(nothing, nothing, segment_ids, parallel=parallel)
        return by_kernel(config, qkvz, kernel, g, beta, weight, context)
    form = {"parts": "pallas"}.get(form, form)
    return _by_parts(
        lambda x: sharded_conv(x, kernel, segment_ids, parallel),
        lambda q, k, v: sharded_delta_rule(q, k, v, g, beta, segment_ids, form, chunk, parallel).astype(jnp.bfloat16),
        qkvz, weight)


def _by_parts(conv: Callable, delta: Callable, qkvz: jax.Array, weight: jax.Array) -> jax.Array:
    """The layer's XLA form around the delta rule."""
    from qcn_jax.layers.norm import GatedRMSNorm

    batch, length, _ = qkvz.shape
    qkvz = qkvz.reshape(batch, length, H, -1)
    mixed = jax.nn.silu(conv(qkvz[..., : 4 * D]))
    v, z = (x.reshape(batch, length, H, R, D) for x in (mixed[..., 2 * D :], qkvz[..., 4 * D :]))
    o = delta(l2_norm(mixed[..., :D]) * D**-0.5, l2_norm(mixed[..., D : 2 * D]), v)
    return GatedRMSNorm(EPS).apply({"params": {"weight": weight}}, o, z).reshape(batch, length, -1)


def program(what: str, form: str, chunk: int, length: int, generation: str):
    """The jitted vjp of one case and its abstract arguments."""
    topology = (STRETCHES if what == "stretch" else TOPOLOGIES)[generation]
    devices = np.asarray(aot.topology_devices(topology))
    devices = devices if what == "stretch" else devices[:1]
    parallel = Parallel(Mesh(devices.reshape(1, 1, 1, 1, -1), AXES))
    length *= devices.size
    sharding = NamedSharding(parallel.mesh, PartitionSpec(None, "context"))
    array = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    weights = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(parallel.mesh, PartitionSpec()))
    gates, ids = [array((1, length, H, R), jnp.float32)] * 2, array((1, length), jnp.int32)
    if what == "rule":
        arguments = [*[array((1, length, H, D))] * 2, array((1, length, H, R, D)), *gates]
        cotangent = array((1, length, H, R, D))
    else:
        arguments = [array((1, length, H * 6 * D)), weights((TAPS, H, 4 * D)), *gates, weights((D,), jnp.float32)]
        cotangent = array((1, length, H * R * D))
    functions = {"rule": rule, "mixer": mixer, "stretch": functools.partial(stretch, parallel)}
    function = functools.partial(functions[what], form, chunk)

    def run(segment_ids, cotangent, *arguments):
        out, pullback = jax.vjp(lambda *x: function(*x, segment_ids), *arguments)
        return out, pullback(cotangent)

    return jax.jit(run), (ids, cotangent, *arguments)


def kernel_steps(what: str, form: str, chunk: int, length: int) -> dict[str, int]:
    """Grid steps of every kernel of a case, by name."""
    from qcn_jax.layers.kernels import delta_rule, mixer_kernels

    if form not in ("pallas", "parts"):
        return {}
    alone = what == "rule" or form == "parts"
    module, kind = (delta_rule, "gated_delta_rule") if alone else (mixer_kernels, "delta_net")
    passes = {"forward": module.FORWARD_HEADS, "backward": module.BACKWARD_HEADS}
    if what == "stretch" and not alone:
        passes |= {"transfer": module.FORWARD_HEADS, "first_gradient": module.BACKWARD_HEADS}
    chunks = -(-length // chunk)
    return {f"{kind}_{name}": H // delta_rule.group_size(H, limit) * chunks for name, limit in passes.items()}


def measure(case: str, length: int) -> dict[str, float]:
    """In a child process: cycles of XLA ops, and temporaries."""
    name, generation = case.split(",")
    what, form, chunk = name.split()
    function, arguments = program(what, form, int(chunk), length, generation)
    compiled, text = aot.compile_with_text(function.trace(*arguments).lower(lowering_platforms=("tpu",)))
    summary = hlo.summarize(text)
    return {"xla": sum(summary.cycles.values()), "GiB": compiled.memory_analysis().temp_size_in_bytes / 2**30}


def _bundles(folder: str, kernel: str) -> int:
    """Bundles of the kernel's final schedule, from libtpu's dump."""
    found = []
    for path in pathlib.Path(folder).glob(f"*{kernel}.*schedule-analysis_final_bundles.txt"):
        found.append(int(_BUNDLES.search(path.read_text(encoding="utf-8")).group(1)))
    if len(found) != 1:
        raise RuntimeError(f"expected one schedule of {kernel} in libtpu's dump, found {len(found)}")
    return found[0]


def run_case(form: str, generation: str) -> dict[str, float]:
    """Cycles of one program: {"xla": .., "kernels": .., "total": .., "GiB": temporaries}."""
    what, kind, chunk = form.split()
    steps = kernel_steps(what, kind, int(chunk), LENGTH.value)
    with tempfile.TemporaryDirectory() as folder:
        environment = aot.worker_environment()
        if steps:
            environment["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        done = subprocess.run(
            [sys.executable, __file__, f"--case={form},{generation}", f"--length={LENGTH.value}"],
            env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{form} on {generation}: {done.stderr[-2000:]}")
        result = json.loads(done.stdout.splitlines()[-1])
        result["kernels"] = sum(count * _bundles(folder, kernel) for kernel, count in steps.items())
    return {**result, "total": result["xla"] + result["kernels"]}


def main(_) -> None:
    if CASE.value:
        print(json.dumps(measure(CASE.value, LENGTH.value)))
        return
    print(f"libtpu {aot.libtpu_version()}, jax {jax.__version__}; millions of cycles, forward + backward")
    print(f"{'':8}{'program':20}{'XLA ops':>9}{'kernels':>9}{'total':>9}{'fewer':>7}{'temp GiB':>10}")
    table = {}
    for generation in GENERATIONS.value:
        best = {}
        for form in FORMS.value:
            result = table[f"{generation} {form}"] = run_case(form, generation)
            what = form.split()[0]
            if "chunked" in form:
                best[what] = min(best.get(what, float("inf")), result["total"])
            ratio = f"{best[what] / result['total']:.2f}x" if "chunked" not in form and what in best else ""
            million = lambda key: f"{result[key] / 1e6:9.2f}"
            print(f"{generation:8}{form:20}{million('xla')}{million('kernels')}{million('total')}{ratio:>7}"
                  f"{result['GiB']:10.2f}", flush=True)
    if JSON.value:
        with open(JSON.value, "w", encoding="utf-8") as stream:
            json.dump(table, stream, indent=1)


if __name__ == "__main__":
    app.run(main)
