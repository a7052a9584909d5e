"""Workspaces: fresh copies of a pristine tree that is kept in the server's memory, each with its own user id.

The pristine tree never lies where a workspace's user could read it: it holds the fix of every injected defect.
Reading and writing on an agent's behalf is done with the agent's identity, so that a symbolic link it made
leads nowhere that it could not go itself.
"""

import contextlib
import io
import os
import signal
import stat
import tarfile

import folders
import zygote

IGNORED = {"__pycache__", ".git", ".pytest_cache", ".hypothesis", ".mypy_cache", ".ruff_cache"}
MAX_FILE = 2_000_000  # bytes of one file read, written or looked at for changes
MAX_CHANGES = 500
MAX_LOOKED_AT = 64_000_000  # bytes that are read to find changes: files of holes cost their author nothing
MAX_PATH = 4096  # characters; the kernel takes no longer ones
MAX_CHANGED = 8_000_000  # bytes of all changed files together; the reply, in JSON, is several times that
PLACES = ("tmp", "var", "shm")  # what stands for /tmp, /var/tmp and /dev/shm while a workspace is at work


class Refused(Exception):
    """A request that cannot be met; `kind` names the exception that the host raises."""

    def __init__(self, kind, message):
        super().__init__(message)
        self.kind = kind


class Tree:
    """A pristine repository in memory: {path below the workspace: (bytes, mode, mtime)}."""

    def __init__(self, payload, settings):
        self.files, self.settings = {}, settings
        with tarfile.open(fileobj=io.BytesIO(payload)) as archive:
            for member in archive:
                if member.isfile():
                    data = archive.extractfile(member).read()
                    self.files[member.name] = (data, 0o755 if member.mode & 0o100 else 0o644, member.mtime)


def stamp(status):
    """What changes whenever a file does (an unprivileged user cannot set the time of change)."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def cached(path):
    """The start of the names under which byte code of the module at `path` is cached."""
    folder, name = os.path.split(path)
    return os.path.join(folder, "__pycache__", name.removesuffix(".py") + ".")


class Workspace:
    """One copy of a tree at `home`/repo, owned by `uid` (None: the server's own user).

    `overlay` belongs to the starting state, `edits` are changes to it; both map paths to text or None. Where it is
    `guarded` its files belong to the server's user: who runs there may add files, but change, move or delete none.
    """

    def __init__(self, home, tree, overlay, edits, uid, guarded=False):
        self.tree, self.uid, self.guarded = tree, uid, guarded
        self.overlay, self.edits = overlay, edits
        self.cut = 0  # files that were deleted for want of room, until its user is told
        self.stand(home)
        self.make()

    def stand(self, home):
        """Takes note of where the workspace is."""
        self.home, self.root = home, os.path.join(home, "repo")

    def make(self):
        """Writes the files; `home` must not exist."""
        self.stamps, made, texts = {}, {self.home}, {**self.overlay, **self.edits}
        for path, text in texts.items():
            inside = len(path) < MAX_PATH and os.path.normpath("repo/" + path).startswith("repo/")
            if not inside or not isinstance(text, str | None):
                raise Refused("PermissionError", f"{path[:100]!r}: not text of a file in the repository")
        os.mkdir(self.home, 0o700)
        stale = tuple(cached("repo/" + path) for path in texts)
        dropped = {"repo/" + path for path in texts}
        for path, (data, mode, mtime) in self.tree.files.items():
            if path in dropped or (stale and path.startswith(stale)):
                continue
            self.stamps[path] = self._put(path, data, mode, mtime, made)
        for path, text in texts.items():
            if text is not None:
                written = self._put("repo/" + path, text.encode("utf-8", "surrogateescape"), 0o644, None, made)
                if path not in self.edits:
                    self.stamps["repo/" + path] = written
        for name in ("repo", "home", *PLACES):
            folder = os.path.join(self.home, name)
            if folder not in made:
                os.mkdir(folder)
                made.add(folder)
            if name in PLACES:
                os.chmod(folder, 0o1777)
        if self.uid is not None:
            own = made if not self.guarded else {os.path.join(self.home, name) for name in ("home", *PLACES)}
            for folder in own:
                os.chown(folder, self.uid, self.uid)
            for folder in made - own:
                if folder == self.home:
                    os.chmod(folder, 0o750)
                    os.chown(folder, 0, self.uid)
                elif os.path.basename(folder) != "__pycache__":
                    os.chmod(folder, 0o1777)  # what others own stays in a sticky folder

    def altered(self):
        """Files of a guarded workspace that are no longer as they were made, as signs of tampering."""
        changed = []
        for path, known in self.stamps.items() if self.guarded else ():
            try:
                same = stamp(os.lstat(os.path.join(self.home, path))) == known
            except OSError:
                same = False
            if not same:
                changed.append(f"file {path.partition('/')[2]}")
        return changed[:20]

    def _put(self, path, data, mode, mtime, made):
        target = os.path.join(self.home, os.path.normpath(path))
        folder = os.path.dirname(target)
        if folder not in made:
            step = self.home
            for part in os.path.relpath(folder, self.home).split(os.sep):
                step = os.path.join(step, part)
                if step not in made:
                    os.mkdir(step)
                    made.add(step)
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view):]
            if mtime is not None:
                os.utime(descriptor, (mtime, mtime))
            if self.uid is not None and not self.guarded:
                os.fchown(descriptor, self.uid, self.uid)
            return stamp(os.fstat(descriptor))
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def identity(self):
        """Acts with the workspace's user id."""
        if self.uid is None:
            yield
            return
        os.setegid(self.uid)
        os.seteuid(self.uid)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(0)
            if os.getpid() == 1:  # in a process namespace: the kernel forgets this wish when the user id changes
                zygote.prctl(zygote.PR_SET_PDEATHSIG, signal.SIGKILL)

    def resolve(self, path):
        """`path` relative to the repository, in which it must lie."""
        path = os.path.relpath(os.path.normpath(os.path.join(self.root, path)), self.root)
        if path == ".." or path.startswith("../"):
            raise Refused("PermissionError", "path is outside the repository")
        return path

    @contextlib.contextmanager
    def opened(self, path, flags, make=False):
        """A descriptor of `path`, opened as the agent; links lead nowhere outside the repository."""
        with self.identity(), folders.located(self.root, self.resolve(path), make) as (folder, name):
            # O_NONBLOCK: a pipe would never open.
            descriptor = os.open(name, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=folder)
            try:
                yield descriptor, os.fstat(descriptor)
            finally:
                os.close(descriptor)

    def read(self, path):
        """The bytes of a regular file."""
        with self.opened(path, os.O_RDONLY) as (descriptor, status):
            if stat.S_ISDIR(status.st_mode):
                raise Refused("IsADirectoryError", f"{path}: is a directory")
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE:
                raise Refused("PermissionError", f"{path}: is not a regular file of at most {MAX_FILE} bytes")
            with os.fdopen(os.dup(descriptor), "rb") as stream:
                return stream.read(MAX_FILE)

    def write(self, path, data):
        """Replaces or creates a regular file, folders included."""
        if len(data) > MAX_FILE:
            raise Refused("PermissionError", f"{path}: more than {MAX_FILE} bytes")
        with self.opened(path, os.O_WRONLY | os.O_CREAT, make=True) as (descriptor, status):
            if not stat.S_ISREG(status.st_mode):
                raise Refused("PermissionError", f"{path}: is not a regular file")
            os.ftruncate(descriptor, 0)
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view):]

    def base(self, path):
        """Bytes of the starting state at `path` (below the repository), or None."""
        if path in self.overlay:
            text = self.overlay[path]
            return None if text is None else text.encode("utf-8", "surrogateescape")
        entry = self.tree.files.get("repo/" + path)
        return None if entry is None else entry[0]

    def changes(self):
        """({path: bytes or None}, [paths of things that are no regular text file]) against the starting state."""
        changed, skipped, seen, total, looked_at = {}, [], set(), 0, 0
        for path, status in self._walk():
            seen.add(path)
            if self.stamps.get("repo/" + path) == stamp(status):
                continue
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE or len(changed) >= MAX_CHANGES or (
                    looked_at + status.st_size > MAX_LOOKED_AT):
                skipped.append(path)
                continue
            looked_at += status.st_size
            try:
                data = self.read(path)
            except (OSError, Refused):
                skipped.append(path)
                continue
            if data != self.base(path):
                if b"\0" in data or total + len(data) > MAX_CHANGED:
                    skipped.append(path)
                else:
                    changed[path], total = data, total + len(data)
        start = {name[5:] for name in self.tree.files if name.startswith("repo/")} | set(self.overlay)
        for path in start - seen:
            ignored = path.endswith(".pyc") or IGNORED & set(path.split("/")) or ".egg-info/" in path
            if not ignored and self.base(path) is not None and not os.path.lexists(os.path.join(self.root, path)):
                changed[path] = None
        return changed, skipped[:MAX_CHANGES]

    def _walk(self):
        stack, count = [] if os.path.islink(self.root) else [""], 0
        while stack:
            folder = stack.pop()
            try:
                entries = sorted(os.scandir(os.path.join(self.root, folder)), key=lambda entry: entry.name)
            except OSError:
                continue
            for entry in entries:
                path = os.path.join(folder, entry.name)
                if entry.name in IGNORED or entry.name.endswith((".pyc", ".egg-info")):
                    continue
                count += 1
                if count > 20_000:
                    return
                if entry.is_dir(follow_symlinks=False):
                    stack.append(path)
                else:
                    yield path, entry.stat(follow_symlinks=False)

    def compiled(self):
        """Byte code caches below the workspace: {path: (bytes, mtime)}."""
        found = {}
        for folder, _, names in os.walk(self.root):
            if os.path.basename(folder) == "__pycache__":
                for name in names:
                    path = os.path.join(folder, name)
                    if os.path.isfile(path) and not os.path.islink(path):
                        with open(path, "rb") as stream:
                            found[os.path.relpath(path, self.home)] = (stream.read(), int(os.stat(path).st_mtime))
        return found

    def shrink(self, limit, entries, shared):
        """Deletes the largest files until at most `limit` bytes and `entries` files are left, and all in `shared`."""
        self.cut += folders.shrink(self.home, limit, entries)
        self._clear(shared)

    def remove(self, shared):
        """Deletes the workspace and what its user left in the folders of `shared` (such as /tmp)."""
        folders.erase(self.home)
        self._clear(shared)

    def _clear(self, shared):
        for folder in shared if self.uid is not None else ():
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    if entry.stat(follow_symlinks=False).st_uid == self.uid:
                        if entry.is_dir(follow_symlinks=False):
                            folders.erase(entry.path)
                        else:
                            os.unlink(entry.path)
