"""Stage `report`: DIR/report/index.html, one self-contained page, and DIR/report/summary.json.

Only reads what the other stages left; a stage that has not finished leaves its section out, and the page says so.
"""

import platform
from typing import Any

from qcn_jax import files
from qcn_jax.pipeline.report import page
from qcn_jax.pipeline.context import StageContext
from qcn_jax.pipeline.train.metrics import read_metrics
from qcn_jax.pipeline.run import STAGES

SUMMARY_MODELS = ("base", "midtrain", "sft", "expert_swe", "expert_single_turn", "expert_tool_format", "unified")
_SUMMARY_FIELDS = ("resolved", "attempted", "rate", "ci95", "pass_at_8", "format_valid")
_TASK_FIELDS = ("train", "heldout", "candidates", "repos_train", "repos_heldout")


def run_stage(context: StageContext) -> dict[str, Any]:
    """Writes the report from what is there; returns where it is."""
    data = collect(context)
    folder = context.workdir
    files.write_json(folder / "summary.json", summary(data))
    files.write_text(folder / "index.html", page.render(data))
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
    for folder in sorted((context.root / "experts").glob("*/metrics.jsonl")):
        curves[f"experts/{folder.parent.name}"] = read_metrics(folder)
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


def summary(data: dict[str, Any]) -> dict[str, Any]:
    """The fixed form of summary.json, with further keys beside the fixed ones.

    A model that was not evaluated is absent; `pass_at_8` is null where fewer than 8 samples were drawn.
    """
    results = data["results"]
    tasks, evaluation = results.get("tasks", {}), results.get("evaluate", {})
    models = evaluation.get("models", {})
    return {
        "sandbox": evaluation.get("sandbox", tasks.get("sandbox")),
        "wall_seconds": round(sum(data["seconds"].values()), 1),
        "tasks": {field: tasks.get(field, [] if field.startswith("repos") else 0) for field in _TASK_FIELDS},
        "models": {name: {field: models[name].get(field) for field in _SUMMARY_FIELDS}
                   for name in SUMMARY_MODELS if name in models},
        "baselines": {name: {field: model.get(field) for field in _SUMMARY_FIELDS}
                      for name, model in models.items() if name not in SUMMARY_MODELS},
        "single_turn": {name: model["single_turn"] for name, model in models.items() if "single_turn" in model},
        "kinds": {name: model["kinds"] for name, model in models.items() if "kinds" in model},
        "attempts": {name: model["attempts"] for name, model in models.items() if "attempts" in model},
        "tests": evaluation.get("tests", {}),
        "retention": evaluation.get("retention", {}),
        "control": evaluation.get("control", {}),
        "yields": tasks.get("yields", {}),
        "stage_seconds": data["seconds"],
        "isolation": evaluation.get("isolation", ""),
        "machine": data["machine"],
    }


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)
