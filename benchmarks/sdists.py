"""How many source distributions, drawn from a list of names, give tasks as they are; and for each other the reason.

    python benchmarks/sdists.py --out=bench/sdists [--count=30] [--seed=22] [--candidates=12] [--seconds=300]

The list is sdists.txt: packages without dependencies, in Python alone, of which none was tried before it was written. Each
drawn one is given to `qcn synthesize` in a process of its own, without any option about the repository. A repository
that has its result in OUT is not run again. `--draw` only prints the names.
"""

import json
import pathlib
import random
import resource
import subprocess
import sys
import time

from absl import app, flags

_OUT = flags.DEFINE_string("out", "bench/sdists", "Folder of tasks and results.")
_COUNT = flags.DEFINE_integer("count", 30, "How many are drawn.")
_SEED = flags.DEFINE_integer("seed", 22, "Of the draw.")
_CANDIDATES = flags.DEFINE_integer("candidates", 12, "Candidates tried of each repository.")
_SECONDS = flags.DEFINE_float("seconds", 300.0, "Wall seconds after which a repository is given up.")
_SANDBOX = flags.DEFINE_enum("sandbox", "local", ["auto", "docker", "local"], "Where code runs.")
_DRAW = flags.DEFINE_bool("draw", False, "Print the names and stop.")
_LIST = pathlib.Path(__file__).with_suffix(".txt")


def drawn(count: int, seed: int) -> list[str]:
    """`count` requirements of the list, in the order of the draw."""
    names = [line for line in _LIST.read_text().splitlines() if line and not line.startswith("#")]
    return random.Random(seed).sample(names, count)


def attempt(requirement: str, out: pathlib.Path) -> dict:
    """What `qcn synthesize` makes of one repository: tasks, seconds and its last words."""
    path = out / f"{requirement}.jsonl"
    command = [sys.executable, "-m", "qcn_jax", "synthesize", f"--repo={requirement}", f"--out={path}",
               f"--candidates_per_repo={_CANDIDATES.value}", f"--sandbox={_SANDBOX.value}", "--noheld_out", "--workers=1"]
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS.value, check=False)
        words = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    except subprocess.TimeoutExpired:
        words = [f"{requirement}: given up after {_SECONDS.value:.0f} s"]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    tasks = len(path.read_text().splitlines()) if path.exists() else 0
    outcomes = [line for line in words if line.startswith("outcomes: ")]
    reason = next((line for line in reversed(words) if requirement in line and str(path) not in line), "")
    return {"tasks": tasks, "seconds": round(time.monotonic() - started, 1), "words": words[-20:],
            "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
            "reason": "" if tasks else "; ".join([reason or words[-1], *outcomes])}


def main(argv):
    """Tries all, prints a table."""
    del argv
    names = drawn(_COUNT.value, _SEED.value)
    if _DRAW.value:
        print("\n".join(names))
        return
    out = pathlib.Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    rows = {}
    for requirement in names:
        known = out / f"{requirement}.json"
        if not known.exists():
            known.write_text(json.dumps(attempt(requirement, out), indent=1))
        row = rows[requirement] = json.loads(known.read_text())
        print(f"| {requirement} | {row['tasks']} | {row['seconds']} | {row['reason']} |", flush=True)
    print(f"\n{sum(bool(row['tasks']) for row in rows.values())} of {len(rows)} give tasks; "
          f"{sum(row['cpu_seconds'] for row in rows.values()):.0f} processor seconds")


if __name__ == "__main__":
    app.run(main)
