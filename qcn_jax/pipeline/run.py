"""The main job: every stage in order, each resumable, one process, one progress line per stage and more inside.

A stage that starts writes `DIR/<stage>/START.json` (the configuration it depends on, when each attempt began);
one that ends writes `DIR/<stage>/DONE.json` (results, seconds, the same configuration's hash). A stage whose
DONE.json is there is skipped, one that has only START.json resumes from whatever its own checkpoints hold, and
one whose configuration has changed since is refused by name: silently mixing two configurations or silently
throwing away hours of training would both be worse.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any, IO

from qcn_jax import files
from qcn_jax.config import RunConfig
from qcn_jax.errors import UserError
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


STAGES = {
    "tasks": Stage("qcn_jax.pipeline.stages.tasks", ("seed", "tasks"), sandbox=True),
    "midtrain": Stage("qcn_jax.pipeline.stages.midtrain", ("init", "model", "tokenizer", "midtrain"), sandbox=False),
    "sft": Stage("qcn_jax.pipeline.stages.sft", ("templates", "sft"), sandbox=True),
    "experts": Stage("qcn_jax.pipeline.rl.learner", ("experts",), sandbox=True),
    "distill": Stage("qcn_jax.pipeline.stages.distill", ("distill",), sandbox=True),
    "evaluate": Stage("qcn_jax.pipeline.stages.evaluate", ("evaluate",), sandbox=True),
    "report": Stage("qcn_jax.pipeline.stages.report", (), sandbox=False),
}


def run(config: RunConfig, workdir: str | os.PathLike[str], stages: Sequence[str] = tuple(STAGES),
        restart: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Runs `stages` in their fixed order and returns the results of each.

    Args:
      config: the run's configuration.
      workdir: the run's folder; created, locked against a second run, and resumed where it holds a run.
      stages: names of stages to run; finished ones are skipped (`report` is always made anew).
      restart: stages to throw away first, together with every later stage.

    Raises:
      UserError: unknown stage, workdir in use or unwritable, changed configuration, full disk, or whatever
        a stage says about its inputs.
    """
    for name in (*stages, *restart):
        if name not in STAGES:
            raise UserError(f"--stages: unknown stage {name!r}; stages: {', '.join(STAGES)}")
    root = pathlib.Path(workdir).absolute()
    shared = Shared(config, root)
    results = {}
    _check_hosts(stages)
    # Of several hosts' processes the first alone locks, cleans and writes down what has been done.
    with _locked(root) if distributed.is_first() else contextlib.nullcontext(), contextlib.closing(shared):
        with distributed.first_before_others("workdir"):
            if distributed.is_first():
                _discard(root, restart)
                _remove_half_written(root)
        for name in stages:
            _check_unchanged(config, root, name)
        began = time.monotonic()
        for name in (name for name in STAGES if name in stages):
            with _full_disk_as_user_error(root, name):
                results[name] = _run_one(name, StageContext(config, root, name, shared))
        print(f"finished {', '.join(results)} in {time.monotonic() - began:.1f} s; workdir {root}", flush=True)
    return results


def _check_hosts(stages: Sequence[str]) -> None:
    alone = [name for name in stages if STAGES[name].sandbox or name == "report"]
    if alone and not distributed.alone():
        raise UserError(f"--stages: {', '.join(alone)} run on one host; on several give --stages=midtrain after tasks "
                        "has finished in the same workdir")


def stage_config(config: RunConfig, name: str) -> dict[str, Any]:
    """What the results of stage `name` depend on: its own part of the configuration and all earlier stages'."""
    names = list(STAGES)[: list(STAGES).index(name) + 1]
    values = dataclasses.asdict(config)
    return {field: values[field] for stage in names for field in STAGES[stage].reads}


def config_hash(config: RunConfig, name: str) -> str:
    """SHA-256 of `stage_config` as canonical JSON."""
    text = json.dumps(stage_config(config, name), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def is_done(root: pathlib.Path, name: str) -> bool:
    """Whether stage `name` has finished in the work directory `root`."""
    return (root / name / "DONE.json").exists()


def _run_one(name: str, context: StageContext) -> dict[str, Any]:
    done_path = context.workdir / "DONE.json"
    distributed.barrier(f"before {name}")
    if is_done(context.root, name) and name != "report":
        done = files.read_json(done_path)
        context.log(f"done before ({done['seconds']:.1f} s), skipped")
        return done["results"]
    began = time.monotonic()
    with distributed.first_before_others(f"start of {name}"):
        spent = _record_start(context, name) if distributed.is_first() else None
    context.log("starts" if spent is None else f"resumes after {spent:.1f} s of an earlier attempt")
    if STAGES[name].sandbox:
        context.provider()  # a demanded sandbox that is missing is said before minutes of work
    try:
        stage_results = importlib.import_module(STAGES[name].module).run_stage(context)
    except BaseException:
        if distributed.is_first():
            _record_end(context, time.monotonic() - began)
        raise
    seconds = time.monotonic() - began + (spent or 0.0)
    if distributed.is_first():
        files.write_json(done_path, {
            "seconds": round(seconds, 2), "config_hash": config_hash(context.config, name), "results": stage_results})
    context.log(f"done in {seconds:.1f} s" + (f": {stage_results['line']}" if "line" in stage_results else ""))
    return stage_results


def _record_start(context: StageContext, name: str) -> float | None:
    """Notes that an attempt begins; returns the seconds earlier attempts took, None where there were none.

    An attempt that was killed could not write its end, so the newest file in the stage's folder stands for it.
    """
    path = context.workdir / "START.json"
    start = files.read_json(path) if path.exists() and name != "report" else {"seconds": []}
    if start["seconds"] and start["seconds"][-1] is None:
        newest = max(p.stat().st_mtime for p in context.workdir.rglob("*") if p.exists())
        start["seconds"][-1] = round(max(0.0, newest - start["began"]), 2)
    spent = sum(start["seconds"]) if start["seconds"] else None
    start = {"config": stage_config(context.config, name), "began": time.time(), "seconds": [*start["seconds"], None]}
    files.write_json(path, start)
    return spent


def _record_end(context: StageContext, seconds: float) -> None:
    """Notes how long an attempt that failed took; never hides why it failed (the disk may be full)."""
    path = context.workdir / "START.json"
    with contextlib.suppress(UserError):
        start = files.read_json(path)
        files.write_json(path, start | {"seconds": [*start["seconds"][:-1], round(seconds, 2)]})


def _check_unchanged(config: RunConfig, root: pathlib.Path, name: str) -> None:
    """Refuses a stage that was started with another configuration; names the first key that differs."""
    path = root / name / "START.json"
    if not path.exists() or name == "report":
        return
    now = json.loads(json.dumps(stage_config(config, name)))
    changes = list(_differences(files.read_json(path)["config"], now, "config"))
    if changes:
        more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
        raise UserError(f"{root / name} was made with another configuration: {changes[0]}{more}; choose another "
                        f"--workdir, or --restart={name} to make this stage and every later one anew")


def _differences(old: Any, new: Any, name: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}")
    elif old != new:
        yield f"{name} was {old!r} and is {new!r}"


def _discard(root: pathlib.Path, restart: Sequence[str]) -> None:
    order = list(STAGES)
    first = min((order.index(name) for name in restart), default=len(order))
    for name in order[first:]:
        shutil.rmtree(root / name, ignore_errors=True)


def _remove_half_written(root: pathlib.Path) -> None:
    """Removes temporary files (see qcn_jax.files) of a run that was killed while it wrote; this run holds the lock."""
    for path in root.rglob(".*.tmp"):
        if path.is_file():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(root: pathlib.Path) -> Iterator[None]:
    """Holds `root/.lock`; a record lock, so that it ends with this process however it ends, and no child keeps it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        stream: IO[str] = open(root / ".lock", "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--workdir={root}: cannot be written: {error.strerror}") from error
    with stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            stream.seek(0)
            holder = stream.read().strip() or "?"
            raise UserError(f"--workdir={root}: is in use by another qcn run (process {holder})") from error
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        yield


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
