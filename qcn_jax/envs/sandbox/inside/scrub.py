"""Runs once in an image in which a repository's set-up has run: leaves no other copy of the repository's files there.

Usage: scrub.py TABLE.json, with `root` (where the repository lies), `files` (SHA-256: path below it), their `sizes`,
`modules` (path below a folder of packages: path below the root) and `dropped` (names of build results below the root).
An installed copy becomes a link to the repository, so that what is imported is what is there to be changed; byte code,
build results, caches and archives that hold a copy are deleted.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tarfile
import zipfile

PACKAGES = ("site-packages", "dist-packages")
METADATA = {"PKG-INFO", "SOURCES.txt", "requires.txt", "entry_points.txt", "top_level.txt", "dependency_links.txt",
            "not-zip-safe", "zip-safe", "namespace_packages.txt"}
SKIPPED = {"/proc", "/sys", "/dev"}
ARCHIVES = (".whl", ".egg", ".zip", ".pyz", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_MEMBER = 10_000_000  # bytes of an archive's member that are looked at


def scrub(table, top="/"):
    """Cleans the file system below `top`."""
    clean_root(os.path.join(top, table["root"].lstrip("/")), set(table["dropped"]))
    for pattern in ("tmp", "var/tmp"):
        empty(os.path.join(top, pattern))
    for folder, folders, names in os.walk(top):
        if folder in SKIPPED or folder == table["root"]:
            folders.clear()
            continue
        for name in [name for name in folders if name == ".cache"]:
            folders.remove(name)
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
        for name in names:
            look_at(folder, name, table)


def look_at(folder, name, table):
    """Replaces or deletes one file, if it is a copy."""
    path = os.path.join(folder, name)
    with contextlib.suppress(OSError):
        if os.path.islink(path) or not os.path.isfile(path):
            return
        if name.endswith(ARCHIVES):
            if holds_copy(path, table["files"]):
                os.unlink(path)
            return
        if name.endswith((".pyc", ".pyo")):
            parent = folder[:-len("/__pycache__")] if folder.endswith("/__pycache__") else folder
            if original(os.path.join(parent, name.split(".")[0] + ".py"), table):
                os.unlink(path)
            return
        found = original(path, table)
        if found is not None:
            os.unlink(path)
            os.symlink(os.path.join(table["root"], found), path)


def original(path, table):
    """The repository's file of which `path` is a copy, in content or because it is imported by that name; or None."""
    if os.path.islink(path):
        target = os.readlink(path)
        return target[len(table["root"]) + 1:] if target.startswith(table["root"] + "/") else None
    for place in PACKAGES:
        _, found, below = path.partition(f"/{place}/")
        if found and below in table["modules"]:
            return table["modules"][below]
    with contextlib.suppress(OSError), open(path, "rb") as stream:
        if os.fstat(stream.fileno()).st_size not in table["sizes"]:
            return None
        return table["files"].get(hashlib.sha256(stream.read()).hexdigest())
    return None


def holds_copy(path, files):
    """Whether an archive has one of the repository's files in it."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                data = [archive.read(info) for info in archive.infolist() if info.file_size < MAX_MEMBER]
        else:
            with tarfile.open(path) as archive:
                data = [archive.extractfile(member).read() for member in archive
                        if member.isfile() and member.size < MAX_MEMBER]
    except (OSError, RuntimeError, ValueError, EOFError, tarfile.TarError, zipfile.BadZipFile):
        return False
    return any(hashlib.sha256(one).hexdigest() in files for one in data)


def clean_root(root, dropped):
    """Deletes byte code and build results below the repository's own folder."""
    for folder, folders, names in os.walk(root):
        for name in [name for name in folders if name in dropped]:
            if os.path.isfile(os.path.join(folder, name, "__init__.py")):
                continue  # a package of that name, which the repository itself has
            folders.remove(name)
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
        for name in names:
            in_info = folder.endswith(".egg-info") and name not in METADATA
            if in_info or name.endswith((".pyc", ".pyo", ".whl", ".egg")):
                os.unlink(os.path.join(folder, name))


def empty(folder):
    """Deletes what is in a folder."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as table_file:
        scrub(json.load(table_file))
