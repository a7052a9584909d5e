"""Compiles how the 80B model acts on named TPU pods: decode step, prefill chunk, change of layout, update; what fits, what moves.

    python benchmarks/rollout_compile.py [--cases=REGEX] [--again]

Needs libtpu (pip install 'qcn_jax[compile]'), 9 GB of memory and some ten minutes of a core a case; no TPU. Each case is one
file in benchmarks/results/rollout_compile/VERSION of the installed libtpu; one whose file is there is not compiled again.
The table of all versions is written to results/rollout_compile.md. Everything is the compiler's account, nothing is
measured on a chip: bytes of the compiled programs, exchanges counted in their text. Kernels state no bytes, so that the
floor is arithmetic: weights, states read and written, and keys and values of full slots, over the chip's bandwidth.
"""

import pathlib
import re
from typing import Any

from _pod_step import compile_step
from absl import app, flags

from qcn_jax import files
from qcn_jax.compile import aot
from qcn_jax.sharding.chips import HOP_SECONDS

_CASES = flags.DEFINE_string("cases", ".", "regular expression of the cases to compile")
_AGAIN = flags.DEFINE_bool("again", False, "compile those anew whose result is there")
RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "rollout_compile"
# By name: pod, and what its configuration is changed by. "in blocks": more sequences than lanes, in one budget.
CASES = {
    "v5p-128": ("v5p-128", ()),
    "v5p-128 in blocks": ("v5p-128", ("experts.rollout.slots=1536", "experts.rollout.max_num_seqs=1024",
                                      "experts.rollout.block_size=128")),
    "v6e-256": ("v6e-256", ()),
    "tpu7x-128": ("tpu7x-128", ()),
    "v5e-256": ("v5e-256", ()),
}
GIB, MS, LENGTH = 2**30, 1e-3, "65536"


def table(results: pathlib.Path) -> str:
    """Markdown of all results in a version's folder."""
    lines = [
        f"libtpu {results.name}", "",
        "| pod | slots of 64k | open sequences of 8k / 64k / 262k, whichever program runs (64k beside decode, prefill, change of layout, update) | decode: weights + keys and values + "
        "states + temporaries, GiB of HBM | floor, GB, ms | exchanges, GB, ms of links + of a hop each, share of the floor | decode, cycles | prefill, "
        "cycles a token | change of layout, GB moved |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(case, files.read_json(path)) for case in CASES if (path := _file(results, case)).exists()]
    return "\n".join(lines) + "\n"


def _file(results: pathlib.Path, case: str) -> pathlib.Path:
    return results / f"{case.replace(' ', '_')}.json"


def _row(pod: str, report: dict[str, Any]) -> str:
    if "error" in report:
        return f"| {pod} | {report['error'][:200]} |" + " |" * 7
    decode, prefill, arrange = (report["programs"][name] for name in ("decode", "prefill", "arrange"))
    kinds = decode["memory"]["arguments_by_kind"]
    gib = lambda size: f"{size / GIB:.1f}"
    held = " + ".join(gib(kinds.get(kind, 0)) for kind in ("weights", "keys and values", "states"))
    cycles = lambda program: sum(program["cycles_by_part"].values())
    fit = " / ".join(f"{count:,}" for count in report["sequences"].values())
    if "sequences_by_program" in report:
        fit += f" ({', '.join(f'{counts[LENGTH]:,}' for counts in report['sequences_by_program'].values())})"
    floor, links = report["floor"], report["links"]
    latency = links["count"] * HOP_SECONDS
    return (f"| {pod} | {report['slots']:,} | {fit} | {held} + {gib(decode['memory']['activations_and_temporaries'])} of "
            f"{gib(decode['memory']['hbm'])} | {floor['bytes'] / 1e9:.1f}, {floor['seconds'] / MS:.1f} | "
            f"{links['count']:,}, {links['bytes'] / 1e9:.3f}, {links['seconds'] / MS:.2f} + {latency / MS:.2f}, "
            f"{(links['seconds'] + latency) / floor['seconds']:.0%} | {cycles(decode) / 1e6:.1f}e6 | "
            f"{cycles(prefill) / report['prefill_tokens']:,.0f} | "
            f"{sum(arrange['collective_bytes'].values()) / 1e9:.1f} |")


def main(_: list[str]) -> None:
    results = RESULTS / (aot.libtpu_version() or "none")
    for case in filter(re.compile(_CASES.value).search, CASES):
        path = _file(results, case)
        if path.exists() and not _AGAIN.value:
            print(f"{case}: there")
            continue
        print(f"{case} ...", flush=True)
        report = compile_step(CASES[case][0], "rollout", CASES[case][1])
        files.write_json(path, report)
        print(_row(case, report), flush=True)
    tables = "\n".join(table(folder) for folder in sorted(RESULTS.iterdir()))
    files.write_text(RESULTS.parent / "rollout_compile.md", tables)
    print(tables)


if __name__ == "__main__":
    app.run(main)
