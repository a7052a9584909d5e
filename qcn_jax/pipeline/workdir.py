"""A run's work directory: whose it is, what its stages were made with, and what a restart moves aside.

A folder of the work directory is a stage's when it holds START.json (the configuration that the stage depends on, when
each attempt began) or DONE.json (results, seconds, that configuration's hash). No other folder is ever moved, emptied
or written into: the work directory may be one that holds the user's own things.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from qcn_jax import files
from qcn_jax.errors import UserError

START, DONE, DISCARDED = "START.json", "DONE.json", "discarded"
_HELD = (errno.EAGAIN, errno.EACCES)  # what POSIX gives for a record lock that another process holds


@contextlib.contextmanager
def locked(root: pathlib.Path) -> Iterator[None]:
    """Makes `root` and holds `root/.lock`, which ends with this process however it ends and which no child keeps.

    Raises:
      UserError: the folder cannot be written, another run holds it, or its file system has no locks.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        files.check_folder(root, "workdir")
        stream: IO[str] = open(root / ".lock", "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--workdir={root}: cannot be written: {error.strerror}") from error
    with stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                raise UserError(f"--workdir={root}: cannot be locked against a second run: {error.strerror}; choose a "
                                "folder whose file system has locks") from error
            stream.seek(0)
            holder = stream.read().strip() or "?"
            raise UserError(f"--workdir={root}: is in use by another qcn run (process {holder})") from error
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        yield


def is_stage(folder: pathlib.Path) -> bool:
    """Whether a stage made `folder`."""
    return any(files.exists(folder / name) for name in (START, DONE))


def is_done(folder: pathlib.Path) -> bool:
    """Whether the stage of `folder` has finished."""
    return files.is_file(folder / DONE)


def _is_ours(folder: pathlib.Path) -> bool:
    """Whether a stage made `folder` or may: it is missing, empty, or a kill left it before START.json was there."""
    if is_stage(folder) or not files.exists(folder):
        return True
    return files.is_dir(folder) and all(map(files.is_temporary, files.list_folder(folder)))


def check_ours(folder: pathlib.Path) -> None:
    """Refuses to run a stage in a folder that holds things and was not made by one, or that cannot be written.

    Raises:
      UserError: names the folder.
    """
    files.check_folder(folder)
    if not _is_ours(folder):
        raise UserError(f"{folder}: exists and was not made by qcn run (it has neither {START} nor {DONE}); choose "
                        "another --workdir")


def check_unchanged(folder: pathlib.Path, config: Mapping[str, Any]) -> bool:
    """Refuses to go on from a stage that was made with another configuration.

    Args:
      folder: of the stage.
      config: what its results depend on, as run.stage_config gives it.
    Returns:
      Whether the folder may stay; where not, all that it holds is left from an attempt with another configuration that
      was refused (see `record_end`), and it is to be moved aside before the stage begins.
    Raises:
      UserError: names the first key that differs, with both values.
    """
    if not files.exists(folder / START):
        return True
    start = _read_start(folder)
    changes = list(_differences(start["config"], _as_json(config), "config"))
    if not changes or _holds_nothing(folder):
        return True
    if start.get("refused"):
        return False
    more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
    raise UserError(f"{folder} was made with another configuration: {changes[0]}{more}; choose another --workdir, or "
                    f"--restart={folder.name} to make this stage and every later one anew")


def _holds_nothing(folder: pathlib.Path) -> bool:
    """Whether the attempt that START.json tells of left nothing else."""
    return not any(path.name != START and not files.is_temporary(path.name) and not path.is_dir()
                   for path in folder.rglob("*"))


def _read_start(folder: pathlib.Path) -> dict[str, Any]:
    start = files.read_json(folder / START)
    if not isinstance(start, dict) or not {"config", "began", "seconds"} <= start.keys():
        raise UserError(f"{folder / START}: was not written by qcn run; choose another --workdir")
    return start


def _as_json(config: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(config))


def _differences(old: Any, new: Any, name: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}")
    elif old != new:
        yield f"{name} was {old!r} and is {new!r}"


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of `config` as canonical JSON."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def record_start(folder: pathlib.Path, config: Mapping[str, Any], anew: bool = False) -> float | None:
    """Notes that an attempt begins; returns the seconds earlier attempts took, None where there were none.

    An attempt that was killed could not write its end, so the newest file in the stage's folder stands for it.

    Args:
      folder: of the stage; made if missing.
      config: what its results depend on; attempts with another one do not count.
      anew: earlier attempts do not count.
    """
    start = _read_start(folder) if files.exists(folder / START) else {}
    if anew or start.get("config") != _as_json(config):
        start = {"seconds": []}
    if start["seconds"] and start["seconds"][-1] is None:
        newest = max(path.lstat().st_mtime for path in folder.rglob("*"))
        start["seconds"][-1] = round(max(0.0, newest - start["began"]), 2)
    spent = sum(start["seconds"]) if start["seconds"] else None
    files.write_json(folder / START, {"config": config, "began": time.time(), "seconds": [*start["seconds"], None]})
    return spent


def record_end(folder: pathlib.Path, seconds: float, error: BaseException) -> None:
    """Notes how an attempt failed and how long it took; never hides why it failed (the disk may be full).

    An attempt was refused where a line about its input ended it before any state of training was saved. Its
    configuration may be corrected without a restart.
    """
    refused = isinstance(error, UserError) and not any(
        path.name.isdecimal() for path in folder.rglob("checkpoints/*"))
    with contextlib.suppress(UserError):
        start = _read_start(folder)
        files.write_json(folder / START, start | {"seconds": [*start["seconds"][:-1], round(seconds, 2)],
                                                  "refused": refused})


def record_done(folder: pathlib.Path, config: Mapping[str, Any], seconds: float, results: Mapping[str, Any]) -> None:
    """Writes DONE.json: the stage is skipped from now on."""
    files.write_json(folder / DONE, {"seconds": round(seconds, 2), "config_hash": config_hash(config),
                                     "results": results})


def discard(root: pathlib.Path, names: Sequence[str], why: str, log: Callable[[str], None]) -> None:
    """Moves the stages called `names` to `root`/discarded/DATE/, and says so; what is no stage's folder stays.

    Args:
      root: the work directory.
      names: in the order in which stages are made from each other. The last goes first, so that a kill in between
        never leaves one whose origin is gone.
      why: begins every line.
      log: takes one line.

    Raises:
      UserError: a folder cannot be moved.
    """
    made = [name for name in names if is_stage(root / name)]
    if not made:
        return
    for name in made:
        if (root / name).is_symlink() or files.is_mount(root / name):
            raise UserError(f"{why}: {root / name} is a symbolic link or a mounted disk and cannot be moved aside; "
                            "move what it holds yourself")
    try:
        target = _dated(root / DISCARDED)
        log(f"{why}: moves {', '.join(made)} to {target}; delete that folder when you no longer need it")
        for name in reversed(made):
            os.rename(root / name, target / name)
    except OSError as error:
        raise UserError(f"{why}: {error.filename or root} cannot be moved aside: {error.strerror}") from error


def _dated(parent: pathlib.Path) -> pathlib.Path:
    """A new folder in `parent` named after this moment."""
    moment = time.strftime("%Y-%m-%dT%H-%M-%S")
    parent.mkdir(exist_ok=True)
    for number in range(1, 1000):
        folder = parent / (moment if number == 1 else f"{moment}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise UserError(f"{parent}: holds {moment} a thousand times")


def clear(root: pathlib.Path, names: Sequence[str]) -> None:
    """Clears up what a killed run left half-written in stages (see files.recover); this run holds the lock."""
    for name in names:
        if _is_ours(root / name):
            files.recover(root / name)
