"""Compiles a config's step for a TPU topology that is not here, and says whether it fits and what it moves.

Needs libtpu (pip install 'qcn_jax[compile]'), no TPU. The program is compiled in a process of its own; 80 billion
parameters take some 8 GB of memory and a few minutes. Nothing here is a time: what a step takes is known on the chip.

  qcn compile --config=configs/qwen3_coder_next.py:v5p-128
  qcn compile --config=configs/qwen3_coder_next.py:v5p-128 --topology=v5p:4x4x4 --stage=sft --out=sft.json
  qcn compile --config=configs/qwen3_coder_next.py:v5p-512,32k-262k --stage=midtrain --phase=2
  qcn compile --config=configs/qwen3_coder_next.py:v5e-256 --config.midtrain.train.optimizer.mu_dtype=bfloat16
"""

import dataclasses
import json
import math
import subprocess
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from qcn_jax import config_checks, files
from qcn_jax.cli import parsing
from qcn_jax.config import TRAINING, RunConfig, from_config_dict, training_settings
from qcn_jax.config_phases import of_phase
from qcn_jax.errors import UserError

if TYPE_CHECKING:
    from qcn_jax.sharding.parallel import Parallel

ROLLOUT = "rollout"
DOES_NOT_FIT = 3  # exit status of a program that compiled, or nearly, but is too large
_GIB = 2**30


def main(argv: Sequence[str]) -> int:
    """Parses flags, compiles in a child process, prints and writes the report."""
    values = flags.FlagValues()
    config = parsing.define_config(values, argv)
    flags.DEFINE_string("topology", None, "GENERATION:AxBxC, e.g. v5p:4x4x4, v5e:16x16, v6e:16x16, tpu7x:4x4x4. "
                        "Default: the config's (config.topology).", flag_values=values)
    flags.DEFINE_integer("slices", 1, "Slices of that topology, joined over the data center network; the mesh's data "
                         "axis must be a multiple.", flag_values=values, lower_bound=1)
    flags.DEFINE_enum("stage", "midtrain", [*TRAINING, ROLLOUT], "Whose step to compile; rollout: the engine's "
                      "programs in stage experts.", flag_values=values)
    flags.DEFINE_integer("phase", 1, "Which of mid-training's phases (config.midtrain.phases), from 1.",
                         flag_values=values, lower_bound=1)
    flags.DEFINE_string("out", None, "File for the report as JSON.", flag_values=values)
    flags.DEFINE_string("dump", None, "File for the compiled program's text.", flag_values=values)
    parsing.parse(values, "compile", __doc__, argv)
    settings = config()
    topology = values.topology or settings.topology
    if not topology:
        raise UserError("--topology is required; this config names none")
    config_checks.check_sizes(settings, ["experts" if values.stage == ROLLOUT else values.stage])
    of_phase(settings, values.stage, values.phase)
    for flag in ("out", "dump"):
        if values[flag].value:
            files.check_file(values[flag].value, flag)
    report = compile_in_child(settings, values.stage, topology, values.slices, values.dump, values.phase)
    if values.out:
        files.write_json(values.out, report)
    print(render(report))
    return 0 if fits(report) else DOES_NOT_FIT


def fits(report: dict[str, Any]) -> bool:
    """Whether all programs of a report fit the chip's memory."""
    found = report["programs"].values() if "programs" in report else [report]
    return all(program["memory"]["fits"] for program in found)


def compile_in_child(config: RunConfig, stage: str, topology: str, slices: int = 1, dump: str | None = None,
                     phase: int = 1) -> dict[str, Any]:
    """The report of `compile_here`, from a process with libtpu's environment.

    Raises:
      UserError: bad input, the compiler's refusal, or a process that ended without a report.
    """
    from qcn_jax.compile import aot

    aot.generation(topology)
    job = {"config": dataclasses.asdict(config), "stage": stage, "topology": topology, "slices": slices, "dump": dump,
           "phase": phase}
    child = subprocess.run([sys.executable, "-m", "qcn_jax.cli.compile"], input=json.dumps(job), capture_output=True,
                           text=True, env=aot.worker_environment(), check=False)
    for line in reversed(child.stdout.splitlines()):
        if line.startswith("{"):
            answer = json.loads(line)
            if "error" in answer:
                raise UserError(answer["error"])
            if "defect" in answer:
                print(child.stderr, file=sys.stderr)
                raise UserError(f"the step cannot be built: {answer['defect']}")
            return answer
    ending = (child.stderr.strip().splitlines() or ["no message"])[-1][:300]
    raise UserError(f"the compiling process ended with status {child.returncode}: {ending}")


def compile_here(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles the step that `job` describes, in this process; the report is JSON-ready."""
    from qcn_jax.compile import aot
    from qcn_jax.compile.stages import stage_step
    from qcn_jax.sharding.mesh import make_parallel

    config = of_phase(from_config_dict(RunConfig, job["config"]), job["stage"], job["phase"])
    devices = aot.topology_devices(job["topology"], job["slices"])
    parallel = make_parallel(config.mesh, devices)
    if job["stage"] == ROLLOUT:
        from qcn_jax.compile.rollout import compile_rollout

        head = _head(config, job, parallel, len(devices))
        return head | compile_rollout(config, parallel, job["topology"], job["dump"])
    step = stage_step(config, job["stage"], parallel)
    head = _head(config, job, parallel, len(devices)) | {
        "tokens_per_device": step.tokens / len(devices),
        "model_flops_per_device": step.model_flops / len(devices),
        "model_flops_by_part": {name: step.passes * step.tokens / len(devices) * value
                                for name, value in dataclasses.asdict(step.flops).items()},
    }
    program = aot.Program(step.function, step.arguments, step.kinds)
    try:
        found = aot.compile_program(program, job["topology"], job["dump"])
    except aot.TooLarge as error:
        kinds = {name: aot.bytes_per_device(tree) for name, tree in step.kinds.items()}
        memory = {"arguments_by_kind": kinds, "total": error.used, "hbm": error.limit, "fits": False,
                  "compiler": str(error)}
        found = {"memory": memory, "versions": {"libtpu": aot.libtpu_version()}}
    report = head | found
    if not report["memory"]["fits"]:
        report["advice"] = advice(config, job["stage"], report)
    return report


def _head(config: RunConfig, job: dict[str, Any], parallel: "Parallel", devices: int) -> dict[str, Any]:
    from qcn_jax.model import parameter_count

    return {"config": config.name, "stage": job["stage"], "phase": job["phase"], "topology": job["topology"],
            "slices": job["slices"], "devices": devices,
            "mesh": {axis: size for axis, size in parallel.mesh.shape.items() if size > 1},
            "parameters": parameter_count(config.model)}


def advice(config: RunConfig, stage: str, report: dict[str, Any]) -> list[str]:
    """What to change, with what each change saves per device (GiB), the largest first."""
    memory, kinds = report["memory"], report["memory"]["arguments_by_kind"]
    group, settings = TRAINING[stage], training_settings(config, stage)
    optimizer, weights, moments = settings.optimizer, kinds["weights"], kinds["optimizer"]
    temporaries = (memory["total"] or 0) - sum(kinds.values())
    found: list[tuple[float, str]] = []
    if config.model.remat != "full":
        found.append((0.7 * temporaries, "--config.model.remat=full: most of the activations, at a forward pass more"))
    if fewer := _fewer_tokens(group, settings, report["mesh"], config.model.num_attention_heads):
        found.append((temporaries / 2, f"{fewer}: about half of what is neither weights nor optimizer"))
    if not optimizer.offload:
        found.append((moments, f"--config.{group}.optimizer.offload=true: the optimizer's state moves to the host"))
    copies = 2 + optimizer.master_copy
    for field in ("mu_dtype", "nu_dtype"):
        if getattr(optimizer, field) == "float32":
            found.append((moments / copies / 2, f"--config.{group}.optimizer.{field}=bfloat16"))
    if config.model.param_dtype == "float32":
        found.append((weights / 2, "--config.model.param_dtype=bfloat16"))
    held = (weights + moments) / 2
    found.append((held, "twice the devices (--topology, --config.mesh.fsdp): half of weights and optimizer's state"))
    return [f"{text}, about {saved / _GIB:.1f} GiB less" for saved, text in sorted(found, reverse=True) if saved > 0]


def _fewer_tokens(group: str, settings: Any, mesh: dict[str, int], heads: int) -> str | None:
    """Flags that halve the tokens that pass through a device at a time; None where rows cannot be divided further."""
    groups = math.prod(mesh.get(axis, 1) for axis in ("data", "fsdp", "expert"))  # of devices, which share out rows
    slices = getattr(settings, "accumulate", 0)
    if slices and settings.rows % (2 * slices * groups) == 0:
        return f"--config.{group}.accumulate={2 * slices}"
    if settings.rows % (2 * groups) == 0:
        return f"--config.{group}.rows={settings.rows // 2}"
    fsdp, context = mesh.get("fsdp", 1), mesh.get("context", 1)
    if fsdp % 2 or settings.rows % 2 or heads % (2 * context * mesh.get("tensor", 1)):
        return None
    return (f"--config.mesh.context={2 * context} --config.mesh.fsdp={fsdp // 2} "
            f"--config.{group}.rows={settings.rows // 2}")


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    where = (f"{report['config']} {report['stage']} on {report['slices']} x {report['topology']} ({report['devices']} "
             f"devices, mesh {' x '.join(f'{axis} {size}' for axis, size in report['mesh'].items())})")
    if "programs" in report:
        from qcn_jax.compile import rollout

        return "\n".join([where, *rollout.render(report)])
    memory, gib = report["memory"], lambda n: f"{n / _GIB:8.2f} GiB"
    lines = [
        where, f"{report['parameters']:,} parameters, {report['tokens_per_device']:,.0f} tokens per device and step",
        "", "HBM per device",
    ]
    lines += [f"  {name:<28}{gib(size)}" for name, size in memory["arguments_by_kind"].items()]
    for name in ("padding", "activations_and_temporaries", "outputs_not_aliased", "code", "host"):
        if memory.get(name):
            lines.append(f"  {name.replace('_', ' '):<28}{gib(memory[name])}")
    if memory["total"]:
        excess = (memory["total"] - memory["hbm"]) / _GIB
        verdict = "fits" if memory["fits"] else f"does not fit: {excess:.1f} GiB too much"
        lines.append(f"  {'total':<28}{gib(memory['total'])} of {memory['hbm'] / _GIB:.0f}: {verdict}")
    elif not memory["fits"]:
        lines.append(f"  does not fit: {memory['compiler']}")
    if "advice" in report:
        lines += ["", "To make it fit:", *(f"  {line}" for line in report["advice"])]
    if "seconds" in report:
        lines += _render_program(report)
    return "\n".join(lines)


def _render_program(report: dict[str, Any]) -> list[str]:
    lines = ["", "Collectives per device and step (loops counted; bytes of the larger side)"]
    for kind, moved in sorted(report["collective_bytes"].items(), key=lambda item: -item[1]):
        lines.append(f"  {kind:<24}{moved / 1e9:9.2f} GB in {report['collective_count'][kind]:,}")
    found = report["matmul_flops"] + report["kernel_flops"]
    lines += [
        "", f"FLOPs per device and step: model {report['model_flops_per_device'] / 1e12:.1f} TF; compiled "
        f"{found / 1e12:.1f} TF ({report['kernel_flops'] / 1e12:.1f} of them stated by kernels), with recomputation",
    ]
    if silent := report["kernels_without_flops"]:
        runs = ", ".join(f"{name} ({count:,} runs)" for name, count in sorted(silent.items()))
        lines.append(f"  not counted, as these kernels state none: {runs}")
    lines += [
        "", "Estimated cycles by part (compiler's estimates of single ops; no collectives, no kernels, no overlap)",
    ]
    lines += [f"  {part:<16}{cycles:14,.0f}" for part, cycles in report["cycles_by_part"].items() if cycles]
    lines += ["", "Largest ops by estimated cycles"]
    lines += [f"  {row['cycles']:14,.0f}  {row['op']}  {row['origin'][-90:]}" for row in report["top_cycles"]]
    seconds, versions = report["seconds"], report["versions"]
    if report["data_dependent_loops"]:
        lines.append(f"{report['data_dependent_loops']} loops depend on data and are counted as run once")
    lines += ["", f"traced in {seconds['trace_and_lower']} s, compiled in {seconds['compile']} s; jax "
              f"{versions['jax']}, libtpu {versions['libtpu']}. Not measured on a chip."]
    return lines


def _worker() -> None:
    """Reads a job from stdin and writes one line of JSON: the report, {"error": line} or {"defect": line}."""
    try:
        answer = compile_here(json.load(sys.stdin))
    except UserError as error:
        answer = {"error": parsing.one_line(error)}
    except Exception as error:  # JAX ends its tracebacks with a remark of its own, so the last line says nothing
        traceback.print_exc()
        answer = {"defect": f"{type(error).__name__}: {parsing.one_line(error)[:400]}"}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _worker()
