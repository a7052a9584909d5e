"""Stage `report`: DIR/report/index.html, one self-contained page, and DIR/report/summary.json.

Only reads what the other stages left; a stage that has not finished leaves its section out, and the page says so.
"""

import platform
from collections.abc import Sequence
from typing import Any

from qcn_jax import files
from qcn_jax.pipeline.context import StageContext
from qcn_jax.pipeline.evaluate.baseline import baseline_of
from qcn_jax.pipeline.experts.expert import Expert
from qcn_jax.pipeline.report import page
from qcn_jax.pipeline.rl import ledger
from qcn_jax.pipeline.run import STAGES
from qcn_jax.pipeline.train.metrics import read_metrics

_SUMMARY_FIELDS = ("resolved", "attempted", "rate", "ci95", "pass_at_8")
_TASK_FIELDS = ("train", "heldout", "candidates", "repos_train", "repos_heldout")


def run_stage(context: StageContext) -> dict[str, Any]:
    """Writes the report from what is there; returns where it is."""
    data = collect(context)
    folder, experts, baseline = context.workdir, context.experts(), baseline_of(context.config)
    files.write_json(folder / "summary.json", summary(data, experts))
    files.write_text(folder / "index.html", page.render(data, experts, baseline))
    return {"line": str(folder / "index.html"), "missing_stages": data["missing"]}


def collect(context: StageContext) -> dict[str, Any]:
    """Everything the page shows, as plain JSON-like data: stage results, curves, sample trajectories."""
    done, missing = {}, []
    for stage in STAGES:
        path = context.root / stage / "DONE.json"
        if stage != "report" and path.exists():
            done[stage] = files.read_json(path)
        elif stage != "report":
            missing.append(stage)
    curves = {name: read_metrics(context.root / name / "metrics.jsonl") for name in ("midtrain", "sft", "distill")}
    for expert in context.experts():
        curves[f"experts/{expert.name}"] = read_metrics(context.root / "experts" / expert.name / "metrics.jsonl")
    trajectories = context.root / "evaluate" / "trajectories.jsonl"
    return {
        "name": context.config.name,
        "results": {stage: value["results"] for stage, value in done.items()},
        "seconds": {stage: value["seconds"] for stage, value in done.items()},
        "missing": missing,
        "curves": {name: rows for name, rows in curves.items() if rows},
        "trajectories": files.read_jsonl(trajectories) if trajectories.exists() else [],
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, "
                   f"jax {_version('jax')}",
    }


def summary(data: dict[str, Any], experts: Sequence[Expert]) -> dict[str, Any]:
    """The fixed form of summary.json, with further keys beside the fixed ones and one for each further expert.

    A model that was not evaluated is absent; `pass_at_8` is null where fewer than 8 samples were drawn.
    """
    results = data["results"]
    tasks, evaluation = results.get("tasks", {}), results.get("evaluate", {})
    models = evaluation.get("models", {})
    trained = ("base", "midtrain", "sft", *(expert.model for expert in experts), "unified")
    fields = (*_SUMMARY_FIELDS, *(field for expert in experts for field in expert.summary))
    return {
        "sandbox": evaluation.get("sandbox", tasks.get("sandbox")),
        "wall_seconds": round(sum(data["seconds"].values()), 1),
        "tasks": {field: tasks.get(field, [] if field.startswith("repos") else 0) for field in _TASK_FIELDS},
        "models": {name: {field: models[name].get(field) for field in fields} for name in trained if name in models},
        "baselines": {name: {field: model.get(field) for field in fields}
                      for name, model in models.items() if name not in trained},
        **{expert.name: {name: model[expert.name] for name, model in models.items() if expert.name in model}
           for expert in experts if not expert.headline or any(expert.name in model for model in models.values())},
        "kinds": {name: model["kinds"] for name, model in models.items() if "kinds" in model},
        "attempts": {name: model["attempts"] for name, model in models.items() if "attempts" in model},
        "feedback": {name: model["feedback"] for name, model in models.items() if "feedback" in model},
        "causes": {name.partition("/")[2]: found for name, rows in data["curves"].items()
                   if name.startswith("experts/") and (found := ledger.over_updates(rows))},
        "tests": evaluation.get("tests", {}),
        "retention": evaluation.get("retention", {}),
        "headroom": evaluation.get("headroom", {}),
        "control": evaluation.get("control", {}),
        "yields": tasks.get("yields", {}),
        "tasks_made": tasks.get("made", {}),
        "stage_seconds": data["seconds"],
        "isolation": evaluation.get("isolation", ""),
        "machine": data["machine"],
    }


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)
