"""Claim: reinforcement learning makes an agent better than the SFT model, and than as many minutes of imitation do.

    python benchmarks/rl_seeds.py --sft=runs/nano --workdir=runs/seeds --config=configs/nano.py

Stages experts (swe alone) and evaluate of a run whose SFT has finished, once for every one of `--seeds`: reinforcement
learning, its control and all draws are repeated, tasks and the SFT model are not. Prints, and writes with `--out`, for
expert against SFT and against the control, greedy and sampled: pairs of all seeds, McNemar's exact test over them, and a
sign-flip test over the tasks' means, since the pairs of a task are not independent; and what the models make of failing
tests. What is behind `--` goes to `qcn run`. Interrupted, it resumes.
"""

import hashlib
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
from absl import app, flags

from qcn_jax import files, statistics
from qcn_jax.cli import parsing
from qcn_jax.pipeline.context import Shared, StageContext
from qcn_jax.pipeline.models import load
from qcn_jax.pipeline.stages.evaluate import make_bench, train_control

SFT = flags.DEFINE_string("sft", None, "Run whose stages tasks, midtrain and sft have finished.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Gets a run for each seed.", required=True)
CONFIG = flags.DEFINE_string("config", "configs/nano.py", "File with get_config().")
SEEDS = flags.DEFINE_list("seeds", ["1", "2", "3"], "At least 1 each.")
OUT = flags.DEFINE_string("out", None, "JSON file to write.")
STAGES = ("tasks", "midtrain", "sft")
PAIRS = (("expert_swe", "sft"), ("expert_swe", "sft_control"), ("sft_control", "sft"))


def repeat(seed: str, further: list[str]) -> dict[str, Any]:
    """Numbers of the models by name, of one seed."""
    root = pathlib.Path(WORKDIR.value).absolute() / seed
    for stage in STAGES:
        if not (root / stage).exists():
            shutil.copytree(pathlib.Path(SFT.value) / stage, root / f"{stage}.copied")
            (root / f"{stage}.copied").rename(root / stage)
    given = ["--config.experts.names=swe", f"--config.experts.seed={seed}", f"--config.evaluate.seed={seed}", *further]
    given = [f"--config={CONFIG.value}", *given]
    subprocess.run([sys.executable, "-m", "qcn_jax", "run", f"--workdir={root}", "--stages=experts", *given], check=True)
    values = flags.FlagValues()
    configured = parsing.define_config(values, given)
    parsing.parse(values, "run", __doc__, given)
    config = configured()
    context = StageContext(config, root, "evaluate", Shared(config, root))
    found, names = {}, ("sft", *["sft_control"] * config.evaluate.sft_control, "expert_swe")
    try:
        bench = None
        for name in names:
            path = context.workdir / "models" / f"{name}.json"
            if not path.exists():
                bench = bench or make_bench(context)
                if name == "sft_control":
                    train_control(context)
                files.write_json(path, bench.model(name, *load(context, name, bench.parallel)))
            found[name] = files.read_json(path)
    finally:
        context.shared.close()
    return found


def sft_hash() -> str:
    """SHA-256 of the SFT model's weights, of which every seed has a copy."""
    digest = hashlib.sha256()
    for path in sorted((pathlib.Path(SFT.value) / "sft" / "model").glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def share(model: dict[str, Any], task: str, sampled: bool) -> float | None:
    """How much of a task a model resolves, greedily 0 or 1; None where it was not played."""
    if not sampled:
        return None if task not in model["solved"] else float(model["solved"][task])
    solved, tries = (model.get("sampled_solved") or {}).get(task, (0, 0))
    return solved / tries if tries else None


def compare(runs: list[dict[str, Any]], first: str, second: str, sampled: bool) -> dict[str, Any]:
    """Two models over the pairs (task, seed) that both have."""
    by_task: dict[str, list[tuple[float, float]]] = {}
    for models in runs:
        for task in models[first]["solved"]:
            one, other = (share(models[name], task, sampled) for name in (first, second))
            if one is not None and other is not None:
                by_task.setdefault(task, []).append((one, other))
    pairs = [pair for found in by_task.values() for pair in found]
    more, less = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    return {
        "first": first, "second": second, "sampled": sampled, "pairs": len(pairs), "tasks": len(by_task),
        "rates": [round(float(np.mean([pair[i] for pair in pairs])), 6) for i in (0, 1)],
        "only_first": more, "only_second": less, "p_exact": statistics.sign_test(more, less),
        "p_tasks": statistics.sign_flip_test([float(np.mean([a - b for a, b in found])) for found in by_task.values()]),
        "by_seed": [round(float(np.mean([one - other for task in models[first]["solved"] if None not in (
            one := share(models[first], task, sampled), other := share(models[second], task, sampled))])), 6)
            for models in runs],
    }


def main(args: list[str]) -> None:
    """Repeats, compares and prints."""
    runs = [repeat(seed, args[1:]) for seed in SEEDS.value]
    pairs = [pair for pair in PAIRS if set(pair) <= runs[0].keys()]
    found = [compare(runs, *pair, sampled) for pair in pairs for sampled in (False, True)]
    print("| pair | | pairs | rates | only first / second | p, pairs | p, tasks | by seed |\n" + "|---" * 8 + "|")
    for one in found:
        print(f"| {one['first']} against {one['second']} | {'sampled' if one['sampled'] else 'greedy'} | {one['pairs']} | "
              f"{one['rates'][0]:.1%}, {one['rates'][1]:.1%} | {one['only_first']} / {one['only_second']} | "
              f"{one['p_exact']:.2g} | {one['p_tasks']:.2g} | {', '.join(f'{x:+.1%}' for x in one['by_seed'])} |")
    feedback = {seed: {name: model.get("feedback") for name, model in models.items()}
                for seed, models in zip(SEEDS.value, runs)}
    if OUT.value:
        files.write_json(pathlib.Path(OUT.value), {
            "command": f"rl_seeds.py --config={CONFIG.value} --seeds={','.join(SEEDS.value)} -- {' '.join(args[1:])}",
            "sft": sft_hash(), "comparisons": found, "feedback": feedback})


if __name__ == "__main__":
    app.run(main)
