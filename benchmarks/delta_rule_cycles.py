"""Cycles of the gated delta rule and of the whole DeltaNet mixer by the TPU compiler's estimates: XLA form and kernels.

    python benchmarks/delta_rule_cycles.py [--generations=v5p,v5e,v6e,tpu7x] [--length=8192] [--json=FILE]

Needs libtpu (pip install 'qcn_jax[compile]'), no TPU: programs are compiled ahead of time, nothing runs, and no figure
is a time. One layer of the 80B model on one device: 16 key heads x 128, 32 value heads x 128, bfloat16, packed documents,
forward and backward (jax.vjp) in one program.

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

import jax
import jax.numpy as jnp
from absl import app, flags

from qcn_jax.sharding import aot, hlo

GENERATIONS = flags.DEFINE_list("generations", ["v5p", "v5e", "v6e", "tpu7x"], "TPU generations.")
FORMS = flags.DEFINE_list(
    "forms", ["rule chunked 64", "rule chunked 128", "rule pallas 128", "mixer chunked 64", "mixer pallas 128"],
    "Programs: what, form and chunk size.")
LENGTH = flags.DEFINE_integer("length", 8192, "Tokens of the one sequence.")
JSON = flags.DEFINE_string("json", None, "Also writes the table there.")
CASE = flags.DEFINE_string("case", None, "One program (set for the child processes): FORM,GENERATION.")

H, R, D, TAPS, EPS = 16, 2, 128, 4, 1e-6  # Qwen3-Coder-Next's linear attention
TOPOLOGIES = {"v5p": "v5p:1x1x1", "v5e": "v5e:1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}
_BUNDLES = re.compile(r"total scheduled bundles:\s+(\d+)")


def rule(form: str, chunk: int, q, k, v, g, beta, segment_ids):
    """The rule on normalised bfloat16 inputs [B, T, H, ...]."""
    from qcn_jax.layers.delta_rule import gated_delta_rule

    return gated_delta_rule(q, k, v, g, beta, None, segment_ids, form, chunk)[0].astype(jnp.bfloat16)


def mixer(form: str, chunk: int, qkvz, kernel, g, beta, weight, segment_ids):
    """All between the layer's two projections: qkvz [B, T, H * 6 D] -> [B, T, H * R * D]."""
    from qcn_jax.layers.gated_delta_net import causal_conv
    from qcn_jax.layers.kernels.mixer import delta_net
    from qcn_jax.layers.norm import GatedRMSNorm, l2_norm

    if form == "pallas":
        return delta_net(qkvz, kernel, g, beta, weight, segment_ids, eps=EPS, chunk_size=chunk, key_dim=D)
    batch, length = segment_ids.shape
    qkvz = qkvz.reshape(batch, length, H, -1)
    mixed = jax.nn.silu(causal_conv(qkvz[..., : 4 * D], kernel, None, segment_ids))
    v, z = (x.reshape(batch, length, H, R, D) for x in (mixed[..., 2 * D :], qkvz[..., 4 * D :]))
    o = rule(form, chunk, l2_norm(mixed[..., :D]) * D**-0.5, l2_norm(mixed[..., D : 2 * D]), v, g, beta, segment_ids)
    return GatedRMSNorm(EPS).apply({"params": {"weight": weight}}, o, z).reshape(batch, length, -1)


def program(what: str, form: str, chunk: int, length: int, device: jax.Device):
    """The jitted vjp of one case and its abstract arguments."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    array = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    gates, ids = [array((1, length, H, R), jnp.float32)] * 2, array((1, length), jnp.int32)
    if what == "rule":
        arguments = [*[array((1, length, H, D))] * 2, array((1, length, H, R, D)), *gates]
        cotangent = array((1, length, H, R, D))
    else:
        arguments = [array((1, length, H * 6 * D)), array((TAPS, H, 4 * D)), *gates, array((D,), jnp.float32)]
        cotangent = array((1, length, H * R * D))
    function = functools.partial({"rule": rule, "mixer": mixer}[what], form, chunk)

    def run(segment_ids, cotangent, *arguments):
        out, pullback = jax.vjp(lambda *x: function(*x, segment_ids), *arguments)
        return out, pullback(cotangent)

    return jax.jit(run), (ids, cotangent, *arguments)


def measure(case: str, length: int) -> dict[str, float]:
    """In a child process: cycles of XLA ops, and grid steps of each kernel."""
    name, generation = case.split(",")
    what, form, chunk = name.split()
    function, arguments = program(what, form, int(chunk), length, aot.topology_devices(TOPOLOGIES[generation])[0])
    compiled, text = aot.compile_with_text(function.trace(*arguments).lower(lowering_platforms=("tpu",)))
    summary = hlo.summarize(text)
    result = {"xla": sum(summary.cycles.values()), "GiB": compiled.memory_analysis().temp_size_in_bytes / 2**30}
    if form == "pallas":
        from qcn_jax.layers.kernels import delta_rule, mixer as mixer_kernel

        module = {"rule": delta_rule, "mixer": mixer_kernel}[what]
        chunks = -(-length // int(chunk))
        for direction, limit in (("forward", module.FORWARD_HEADS), ("backward", module.BACKWARD_HEADS)):
            result[f"{direction} steps"] = H // delta_rule.group_size(H, limit) * chunks
    return result


def _bundles(folder: str, direction: str) -> int:
    """Bundles of the kernel's final schedule, from libtpu's dump."""
    found = []
    for path in pathlib.Path(folder).glob(f"*_{direction}.*schedule-analysis_final_bundles.txt"):
        found.append(int(_BUNDLES.search(path.read_text(encoding="utf-8")).group(1)))
    if len(found) != 1:
        raise RuntimeError(f"expected one schedule of the {direction} kernel in libtpu's dump, found {len(found)}")
    return found[0]


def run_case(form: str, generation: str) -> dict[str, float]:
    """Cycles of one program: {"xla": .., "kernels": .., "total": .., "GiB": temporaries}."""
    with tempfile.TemporaryDirectory() as folder:
        environment = aot.worker_environment()
        if "pallas" in form:
            environment["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        done = subprocess.run(
            [sys.executable, __file__, f"--case={form},{generation}", f"--length={LENGTH.value}"],
            env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{form} on {generation}: {done.stderr[-2000:]}")
        result = json.loads(done.stdout.splitlines()[-1])
        result["kernels"] = sum(
            result.pop(f"{direction} steps") * _bundles(folder, direction)
            for direction in ("forward", "backward") if f"{direction} steps" in result)
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
            if "pallas" not in form:
                best[what] = min(best.get(what, float("inf")), result["total"])
            ratio = f"{best[what] / result['total']:.2f}x" if "pallas" in form and what in best else ""
            million = lambda key: f"{result[key] / 1e6:9.2f}"
            print(f"{generation:8}{form:20}{million('xla')}{million('kernels')}{million('total')}{ratio:>7}"
                  f"{result['GiB']:10.2f}", flush=True)
    if JSON.value:
        with open(JSON.value, "w", encoding="utf-8") as stream:
            json.dump(table, stream, indent=1)


if __name__ == "__main__":
    app.run(main)
