"""The main job: every stage in order, each resumable, one process, one progress line per stage and more inside.

A stage whose DONE.json is there is skipped, one that has only START.json (see pipeline.workdir) resumes from whatever
its own checkpoints hold, and one whose configuration has changed since is refused by name: silently mixing two
configurations or silently throwing away hours of training would both be worse.
"""

import contextlib
import dataclasses
import errno
import importlib
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from qcn_jax import config_checks, files
from qcn_jax.config import TRAINING, RunConfig
from qcn_jax.errors import UserError
from qcn_jax.pipeline import workdir as work
from qcn_jax.pipeline.context import Shared, StageContext
from qcn_jax.sharding import distributed


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage: its module (which has `run_stage(context)`), the fields of RunConfig that it reads, its needs.

    `reads` leaves out what cannot change a result (`workers`, `sandbox`, `name`).
    """

    module: str
    reads: tuple[str, ...]
    sandbox: bool  # whether it executes code in sandboxes
    first: bool = False  # whether of several hosts the first alone runs it, and the others wait


STAGES = {
    "tasks": Stage("qcn_jax.pipeline.stages.tasks", ("seed", "tasks"), sandbox=True, first=True),
    "midtrain": Stage("qcn_jax.pipeline.stages.midtrain", ("init", "model", "tokenizer", "midtrain"), sandbox=False),
    "sft": Stage("qcn_jax.pipeline.stages.sft", ("templates", "sft"), sandbox=True),
    "experts": Stage("qcn_jax.pipeline.stages.experts", ("network", "experts", "problems", "tool_calls", "web"),
                     sandbox=True),
    "distill": Stage("qcn_jax.pipeline.stages.distill", ("network", "distill"), sandbox=True),
    "evaluate": Stage("qcn_jax.pipeline.stages.evaluate", ("network", "heldout_templates", "evaluate"), sandbox=True),
    "report": Stage("qcn_jax.pipeline.stages.report", (), sandbox=False, first=True),
}


def run(config: RunConfig, workdir: str | os.PathLike[str], stages: Sequence[str] = tuple(STAGES),
        restart: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Runs `stages` in their fixed order and returns the results of each.

    Args:
      config: the run's configuration.
      workdir: the run's folder; created, locked against a second run, and resumed where it holds a run.
      stages: names of stages to run; finished ones are skipped (`report` is always made anew).
      restart: stages to make anew; they and every later stage are moved to `workdir`/discarded/DATE/ first.

    Raises:
      UserError: unknown stage, workdir in use or unwritable, changed configuration, full disk, or whatever
        a stage says about its inputs.
    """
    if not os.fspath(workdir):
        raise UserError("--workdir: is empty; give a folder's name, . for the current one")
    for flag, names in (("stages", stages), ("restart", restart)):
        for name in names:
            if name not in STAGES:
                raise UserError(f"--{flag}: unknown stage {name!r}; stages: {', '.join(STAGES)}")
    root = pathlib.Path(workdir).absolute()
    asked = [name for name in STAGES if name in stages]
    discarded = _with_later(restart)
    _check_config(config, [name for name in asked if name in discarded or not _finished(root / name)])
    shared = Shared(config, root)
    results = {}
    # Of several hosts' processes the first alone locks, cleans and writes down what has been done.
    with work.locked(root) if distributed.is_first() else contextlib.nullcontext(), contextlib.closing(shared):
        refused = _check_folders(config, root, asked, discarded)
        distributed.barrier("workdir is checked")
        with distributed.first_before_others("workdir"):
            if distributed.is_first():
                _discard(root, discarded, restart, asked)
                work.discard(root, refused, "refused with another configuration", _say)
                work.clear(root, list(STAGES))
        began = time.monotonic()
        for name in asked:
            with _full_disk_as_user_error(root, name):
                results[name] = _run_one(name, StageContext(config, root, name, shared))
        print(f"finished {', '.join(results)} in {time.monotonic() - began:.1f} s; workdir {root}", flush=True)
    return results


def _with_later(restart: Sequence[str]) -> list[str]:
    """The stages in `restart` and every later one, in order."""
    order = list(STAGES)
    return order[min((order.index(name) for name in restart), default=len(order)):]


def _check_folders(config: RunConfig, root: pathlib.Path, asked: Sequence[str], discarded: Sequence[str]) -> list[str]:
    """Refuses folders that no stage made, and other settings than a stage that stays was made with.

    Returns:
      Stages asked for of which only a refused start with other settings is there.
    """
    refused = []
    for name in list(STAGES)[: max(map(list(STAGES).index, asked), default=-1) + 1]:
        if name in asked:
            work.check_ours(root / name)
        if name in (*discarded, "report"):
            continue
        if not work.check_unchanged(root / name, stage_config(config, name)) and name in asked:
            refused.append(name)
    return refused


def _discard(root: pathlib.Path, discarded: Sequence[str], restart: Sequence[str], asked: Sequence[str]) -> None:
    surplus = [name for name in discarded if name not in (*asked, *restart) and work.is_stage(root / name)]
    if surplus:
        _say(f"--restart={','.join(restart)}: {', '.join(surplus)} follow from it and go too; --stages does not ask "
             "for them anew")
    work.discard(root, discarded, "--restart", _say)


def _say(line: str) -> None:
    print(line, flush=True)


def _finished(folder: pathlib.Path) -> bool:
    try:
        return work.is_done(folder)
    except UserError:  # rights, of which `_check_folders` speaks
        return False


def _check_config(config: RunConfig, pending: Sequence[str]) -> None:
    """Checks the configuration for the stages that are still to be run, and its mesh for the devices there are."""
    config_checks.check(config, pending)
    if {*TRAINING, "evaluate"} & set(pending):
        from qcn_jax.pipeline.train.divisibility import check_mesh

        check_mesh(config, pending, len(distributed.devices()))


def stage_config(config: RunConfig, name: str) -> dict[str, Any]:
    """What the results of stage `name` depend on: its own part of the configuration and all earlier stages'."""
    names = list(STAGES)[: list(STAGES).index(name) + 1]
    values = dataclasses.asdict(config)
    return {field: values[field] for stage in names for field in STAGES[stage].reads}


def _run_one(name: str, context: StageContext) -> dict[str, Any]:
    folder, settings = context.workdir, stage_config(context.config, name)
    distributed.barrier(f"before {name}")
    if work.is_done(folder) and name != "report":
        done = files.read_json(folder / work.DONE)
        context.log(f"done before ({done['seconds']:.1f} s), skipped")
        return done["results"]
    began = time.monotonic()
    with distributed.first_before_others(f"start of {name}"):
        spent = work.record_start(folder, settings, anew=name == "report") if distributed.is_first() else None
    context.log("starts" if spent is None else f"resumes after {spent:.1f} s of an earlier attempt")
    if STAGES[name].sandbox and distributed.is_first() and _executes(context.config, name):
        context.provider()  # a demanded sandbox that is missing is said before minutes of work
    try:
        stage_results = _results(name, context)
    except BaseException as error:
        if distributed.is_first():
            work.record_end(folder, time.monotonic() - began, error)
        raise
    seconds = time.monotonic() - began + (spent or 0.0)
    if distributed.is_first():
        work.record_done(folder, settings, seconds, stage_results)
    context.log(f"done in {seconds:.1f} s" + (f": {stage_results['line']}" if "line" in stage_results else ""))
    return stage_results


def _results(name: str, context: StageContext) -> dict[str, Any]:
    run_stage = importlib.import_module(STAGES[name].module).run_stage
    if not STAGES[name].first:
        return run_stage(context)
    with distributed.first_before_others(name):
        return run_stage(context) if distributed.is_first() else {}


def _executes(config: RunConfig, stage: str) -> bool:
    from qcn_jax.pipeline import names

    return names.needs_sandbox(config, stage)


@contextlib.contextmanager
def _full_disk_as_user_error(root: pathlib.Path, name: str) -> Iterator[None]:
    """Libraries wrap ENOSPC in exceptions of their own; its text is what they have in common."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and \
                os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise UserError(f"stage {name}: no space left on the disk of {root}; free some and give the same command "
                        "again, it resumes") from error
