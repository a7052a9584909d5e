"""Folders that an agent made, however it made them: looked into without following a link out, deleted at any depth.

All of it goes step by step along descriptors, because paths may be longer than the kernel takes and recursion deeper
than the interpreter.
"""

import contextlib
import errno
import os
import stat

MAX_LINKS = 40  # links of one path, as many as the kernel follows
MAX_DEPTH = 100  # folders of one path that are looked into
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def located(root, path, make=False):
    """Yields (a descriptor of the folder that `path` lies in, its name there); with `make`, folders are made.

    Links are followed as long as they lead below `root`, which may also be written /testbed. What the name is, the
    caller finds out, with O_NOFOLLOW.

    Raises:
      PermissionError: a link leads outside.
      OSError: no such folder, too many links or folders.
    """
    trail, links = [os.open(root, _FOLDER)], 0
    try:
        pending = _parts(path)
        while True:
            name = pending.pop() if pending else "."
            if name == "..":
                if len(trail) == 1:
                    raise PermissionError(errno.EACCES, "path leads outside the repository")
                os.close(trail.pop())
            elif (target := _link(trail[-1], name)) is not None:
                links += 1
                if links > MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                if target.startswith("/"):
                    target = _below(root, target)
                    while len(trail) > 1:
                        os.close(trail.pop())
                pending += _parts(target)
            elif not pending:
                yield trail[-1], name
                return
            else:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, dir_fd=trail[-1])
                if len(trail) > MAX_DEPTH:
                    raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
                trail.append(os.open(name, _FOLDER, dir_fd=trail[-1]))
    finally:
        for descriptor in trail:
            os.close(descriptor)


def _parts(path):
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _link(folder, name):
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):  # no link, or nothing there
            return None
        raise


def _below(root, target):
    for top in ("/testbed", root):
        if target == top or target.startswith(top + "/"):
            return target[len(top):]
    raise PermissionError(errno.EACCES, "path leads outside the repository")


def erase(place):
    """Deletes a folder and all below it. Folders are moved up next to `place` first, so that depth does not matter."""
    parent, name = os.path.split(place)
    top = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _erase(top, name, top)
    finally:
        os.close(top)


def _erase(parent, name, top):
    """Deletes the folder `name` of the folder `parent`; `top` is a folder of ours on the same file system."""
    count, moved = 0, f"{name[:200]}.gone"
    _own_sticky(parent)
    _open_up(parent, name)
    os.rename(name, f"{moved}0", src_dir_fd=parent, dst_dir_fd=top)
    front = [f"{moved}0"]
    while front:
        current = front.pop()
        folder = os.open(current, _FOLDER, dir_fd=top)
        try:
            _own_sticky(folder)
            with os.scandir(folder) as entries:
                found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
            for entry, is_folder in found:
                if is_folder:
                    count += 1
                    _open_up(folder, entry)
                    os.rename(entry, f"{moved}{count}", src_dir_fd=folder, dst_dir_fd=top)
                    front.append(f"{moved}{count}")
                else:
                    os.unlink(entry, dir_fd=folder)
        finally:
            os.close(folder)
        os.rmdir(current, dir_fd=top)


def _own_sticky(folder):
    """In a sticky folder only its owner may delete what is another's."""
    status = os.fstat(folder)
    if status.st_mode & stat.S_ISVTX and os.geteuid() == 0 and status.st_uid != 0:
        os.fchown(folder, 0, 0)


def _open_up(parent, name):
    """Where the folder is this user's own, its mode may keep even its owner out."""
    if os.geteuid() != 0 or os.stat(name, dir_fd=parent, follow_symlinks=False).st_uid == 0:
        os.chmod(name, 0o700, dir_fd=parent)


def erase_contents(place):
    """Deletes what is in a folder and, where that is possible, the folder."""
    with contextlib.suppress(OSError):
        for name in os.listdir(place):
            path = os.path.join(place, name)
            with contextlib.suppress(OSError):
                erase(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
        os.rmdir(place)


def measure(place):
    """(bytes, entries) below `place`."""
    files, below = _entries(place, lambda *_: None)
    return sum(size for size, _ in files), len(files) + len(below)


def shrink(place, limit, entries):
    """Deletes what is below `place` until at most `limit` bytes and `entries` files and folders are left.

    The largest files go first, and folders too deep to look into.

    Returns:
      How many were deleted.
    """
    deep = []
    files, below = _entries(place, lambda folder, name: deep.append(_erase_deep(place, folder, name)))
    total, count, chosen = sum(size for size, _ in files), len(files) + len(below), {}
    for size, (*parts, name) in sorted(files, reverse=True):
        if total <= limit and count <= entries:
            break
        chosen.setdefault(tuple(parts), []).append(name)
        total, count = total - size, count - 1
    removed = len(deep)
    for parts, names in chosen.items():
        removed += _remove(place, parts, names, os.unlink)
    for *parts, name in sorted(below, key=len, reverse=True):  # those that are not empty stay
        if count <= entries:
            break
        gone = _remove(place, tuple(parts), [name], os.rmdir)
        count, removed = count - gone, removed + gone
    return removed


def _entries(place, too_deep):
    """([(bytes, path)], [path of a folder]) below `place`; `too_deep(folder, name)` takes folders beyond MAX_DEPTH."""
    files, below, front = [], [], [()]
    while front:
        parts = front.pop()
        with contextlib.suppress(OSError), _opened(place, parts) as folder, os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    files.append((entry.stat(follow_symlinks=False).st_blocks * 512, (*parts, entry.name)))
                elif len(parts) < MAX_DEPTH:
                    front.append((*parts, entry.name))
                    below.append((*parts, entry.name))
                else:
                    too_deep(folder, entry.name)
    return files, below


def _remove(place, parts, names, how):
    """Deletes names in one folder, whoever owns it; returns how many."""
    removed = 0
    with contextlib.suppress(OSError), _opened(place, parts) as folder:
        status = os.fstat(folder)
        _own_sticky(folder)
        try:
            for name in names:
                with contextlib.suppress(OSError):
                    how(name, dir_fd=folder)
                    removed += 1
        finally:
            if os.geteuid() == 0:
                os.fchown(folder, status.st_uid, status.st_gid)
    return removed


def _erase_deep(place, folder, name):
    top = os.open(os.path.dirname(place), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            _erase(folder, name, top)
    finally:
        os.close(top)


@contextlib.contextmanager
def _opened(place, parts):
    """A descriptor of the folder `parts` below `place`, without following links."""
    descriptor = os.open(place, _FOLDER)
    try:
        for name in parts:
            below = os.open(name, _FOLDER, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        yield descriptor
    finally:
        os.close(descriptor)
