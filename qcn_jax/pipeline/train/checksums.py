"""Checksums of a checkpoint's files: written once it is complete, compared before it is restored.

Every process sums the files that it wrote into `checksums.process_<i>.json` in the checkpoint's folder: those whose
path names it (Orbax's and Grain's do: ocdbt.process_3, process_3-of-8.json), and the first process all others.
"""

import hashlib
import os
import pathlib
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qcn_jax import files
from qcn_jax.errors import UserError

_SUMS = re.compile(r"checksums\.process_(\d+)\.json")
_WRITER = re.compile(r"(?:^|[/.])process_(\d+)(?:$|[/-])")
_THREADS = 4  # hashing releases the interpreter's lock


def write(folder: pathlib.Path, process: int, processes: int) -> None:
    """Sums what process number `process` of `processes` wrote into the complete checkpoint `folder`.

    Raises:
      UserError, OSError: the files cannot be read, or the sums not written.
    """
    # Another process may be writing its sums meanwhile.
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*")
             if not files.is_temporary(path.name) and path.is_file()]
    own = sorted(path for path in paths if _writer(path) == process and not _SUMS.fullmatch(path))
    with ThreadPoolExecutor(_THREADS) as threads:
        entries = threads.map(lambda path: [os.stat(folder / path).st_size, _digest(folder / path)], own)
        sums = dict(zip(own, entries, strict=True))
    files.write_json(folder / f"checksums.process_{process}.json", {"processes": processes, "files": sums})


def _writer(path: str) -> int:
    named = _WRITER.search(path)
    return int(named.group(1)) if named else 0


def _digest(path: pathlib.Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def are_complete(folder: pathlib.Path) -> bool:
    """Whether every process has written its sums; a kill right after the checkpoint may have come first."""
    found = _found(folder)
    try:
        return bool(found) and len(found) >= max(_read(path)["processes"] for path in found.values())
    except UserError:
        return True  # they were written, and `damage` says what has become of them


def damage(folder: pathlib.Path, process: int = 0, processes: int = 1) -> str | None:
    """What is wrong with the checkpoint `folder`, in words, None where nothing is.

    Args:
      folder: the checkpoint; one without sums has nothing that could be found wrong.
      process, processes: this process compares its share of the sums.

    Raises:
      UserError: this user may not read a file.
    """
    for number, path in sorted(_found(folder).items()):
        if number % processes != process:
            continue
        try:
            sums = _read(path)["files"]
        except UserError as error:
            return str(error)
        # Sizes first: most damage shows in them, and they cost nothing.
        for compare in (_size_damage, _content_damage):
            with ThreadPoolExecutor(_THREADS) as threads:
                for words in threads.map(lambda item: compare(folder / item[0], *item[1]), sums.items()):
                    if words:
                        return words
    return None


def _found(folder: pathlib.Path) -> dict[int, pathlib.Path]:
    """Files of sums by process."""
    matches = ((_SUMS.fullmatch(name), name) for name in files.list_folder(folder))
    return {int(match.group(1)): folder / name for match, name in matches if match}


def _read(path: pathlib.Path) -> Any:
    sums = files.read_json(path)
    if not isinstance(sums, dict) or not {"processes", "files"} <= sums.keys():
        raise UserError(f"{path}: is damaged")
    return sums


def _size_damage(path: pathlib.Path, size: int, digest: str) -> str | None:
    if not files.exists(path):
        return f"{path} is missing"
    found = os.stat(path).st_size
    return None if found == size else f"{path} has {found:,} bytes and was written with {size:,}"


def _content_damage(path: pathlib.Path, size: int, digest: str) -> str | None:
    try:
        return None if _digest(path) == digest else f"{path} does not hold what was written (by its checksum)"
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
