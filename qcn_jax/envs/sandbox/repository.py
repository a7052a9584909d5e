"""Repositories as sandboxes see them: unpacked safely, stripped of history and leftovers, kept by content.

Members of a tree are named "repo/<path>" and "meta/<path>"; the latter is a folder on the module search path that
holds the distribution's metadata, so that importlib.metadata finds the version without an installation.
"""

import bz2
import contextlib
import dataclasses
import fcntl
import functools
import gzip
import hashlib
import io
import json
import lzma
import os
import pathlib
import re
import tarfile
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from qcn_jax import files
from qcn_jax.envs import names
from qcn_jax.errors import UserError

# Never part of a starting state: history, byte code, build results and caches may hold the fix.
DROPPED_NAMES = frozenset({".git", ".hg", ".svn", "__pycache__", ".pytest_cache", ".tox", ".nox", ".eggs", ".venv",
                           "build", "dist", ".mypy_cache", ".ruff_cache", ".hypothesis", "node_modules"})
# Two of these that packages are also called: such a folder is left out unless it is a package.
_PACKAGES_TOO = frozenset({"build", "dist"})
DROPPED_ENDINGS = (".pyc", ".pyo", ".orig", ".rej", ".whl", ".egg")
_PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}  # by the first bytes
_SEARCHED = ("src", "lib", "python")
MAX_FILES, MAX_BYTES = 20_000, 200_000_000  # of one repository; far above any in the lists
# What pytest imports, so that it is loaded before a repository; pytest itself cannot be had twice.
LIBRARIES = ("iniconfig", "packaging", "pluggy", "pygments")
FORMAT = "10"  # part of every key: raise it when what is stored changes


@dataclasses.dataclass(frozen=True)
class RepositorySpec:
    """A repository at one state.

    `archive` is a source distribution (.tar.gz, .zip) or a folder; `root` a folder inside it (default: the only one
    at the top). `python_path` lists folders put on the module search path, relative to the root (default: "src" if
    there is one, and the root). `image` is a base image for this repository alone, and `setup` are shell commands that
    install what it needs there, run once as root with network; both ask for docker. `modules` is a folder whose
    node_modules pages are built from (default: our own, envs/web/vendored.py).
    """

    name: str
    archive: str
    sha256: str = ""
    pytest_args: tuple[str, ...] = ()
    root: str = ""
    python_path: tuple[str, ...] | None = None
    environment: tuple[tuple[str, str], ...] = ()
    image: str = ""
    setup: tuple[str, ...] = ()
    modules: str = ""


def read_specs(path: files.Path) -> list[RepositorySpec]:
    """Specs from a JSON list of their fields, as `qcn run` leaves them beside its tasks."""
    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return [RepositorySpec(**{key: tuples(value) for key, value in row.items()}) for row in files.read_json(path)]


@dataclasses.dataclass(frozen=True)
class Member:
    """One file of a tree."""

    data: bytes
    mode: int
    mtime: int


@dataclasses.dataclass(frozen=True)
class Stored:
    """A prepared repository read back from the state folder."""

    files: Mapping[str, str]
    settings: dict[str, Any]
    archive: str
    baseline: dict[str, Any]


def unpack(spec: RepositorySpec) -> dict[str, Member]:
    """Reads a repository into memory; links, devices and paths that lead outside are left out.

    Raises:
      UserError: missing, damaged, of another hash, or empty.
    """
    source = pathlib.Path(spec.archive)
    try:
        if source.is_dir():
            raw = dict(_folder(source))
        else:
            data = source.read_bytes()
            if spec.sha256 and hashlib.sha256(data).hexdigest() != spec.sha256:
                raise UserError(f"{source}: sha256 is {hashlib.sha256(data).hexdigest()}, expected {spec.sha256}")
            raw = dict(_zip(data) if zipfile.is_zipfile(io.BytesIO(data)) else _tar(data))
    except OSError as error:
        raise UserError(f"{error.filename or source}: cannot be read: {error.strerror or error}") from error
    except UserError:
        raise
    # Readers of archives raise all sorts: zlib.error, LZMAError, RuntimeError (encrypted), NotImplementedError, ...
    except Exception as error:
        words = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{source}: is not a source distribution: {words}") from error
    root = spec.root.strip("/")
    tops = {path.split("/")[0] for path in raw}
    if not root and not source.is_dir() and len(tops) == 1:
        root = tops.pop()
    metadata = raw.get(f"{root}/PKG-INFO" if root else "PKG-INFO")
    inside = {path[len(root) + 1:] if root else path: member for path, member in raw.items()
              if not root or path.startswith(root + "/")}
    members = {f"repo/{path}": inside[path] for path in without_leftovers(inside)}
    folders = {path[:at] for path in members for at in range(len(path)) if path[at] == "/"}
    if both := members.keys() & folders:
        raise UserError(f"{source}: is not a source distribution: {names.shown(min(both)[5:])} is a file and a folder")
    if not members:
        raise UserError(f"{source}: holds no files" + (f" below {root}" if root else ""))
    if metadata is not None:
        found = dict(re.findall(r"(?m)^(Name|Version): *(\S+)", metadata.data.decode("utf-8", "replace")))
        if len(found) == 2:
            folder = f"meta/{re.sub('[-_.]+', '_', found['Name'])}-{found['Version']}.dist-info"
            members[f"{folder}/METADATA"] = Member(metadata.data, 0o644, metadata.mtime)
    return members


def without_leftovers(paths: Collection[str]) -> list[str]:
    """Those of a repository's paths that are neither history nor what tools left there."""
    packages = {os.path.dirname(path) for path in paths if path.endswith("/__init__.py")}

    def leftover(path: str) -> bool:
        parts = path.split("/")
        return path.endswith(DROPPED_ENDINGS) or any(
            part in DROPPED_NAMES and not (part in _PACKAGES_TOO and "/".join(parts[:end]) in packages)
            for end, part in enumerate(parts, 1))

    return [path for path in paths if not leftover(path)]


def write_archive(path: pathlib.Path, root: str, members: Mapping[str, tuple[bytes, int]]) -> None:
    """Writes files, by path with content and mode, as a source distribution below `root`, reproducibly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (files.atomic_open(path, "wb") as stream, gzip.GzipFile("", "wb", 6, stream, mtime=0) as packed,
          tarfile.open(fileobj=packed, mode="w") as archive):
        for entry in sorted(members):
            content, mode = members[entry]
            info = tarfile.TarInfo(f"{root}/{entry}")
            info.size, info.mode, info.mtime = len(content), mode, 1_600_000_000
            archive.addfile(info, io.BytesIO(content))


def _safe(path: str) -> str | None:
    path = os.path.normpath(path.replace("\\", "/"))
    return None if path.startswith(("/", "..")) or path == "." or names.path_fault(path) else path


class _Unpacked(io.RawIOBase):
    """A tar archive's bytes as they are unpacked, no more than any repository may have, headers included."""

    def __init__(self, data: bytes):
        opener = next((one for magic, one in _PACKED.items() if data.startswith(magic)), None)
        self._stream = io.BytesIO(data) if opener is None else opener(io.BytesIO(data))
        self._left = MAX_BYTES + 2048 * MAX_FILES

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; raises tarfile.TarError where they are too many."""
        if not 0 <= size <= self._left:
            raise tarfile.TarError(f"more than {MAX_FILES} files or {MAX_BYTES} bytes")
        data = self._stream.read(size)
        self._left -= len(data)
        return data


def _tar(data: bytes) -> Iterator[tuple[str, Member]]:
    # As a stream, in small steps: the size that a header states is what would be taken from memory.
    with tarfile.open(fileobj=_Unpacked(data), mode="r|") as archive:
        for number, member in enumerate(archive):
            path = _safe(member.name)
            if number > MAX_FILES:
                raise tarfile.TarError(f"more than {MAX_FILES} files or {MAX_BYTES} bytes")
            if path and member.isfile():
                yield path, Member(archive.extractfile(member).read(), _mode(member.mode), _time(member.mtime))


def _time(seconds: float) -> int:
    """A member's time as file systems have it: whoever packed it may have written any number."""
    return int(min(max(seconds, 0), 2**32 - 1)) if seconds == seconds else 0


def _zip(data: bytes) -> Iterator[tuple[str, Member]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        if len(infos) > MAX_FILES or sum(info.file_size for info in infos) > MAX_BYTES:
            raise zipfile.BadZipFile(f"more than {MAX_FILES} files or {MAX_BYTES} bytes")
        for info in infos:
            path = _safe(info.filename)
            kind = info.external_attr >> 28  # 0 (no Unix mode) or 8 (regular file)
            if path and not info.is_dir() and kind in (0, 8):
                yield path, Member(archive.read(info), _mode(info.external_attr >> 16), 1_600_000_000)


def _folder(source: pathlib.Path) -> Iterator[tuple[str, Member]]:
    count = total = 0
    for folder, folders, found in os.walk(source, onerror=_raise):  # or unreadable folders would be left out in silence
        folders[:] = sorted(name for name in folders if name not in DROPPED_NAMES or (
            name in _PACKAGES_TOO and os.path.isfile(os.path.join(folder, name, "__init__.py"))))
        for name in sorted(found):
            path = pathlib.Path(folder, name)
            if path.is_file() and not path.is_symlink():
                status = path.stat()
                count, total = count + 1, total + status.st_size
                if count > MAX_FILES or total > MAX_BYTES:
                    raise UserError(f"{source}: more than {MAX_FILES} files or {MAX_BYTES} bytes")
                place = path.relative_to(source).as_posix()
                if not names.path_fault(place):
                    yield place, Member(path.read_bytes(), _mode(status.st_mode), _time(status.st_mtime))


def _raise(error: OSError) -> None:
    raise error


def pack_folder(source: pathlib.Path, top: str) -> bytes:
    """A repository that is a folder as a tar archive with one folder `top`; raises UserError where it is too large."""
    return pack({f"{top}/{path}": member for path, member in _folder(source)})


def _mode(mode: int) -> int:
    return 0o755 if mode & 0o100 else 0o644


def settings(spec: RepositorySpec, members: Mapping[str, Member]) -> dict[str, Any]:
    """What the server must know about a tree besides its files."""
    paths = spec.python_path
    if paths is None:
        # "src" and its like are search paths, unless they are packages themselves.
        paths = (*(folder for folder in _SEARCHED if f"repo/{folder}/__init__.py" not in members and any(
            path.startswith(f"repo/{folder}/") and path.endswith(".py") for path in members)), ".")
    libraries = [name for name in LIBRARIES if any(os.path.normpath(f"repo/{root}/{name}{ending}") in members
                                                   for root in paths for ending in (".py", "/__init__.py"))]
    search = [os.path.normpath(os.path.join("repo", path)) for path in paths] + ["meta"]
    return {"libraries": libraries, "python_path": search,
            "environment": dict(spec.environment), "pytest_args": list(spec.pytest_args), "modules": []}


def pack(members: Mapping[str, Member]) -> bytes:
    """The members as an uncompressed tar archive, in sorted order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(members):
            info = tarfile.TarInfo(path)
            info.size, info.mode, info.mtime = len(members[path].data), members[path].mode, members[path].mtime
            archive.addfile(info, io.BytesIO(members[path].data))
    return buffer.getvalue()


def key(spec: RepositorySpec, fingerprint: str) -> str:
    """Names a prepared repository: by the archive's content, the settings, and what prepares it.

    Raises:
      UserError: the archive cannot be read.
    """
    source = pathlib.Path(spec.archive)
    try:
        if source.is_dir():
            content = hashlib.sha256(pack({path: member for path, member in _folder(source)})).hexdigest()
        else:
            content = _file_hash(str(source), source.stat().st_mtime_ns)
    except OSError as error:
        raise UserError(f"{error.filename or source}: cannot be read: {error.strerror or error}") from error
    facts = [FORMAT, content, spec.sha256, spec.pytest_args, spec.root, spec.python_path, spec.environment, fingerprint]
    facts += [spec.image, spec.setup] if spec.image or spec.setup else []
    facts += [{"modules": spec.modules}] if spec.modules else []
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


@functools.lru_cache(maxsize=256)
def _file_hash(path: str, mtime: int) -> str:
    del mtime  # part of the cache's key
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def store(state_dir: str, name: str, members: Mapping[str, Member], facts: dict[str, Any],
          baseline: dict[str, Any]) -> Stored:
    """Writes a prepared repository to the state folder; the JSON file comes last and makes it valid."""
    folder = pathlib.Path(state_dir, "repositories")
    with files.atomic_open(folder / f"{name}.tar", "wb") as stream:
        stream.write(pack(members))
    os.chmod(folder / f"{name}.tar", 0o600)  # holds the fix of every injected defect
    files.write_json(folder / f"{name}.json", {"settings": facts, "baseline": baseline})
    stored = load(state_dir, name)
    assert stored is not None
    return stored


def text_files(members: Iterable[tuple[str, bytes]]) -> dict[str, str]:
    """The repository's UTF-8 files, of all its (member's name, content): what agents can read and tasks change."""
    texts = {}
    for name, data in members:
        if name.startswith("repo/") and not name.endswith(".pyc"):
            with contextlib.suppress(UnicodeDecodeError):
                texts[name[5:]] = data.decode("utf-8")
    return texts


def load(state_dir: str, name: str) -> Stored | None:
    """Reads a prepared repository back, or None."""
    folder = pathlib.Path(state_dir, "repositories")
    if not (folder / f"{name}.json").exists():
        return None
    facts = files.read_json(folder / f"{name}.json")
    with tarfile.open(folder / f"{name}.tar") as archive:
        texts = text_files((member.name, archive.extractfile(member).read()) for member in archive)
    return Stored(texts, facts["settings"], str(folder / f"{name}.tar"), facts["baseline"])


@contextlib.contextmanager
def lock(state_dir: str, name: str) -> Iterator[None]:
    """Holds a file lock, so that several processes prepare a repository once."""
    folder = pathlib.Path(state_dir, "locks")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "w", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
