"""Stage `evaluate`: every model of the run, the equal-time SFT control and the baseline, on held-out repositories.

Each measured model leaves `DIR/evaluate/models/<name>.json`, so a resumed stage measures only what is missing.
"""

import base64
import statistics
from typing import Any

from qcn_jax import files
from qcn_jax.envs.patches import PatchError
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.tasks.schema import PAGES
from qcn_jax.hub.description import ACTING_FILE
from qcn_jax.pipeline.context import StageContext
from qcn_jax.pipeline.evaluate import comparisons, settings
from qcn_jax.pipeline.evaluate.baseline import Baseline, baseline_of
from qcn_jax.pipeline.evaluate.bench import Bench, balanced
from qcn_jax.pipeline.experts import headline
from qcn_jax.pipeline.models import load
from qcn_jax.pipeline.train.metrics import read_metrics
from qcn_jax.pipeline.train.trainer import mesh_here
from qcn_jax.sharding import distributed

SHOWN = 10  # sample trajectories of the report


def run_stage(context: StageContext) -> dict[str, Any]:
    """Measures all models; returns their numbers, paired tests, retention, and what the sandboxes were."""
    bench, start = make_bench(context), context.start("evaluate")
    models: dict[str, dict[str, Any]] = {}

    def measured(name: str, measure, write=distributed.write_json) -> None:
        path = context.workdir / "models" / f"{name}.json"
        if not path.exists():
            write(path, measure())
        models[name] = files.read_json(path)

    baseline = baseline_of(context.config)
    if baseline is not None:
        with distributed.first_before_others(baseline.name):  # it plays on the first host, the others find its numbers
            measured(baseline.name, lambda: bench.baseline(baseline), files.write_json)
        models[f"{baseline.name}_once"] = first_guess(models[baseline.name])
    control = train_control(context) if has_control(context) else None
    for name in model_names(context):
        if name != "base" and distributed.is_first():  # it may have been trained under another configuration of this
            folder = context.model_path(name)
            acting = settings.of_run(context.config, context.root, folder)
            files.write_json(folder / ACTING_FILE, acting.to_json())
        measured(name, lambda name=name: bench.model(name, *load(context, name, bench.parallel)))
    if distributed.is_first():
        chosen = [with_screenshots(one, models, bench) for one in choose_trajectories(models, bench, baseline, start)]
        files.write_jsonl(context.workdir / "trajectories.jsonl", chosen)
    for model in models.values():
        model.pop("messages", None), model.pop("patches", None)
    results = {
        "models": models,
        "tests": comparisons.comparisons(models, bench.experts, baseline.name if baseline else "", start),
        "retention": comparisons.retention(models, bench.experts),
        "headroom": comparisons.headroom(models, bench.experts, start),
        "sandbox": context.provider().kind, "isolation": context.provider().describe(),
        "line": _line(models, headline(bench.experts).model),
    }
    return results | ({"control": control} if control else {})


def first_guess(baseline: dict[str, Any]) -> dict[str, Any]:
    """A baseline's numbers had it submitted its first guess: what needs neither a model nor test feedback."""
    return {key: value for key, value in baseline["attempts"][0].items() if key != "attempts"} | {"pass_at_8": None}


def model_names(context: StageContext) -> list[str]:
    """The initial model and those that this run trains, in the order of the report."""
    experts = [expert.model for expert in context.experts()]
    control = ["sft_control"] if has_control(context) else []
    stages = {"midtrain": "midtrain", "sft": "sft", "unified": "distill"}
    finished = {name for name, stage in stages.items() if (context.root / stage / "DONE.json").exists()}
    return [name for name in ("base", "midtrain", "sft", *control, *experts, "unified")
            if name not in stages or name in finished]


def has_control(context: StageContext) -> bool:
    """Whether there is an equal-time control; its time is the headline expert's."""
    return context.config.evaluate.sft_control


def make_bench(context: StageContext) -> Bench:
    """The bench over this run's held-out tasks."""
    config = context.config
    tasks = balanced(context.tasks("heldout"), config.evaluate.tasks, config.seed)
    return Bench(tasks, context.experts(), context.scaffold("evaluate"), context.templates(), config.evaluate,
                 context.encoder(), context.services(), context.seed, context.log,
                 mesh_here(config.mesh), config.heldout_templates)


def train_control(context: StageContext) -> dict[str, Any]:
    """Continues SFT for as many steps as take the time that the headline expert's reinforcement learning took.

    Both times are without compilation: the median update times the number of updates, and SFT's own median step.
    The number of steps is written down before training, so that a resumed run trains the same number.
    """
    from qcn_jax.pipeline.stages import sft

    done = context.workdir / "control.json"
    if done.exists():
        return files.read_json(done)
    plan_path = context.workdir / "control_plan.json"
    if not plan_path.exists():
        rows = read_metrics(context.root / "experts" / headline(context.experts()).name / "metrics.jsonl")
        # A process's first update compiles and has no time of its own; acting is the most of it.
        updates = [row["seconds_per_step"] or row["seconds_rollout"] for row in rows]
        target = statistics.median_low(updates) * len(updates)
        steps = max(1, round(target / context.result("sft")["seconds_per_step"]))
        distributed.write_json(plan_path, {"target_seconds": round(target, 2), "steps": steps})
    plan = files.read_json(plan_path)
    context.log(f"sft_control: {plan['steps']} steps, as long as {plan['target_seconds']:.1f} s of RL")
    trained = sft.train_control(context, plan["steps"], context.workdir / "sft_control")
    control = plan | {"seconds": trained["seconds"]}
    distributed.write_json(done, control)
    return control


def choose_trajectories(models: dict[str, dict[str, Any]], bench: Bench, baseline: Baseline | None, start: str = "sft"
                        ) -> list[dict[str, Any]]:
    """Conversations worth reading: first a recovery, then what reinforcement learning changed, then failures.

    Args:
      start: the model that reinforcement learning began from.
    """
    kinds = {task.instance_id: task.kind for task in (*bench.own_tasks().values(), *bench.tasks)}
    picks: list[tuple[str, str]] = []

    def turns(model: str, task: str) -> int:
        return sum(message["role"] == "assistant" for message in models[model]["messages"][task])

    best = headline(bench.experts).model
    solved, before = models[best]["solved"], models[start]["solved"]
    recovered = sorted((task for task in solved if solved[task]), key=lambda task: (-turns(best, task), task))
    gained = [task for task in recovered if not before.get(task, False)]
    picks += [(best, task) for task in recovered[:2]]
    for task in gained[:2]:
        picks += [(best, task), (start, task)]
    if "unified" in models:
        picks += [("unified", task) for task, ok in sorted(models["unified"]["solved"].items()) if ok][:1]
    picks += [(best, task) for task in sorted(solved) if not solved[task]][:2]
    if baseline is not None:
        picks += [(baseline.name, task) for task, ok in sorted(models[baseline.name]["solved"].items()) if ok][:1]
    return [{"model": model, "instance_id": task, "kind": kinds[task], "resolved": models[model]["solved"][task],
             "messages": models[model]["messages"][task]}
            for model, task in dict.fromkeys(picks) if task in models[model]["solved"]][:SHOWN]


def with_screenshots(one: dict[str, Any], models: dict[str, dict[str, Any]], bench: Bench) -> dict[str, Any]:
    """A chosen trajectory; of a page with `screenshots`, PNGs in base64 of its defect and of what was left."""
    task = next((task for task in bench.tasks if task.instance_id == one["instance_id"]), None)
    if task is None or task.language != PAGES or bench.services.screenshots is None:
        return one
    try:
        taken = bench.services.screenshots(task, models[one["model"]]["patches"][task.instance_id])
    except (SandboxError, PatchError) as error:
        bench.log(f"no screenshots of {task.instance_id}: {error}")
        return one
    return one | {"screenshots": [base64.b64encode(png).decode() for png in taken]}


def _line(models: dict[str, dict[str, Any]], expert: str) -> str:
    shown = [name for name in ("base", "midtrain", "sft", "sft_control", expert, "unified") if name in models]
    return "resolved " + ", ".join(f"{name} {models[name]['rate']:.1%}" for name in shown)
