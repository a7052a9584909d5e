"""Compiles the 80B model's steps for named TPU pods, and grows memory and compile time with length and depth.

    python benchmarks/pod_compile.py [--cases=REGEX] [--list] [--again]

Needs libtpu (pip install 'qcn_jax[compile]'), 9 GB of memory, and some minutes of two cores a case; no TPU. Each case
is one file in benchmarks/results/pod_compile/VERSION of the installed libtpu; a case whose file is there is not
compiled again, so that an interrupted run goes on where it stopped. At the end the tables of all versions are written
to results/pod_compile.md and printed, and growth of this version's, if any, drawn in pod_growth.svg. Everything is the
compiler's account (memory_analysis and the compiled text, loop trip counts applied); nothing is measured on a chip.
Kernels of attention and DeltaNet state no FLOPs, so that they are missing among the compiled ones.
"""

import dataclasses
import math
import pathlib
import re
from typing import Any

from _pod_step import COLLECTIVES, collectives, compile_step
from absl import app, flags

from qcn_jax import files
from qcn_jax.compile import aot

_CASES = flags.DEFINE_string("cases", ".", "regular expression of the cases to run")
_LIST = flags.DEFINE_bool("list", False, "only list them")
_AGAIN = flags.DEFINE_bool("again", False, "compile those anew whose result is there")
RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "pod_compile"
STAGES = ("midtrain", "sft", "experts", "distill")
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """One compilation: the config's argument, the stage, overrides, and how many slices."""

    name: str
    argument: str
    stage: str = "midtrain"
    overrides: tuple[str, ...] = ()
    slices: int = 1


def _cases() -> list[Case]:
    # The work of the published comparison: 8,192 tokens a device, bfloat16 weights, no master copy.
    moments = "midtrain.train.optimizer"
    bare = (f"{moments}.master_copy=false",)
    low = (*bare, f"{moments}.mu_dtype=bfloat16", f"{moments}.nu_dtype=bfloat16")
    cases = [
        Case("peer-v5p-float32-moments", "v5p-128,8k", overrides=bare),
        Case("peer-v5p-bfloat16-moments", "v5p-128,8k", overrides=low),
        Case("peer-v5p-capacity", "v5p-128,8k", overrides=(*bare, "mesh.dispatch=capacity")),
        Case("peer-v5e-float32-moments", "v5e-256,8k", overrides=bare),
        Case("peer-v6e-float32-moments", "v6e-256,8k", overrides=bare),
        Case("peer-tpu7x-float32-moments", "tpu7x-128,8k", overrides=bare),
    ]
    pods = ("v5p-128", "v5e-256", "v6e-256", "tpu7x-128")
    cases += [Case(f"{pod}-{stage}", f"{pod},32k", stage) for pod in pods for stage in STAGES]
    cases += [
        Case("v5p-128-midtrain-262k", "v5p-128,262k"),
        Case("v5p-512-midtrain-262k", "v5p-512,262k"),
        Case("v5p-128-two-slices", "v5p-128,8k", overrides=("mesh.data=2", "midtrain.train.rows=128"), slices=2),
    ]
    cases += [
        Case(f"length-{length}", "v5p-128,8k", overrides=(*bare, f"midtrain.train.sequence_length={length}"))
        for length in (1024, 2048, 4096, 8192, 16_384)
    ]
    cases += [
        Case(f"layers-{layers}", "v5p-128,8k", overrides=(*bare, f"model.num_hidden_layers={layers}"))
        for layers in (4, 12, 24, 36, 48)
    ]
    return cases


def table(cases: list[Case], results: pathlib.Path) -> str:
    """Markdown of all results in a version's folder."""
    lines = [
        f"libtpu {results.name}", "",
        f"| case | topology | mesh | tokens per device | arguments + temporaries, GiB of HBM | {COLLECTIVES} | "
        "TF compiled / model | estimated cycles, 1e9 | compilation, processor seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    path = lambda case: results / f"{case.name}.json"
    lines += [_row(case, files.read_json(path(case))) for case in cases if path(case).exists()]
    missing = [case.name for case in cases if not path(case).exists()]
    if missing:
        lines += ["", f"Not compiled: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _row(case: Case, report: dict[str, Any]) -> str:
    if "error" in report:
        return f"| {case.name} | | | | {report['error'][:160]} |" + " |" * 8
    memory = report["memory"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    topology = f"{report['slices']} x {report['topology']}" if report["slices"] > 1 else report["topology"]
    start = f"| {case.name} | {topology} | {mesh} | {report['tokens_per_device']:,.0f} |"
    if "seconds" not in report:
        return f"{start} does not fit: {memory['compiler'][:120]} |" + " |" * 8
    flops = (report["matmul_flops"] + report["kernel_flops"]) / 1e12
    verdict = "" if memory["fits"] else ", does not fit"
    return (f"{start} {memory['arguments'] / GIB:.1f} + {memory['activations_and_temporaries'] / GIB:.1f} of "
            f"{memory['hbm'] / GIB:.0f}{verdict} | {collectives(report)} | "
            f"{flops:.0f} / {report['model_flops_per_device'] / 1e12:.0f} | "
            f"{sum(report['cycles_by_part'].values()) / 1e9:.2f} | "
            f"{report['seconds'].get('compile_cpu', '-')} |")


def plot_growth(results: pathlib.Path, path: pathlib.Path) -> None:
    """Memory and compile time of the cases length-* and layers-* of a version's folder, as one SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    if not any(results.glob("length-*.json")) and not any(results.glob("layers-*.json")):
        return  # another version's drawing stays
    matplotlib.rcParams["svg.hashsalt"] = "qcn_jax"  # the same results, the same file
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col")
    for column, (kind, label) in enumerate((("length", "tokens in a row, one row a chip"), ("layers", "layers"))):
        found = {int(file.stem.split("-")[1]): files.read_json(file) for file in results.glob(f"{kind}-*.json")}
        reports = {point: report for point, report in found.items() if "seconds" in report}
        points = sorted(reports)
        memory = lambda name: [reports[point]["memory"][name] / GIB for point in points]
        top, bottom = panels[:, column]
        top.plot(points, memory("arguments"), "o-", label="arguments")
        top.plot(points, memory("activations_and_temporaries"), "s-", label="temporaries")
        # NaN, which draws nothing, for results from before processor time was kept.
        seconds = [reports[point]["seconds"].get("compile_cpu", math.nan) for point in points]
        bottom.plot(points, seconds, "o-", label="compilation, processor time")
        top.set_ylabel("GiB a chip")
        bottom.set(ylabel="seconds", xlabel=label, xticks=points)
        bottom.tick_params(axis="x", labelrotation=45)
        for panel in (top, bottom):
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
            panel.legend()
    figure.suptitle(f"80B step on v5p:4x4x4, compiled by libtpu {results.name}")
    figure.savefig(path, metadata={"Date": None})


def main(_: list[str]) -> None:
    cases = _cases()
    chosen = [case for case in cases if re.search(_CASES.value, case.name)]
    results = RESULTS / (aot.libtpu_version() or "none")
    for number, case in enumerate(chosen, 1):
        path = results / f"{case.name}.json"
        if _LIST.value or (path.exists() and not _AGAIN.value):
            print(f"{case.name}: {'there' if path.exists() else 'to be compiled'}")
            continue
        print(f"[{number}/{len(chosen)}] {case.name} ...", flush=True)
        report = compile_step(case.argument, case.stage, case.overrides, case.slices)
        files.write_json(path, report)
        print(report.get("error") or _row(case, report), flush=True)
    if not _LIST.value:
        tables = "\n".join(table(cases, folder) for folder in sorted(RESULTS.iterdir()))
        files.write_text(RESULTS.parent / "pod_compile.md", tables)
        plot_growth(results, RESULTS.parent / "pod_growth.svg")
        print(tables)


if __name__ == "__main__":
    app.run(main)
