"""Stage `tasks`: verified tasks, training and held-out ones apart; read from files, or made of source distributions.

Resumable: downloads, surveys and verdicts are kept as they come, and a rerun continues with the same result.
"""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qcn_jax import files
from qcn_jax.agents import image_tasks
from qcn_jax.agents.scaffolds import SCAFFOLDS
from qcn_jax.config_checks import in_both
from qcn_jax.envs.sandbox.repository import RepositorySpec
from qcn_jax.envs.synthesis import plan, quality, sources, synthesize
from qcn_jax.envs.synthesis.pages import factory
from qcn_jax.envs.tasks.schema import PAGES, Task, write_tasks
from qcn_jax.envs.tasks.swebench import Instance
from qcn_jax.envs.web import runtime, vendored
from qcn_jax.errors import UserError
from qcn_jax.pipeline.context import StageContext
from qcn_jax.pipeline.data import given_tasks
from qcn_jax.pipeline.data.readers.task_sets import FIELDS
from qcn_jax.pipeline.evaluate.baseline import baseline_of

_DOWNLOADS = 4  # at a time


def run_stage(context: StageContext) -> dict[str, Any]:
    """Makes `train.jsonl`, `heldout.jsonl`, `repositories.json` and `instances.jsonl` in the stage's folder.

    Raises:
      UserError: no network, a wrong hash, a repository in both splits, none that can be used, or a task of a file that
        cannot.
    """
    config = context.config.tasks
    if config.modules:
        vendored.check(config.modules, "--config.tasks.modules")
    given = {split for split, field in FIELDS.items() if getattr(config, field)}
    names = {"train": config.repos_train, "heldout": config.repos_heldout}
    specs = _locate(context, [name for split in names if split not in given for name in names[split]])
    if not given:  # asked again, by name: archives and folders only have one now
        for line in in_both(*([specs[source].name for source in sources] for sources in names.values())):
            raise UserError(line)
    results: dict[str, Any] = {"candidates": 0, "yields": {}, "repository_yields": {}, "outcomes": {}, "left_out": {}}
    tasks: dict[str, list[Task]] = {}
    used: dict[str, list[RepositorySpec]] = {}
    instances: list[Instance] = []
    for split in ("heldout", "train") if given else ("train", "heldout"):  # what is held out bounds what is trained on
        if split in given:
            apart = given_tasks.heldout_apart(tasks.get("heldout", ()), used.get("heldout", ()))
            found = given_tasks.load(config, split, context.pool(), context.connect, context.workdir / "archives",
                                     context.log, apart)
            _check_agents(context, split, found.tasks)
            tasks[split], used[split] = found.tasks, found.repositories
            instances += found.instances
            results.setdefault("given", {})[split] = found.summary
            results |= {split: len(found.tasks), f"repos_{split}": [spec.name for spec in found.repositories]}
        else:
            chosen = [specs[name] for name in names[split]]
            if split == "train":
                _check_apart(chosen, used.get("heldout", ()))
            made = _make(context, split, chosen, results)
            tasks[split], used[split] = made.tasks, made.repositories
        write_tasks(context.workdir / f"{split}.jsonl", tasks[split])
    rows = {spec.name: dataclasses.asdict(spec) for spec in (*used["train"], *used["heldout"])}
    files.write_json(context.workdir / "repositories.json", list(rows.values()))
    files.write_jsonl(context.workdir / "instances.jsonl", map(dataclasses.asdict, instances))
    results["pages"] = _pages(context, tasks, results, specs.values())
    if len(given) < len(names):
        made = [task for split in names if split not in given for task in tasks[split]]
        results["made"] = {"statement": config.statement, "pass_to_pass": config.pass_to_pass or "all",
                           "tasks": len(made), **quality.summary(made)}
    results["line"] = f"{results['train']} training and {results['heldout']} held-out tasks" + (
        f" from {results['candidates']} candidates" if results["candidates"] else "")
    return results


def _pages(context: StageContext, tasks: Mapping[str, Sequence[Task]], results: Mapping[str, Any],
           specs: Iterable[RepositorySpec]) -> dict[str, Any]:
    """How many tasks are of pages, and why others were left out; expert web goes by it."""
    left_out = {*results["left_out"].values(), *(reason for one in results.get("given", {}).values()
                                                 for reason in one["left_out"])}
    kind = context.provider().kind
    pages = [spec for spec in specs if spec.name in results["left_out"] and factory.is_pages(spec)]
    missing = {runtime.missing(kind), *(factory.missing(spec, kind) for spec in pages)} & left_out
    return {"tasks": sum(task.language == PAGES for split in tasks.values() for task in split),
            "missing": min(missing, default="")}


def _locate(context: StageContext, names: Sequence[str]) -> dict[str, RepositorySpec]:
    """Finds or downloads the repositories, several at a time."""
    cache = files.cache_folder("sources")
    with concurrent.futures.ThreadPoolExecutor(_DOWNLOADS) as executor:
        found = list(executor.map(lambda name: sources.locate(name, cache), names))
    if found:
        context.log(f"{len(found)} source distributions, hashes checked, in {cache}")
    sources.distinct(found, "--config.tasks.repos_train and repos_heldout")
    modules = context.config.tasks.modules
    return {name: dataclasses.replace(spec, modules=modules) for name, spec in zip(names, found, strict=True)}


def _make(context: StageContext, split: str, chosen: list[RepositorySpec], results: dict[str, Any]
          ) -> synthesize.Result:
    """Makes the tasks of a split of repositories; adds its numbers to the stage's results."""
    target = getattr(context.config.tasks, split)
    if target == 0:
        found = synthesize.Result([], [], chosen, {})
    else:
        found = _of_repositories(context, split, chosen, _settings(context, target))
    if len(found.tasks) < target:
        context.log(f"{split}: only {len(found.tasks)} of {target} tasks could be made; more repositories, kinds "
                    "or candidates_per_repo would help")
    _add(results, split, found)
    return found


def _of_repositories(context: StageContext, split: str, chosen: Sequence[RepositorySpec], settings: plan.Settings
                     ) -> synthesize.Result:
    """Tasks of Python repositories, and of pages, which share the target by their numbers."""
    pages, left_out = [spec for spec in chosen if factory.is_pages(spec)], {}
    if pages:
        left_out = {spec.name: reason for spec in pages if (reason := factory.missing(spec, context.provider().kind))}
        for reason, count in collections.Counter(left_out.values()).items():
            context.log(f"{split}: {count} repositories of pages are left out: {reason}")
        chosen, pages = ([spec for spec in specs if spec.name not in left_out] for specs in (chosen, pages))
        if not chosen:
            return synthesize.Result([], [], [], left_out)
    if not pages and not left_out:
        return synthesize.synthesize(context.pool(), chosen, settings, context.workdir, context.log, split)
    others = [spec for spec in chosen if spec not in pages]
    share = settings.target * len(pages) // len(chosen)
    parts = []
    for specs, make, label, target in (
            (pages, factory.synthesize_pages, f"{split}-pages", share),
            (others, synthesize.synthesize, split, settings.target - share)):
        if specs and target:
            parts.append(make(context.pool(), specs, dataclasses.replace(settings, target=target), context.workdir,
                              context.log, label))
    return synthesize.Result(
        [task for part in parts for task in part.tasks], [one for part in parts for one in part.verdicts],
        [spec for part in parts for spec in part.repositories],
        left_out | {name: reason for part in parts for name, reason in part.skipped.items()})


def _check_agents(context: StageContext, split: str, tasks: Sequence[Task]) -> None:
    """Raises UserError where a stage would act on tasks in images, and its agent cannot act there."""
    if not any(task.eval_script for task in tasks):
        return
    for stage in ("experts", "distill") if split == "train" else ("evaluate",):
        settings, field = getattr(context.config, stage), f"--config.{stage}.scaffold"
        scaffold = SCAFFOLDS.resolve(settings.scaffold, field)
        for expert in context.experts():
            image_tasks.check_agent(expert.present(scaffold), context.config.network, "--config.", field)
    baseline = baseline_of(context.config)
    if split == "heldout" and baseline is not None:
        raise UserError(f"--config.evaluate.baseline: {baseline.name!r}; it does not act in tasks' own images; \"\" "
                        "leaves it out")


def _check_apart(train: Sequence[RepositorySpec], heldout: Sequence[RepositorySpec]) -> None:
    """Raises UserError where tasks would be made of a project that given held-out tasks are of."""
    projects = {given_tasks.project(spec.name): spec.name for spec in heldout}
    for spec in train:
        if (other := projects.get(given_tasks.project(spec.name))) is not None:
            raise UserError(f"--config.tasks.repos_train: {spec.name} is of the project of {other}, which is held out; "
                            "the splits must be disjoint")


def _settings(context: StageContext, target: int) -> plan.Settings:
    config = context.config.tasks
    return plan.Settings(
        target=target,
        kinds=config.kinds,
        single_line=config.single_line,
        max_function_lines=config.max_function_lines,
        candidates_per_repo=config.candidates_per_repo,
        timeout=config.test_timeout,
        reruns=config.reruns,
        statement=config.statement,
        hide_tests=config.hide_tests,
        held_out=config.held_out,
        near_duplicates=config.near_duplicates,
        statement_characters=config.statement_characters,
        at_fault=config.at_fault,
        pass_to_pass=config.pass_to_pass,
        seed=context.config.seed,
    )


def _add(results: dict[str, Any], split: str, found: synthesize.Result) -> None:
    """Adds one split's numbers to the stage's results."""
    results[split] = len(found.tasks)
    results[f"repos_{split}"] = [spec.name for spec in found.repositories]
    results["candidates"] += len(found.verdicts)
    results["repository_yields"].update(found.repository_yields())
    results["left_out"].update(found.skipped)
    for name, count in found.outcomes().items():
        results["outcomes"][name] = results["outcomes"].get(name, 0) + count
    for kind, row in found.yields().items():
        known = results["yields"].setdefault(kind, dict.fromkeys(row, 0))
        total = known["candidates"] + row["candidates"]
        for name in ("seconds", "cpu_seconds"):
            known[name] = round((known[name] * known["candidates"] + row[name] * row["candidates"]) / total, 4)
        known["candidates"], known["kept"] = total, known["kept"] + row["kept"]
        known["yield"] = round(known["kept"] / total, 4)
