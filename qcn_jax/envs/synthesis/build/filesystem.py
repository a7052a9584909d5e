"""What a container's files have become, as a patch of its whole file system in git's form, and that patch applied.

Texts, binary files, symbolic links and executable bits are kept; empty folders, owners of new files and running
programs are not.
Git runs here, on copies of the named files; the containers need none.
"""

import dataclasses
import io
import os
import pathlib
import re
import shlex
import stat
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping

import docker.errors

from qcn_jax.envs import names
from qcn_jax.envs.patches import PatchError, check_size
from qcn_jax.envs.sandbox import docker as backend
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.synthesis.build.container import Container
from qcn_jax.envs.synthesis.mine.gitdir import environment

MAX_BYTES = 64 << 20  # of all changed files of a container
MAX_PATCH = 2 * MAX_BYTES  # binary files are written in 85 letters
_GIT_SECONDS = 300.0
_MODIFIED, _ADDED, _DELETED = 0, 1, 2  # in the engine's list of changes
_DIRECTORY = 1 << 31  # in the engine's file modes
_MOVED = re.compile(r"^(?:rename|copy) (?:from|to) ", re.MULTILINE)
_NOISE = re.compile(r"(?:^|/)__pycache__/|^\.qcn-")
_DIFF = ("diff", "--no-index", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--binary",
         "--no-prefix", "--", "a", "b")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file or a symbolic link: what the archive says of it, and its content or target."""

    info: tarfile.TarInfo
    data: bytes

    def same(self, other: "Entry | None") -> bool:
        """Whether a patch could not tell them apart."""
        return other is not None and (self.data, self.link, self.executable) == (other.data, other.link,
                                                                                  other.executable)

    @property
    def link(self) -> bool:
        """Whether it is a symbolic link."""
        return self.info.issym()

    @property
    def executable(self) -> bool:
        """Whether its owner may execute it."""
        return not self.link and bool(self.info.mode & stat.S_IXUSR)


def listed(container: Container) -> dict[str, int]:
    """What differs from the image by the engine: kinds of changes, by absolute path."""
    try:
        found = container.client.api.diff(container.id) or []
    except (docker.errors.DockerException, OSError) as error:
        raise SandboxError(f"the engine does not answer: {str(error).splitlines()[0]}") from error
    return {one["Path"]: one["Kind"] for one in found}


def changes(container: Container, before: Collection[str], closed: Collection[str]) -> str:
    """What a container's files have become since it was started, as a patch.

    Args:
      container: of an image.
      before: what `listed` gave when it was started.
      closed: top folders of which nothing is kept.

    Raises:
      PatchError: the changes are too large.
      SandboxError: the engine failed.
    """
    found = {path.lstrip("/"): kind for path, kind in listed(container).items()
             if path not in before or kind != _ADDED}
    kept = {path for path in found if not _NOISE.search(path) and _fault(path, closed) == ""}
    inner = {parent for path in kept for parent in _parents(path)}
    new = _entries(container, container.id, {path for path in kept - inner if found[path] != _DELETED})
    made = container.client.api.create_container(
        container.image, ["true"], entrypoint=[],
        labels={backend.OWNER: backend.owner(os.getpid()), backend.HOST: backend.host_identity()})["Id"]
    try:  # never started: its files are the image's
        old = _entries(container, made, {path for path in kept if found[path] == _MODIFIED})
        old |= _entries(container, made, {path for path in kept if found[path] == _DELETED}, below=True)
    finally:
        backend.remove(container.client, made)
    apart = {path for path in {*old, *new} if path not in new or not new[path].same(old.get(path))}
    old, new = ({path: one for path, one in state.items() if path in apart and not _NOISE.search(path)}
                for state in (old, new))
    plain = {path for path in apart if all(_is_text(state[path].data) for state in (old, new) if path in state)}
    return _diff(old, new, plain, False) + _diff(old, new, apart - plain, True)


def apply(container: Container, patch: str, closed: Collection[str]) -> dict[str, str]:
    """Applies a patch of `changes` to a fresh container of the same image; returns what was left out, and why.

    Raises:
      PatchError: it is malformed, too large, or does not fit.
      SandboxError: the engine failed.
    """
    check_size(patch, MAX_PATCH)
    if _MOVED.search(patch):
        raise PatchError("renames and copies are not read here; git diff --no-renames writes none")
    with tempfile.TemporaryDirectory(prefix="qcn-files-") as place:
        data, tree = patch.encode("utf-8"), pathlib.Path(place, "tree")
        tree.mkdir()
        raw = _git(tree, ("apply", "--numstat", "-z", "-"), data).split(b"\0")
        paths = {line.split(b"\t", 2)[2].decode("utf-8", "replace") for line in raw if line.count(b"\t") > 1}
        for path in paths:
            if words := names.path_fault(path):  # those of git apply are given up for paths below .git
                raise PatchError(f"path {names.shown(path)} {words}")
        old = _entries(container, container.id, paths)
        _write(old, tree)
        _git(tree, ("apply", "--unsafe-paths", "--whitespace=nowarn", "-"), data)
        dropped = {path: words for path in sorted(paths) if (words := _fault(path, closed))}
        archive, gone = _packed(tree, sorted(paths - dropped.keys()), old)
    container.write({f"/{path}": None for path in gone})
    for folder in {path.rpartition("/")[0] for path in gone} - {""}:  # as git does with those that are empty then
        container.exec(f"rmdir -p --ignore-fail-on-non-empty -- {shlex.quote(folder)}", _GIT_SECONDS, "/")
    container.unpack(archive)
    return dropped


def _fault(path: str, closed: Collection[str]) -> str:
    return f"is in /{path.split('/')[0]}, which is not the agent's" if path.split("/")[0] in closed else (
        names.path_fault(path))


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:number]) for number in range(1, len(parts))]


def _is_text(data: bytes) -> bool:
    try:
        return "\0" not in data.decode("utf-8")
    except UnicodeDecodeError:
        return False


def _entries(container: Container, id_: str, paths: Iterable[str], below: bool = False) -> dict[str, Entry]:
    """Files and links at these paths of a container; with `below` also those in folders among them."""
    found: dict[str, Entry] = {}
    total = 0
    for path in sorted(paths):
        if path in found:
            continue
        try:
            stream, status = container.client.api.get_archive(id_, f"/{path}")
            if status["mode"] & _DIRECTORY and not below:
                stream.close()
                continue
            data = bytearray()
            for part in stream:
                data += part
                if total + len(data) > MAX_BYTES:
                    raise PatchError(f"the changed files are larger than {MAX_BYTES >> 20} MiB")
        except docker.errors.NotFound:
            continue
        except (docker.errors.DockerException, OSError) as error:
            raise SandboxError(f"/{path} cannot be read: {str(error).splitlines()[0]}") from error
        total += len(data)
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                name = "/".join(filter(None, (path, member.name.rstrip("/").partition("/")[2])))
                if member.issym():
                    found[name] = Entry(member, member.linkname.encode("utf-8", "surrogateescape"))
                elif member.isreg() or member.islnk() and member.linkname in archive.getnames():
                    found[name] = Entry(member, archive.extractfile(member).read())
    return found


def _write(state: Mapping[str, Entry], folder: pathlib.Path) -> None:
    """Writes files below `folder`; nothing is written through a link."""
    for path, one in state.items():
        if any(parent in state for parent in _parents(path)):
            raise PatchError(f"/{path}: a folder above it is a file")
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if one.link:
            os.symlink(one.data, os.fsencode(place))
        else:
            place.write_bytes(one.data)
            place.chmod(0o755 if one.executable else 0o644)


def _diff(old: Mapping[str, Entry], new: Mapping[str, Entry], chosen: Collection[str], binary: bool) -> str:
    if not chosen:
        return ""
    with tempfile.TemporaryDirectory(prefix="qcn-files-") as place:
        folder = pathlib.Path(place)
        for name, state in (("a", old), ("b", new)):
            (folder / name).mkdir()
            _write({path: one for path, one in state.items() if path in chosen}, folder / name)
        (folder / "attributes").write_text("* -diff\n")
        settings = ("-c", f"core.attributesFile={folder / 'attributes'}") if binary else ()
        return _git(folder, (*settings, *_DIFF), None, (0, 1)).decode("utf-8")


def _git(folder: pathlib.Path, arguments: tuple[str, ...], data: bytes | None, good: tuple[int, ...] = (0,)) -> bytes:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, input=data, capture_output=True, check=False,
                              env=environment() | {"GIT_CEILING_DIRECTORIES": str(folder.parent.resolve())},
                              timeout=_GIT_SECONDS)
    except FileNotFoundError as error:
        raise SandboxError("git is not here, which patches of images' files need") from error
    except subprocess.TimeoutExpired as error:
        raise PatchError("the patch takes too long") from error
    if done.returncode not in good:
        words = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise PatchError(words[0].removeprefix("error: ")[:300] if words else "git refuses the patch")
    return done.stdout


def _packed(tree: pathlib.Path, paths: Iterable[str], old: Mapping[str, Entry]) -> tuple[bytes, list[str]]:
    """An archive of what stands in `tree` at these paths, and those where nothing stands; owners as they were."""
    buffer, gone = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in paths:
            place, info = tree / path, tarfile.TarInfo(path)
            if not os.path.lexists(place):
                gone.append(path)
                continue
            executable = os.lstat(place).st_mode & stat.S_IXUSR
            info.mode, info.mtime = 0o755 if executable else 0o644, int(time.time())
            if path in old:
                was = old[path]
                info.uid, info.gid = was.info.uid, was.info.gid
                info.mode = was.info.mode if was.executable == bool(executable) and not was.link else info.mode
            data = b""
            if place.is_symlink():
                info.type, info.linkname = tarfile.SYMTYPE, os.readlink(place)
            else:
                data = place.read_bytes()
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue(), gone
