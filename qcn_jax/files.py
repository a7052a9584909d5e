"""Writing files so that a crash never leaves half of one: write to a temporary name, then rename."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, IO

from qcn_jax.errors import UserError

Path = str | os.PathLike[str]
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")  # as mkstemp and mkdtemp name what this module asks of them


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is one that this module was writing."""
    return _TEMPORARY.fullmatch(name) is not None


@contextlib.contextmanager
def atomic_open(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a temporary neighbour of `path` and renames it over `path` when the block ends without error.

    Raises:
      UserError: the directory cannot be written or the disk is full.
    """
    path = pathlib.Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


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
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON: {error}") from error


def read_jsonl(path: Path) -> list[Any]:
    """Reads one JSON document a line; raises UserError that names the file and line at fault."""
    rows = []
    try:
        with open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    try:
                        rows.append(json.loads(line))
                    except ValueError as error:
                        raise UserError(f"{path}:{number}: is not valid JSON: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return rows


def check_replaceable(path: Path, replaceable: str | None = None) -> None:
    """Raises UserError where `atomic_directory` would refuse; for asking before long work."""
    path = pathlib.Path(path)
    if not path.exists():
        return
    if not path.is_dir() or (any(path.iterdir()) and not (replaceable and (path / replaceable).exists())):
        raise UserError(f"{path}: exists and holds other things; name a new or empty folder")


@contextlib.contextmanager
def atomic_directory(path: Path, replaceable: str | None = None) -> Iterator[pathlib.Path]:
    """Gives a temporary neighbour folder to fill, which takes the place of `path` when the block ends without error.

    Args:
      path: the folder to appear; an empty one is replaced.
      replaceable: a file name; an existing folder that holds it is replaced too.

    Raises:
      UserError: `path` holds something else, cannot be written, or the disk is full.
    """
    path = pathlib.Path(path)
    check_replaceable(path, replaceable)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.chmod(temporary, 0o755)
        yield pathlib.Path(temporary)
        old = f"{temporary}.old"
        if path.exists():
            os.rename(path, old)  # a folder cannot be renamed over one that holds files
        os.rename(temporary, path)
        temporary = None
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
