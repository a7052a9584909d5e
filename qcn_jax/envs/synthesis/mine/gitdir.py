"""A stranger's clone behind a git directory of our own: its objects and references, and nothing of its settings.

A clone's own directory decides what git runs (fsmonitor, signature programs, transports of missing objects) and where
git looks (alternates, links, a .git that is a file). So git is given a new directory that has no settings but ours,
links to the clone's object folders, and its references by hash.
"""

import os
import pathlib
import re
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator

from qcn_jax.errors import UserError

MAX_OUTPUT = 512_000_000  # bytes of one command; a long history's messages are a tenth of it
MAX_SECONDS = 300.0  # for one command
_MAX_FILE = 64_000_000  # bytes of a file of the git directory that is read here
_MAX_REFERENCE = 1000  # bytes of a file that holds one hash
_MAX_ENTRIES = 2_000_000  # objects and references that are looked at
# Bytes of one object, which git holds in memory whole, however well packed; blobs are looked at when they are read.
_MAX_OBJECT = {b"commit": 1_000_000, b"tag": 1_000_000, b"tree": 24_000_000}
_HASH = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_REFERENCE = re.compile(r"refs/(?:heads|tags|remotes)/[^\s\x00-\x20\x7f~^:?*\[\\]{1,400}")
_SETTINGS = ("protocol.allow=never", "core.quotePath=false", "core.multiPackIndex=false", "safe.directory=*",
             "core.hooksPath=/dev/null", "core.fsmonitor=false", "log.showSignature=false", "gc.auto=0")


def environment() -> dict[str, str]:
    """Variables for git: none of the surroundings' GIT_*, no settings of the machine or of the user, no network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return kept | {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_TERMINAL_PROMPT": "0",
                   "GIT_NO_REPLACE_OBJECTS": "1", "GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none",
                   "GIT_ATTR_NOSYSTEM": "1", "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}


class GitDirectory:
    """Our own git directory for the clone at `path`; it lives as long as this object.

    Attributes:
      origin: the address of the remote `origin`, "" without one.

    Raises:
      UserError: there is no clone, or it borrows from elsewhere (links, alternates, a .git file); names it.
    """

    def __init__(self, path: pathlib.Path):
        self._clone = path
        theirs = self._find(path)
        self._temporary = tempfile.TemporaryDirectory(prefix="qcn-git-")
        self.folder = pathlib.Path(self._temporary.name, "git")
        settings = theirs / "config"
        wide = self._setting(settings, "extensions.objectformat") == "sha256"
        self.origin = self._setting(settings, "remote.origin.url")
        form = f"--object-format={'sha256' if wide else 'sha1'}"
        self._run(["git", "init", "-q", "--bare", "--template=", form, str(self.folder)])
        self._link_objects(theirs / "objects")
        references = dict(self._references(theirs))
        lines = [f"{commit} {name}\n" for name, commit in sorted(references.items())]
        (self.folder / "packed-refs").write_text("".join(lines))
        head = self._read(theirs / "HEAD").strip()
        commit = references.get(head.removeprefix("ref:").strip(), "") if head.startswith("ref:") else head
        if _HASH.fullmatch(commit):
            (self.folder / "HEAD").write_text(f"{commit}\n")
        shallow = [line for line in self._read(theirs / "shallow").splitlines() if _HASH.fullmatch(line)]
        if shallow:
            (self.folder / "shallow").write_text("".join(f"{line}\n" for line in shallow))
        self._check_objects()

    def _check_objects(self) -> None:
        form = "--batch-check=%(objecttype) %(objectsize)"
        for line in self.run("cat-file", "--batch-all-objects", "--unordered", form).splitlines():
            kind, _, size = line.partition(b" ")
            if kind in _MAX_OBJECT and int(size) > _MAX_OBJECT[kind]:
                raise UserError(f"{self._clone}: holds a {kind.decode()} of {int(size)} bytes")

    def run(self, *arguments: str, data: bytes | None = None, limit: int = MAX_OUTPUT) -> bytes:
        """A git command's output; raises UserError with git's own words, or where it prints or takes too much."""
        settings = [word for setting in _SETTINGS for word in ("-c", setting)]
        return self._run(["git", *settings, f"--git-dir={self.folder}", *arguments], data, limit, arguments[0])

    def _run(self, command: list[str], data: bytes | None = None, limit: int = MAX_OUTPUT, name: str = "") -> bytes:
        with tempfile.TemporaryFile() as words, tempfile.TemporaryFile() as given:
            given.write(data or b"")
            given.seek(0)
            process = subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, stderr=words, env=environment(),
                                       cwd=self._temporary.name)
            timer = threading.Timer(MAX_SECONDS, process.kill)
            timer.start()
            output = bytearray()
            try:
                while len(output) <= limit and (part := process.stdout.read(1 << 20)):  # memory for what comes only
                    output += part
            finally:
                timer.cancel()
                if process.poll() is None and len(output) > limit:
                    process.kill()
                process.stdout.close()
                status = process.wait()
            if len(output) > limit:
                raise UserError(f"git {name} in {self._clone}: prints more than {limit} bytes")
            if status:
                words.seek(0)
                lines = words.read(100_000).decode("utf-8", "replace").strip().splitlines()
                last = lines[-1][:300] if lines else f"ended with status {status}"
                raise UserError(f"git {name} in {self._clone}: {last}")
            return bytes(output)

    def _find(self, path: pathlib.Path) -> pathlib.Path:
        own = path / ".git"
        if os.path.lexists(own) and not stat.S_ISDIR(os.lstat(own).st_mode):
            raise UserError(f"{path}: its .git leads to another repository; name that one")
        folder = own if os.path.isdir(own) else path
        if not os.path.isdir(folder / "objects") or not os.path.lexists(folder / "HEAD"):
            raise UserError(f"{path}: is no git repository")
        if os.path.lexists(folder / "commondir"):
            raise UserError(f"{path}: is a working tree of another repository; name that one")
        return folder

    def _read(self, path: pathlib.Path) -> str:
        """A file of the clone's git directory, "" where there is none."""
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return ""
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_FILE:
            raise UserError(f"{path}: is not a plain file of at most {_MAX_FILE} bytes")
        return path.read_text(encoding="utf-8", errors="replace")

    def _setting(self, path: pathlib.Path, name: str) -> str:
        """One value of the clone's settings; values alone, included files are not read."""
        if not self._read(path):
            return ""
        try:
            command = ["git", "config", "--no-includes", f"--file={path.resolve()}", "--get", name]
            return self._run(command).decode("utf-8", "replace").strip()
        except UserError:
            return ""

    def _plain(self, folder: pathlib.Path) -> Iterator[os.DirEntry[str]]:
        """Files below `folder`, none of which is a link or anything special."""
        stack, count = [os.fspath(folder)], 0
        if os.path.islink(folder):
            raise UserError(f"{folder}: is a link; a clone must hold its own objects")
        while stack:
            with os.scandir(stack.pop()) as entries:
                for entry in entries:
                    count += 1
                    if count > _MAX_ENTRIES:
                        raise UserError(f"{folder}: holds more than {_MAX_ENTRIES} files")
                    if entry.is_dir(follow_symlinks=False):
                        stack.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        yield entry
                    else:
                        raise UserError(f"{entry.path}: is a link or no file; a clone must hold its own objects")

    def _link_objects(self, theirs: pathlib.Path) -> None:
        if self._read(theirs / "info" / "alternates").strip():
            raise UserError(f"{self._clone}: borrows objects of another repository (objects/info/alternates); make it "
                            "whole with git repack -a -d and remove that file")
        for _ in self._plain(theirs):
            pass
        mine = self.folder / "objects"
        for name in os.listdir(theirs):
            if name == "pack" or re.fullmatch("[0-9a-f]{2}", name):
                if (mine / name).is_dir():
                    (mine / name).rmdir()
                (mine / name).symlink_to((theirs / name).resolve())

    def _references(self, theirs: pathlib.Path) -> Iterator[tuple[str, str]]:
        """(name, hash) of branches, tags and what was fetched; loose ones come last and hold."""
        for line in self._read(theirs / "packed-refs").splitlines():
            commit, _, name = line.partition(" ")
            if _HASH.fullmatch(commit) and _plain_reference(name):
                yield name, commit
        if not os.path.lexists(theirs / "refs"):
            return
        for entry in self._plain(theirs / "refs"):
            name = os.path.relpath(entry.path, theirs)
            short = entry.stat(follow_symlinks=False).st_size <= _MAX_REFERENCE
            commit = self._read(pathlib.Path(entry.path)).strip() if short and _plain_reference(name) else ""
            if _HASH.fullmatch(commit):
                yield name, commit


def _plain_reference(name: str) -> bool:
    return bool(_REFERENCE.fullmatch(name)) and not any(
        part.startswith(".") or part.endswith((".", ".lock")) or ".." in part or "@{" in part or not part
        for part in name.split("/"))
