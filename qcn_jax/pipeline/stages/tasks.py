"""Stage `tasks`: source distributions in, verified tasks out, training and held-out repositories apart.

Resumable: downloads, surveys and verdicts are kept as they come, and a rerun continues with the same result.
"""

import concurrent.futures
import dataclasses
from collections.abc import Sequence
from typing import Any

from qcn_jax import files
from qcn_jax.config_checks import in_both
from qcn_jax.envs.sandbox.repository import RepositorySpec
from qcn_jax.envs.synthesis import plan, sources, synthesize
from qcn_jax.envs.tasks.schema import write_tasks
from qcn_jax.errors import UserError
from qcn_jax.pipeline.context import StageContext

_DOWNLOADS = 4  # at a time


def run_stage(context: StageContext) -> dict[str, Any]:
    """Makes `train.jsonl`, `heldout.jsonl` and `repositories.json` in the stage's folder.

    Raises:
      UserError: no network, a wrong hash, a repository in both splits, or none that can be used.
    """
    config = context.config.tasks
    specs = _locate(context, [*config.repos_train, *config.repos_heldout])
    # Asked again, by name: archives and folders only have one now.
    names_of = lambda sources: [specs[source].name for source in sources]
    for line in in_both(names_of(config.repos_train), names_of(config.repos_heldout)):
        raise UserError(line)
    results: dict[str, Any] = {"candidates": 0, "yields": {}, "repository_yields": {}, "outcomes": {}, "left_out": {}}
    usable: list[RepositorySpec] = []
    for split, names, target in (
        ("train", config.repos_train, config.train), ("heldout", config.repos_heldout, config.heldout),
    ):  # fmt: skip
        chosen = [specs[name] for name in names]
        if target == 0:
            found = synthesize.Result([], [], chosen, {})
        else:
            found = synthesize.synthesize(context.pool(), chosen, _settings(context, target), context.workdir,
                                          context.log, split)  # fmt: skip
        if len(found.tasks) < target:
            context.log(f"{split}: only {len(found.tasks)} of {target} tasks could be made; more repositories, kinds "
                        "or candidates_per_repo would help")
        write_tasks(context.workdir / f"{split}.jsonl", found.tasks)
        usable += found.repositories
        _add(results, split, found)
    files.write_json(context.workdir / "repositories.json", [dataclasses.asdict(spec) for spec in usable])
    results["line"] = (f"{results['train']} training and {results['heldout']} held-out tasks from "
                       f"{results['candidates']} candidates")
    return results


def _locate(context: StageContext, names: Sequence[str]) -> dict[str, RepositorySpec]:
    """Finds or downloads the repositories, several at a time."""
    cache = sources.default_cache()
    with concurrent.futures.ThreadPoolExecutor(_DOWNLOADS) as executor:
        found = list(executor.map(lambda name: sources.locate(name, cache), names))
    context.log(f"{len(found)} source distributions, hashes checked, in {cache}")
    return dict(zip(names, found))


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
        statement_characters=config.statement_characters,
        at_fault=config.at_fault,
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
