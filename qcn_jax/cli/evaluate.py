"""Measures how many tasks a checkpoint, a model behind an endpoint, or patches that were made elsewhere, resolve.

  qcn evaluate --endpoint=http://localhost:8000/v1 --model=NAME --tasks=tasks.jsonl --scaffold=mini_swe_agent --out=DIR
  qcn evaluate --checkpoint=runs/nano/distill/model --out=DIR
  qcn evaluate --predictions=preds.jsonl --tasks=tasks.jsonl --out=DIR
  qcn evaluate --repo=. --endpoint=URL --model=NAME --model=OTHER --out=DIR

Whoever acts plays --attempts episodes a task with --scaffold; all are written down as they end, and the same command
goes on after a kill. A model within the folder of a run acts as that run let it (scaffold, limits, sampling), without
--tasks on the tasks that it measured its models on; flags that are given come first. An endpoint that is busy, fails or
breaks off is asked again. First the tasks themselves are executed: their gold patches must resolve them, and nothing
must not. Predictions are SWE-bench's: one JSON object a
line with instance_id, model_name_or_path and model_patch, a list of them, or mini-swe-agent's object by id.

Tasks in the form of SWE-bench's release 5 (with image, eval_script, log_parser) are acted on and run in their images,
and graded from their logs by SWE-bench's rules; Harbor's task folders (Terminal-Bench) in the images that they name or
whose Dockerfile they hold, by their own tests. Both need Docker. Every patch is graded in a fresh sandbox that its
author never saw. DIR holds summary.json (resolved rate and pass@k with 95 % intervals, outcomes, what the guard
refused), results.jsonl (for qcn compare), trajectories, preds.jsonl, SWE-bench's run report (MODEL.qcn.json) and a
report.json for each task. Rows that cannot be read are named, left out and counted (bad_rows).

--model or --endpoint given several times: each gets a folder in DIR, and DIR/index.html compares them, paired. With
--repo and no --tasks the tasks are made of that repository first (qcn synthesize), and the page says which model is
best on it.
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import tqdm
from absl import flags

from qcn_jax import files
from qcn_jax.agents import comparing, exports, outputs, records, running
from qcn_jax.agents.arena import open_arena
from qcn_jax.agents.records import Record
from qcn_jax.cli import acting, parsing, task_repositories
from qcn_jax.envs import names
from qcn_jax.envs.synthesis import statement
from qcn_jax.envs.tasks import predictions, swebench
from qcn_jax.envs.tasks.schema import write_tasks
from qcn_jax.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Parses flags, obtains patches, grades them, writes and prints the report."""
    values = flags.FlagValues()
    flags.DEFINE_string("tasks", None, "Tasks as JSONL in SWE-bench's schema, or a folder of Harbor's task folders; "
                        "without: made of --repo, or those of the run that made --checkpoint.",
                        flag_values=values)
    flags.DEFINE_string("out", None, "Folder for the report.", flag_values=values, required=True)
    flags.DEFINE_string("predictions", None, "Predictions: JSON lines, a JSON list or JSON by id.", flag_values=values)
    flags.DEFINE_integer("count", 20, "Tasks that are made of --repo.", flag_values=values, lower_bound=1)
    flags.DEFINE_list("export", [], f"Further forms of the results: {', '.join(exports.FORMATS)}.", flag_values=values)
    acting.define_invalid(values)
    task_repositories.define(values)
    acting.define_place(values)
    others = set(values)
    mesh = acting.define_agent(values, several=True)
    of_agents = set(values) - others | {"count", "invalid", "export", "network"}
    parsing.parse(values, "evaluate", __doc__, argv)
    if sum(map(bool, (values.checkpoint, values.predictions, values.endpoint, values.baseline))) != 1:
        raise UserError("give one of --checkpoint=DIR, --endpoint=URL (with --model=NAME), --baseline=NAME and "
                        "--predictions=FILE")
    if values.predictions:
        parsing.refuse_given(values, of_agents, "who made --predictions has acted already")
    unknown = [name for name in values.export if name not in exports.FORMATS]
    if unknown:
        raise UserError(f"--export: unknown {unknown[0]!r}; allowed: {', '.join(exports.FORMATS)}")
    own = acting.tasks_of_run(values.checkpoint) if values.checkpoint and not (values.tasks or values.repo) else None
    if not values.tasks and own is None and (values.predictions or len(values.repo) != 1):
        raise UserError("--tasks is required, or --repo=REPOSITORY of which tasks are made for whoever acts, or a "
                        "--checkpoint within the folder of a run that has held-out tasks")
    if values.tasks or own is not None:
        parsing.refuse_given(values, ["count"], "tasks are made of --repo only without --tasks")
    files.check_folder(values.out, "out")
    if values.predictions:
        found, lost = _graded(values, acting.read_tasks(values.tasks))
    else:
        agents = acting.agents(values, mesh)  # before any work
        found, lost = _acted(values, own or acting.read_tasks(values.tasks or _made(values)), agents)
    print(json.dumps(found, indent=1) if isinstance(found, dict) else found)
    return int(lost)


def _made(values: flags.FlagValues) -> str:
    """Makes verified tasks of --repo in the folder of the results, or finds those made before; returns their file."""
    from qcn_jax.envs.synthesis import make_tasks, plan

    path = pathlib.Path(values.out) / "tasks.jsonl"
    if not path.exists():
        settings = plan.Settings(target=values.count, tests_may_tell=True, statement_characters=statement.FULL,
                                 seed=values.seed)
        made, _ = make_tasks.make_tasks(make_tasks.Request(
            values.repo, pathlib.Path(f"{path}.work"), settings=settings, setup=values.setup, sandbox=values.sandbox,
            workers=values.workers, modules=task_repositories.modules(values)))
        if not made:
            raise UserError(f"--repo={values.repo[0]}: no task could be made of it; qcn synthesize says why")
        write_tasks(path, made[:values.count])
    values.tasks, values.repo = str(path), []
    return str(path)


def _acted(values: flags.FlagValues, given: acting.TaskSet, agents: Sequence[acting.Agent]
           ) -> tuple[dict[str, Any] | str, bool]:
    """Checks the tasks, lets everybody act on them, writes what came of it.

    Returns:
      The summary; or of several, or of tasks that were made for this, a table, whose page stands in the folder. And
      whether there is one of whom no episode counts.
    """
    out = pathlib.Path(values.out)
    paged = len(agents) > 1 or given.tasks and values.tasks == str(out / "tasks.jsonl")
    places = [out / f"{number}_{names.file_stem(agent.name.replace('/', '__'))}" if paged else out
              for number, agent in enumerate(agents, 1)]
    folders = [running.Folder(place, agent.settings) for place, agent in zip(places, agents, strict=True)]
    given, summaries, lost = given.located(values), {}, False
    with open_arena(given.tasks, given.specs, acting.place_of(values), given.instances, agents[0].scaffold) as arena:
        arena = acting.checked(values, arena, out)
        for agent, folder in zip(agents, folders, strict=True):
            found = agent.run(arena, folder)
            lost |= _all_lost(agent.name, found)
            facts = {"scaffold": agent.scaffold.name, "sandbox": arena.sandbox, "bad_rows": len(given.faults)}
            results = outputs.Results(agent.name, list(arena.tasks), found, agent.plan.attempts, facts)
            summaries[str(folder.path)] = outputs.write(folder.path, results)
            for kind in values.export:
                exports.export(kind, folder, agent.name, agent.scaffold.name, found)
            folder.close()
    for fault in given.faults:
        print(fault, file=sys.stderr)
    return _compared(out, places, summaries) if paged else summaries[str(out)], lost


def _all_lost(name: str, found: Sequence[Record]) -> bool:
    """Says which episodes do not count, and why; whether none does."""
    lost = [record for record in found if not record.counts]
    if lost:
        reason = " ".join(lost[0].detail.split())[:300]
        print(f"{name}: {len(lost)} of {len(found)} episodes were lost to the infrastructure and count for nothing; "
              f"the same command tries them again. {lost[0].key}: {reason}", file=sys.stderr)
    return bool(lost) and len(lost) == len(found)


def _compared(out: pathlib.Path, places: Sequence[pathlib.Path], summaries: dict[str, Any]) -> str:
    """Writes comparison.json and index.html; returns a table."""
    from qcn_jax.pipeline.evaluate.page import page

    found = comparing.compare([comparing.read(str(place)) for place in places])
    files.write_json(out / "comparison.json", found)
    files.write_text(out / "index.html", page(f"Which model is best: {out.name}", found, summaries))
    return f"{comparing.table(found)}\n{out / 'index.html'}"


def _graded(values: flags.FlagValues, given: acting.TaskSet) -> tuple[dict[str, Any], bool]:
    """Grades predictions, writes what came of it; returns the summary, and whether no verdict counts."""
    rows = _predictions(values.predictions, given)  # what ends all is named before anything is downloaded
    model, given = rows[0].model, given.located(values)
    rows = [row for row in rows if row.instance_id in given.tasks]
    pairs = [(row.instance_id, row.patch) for row in rows]
    with tqdm.tqdm(total=len(rows), desc="grading", unit="task", file=sys.stderr) as bar:
        if given.instances:
            sandbox = "docker"
            verdicts = swebench.evaluate(given.instances, pairs, values.workers, values.out, bar.update, values.timeout)
        else:
            with open_arena(given.tasks, given.specs, acting.place_of(values)) as arena:
                sandbox = arena.sandbox
                verdicts = arena.grade_all(pairs, bar.update)
    found = [Record(row.instance_id, 0, records.outcome_of(verdict), patch=row.patch, verdict=verdict.to_json(),
                    detail=verdict.detail) for row, verdict in zip(rows, verdicts, strict=True)]
    for fault in given.faults:
        print(fault, file=sys.stderr)
    facts = {"sandbox": sandbox, "bad_rows": len(given.faults)}
    results = outputs.Results(model, list(given.tasks), found, 1, facts)
    return outputs.write(pathlib.Path(values.out), results, predictions=False), _all_lost(model, found)


def _predictions(path: str, given: acting.TaskSet) -> list[predictions.Prediction]:
    """The predictions of a file; its faults are added to those of the tasks, or raised where no row is left."""
    found: list[str] = []
    rows = predictions.read_predictions(path, given.tasks, found)
    if not rows:
        raise UserError(found[0] if found else f"--predictions={path}: holds no prediction")
    given.faults.extend(found)
    return rows
