"""Writing files so that a crash never leaves half of one: write to a temporary name, then rename."""

import contextlib
import fcntl
import glob
import json
import os
import pathlib
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from qcn_jax.errors import UserError

Path = str | os.PathLike[str]
Surplus = Callable[[pathlib.Path], str | None]  # of a folder: the first thing in it that must not be lost
_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.tmp")  # as mkstemp and mkdtemp name what this module asks of them
_OLD = ".old"  # after that: a folder that is being replaced


def cache_folder(name: str) -> pathlib.Path:
    """Where things of this kind are kept for later runs: $XDG_CACHE_HOME/qcn_jax/NAME or ~/.cache/qcn_jax/NAME."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "qcn_jax" / name


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is one that this module was writing."""
    return _TEMPORARY.fullmatch(name) is not None


def exists(path: Path) -> bool:
    """Whether there is anything at `path`, a link to nothing included.

    Raises:
      UserError: that cannot be found out, as of what lies in a folder that this user may not enter. (pathlib gives a
        traceback or no, by Python's version.) `is_file` and `is_dir` do the same.
    """
    return _mode(path, os.lstat) != 0


def is_file(path: Path) -> bool:
    """Whether `path` is a file; links are followed."""
    return stat.S_ISREG(_mode(path, os.stat))


def is_dir(path: Path) -> bool:
    """Whether `path` is a folder; links are followed."""
    return stat.S_ISDIR(_mode(path, os.stat))


def list_folder(path: Path) -> list[str]:
    """Names in the folder `path`, sorted; raises UserError where it cannot be read."""
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _mode(path: Path, status: Callable[[Path], os.stat_result]) -> int:
    try:
        return status(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


@contextlib.contextmanager
def atomic_open(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a temporary neighbour of `path` and renames it over `path` when the block ends without error.

    Of a symbolic link the target is replaced.

    Raises:
      UserError: the directory cannot be written or the disk is full.
    """
    real = pathlib.Path(os.path.realpath(path))
    temporary = None
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=real.parent, prefix=f".{real.name}.", suffix=".tmp")
        # Half a character (a lone surrogate) becomes \\udc80, which is JSON's own way to write it.
        encoding, errors = (None, None) if "b" in mode else ("utf-8", "backslashreplace")
        with os.fdopen(handle, mode, encoding=encoding, errors=errors) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        if real.exists():
            _keep_rights(real, temporary)
        os.replace(temporary, real)
        temporary = None
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _keep_rights(old: pathlib.Path, new: str) -> None:
    """Gives `new` the owner, the group and the mode of `old`, whose place it takes."""
    status = old.stat()
    with contextlib.suppress(PermissionError):  # an ordinary user gives nothing away
        os.chown(new, status.st_uid, status.st_gid)
    os.chmod(new, stat.S_IMODE(status.st_mode))


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` atomically (UTF-8)."""
    with atomic_open(path) as stream:
        stream.write(text)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` to `path` atomically as indented JSON; NaN is refused because JSON has none."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Writes one JSON document a line to `path`, atomically."""
    with atomic_open(path) as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads JSON from `path`; raises UserError that names the file where it is missing or not JSON."""
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises UserError that names the file where it is none."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object")
    return values


def read_jsonl(path: Path) -> list[Any]:
    """Reads one JSON document a line; raises UserError that names the file and line at fault."""
    return [row for _, row in read_numbered(path)]


def read_numbered(path: Path, faults: list[str] | None = None) -> list[tuple[int, Any]]:
    """Reads (line's number, JSON document) pairs.

    A line that is no JSON becomes a line of `faults`, and the others are read; without `faults` it raises UserError.
    """
    rows: list[tuple[int, Any]] = []
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    line.encode("utf-8")  # as bytes that are no UTF-8 cannot be
                    rows.append((number, json.loads(line)))
                except (ValueError, RecursionError) as error:
                    words = "UTF-8" if isinstance(error, UnicodeError) else f"JSON: {error}"
                    fault = UserError(f"{path}:{number}: is not valid {words}")
                    if faults is None:
                        raise fault from error
                    faults.append(str(fault))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return rows


def is_mount(path: Path) -> bool:
    """Whether something is mounted at `path`, also a folder or file of the same disk (as Docker's volumes are)."""
    real = os.path.realpath(path)
    return os.path.ismount(real) or real in _mounts()


def _mounts() -> list[str]:
    """Every path at which something is mounted; none where the system does not tell (not Linux)."""
    try:
        lines = pathlib.Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    plain = lambda text: re.sub(r"\\([0-7]{3})", lambda code: chr(int(code.group(1), 8)), text)
    return [plain(line.split(" ")[4]) for line in lines]


def check_file(path: Path, flag: str) -> None:
    """Raises UserError, which names `flag`, where `path` could not be written; for asking before long work."""
    real, name = pathlib.Path(os.path.realpath(path)), f"--{flag}={path}"
    if os.path.isdir(real):
        raise UserError(f"{name}: is a folder; name a file")
    if os.path.lexists(real) and (not os.path.isfile(real) or is_mount(real)):
        raise UserError(f"{name}: is not a plain file that could be replaced; name another")
    _check_parent(real, name)


def check_folder(path: Path, flag: str | None = None) -> None:
    """Raises UserError, which names `flag`, where no files could be written into the folder `path`."""
    _check_parent(pathlib.Path(os.path.realpath(path)) / "file", f"--{flag}={path}" if flag else str(path))


def check_replaceable(path: Path, surplus: Surplus | None = None, flag: str | None = None) -> None:
    """Raises UserError where `atomic_directory` would refuse; for asking before long work."""
    real, name = pathlib.Path(os.path.realpath(path)), f"--{flag}={path}" if flag else str(path)
    if os.path.lexists(real):
        try:
            if not os.path.isdir(real):
                raise UserError(f"{name}: exists and is no folder; name a new or empty folder")
            inside = sorted(os.listdir(real))
            other = surplus(real) if inside and surplus is not None else next(iter(inside), None)
        except OSError as error:
            raise UserError(f"{name}: cannot be read: {error.strerror}") from error
        if other is not None:
            raise UserError(f"{name}: exists and holds other things, such as {other}; name a new or empty folder")
        below = [mount for mount in _mounts() if mount.startswith(f"{real}/")]
        if below:
            raise UserError(f"{name}: a disk is mounted in it, at {below[0]}; name a new or empty folder")
        if is_mount(real):
            raise UserError(f"{name}: is where a disk is mounted, which cannot be replaced; name a folder in it")
    _check_parent(real, name)


def _check_parent(path: pathlib.Path, name: str) -> None:
    """Whether something can be put at `path`: in its folder, or in the nearest one above it that is there."""
    parent = path.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not os.path.isdir(parent):
        raise UserError(f"{name}: cannot be written: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise UserError(f"{name}: cannot be written: no permission to write into {parent}")


@contextlib.contextmanager
def atomic_directory(path: Path, surplus: Surplus | None = None) -> Iterator[pathlib.Path]:
    """Gives a temporary neighbour folder to fill, which takes the place of `path` when the block ends without error.

    Args:
      path: the folder to appear; an empty one is replaced, whose rights stay. Of a symbolic link the target.
      surplus: gives the name of the first thing in an existing folder that must not be lost; a folder of which it
        gives None is replaced too.

    Raises:
      UserError: `path` holds something else, cannot be written, or the disk is full.
    """
    real = pathlib.Path(os.path.realpath(path))
    if os.path.isdir(real.parent):
        pattern = f".{glob.escape(real.name)}.*.tmp*"
        _recover((left for left in real.parent.glob(pattern) if left.is_dir()), _is_abandoned)
    check_replaceable(path, surplus)
    temporary = None
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=real.parent, prefix=f".{real.name}.", suffix=".tmp")
        with _held(temporary):
            os.chmod(temporary, 0o755)
            yield pathlib.Path(temporary)
            old = f"{temporary}{_OLD}"
            check_replaceable(path, surplus)  # again: the block may have taken hours
            if real.exists():
                _keep_rights(real, temporary)
                os.rename(real, old)  # a folder cannot be renamed over one that holds files
            os.rename(temporary, real)
            temporary = None
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: str) -> Iterator[None]:
    """Locks `folder`, so that no other process takes it for one that a killed process left."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle)
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Whether nobody else holds the file or folder; False also where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_abandoned(folder: pathlib.Path) -> bool:
    handle = os.open(folder, os.O_RDONLY)
    try:
        return _lock(handle)
    finally:
        os.close(handle)


def recover(folder: pathlib.Path) -> None:
    """Clears up what killed processes left in and below `folder`: removes what they had half-written, and puts back
    folders that they were about to replace. No other process may be writing there."""
    _recover(folder.rglob(".*.tmp*"), lambda path: True)


def _recover(left: Iterable[pathlib.Path], is_abandoned: Callable[[pathlib.Path], bool]) -> None:
    for path in sorted(left, key=lambda path: path.name.endswith(_OLD)):  # what was to replace an old folder goes first
        name = path.name.removesuffix(_OLD)
        temporary = _TEMPORARY.fullmatch(name)
        if temporary is None:
            continue
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            if not path.is_dir():
                path.unlink()
            elif name == path.name:
                if is_abandoned(path):
                    shutil.rmtree(path)
            elif not os.path.lexists(path.with_name(name)):
                target = path.with_name(temporary.group(1))
                shutil.rmtree(path) if os.path.lexists(target) else os.rename(path, target)
