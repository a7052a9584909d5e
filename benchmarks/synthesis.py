"""Verified tasks at scale: candidates, kept, yield and seconds per kind; `qcn verify` and flakiness afterwards.

    python benchmarks/synthesis.py --out=bench/synthesis [--count=2000] [--workers=2] [--sample=0] [--reruns=3]

Makes tasks from the repositories below in one run (source distributions from PyPI, hashes checked). The run can be
killed at any time and given again: it continues from its journal. Held-out repositories of configs/ take no part. What
is printed also stands in OUT/summary.json. Processor seconds are those of the sandboxes' processes; wall seconds are
of this machine, busy or not.
"""

import collections
import pathlib
import platform
import resource
import subprocess
import sys
import time

from absl import app, flags

from qcn_jax import files
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.synthesis import plan, sources, statement, synthesize
from qcn_jax.envs.tasks.schema import write_tasks
from qcn_jax.recipes.nano import repositories

MORE = {
    "funcy==2.1": "8979feb3de7120afd1d00e5a8eae810c1942e4bfbc91697151e9ee1e49f79284",
    "humanize==4.17.0": "1d6a36c453dbfbb3f0b34601d2e0b4ce5d48d780305cd45714843f0068fde6ac",
}  # beside the training repositories of configs/
_OUT = flags.DEFINE_string("out", "bench/synthesis", "Folder of tasks, journal and summary.")
_COUNT = flags.DEFINE_integer("count", 2000, "Verified tasks wanted from injection; combinations come on top.")
_WORKERS = flags.DEFINE_integer("workers", 2, "Candidates side by side.")
_SANDBOX = flags.DEFINE_enum("sandbox", "auto", ["auto", "docker", "local"], "Where code runs.")
_SAMPLE = flags.DEFINE_integer("sample", 0, "Verify so many tasks, evenly spread; 0: all.")
_RERUNS = flags.DEFINE_integer("reruns", 3, "Runs of both states of each verified task, for the flaky rate.")
_VERIFY = flags.DEFINE_bool("verify", True, "Run `qcn verify` at the end.")


def table(summary: dict) -> str:
    """Markdown: what became of the candidates, and yield and cost by kind."""
    lines = [f"{summary['tasks']} tasks from {len(summary['repositories'])} repositories, {summary['candidates']} "
             f"candidates: {', '.join(f'{name} {count}' for name, count in summary['outcomes'].items())}", "",
             "| kind | candidates | kept | yield | seconds each | processor seconds each |", "|---|---|---|---|---|---|"]
    lines += [f"| {kind} | {row['candidates']} | {row['kept']} | {row['yield']:.0%} | {row['seconds']:.2f} | "
              f"{row['cpu_seconds']:.2f} |" for kind, row in summary["kinds"].items()]
    lines += ["", "| repository | tasks |", "|---|---|"]
    lines += [f"| {name} | {count} |" for name, count in summary["repositories"].items()]
    return "\n".join(lines) + "\n"


def main(argv):
    """Synthesizes, verifies, prints the tables."""
    del argv
    out = pathlib.Path(_OUT.value)
    known = [*repositories.pinned(*repositories.BASE), *(f"{name}#sha256={digest}" for name, digest in MORE.items())]
    settings = plan.Settings(target=_COUNT.value, statement_characters=statement.FULL, tests_may_tell=True,
                             held_out=True, candidates_per_repo=600, combined_per_repo=12)
    started, arguments = time.monotonic(), {"kind": _SANDBOX.value, "state_dir": str(out / "sandbox")}
    with EnvPool(_WORKERS.value, arguments) as pool:
        described = pool.describe()["description"]
        specs = [sources.locate(f"{name}#sha256={digest}") for name, digest in known.items()]
        result = synthesize.synthesize(pool, specs, settings, out, lambda line: print(line, flush=True))
    wall = time.monotonic() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    tasks, repeated = result.tasks, result.outcomes().get("near_duplicate", 0)
    write_tasks(out / "tasks.jsonl", tasks)
    executed = sum(row["seconds"] * row["candidates"] for row in result.yields().values())
    summary = {
        "machine": f"{platform.machine()}, {_WORKERS.value} workers, {described}", "tasks": len(tasks),
        "repositories": dict(collections.Counter(task.repo for task in tasks).most_common()),
        "left_out": result.skipped, "candidates": len(result.verdicts), "outcomes": result.outcomes(),
        "near_duplicates": repeated, "with_held_out_tests": sum(bool(task.held_out_patch) for task in tasks),
        "wall_seconds_of_this_start": round(wall, 1), "sandbox_seconds_all_starts": round(executed, 1),
        "cpu_seconds_of_children_of_this_start": round(used.ru_utime + used.ru_stime, 1),
        "kinds": result.yields(), "by_repository": result.repository_yields(),
    }
    files.write_json(out / "summary.json", summary)
    print(f"\n{summary['machine']}\n{len(tasks)} tasks from {len(summary['repositories'])} repositories, "
          f"{len(result.verdicts)} candidates, {wall:.0f} s; {repeated} near duplicates left out; "
          f"{summary['with_held_out_tests']} with held-out tests")
    files.write_text(out / "table.md", table(summary))
    print("\n" + table(summary))
    if not _VERIFY.value:
        return 0
    command = [sys.executable, "-m", "qcn_jax", "verify", f"--tasks={out / 'tasks.jsonl'}", f"--sample={_SAMPLE.value}",
               f"--reruns={_RERUNS.value}", f"--workers={_WORKERS.value}", f"--sandbox={_SANDBOX.value}",
               "--isolation=shared"]
    verified = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(verified.stdout)
    files.write_json(out / "summary.json", summary | {"verify": verified.stdout.strip().splitlines()[-3:]})
    return verified.returncode


if __name__ == "__main__":
    app.run(main)
