"""Measures how many tasks a checkpoint, or patches that were made elsewhere, resolve.

  qcn evaluate --checkpoint=runs/nano/distill/model --tasks=runs/nano/tasks/heldout.jsonl --out=DIR
  qcn evaluate --predictions=preds.jsonl --tasks=tasks.jsonl --out=DIR

Predictions are SWE-bench's: JSON objects with instance_id, model_name_or_path and model_patch, one a line, in a list or by
id (preds.json of SWE-agent and mini-swe-agent). A checkpoint acts with --scaffold, greedy, one episode a task; its
patches are written to DIR/preds.jsonl and graded in the same way. Tasks in the form of SWE-bench's release 5 (with image, eval_script, log_parser) are run in their images and
graded from their logs by SWE-bench's rules; that needs Docker. Every patch is graded in a fresh sandbox that its author
never saw. DIR holds SWE-bench's run report (MODEL.qcn.json), a report.json for each task, and summary.json with the
resolved rate and its 95 % interval. Rows that cannot be read are named, left out and counted (bad_rows).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tqdm
from absl import flags

from qcn_jax import files
from qcn_jax.agents.scaffolds import SCAFFOLDS
from qcn_jax.cli import parsing, task_repositories
from qcn_jax.config import MeshConfig
from qcn_jax.envs.sandbox import RepositorySpec, SandboxError, make_provider
from qcn_jax.envs.tasks import formats, swebench
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.tasks.verdicts import Verdict, write_reports
from qcn_jax.errors import UserError

if TYPE_CHECKING:
    from qcn_jax.envs.pool.env_pool import EnvPool


def main(argv: Sequence[str]) -> int:
    """Parses flags, obtains patches, grades them, writes and prints the report."""
    values = flags.FlagValues()
    flags.DEFINE_string("tasks", None, "Tasks as JSONL in SWE-bench's schema.", flag_values=values, required=True)
    flags.DEFINE_string("out", None, "Folder for the report.", flag_values=values, required=True)
    flags.DEFINE_string("checkpoint", None, "Folder with weights in Hugging Face form and tokenizer.json.",
                        flag_values=values)
    flags.DEFINE_string("predictions", None, "Predictions as JSON lines, a JSON list or JSON by id.", flag_values=values)
    task_repositories.define(values)
    flags.DEFINE_enum("sandbox", "auto", ["auto", "docker", "local"], "Where code runs.", flag_values=values)
    flags.DEFINE_enum("isolation", "container", ["container", "shared"],
                      "A fresh container for each grading, or warm ones with a fresh workspace.", flag_values=values)
    flags.DEFINE_enum("pool", "process", ["process", "ray"], "Workers on this machine or in a Ray cluster.",
                      flag_values=values)
    flags.DEFINE_string("ray_address", "", "Of the cluster; by default RAY_ADDRESS.", flag_values=values)
    flags.DEFINE_float("timeout", swebench.TIMEOUT, "Seconds for the tests of a task that has an image of its own.",
                       flag_values=values, lower_bound=1.0)
    flags.DEFINE_integer("workers", 2, "Gradings side by side.", flag_values=values, lower_bound=1)
    flags.DEFINE_string("scaffold", "nano", "How tasks are shown to the checkpoint: a name or package.module:OBJECT.",
                        flag_values=values)
    flags.DEFINE_integer("max_turns", 8, "Turns of an episode.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 64, "Tokens of a turn.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("max_length", 1024, "Tokens of an episode.", flag_values=values, lower_bound=16)
    flags.DEFINE_integer("slots", 32, "Episodes side by side.", flag_values=values, lower_bound=1)
    mesh = parsing.define_mesh(values)
    parsing.parse(values, "evaluate", __doc__, argv)
    if bool(values.checkpoint) == bool(values.predictions):
        raise UserError("give either --checkpoint=DIR or --predictions=FILE")
    SCAFFOLDS.resolve(values.scaffold, "--scaffold")
    files.check_folder(values.out, "out")
    faults: list[str] = []
    instances = swebench.read(values.tasks, faults)
    if instances is None:
        faults = []  # of the same rows as tasks of our own
    tasks = {task.instance_id: task for task in formats.read(values.tasks, faults if instances is None else [])
             if instances is None or task.instance_id in instances}
    if not tasks:
        raise UserError(faults[0] if faults else f"--tasks={values.tasks}: holds no task")
    if instances and values.checkpoint:
        raise UserError(f"--checkpoint: the tasks of {values.tasks} have images of their own; give --predictions=FILE")
    found = (_evaluate(values, tasks, faults, mesh()) if instances is None
             else _evaluate_images(values, tasks, faults, instances))
    print(json.dumps(found, indent=1))
    return 0


def _evaluate_images(values: flags.FlagValues, tasks: Mapping[str, Task], faults: list[str],
                     instances: Mapping[str, swebench.Instance]) -> dict[str, Any]:
    """SWE-bench's own instances: verdicts from logs of runs in their images."""
    rows = _predictions(values.predictions, tasks, faults)
    pairs = [(row.instance_id, row.patch) for row in rows]
    with tqdm.tqdm(total=len(rows), desc="grading", unit="task", file=sys.stderr) as bar:
        verdicts = swebench.evaluate(instances, pairs, values.workers, values.out, bar.update, values.timeout)
    return _report(values, tasks, rows, verdicts, "docker", faults)


def _evaluate(values: flags.FlagValues, tasks: Mapping[str, Task], faults: list[str],
              mesh: MeshConfig | None) -> dict[str, Any]:
    """Patches, verdicts, reports; returns what is printed."""
    from qcn_jax.envs.pool.env_pool import make_pool

    out = pathlib.Path(values.out)
    if values.predictions:  # what ends all is named before anything is downloaded
        _predictions(values.predictions, tasks, [])
    specs = task_repositories.find(values, [task for task in tasks.values() if not task.eval_script], faults)
    found = {spec.name for spec in specs}
    tasks = {name: task for name, task in tasks.items() if task.eval_script or task.repo in found}
    if not tasks:
        raise UserError(faults[0])
    arguments = {"kind": values.sandbox, "isolation": values.isolation,
                 "state_dir": str(files.cache_folder("sandbox"))}
    with make_pool(values.pool, values.workers, arguments, specs, ray_address=values.ray_address) as pool:
        sandbox = pool.describe()  # or says why there is none
        path = values.predictions or out / "preds.jsonl"
        if values.checkpoint:
            files.write_jsonl(path, _act(values, list(tasks.values()), specs, pool, arguments, mesh))
        rows = _predictions(path, tasks, faults)
        with tqdm.tqdm(total=len(rows), desc="grading", unit="task", file=sys.stderr) as bar:
            verdicts = _grade(rows, tasks, pool, values.workers, bar.update)
    return _report(values, tasks, rows, verdicts, sandbox["kind"], faults)


def _predictions(path: str | pathlib.Path, tasks: Mapping[str, Task], faults: list[str]) -> list[Any]:
    """The predictions of a file; its faults are added to `faults`, or raised where no row is left."""
    from qcn_jax.pipeline.evaluate import predictions

    found: list[str] = []
    rows = predictions.read_predictions(path, tasks, found)
    if found and not rows:
        raise UserError(found[0])
    faults += found
    return rows


def _grade(rows: Sequence[Any], tasks: Mapping[str, Task], pool: EnvPool, workers: int,
           update: Callable[[], Any]) -> list[Verdict]:
    """Verdicts in the order of `rows`: by the pool, or for tasks with a script and an image of their own in that."""
    from qcn_jax.pipeline.evaluate import predictions

    own = [row for row in rows if not tasks[row.instance_id].eval_script]
    found = {verdict.instance_id: verdict for verdict in predictions.grade(own, tasks, pool, lambda _: update())}
    foreign = [row for row in rows if row.instance_id not in found]
    if foreign:
        from qcn_jax.envs.synthesis.build.container import engine
        from qcn_jax.envs.synthesis.languages import grade

        client = engine()

        def one(row: Any) -> Verdict:
            try:
                verdict = grade.grade(client, tasks[row.instance_id], row.patch)
            except (SandboxError, UserError) as error:  # with the patch and without it
                verdict = Verdict(row.instance_id, "infrastructure", detail=str(error))
            update()
            return verdict

        with concurrent.futures.ThreadPoolExecutor(workers) as threads:
            found.update((verdict.instance_id, verdict) for verdict in threads.map(one, foreign))
    return [found[row.instance_id] for row in rows]


def _report(values: flags.FlagValues, tasks: Mapping[str, Task], rows: Sequence[Any], verdicts: Sequence[Any],
            sandbox: str, faults: Sequence[str]) -> dict[str, Any]:
    """Writes SWE-bench's reports and the summary, names rows that were left out; returns the summary."""
    from qcn_jax.pipeline.evaluate import predictions

    model = rows[0].model if rows else "none"
    write_reports(values.out, "qcn", model, verdicts, [row.instance_id for row in rows], list(tasks))
    for fault in faults:
        print(fault, file=sys.stderr)
    summary = {"model": model, "sandbox": sandbox, **predictions.resolved_rate(tasks, verdicts),
               "bad_rows": len(faults)}
    files.write_json(pathlib.Path(values.out) / "summary.json", summary)
    return summary


def _act(values: flags.FlagValues, tasks: Sequence[Task], specs: Sequence[RepositorySpec], pool: EnvPool,
         provider_arguments: Mapping[str, Any], mesh: MeshConfig | None) -> list[dict[str, str]]:
    """Lets the checkpoint work on the tasks; returns predictions."""
    from qcn_jax.chat.encoder import ChatEncoder
    from qcn_jax.chat.tokenizer import Tokenizer
    from qcn_jax.config import EvaluateConfig, RolloutConfig
    from qcn_jax.inference.checkpoint import load_to_act
    from qcn_jax.pipeline.evaluate.bench import Bench
    from qcn_jax.pipeline.experts.expert import Expert
    from qcn_jax.pipeline.experts.services import check_shell, pool_services

    scaffold = SCAFFOLDS.resolve(values.scaffold, "--scaffold")
    limits = RolloutConfig(max_turns=values.max_turns, max_new_tokens=values.max_new_tokens,
                           max_length=values.max_length, slots=values.slots)
    encoder = ChatEncoder(Tokenizer.from_folder(values.checkpoint))
    model, params, parallel = load_to_act(values.checkpoint, mesh)
    with contextlib.closing(make_provider(**provider_arguments)) as provider:
        check_shell(scaffold, provider, "--scaffold")
        services = pool_services({spec.name: spec for spec in specs}, provider, pool)
        bench = Bench(tasks, [Expert("agent", "agent", headline=True)], scaffold, (), EvaluateConfig(rollout=limits),
                      encoder, services, 0, print, parallel)
        patches = bench.patches(model, params)
    return [{"instance_id": task.instance_id, "model_name_or_path": values.checkpoint, "model_patch": patch}
            for task, patch in patches]
