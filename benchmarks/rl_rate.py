"""Claim: asynchronous updates grade more episodes a minute, and the device waits less for environments.

    qcn run --config=configs/nano.py --workdir=runs/nano            # tasks and an SFT policy, once
    python benchmarks/rl_rate.py --run=runs/nano [--updates=8] [--staleness=0,1] [--before=CHECKOUT]

Stage `experts` (swe) is run from one and the same SFT policy with every value of --staleness in turn, with the same
prompts, groups and limits, each in a copy of the run without remembered verdicts: every episode is graded by running
tests. Printed are episodes a minute and the share of rollouts' time in which nothing could be generated, both without
the first update, in which programs are compiled. Episodes whose patches are alike share a verdict, before and after:
`graded_per_minute` counts each verdict once (the share of the whole run's). With --before a checkout of commit 396fadd runs
the same stage from the same policy, by its own rules of grading. It noted no waiting; what it did not spend on updates it
spent on rollouts, which are `rollout` of the time.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from qcn_jax import files
from qcn_jax.errors import UserError

RUN = flags.DEFINE_string("run", None, "A finished run of configs/nano.py, or one with stages tasks to sft.", required=True)
CONFIG = flags.DEFINE_string("config", "configs/nano.py", "Its configuration.")
UPDATES = flags.DEFINE_integer("updates", 8, "Of every side.", lower_bound=2)
STALENESS = flags.DEFINE_list("staleness", ["0", "1"], "Values of max_staleness.")
SETTINGS = flags.DEFINE_list("settings", [], "Further settings of all sides, as experts.NAME=VALUE.")
BEFORE = flags.DEFINE_string("before", "", "Checkout of commit 396fadd; empty: none.")
OUT = flags.DEFINE_string("out", "", "JSON for what was measured; empty: none.")
NEEDED = ("tasks", "midtrain", "sft", "xla_cache")
ROOT = pathlib.Path(__file__).resolve().parent.parent


def copied(run: pathlib.Path, to: pathlib.Path) -> None:
    """What the stage needs of a run, and what its sandboxes have made, without verdicts."""
    for name in NEEDED:
        if (run / name).exists():
            shutil.copytree(run / name, to / name)
    if (run / "sandbox").exists():
        shutil.copytree(run / "sandbox", to / "sandbox", ignore=lambda folder, names: [n for n in names if "verdicts" in n])


def played(checkout: pathlib.Path, folder: pathlib.Path, settings: list[str]) -> dict[str, float]:
    """Runs the stage; returns what was measured of its updates but the first."""
    command = [sys.executable, "-m", "qcn_jax", "run", f"--config={checkout / CONFIG.value}", f"--workdir={folder}",
               "--stages=experts", *(f"--config.{setting}" for setting in settings)]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)}, capture_output=True,
                          text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    lines = (folder / "experts/swe/metrics.jsonl").read_text().splitlines()
    first, *rows = [json.loads(line) for line in lines]
    total = sum(row["episodes"] for row in rows)
    # 396fadd noted an update's own.
    own = "seconds_update" in first
    seconds = sum(row["seconds"] for row in rows) if own else rows[-1]["seconds"] - first["seconds"]
    waited = sum(row.get("seconds_waited", 0.0) for row in rows)
    mean = lambda name: sum(row.get(name, 0.0) for row in rows) / len(rows)
    known = {} if "seconds_waited" not in first else {"waited": waited / seconds}
    episodes = total + first["episodes"]
    verdicts = len((folder / "sandbox/verdicts.jsonl").read_text().splitlines())
    return known | {
        "episodes_per_minute": 60 * total / seconds, "graded_per_minute": 60 * total / seconds * verdicts / episodes,
        "seconds": seconds, "rollout": sum(row["seconds_rollout"] for row in rows) / seconds,
        "sampled_tokens": mean("sampled_tokens"),
        "turns": mean("turns"), "staleness": mean("staleness"), "reward": mean("reward"),
        "infrastructure": mean("infrastructure"), "wall": time.perf_counter() - began,
    }


def main(argv: list[str]) -> None:
    """Runs the sides and prints a line for each."""
    run, found = pathlib.Path(RUN.value), {}
    if not (run / "sft/DONE.json").exists():
        raise UserError(f"--run={run}: holds no finished stage sft")
    own = ["experts.names=swe", f"experts.updates={UPDATES.value}", *SETTINGS.value]
    sides = {f"staleness {value}": (ROOT, [*own, f"experts.max_staleness={value}"]) for value in STALENESS.value}
    if BEFORE.value:
        sides |= {"before": (pathlib.Path(BEFORE.value).resolve(), ["rl.experts=swe", f"rl.updates={UPDATES.value}"])}
    for name, (checkout, settings) in sides.items():
        with tempfile.TemporaryDirectory() as folder:
            copied(run, pathlib.Path(folder))
            found[name] = played(checkout, pathlib.Path(folder), settings)
        print(name, json.dumps({key: round(value, 3) for key, value in found[name].items()}), flush=True)
    if OUT.value:
        files.write_json(pathlib.Path(OUT.value), {"updates": UPDATES.value, "settings": SETTINGS.value, **found})


def _run(argv: list[str]) -> None:
    try:
        main(argv)
    except UserError as error:
        raise SystemExit(f"rl_rate: {error}") from error


if __name__ == "__main__":
    app.run(_run)
