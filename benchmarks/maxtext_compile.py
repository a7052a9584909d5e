"""The 80B training step beside MaxText's own, both compiled for one TPU topology by one libtpu; no TPU is needed.

    python benchmarks/maxtext_compile.py --python=VENV/bin/python --sources=MAXTEXT/src [--variants=REGEX]

VENV holds MaxText's requirements (Python 3.12 or later) with the jax and libtpu of this environment, MAXTEXT is a
checkout; nothing of it is changed but the last step of its train_compile, which keeps the compiled program. The work is
the same: v5p:4x4x4, 8,192 tokens a chip in rows of 8,192, bfloat16 weights and Adam moments, full rematerialisation,
experts over 16 chips. Both programs' texts are read by qcn_jax.compile.hlo, so that one ruler measures both. Rows go to
benchmarks/results/maxtext_compile/VERSION.json of the libtpu, the tables of all versions to maxtext_compile.md beside
it. Counts and the compiler's estimates; nothing ran on a chip.
"""

import os
import pathlib
import re
import subprocess
import tempfile
from typing import Any

from _pod_step import COLLECTIVES, collectives, compile_step
from absl import app, flags

from qcn_jax import files
from qcn_jax.compile import aot, hlo

_PYTHON = flags.DEFINE_string("python", None, "Interpreter with MaxText's requirements.", required=True)
_SOURCES = flags.DEFINE_string("sources", None, "The folder src of a checkout of MaxText.", required=True)
_VARIANTS = flags.DEFINE_string("variants", ".", "regular expression of the variants to run")
HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results" / "maxtext_compile"
GIB = 2**30
COMMON = (
    "model_name=qwen3-next-80b-a3b", "compile_topology=v5p-128", "compile_topology_num_slices=1",
    "per_device_batch_size=1", "max_target_length=8192", "weight_dtype=bfloat16", "mu_dtype=bfloat16",
    "remat_policy=full", "megablox=true", "attention=flash", "dataset_type=synthetic", "enable_checkpointing=false",
    "skip_jax_distributed_system=true", "run_name=compile",
)
EXPERTS = ("ici_expert_parallelism=16", "ici_fsdp_parallelism=4")
# Its buffer of dispatched rows: a factor 1 holds balanced routing and drops what exceeds it.
THEIRS = {
    "MaxText, expert 16 x fsdp 4, drops when unbalanced": (*EXPERTS, "ragged_buffer_factor=1.0"),
    "MaxText, the same, delta rule in chunks of 128": (
        *EXPERTS, "ragged_buffer_factor=1.0", "gdn_chunk_size=128", "override_model_config=true"),
    "MaxText, expert 16 x fsdp 4, dropless": EXPERTS,
    "MaxText, fsdp 64": (),
}
# Parts of its step by the functions that made an operation; the first that matches counts.
PARTS = {
    "delta rule": r"@.*gated_delta_rule", "delta net": r"@.*GatedDeltaNet", "moe": r"@.*(MoE|Moe|moe|megablox|ragged)",
    "attention": r"@.*(Attention|attention)",
}
_OPTIMIZER = "midtrain.train.optimizer"
_LOW = (f"{_OPTIMIZER}.master_copy=false", f"{_OPTIMIZER}.mu_dtype=bfloat16", f"{_OPTIMIZER}.nu_dtype=bfloat16")
OURS = {
    "qcn_jax (its kernels), dropless": _LOW,
    # Buffers as large as those of MaxText's first row; what exceeds them goes in another round.
    "qcn_jax, dropless, buffers of a balanced load": (*_LOW, "mesh.dispatch_buffer=1.0"),
    "qcn_jax, kernels in chunks of 64": (*_LOW, "model.chunk_size=64"),
    "qcn_jax, XLA form of the delta rule": (*_LOW, "model.delta_rule=chunked", "model.chunk_size=64"),
}


def theirs(settings: tuple[str, ...]) -> dict[str, Any]:
    """MaxText's step: memory, collectives, FLOPs and cycles."""
    with tempfile.TemporaryDirectory() as scratch:
        out = pathlib.Path(scratch) / "step"
        child = subprocess.run(
            [_PYTHON.value, str(HERE / "_maxtext_side.py"), _SOURCES.value, str(out), *COMMON,
             f"base_output_directory={scratch}", *settings],
            env={**os.environ, **aot.ENVIRONMENT}, capture_output=True, text=True, check=False)
        if child.returncode:
            message = re.search(r"RESOURCE_EXHAUSTED[^\n]*|Used [\d.]+G of [^\n]*", child.stderr)
            ending = (child.stderr.strip().splitlines() or ["no message"])[-1]
            return {"error": (message.group(0) if message else ending)[:300]}
        found = files.read_json(f"{out}.json")
        if found["versions"]["libtpu"] != aot.libtpu_version():
            raise SystemExit(f"--python: its libtpu is {found['versions']['libtpu']}, here it is {aot.libtpu_version()}")
        summary = hlo.summarize(_with_functions(pathlib.Path(f"{out}.hlo").read_text(encoding="utf-8")))
    memory = found["memory"]
    return {
        "arguments": memory["argument"], "temporaries": memory["temp"], "mesh": found["mesh"],
        "cycles_by_part": hlo.cycles_by_part(summary, PARTS), "seconds": found["seconds"],
        "versions": found["versions"], **hlo.to_json(summary),
    }


def _with_functions(text: str) -> str:
    """HLO text whose operations' names end in " @f/g/h", the Python functions that made them, outermost first.

    MaxText's modules give their operations no names; the text's own tables know the stack of each.
    """
    table = lambda name: dict(re.findall(r"^(\d+) (.*)$", text.split(f"\n{name}\n")[1].split("\n\n")[0], re.MULTILINE))
    functions, locations = table("FunctionNames"), table("FileLocations")
    frames = {}
    for number, frame in table("StackFrames").items():
        location, parent = re.search(r"file_location_id=(\d+)", frame), re.search(r"parent_frame_id=(\d+)", frame)
        function = re.search(r"function_name_id=(\d+)", locations[location.group(1)]).group(1)
        # Parents are written one too high: a frame without one names itself.
        above = frames.get(str(int(parent.group(1)) - 1), "") if parent else ""
        frames[number] = f"{above}/{functions[function].strip(chr(34))}"
    return re.sub(
        r'op_name="([^"]*)"((?: [\w]+=\S+)*? stack_frame_id=(\d+))',
        lambda found: f'op_name="{found.group(1)} @{frames[found.group(3)]}"{found.group(2)}', text)


def ours(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Our step, with the same fields."""
    report = compile_step("v5p-128,8k", "midtrain", overrides)
    if "error" in report:
        return report
    if "seconds" not in report:
        return {"error": report["memory"]["compiler"]}
    memory = report["memory"]
    return {"arguments": memory["arguments"], "temporaries": memory["activations_and_temporaries"], **{
        name: report[name] for name in (
            "mesh", "cycles_by_part", "seconds", "versions", "collective_bytes", "collective_count",
            "largest_collectives", "matmul_flops", "kernel_flops", "kernels_without_flops", "data_dependent_loops",
            "without_cycle_estimate", "top_cycles", "model_flops_per_device")}}


def table(version: str, rows: dict[str, dict[str, Any]]) -> str:
    """Markdown of all variants that are there."""
    lines = [
        f"libtpu {version}", "",
        f"| step | arguments + temporaries, GiB | {COLLECTIVES} | "
        "TF of products + kernels | estimated cycles, 1e9: all | delta net and rule | attention | experts |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in (*OURS, *THEIRS):
        row = rows.get(name)
        if row is None or "error" in row:
            lines.append(f"| {name} | {row['error'] if row else 'not compiled'} |" + " |" * 10)
            continue
        cycles = row["cycles_by_part"]
        part = lambda *names: f"{sum(map(cycles.get, names)) / 1e9:.2f}"
        lines.append(
            f"| {name} | {row['arguments'] / GIB:.1f} + {row['temporaries'] / GIB:.1f} | "
            f"{collectives(row)} | "
            f"{row['matmul_flops'] / 1e12:.0f} + {row['kernel_flops'] / 1e12:.0f} | {sum(cycles.values()) / 1e9:.2f} | "
            f"{part('delta rule', 'delta net')} | {part('attention')} | {part('moe')} |")
    return "\n".join(lines) + "\n"


def main(_: list[str]) -> None:
    path = RESULTS / f"{aot.libtpu_version()}.json"
    rows = files.read_json(path) if path.exists() else {}
    for name in (*OURS, *THEIRS):
        if re.search(_VARIANTS.value, name):
            print(f"{name} ...", flush=True)
            rows[name] = ours(OURS[name]) if name in OURS else theirs(THEIRS[name])
            files.write_json(path, rows)
    tables = [table(version.stem, files.read_json(version)) for version in sorted(RESULTS.glob("*.json"))]
    files.write_text(RESULTS.with_suffix(".md"), "\n".join(tables))
    print("\n".join(tables))


if __name__ == "__main__":
    app.run(main)
