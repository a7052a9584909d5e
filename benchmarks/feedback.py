"""Claim: an agent that is told by tests that its edit is wrong tries another one.

    python benchmarks/feedback.py --workdir=runs/nano --config=configs/nano.py --models=sft,expert_swe --tasks=50
    python benchmarks/feedback.py --workdir=runs/experts_small --config=configs/experts_small.py --expert=web \
        --models=sft,expert_web --tasks=60 --samples=0 --baselines=solver,heuristic

Models of a finished run, and baselines, on held-out tasks: one greedy episode and `--samples` sampled ones a task.
By pipeline.experts.feedback: failing turns that tried what had failed before; whether the attempt behind a failure is
right, and whether any further one is, beside as many fresh attempts on the same tasks that were told nothing; and how
many more tasks all attempts resolve than the first. Each model acts once for every figure of `--redraws`
(config.evaluate.redraws). Prints a table, and writes JSON with `--out`.
"""

import dataclasses
import pathlib
import runpy
from collections.abc import Mapping
from typing import Any

from absl import app, flags

from qcn_jax import files
from qcn_jax.config import EvaluateConfig, RunConfig, from_config_dict
from qcn_jax.pipeline.context import Shared, StageContext
from qcn_jax.pipeline.evaluate.baseline import BASELINES
from qcn_jax.pipeline.models import load
from qcn_jax.pipeline.stages.evaluate import make_bench

WORKDIR = flags.DEFINE_string("workdir", None, "Of a run whose stages tasks and sft have finished.", required=True)
CONFIG = flags.DEFINE_string("config", "configs/nano.py", "File with get_config().")
MODELS = flags.DEFINE_list("models", ["sft"], "base, midtrain, sft, sft_control, expert_NAME, unified.")
TASKS = flags.DEFINE_integer("tasks", 50, "Held-out tasks.")
REDRAWS = flags.DEFINE_list("redraws", ["0", "16"], "For each model: how often a turn that repeats is drawn again.")
SAMPLES = flags.DEFINE_integer("samples", 8, "Sampled episodes a task.")
PLAYED = flags.DEFINE_list("baselines", ["heuristic"], "What plays without a model: heuristic, solver.")
EXPERT = flags.DEFINE_string("expert", "swe", "Whose tasks: swe, or web in a run with pages.")
SANDBOX = flags.DEFINE_string("sandbox", "local", "docker or local.")
OUT = flags.DEFINE_string("out", None, "JSON file to write.")
KEPT = ("resolved", "attempted", "rate", "ci95", "attempts", "mean_turns", "pass_at_1", "pass_at_8", "feedback")


def context_of(config: RunConfig, root: pathlib.Path) -> StageContext:
    """What stage `evaluate` would be given, for one expert alone."""
    evaluate: EvaluateConfig = dataclasses.replace(
        config.evaluate, tasks=TASKS.value, pass_k_tasks=TASKS.value, samples=SAMPLES.value)
    experts = dataclasses.replace(config.experts, names=(EXPERT.value,))
    config = dataclasses.replace(config, sandbox=SANDBOX.value, evaluate=evaluate, experts=experts)
    return StageContext(config, root, "evaluate", Shared(config, root))


def row(name: str, found: Mapping[str, Any]) -> str:
    """A model's line of the table."""
    curve = found["attempts"]
    greedy, sampled = found.get("feedback", {}).get("greedy"), found.get("feedback", {}).get("sampled")
    shown = [f"{found['resolved']}/{found['attempted']}", f"{curve[0]['rate']:.0%} -> {curve[-1]['rate']:.0%}"]
    for one in (greedy, sampled):
        shown.append("-" if one is None else f"repeated {one['repeated'] or 0:.0%}, gain {one['gain']:.1%}, next "
                     f"{_beside(one['next'])}, all {_beside(one['equal'])}")
    pass_1, pass_8 = found.get("pass_at_1"), found.get("pass_at_8")
    shown.append("" if pass_1 is None else f"sampled {pass_1:.1%}, pass@8 {pass_8:.1%}")
    return f"| {name} | {' | '.join(shown)} |"


def _beside(pair: Mapping[str, Any] | None) -> str:
    return "-" if pair is None else f"{pair['told']:.1%} told, {pair['fresh']:.1%} fresh"


def main(_: list[str]) -> None:
    """Measures and prints."""
    config = from_config_dict(RunConfig, runpy.run_path(CONFIG.value)["get_config"]())
    context = context_of(config, pathlib.Path(WORKDIR.value).absolute())
    results: dict[str, Any] = {}
    try:
        bench = make_bench(context)
        for name in PLAYED.value:
            results[name] = bench.baseline(BASELINES.resolve(name, "--baselines"))
        for name in MODELS.value:
            model = load(context, name, bench.parallel)
            for redraws in map(int, REDRAWS.value):
                bench.config = dataclasses.replace(bench.config, redraws=redraws)
                title = f"{name}, {redraws} redraws" if redraws else name
                results[title] = bench.model(name, *model)
                print(row(title, results[title]), flush=True)
    finally:
        context.shared.close()
    results = {name: {key: found[key] for key in KEPT if key in found} for name, found in results.items()}
    print("| model | resolved | by attempts | greedy | sampled | |\n|---|---|---|---|---|---|")
    for name, found in results.items():
        print(row(name, found))
    if OUT.value:
        files.write_json(pathlib.Path(OUT.value), {
            "command": f"feedback.py --config={CONFIG.value} --expert={EXPERT.value} --models={','.join(MODELS.value)} "
                       f"--tasks={TASKS.value} --samples={SAMPLES.value} --baselines={','.join(PLAYED.value)}",
            "temperature": context.config.evaluate.temperature, "models": results})


if __name__ == "__main__":
    app.run(main)
