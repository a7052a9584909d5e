"""Hostile clones: reading one runs nothing of it, shows nothing else of the machine, and always comes to an end.

A clone that was copied (not cloned) keeps its git directory as its author left it: settings that name programs, object
stores and references that lead elsewhere, objects that are bombs. Every clone here is read as mining reads it.
"""

import hashlib
import os
import pathlib
import shutil
import signal
import subprocess
import tracemalloc
import zlib

import pytest

from qcn_jax.envs.sandbox import repository
from qcn_jax.envs.synthesis.mine.history import Clone
from qcn_jax.envs.synthesis.mine.split import split
from qcn_jax.errors import UserError

SECRET = "s3cret-of-another-repository"
ENVIRONMENT = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1", "GIT_NO_LAZY_FETCH": "1",
               **{f"GIT_{role}_{field}": value for role in ("AUTHOR", "COMMITTER")
                  for field, value in (("NAME", "a"), ("EMAIL", "a@b"), ("DATE", "2024-01-01T00:00:00Z"))}}


def git(folder, *arguments, data=None):
    """Runs git in a folder; returns its output."""
    return subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, env=ENVIRONMENT,
                          input=data).stdout.decode().strip()


@pytest.fixture
def clone(tmp_path):
    """Three changes of a small package, the last one with a tag."""
    root = tmp_path / "clone"
    git(tmp_path, "init", "-q", "-b", "main", str(root))
    git(root, "remote", "add", "origin", "https://github.com/someone/numbers.git")
    for number in range(3):
        for path in ("pkg/core.py", "tests/test_core.py"):
            (root / path).parent.mkdir(exist_ok=True)
            (root / path).write_text(f"x = {number}\n")
        git(root, "add", "-A")
        git(root, "commit", "-q", "-m", f"change {number}; fixes #{number + 1}")
    git(root, "tag", "v1.0")
    return root


def read(root, folder):
    """Everything that mining asks of a clone."""
    clone = Clone(root)
    seen = []
    for change in clone.changes():
        seen += [change, split(clone, change), clone.text_files(change.base), clone.version(change.base)]
        clone.archive(change.base, folder / "archives")
    return clone, seen


def without_object(root, name="HEAD:pkg/core.py"):
    """Takes one object away, as a partial clone lacks it."""
    blob = git(root, "rev-parse", name)
    (root / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    return blob


def test_an_honest_clone(clone, tmp_path):
    found, seen = read(clone, tmp_path)
    assert (found.owner, found.name, len(seen)) == ("someone", "numbers", 8)
    assert [change.title for change in seen[::4]] == ["change 2; fixes #3", "change 1; fixes #2"]
    git(clone, "gc", "-q")  # packs and packed references
    assert [change.commit for change in read(clone, tmp_path)[1][::4]] == [change.commit for change in seen[::4]]
    git(tmp_path, "clone", "-q", "--depth=2", f"file://{clone}", "shallow")
    assert len(read(tmp_path / "shallow", tmp_path)[1]) == 4
    git(tmp_path, "clone", "-q", "--mirror", str(clone), "bare.git")
    assert len(read(tmp_path / "bare.git", tmp_path)[1]) == 8
    git(tmp_path, "init", "-q", "--object-format=sha256", "wide")
    (tmp_path / "wide" / "a.py").write_text("x = 1\n")
    git(tmp_path / "wide", "add", "-A")
    git(tmp_path / "wide", "commit", "-q", "-m", "one")
    assert len(Clone(tmp_path / "wide").head) == 64


# --- settings that name programs


def signed(root):
    """Adds a commit with a signature, which `log.showSignature` has checked by a program."""
    git(root, "commit", "-q", "--allow-empty", "-m", "signed")
    head = git(root, "cat-file", "commit", "HEAD").split("\n")
    head.insert(4, "gpgsig -----BEGIN PGP SIGNATURE-----\n \n iQ==\n -----END PGP SIGNATURE-----")
    commit = git(root, "hash-object", "-t", "commit", "-w", "--stdin", data=("\n".join(head) + "\n").encode())
    git(root, "update-ref", "HEAD", commit)


PROGRAMS = {
    "fsmonitor": "[core]\n\tfsmonitor = {run}\n",
    "signature": "[log]\n\tshowSignature = true\n[gpg]\n\tprogram = {script}\n",
    "signature_ssh": "[log]\n\tshowSignature = true\n[gpg \"ssh\"]\n\tprogram = {script}\n\tallowedSignersFile = /dev/null\n"
                     "[gpg]\n\tprogram = {script}\n\tformat = ssh\n",
    "promisor_ext": "[core]\n\trepositoryformatversion = 1\n[extensions]\n\tpartialClone = evil\n[protocol \"ext\"]\n"
                    "\tallow = always\n[remote \"evil\"]\n\turl = \"ext::{script} %S\"\n\tpromisor = true\n",
    "promisor_ssh": "[core]\n\trepositoryformatversion = 1\n\tsshCommand = {script}\n[extensions]\n\tpartialClone = evil\n"
                    "[remote \"evil\"]\n\turl = ssh://nowhere.invalid/x\n\tpromisor = true\n",
    "promisor_proxy": "[core]\n\trepositoryformatversion = 1\n\tgitProxy = {script}\n[extensions]\n\tpartialClone = evil\n"
                      "[remote \"evil\"]\n\turl = git://nowhere.invalid/x\n\tpromisor = true\n",
    "promisor_uploadpack": "[core]\n\trepositoryformatversion = 1\n[extensions]\n\tpartialClone = evil\n"
                           "[remote \"evil\"]\n\turl = {folder}\n\tuploadpack = {script}\n\tpromisor = true\n",
    "include": "[include]\n\tpath = {folder}/more\n",
    "include_if": "[includeIf \"gitdir:**\"]\n\tpath = {folder}/more\n",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_settings_run_nothing(clone, tmp_path, name):
    signed(clone)
    script, marker = tmp_path / "evil.sh", tmp_path / "hooked"
    script.write_text(f"#!/bin/sh\ntouch {marker}\nexit 1\n")
    script.chmod(0o755)
    (tmp_path / "more").write_text(PROGRAMS["signature"].format(script=script))
    with open(clone / ".git" / "config", "a") as stream:
        stream.write(PROGRAMS[name].format(script=script, run=f"touch {marker}; false", folder=tmp_path))
    if name.startswith("promisor"):
        without_object(clone, "HEAD~1:tests/test_core.py")
        with pytest.raises(UserError, match=r"^\S.*$"):  # it says that something is missing, and fetches nothing
            read(clone, tmp_path)
    else:
        read(clone, tmp_path)
    assert not marker.exists()


def test_hooks_filters_and_attributes_run_nothing(clone, tmp_path):
    script, marker = tmp_path / "evil.sh", tmp_path / "hooked"
    script.write_text(f"#!/bin/sh\ntouch {marker}\ncat\n")
    script.chmod(0o755)
    (clone / ".gitattributes").write_text("* filter=evil diff=evil\n")
    git(clone, "add", ".gitattributes")
    git(clone, "commit", "-q", "-m", "attributes")
    for hook in ("post-checkout", "reference-transaction", "post-index-change", "fsmonitor-watchman", "pre-auto-gc"):
        shutil.copy(script, clone / ".git" / "hooks" / hook)
    (clone / ".git" / "info" / "attributes").write_text("* filter=evil diff=evil merge=evil\n")
    with open(clone / ".git" / "config", "a") as stream:
        stream.write(f"[core]\n\tpager = {script}\n\teditor = {script}\n\taskPass = {script}\n\talternateRefsCommand = {script}\n"
                     f"[filter \"evil\"]\n\tclean = {script}\n\tsmudge = {script}\n\tprocess = {script}\n"
                     f"[diff]\n\texternal = {script}\n[diff \"evil\"]\n\ttextconv = {script}\n\tcommand = {script}\n"
                     f"[alias]\n\tlog = !{script}\n\tcat-file = !{script}\n[pager]\n\tlog = {script}\n")
    assert len(read(clone, tmp_path)[1]) == 12
    assert not marker.exists()


def test_the_readers_own_settings_change_nothing(clone, tmp_path, monkeypatch):
    """Neither a user's configuration nor variables of the surroundings decide what a clone says."""
    plain = read(clone, tmp_path)[1]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".gitconfig").write_text("[log]\n\tshowSignature = true\n\tdate = raw\n[core]\n\tquotePath = true\n")
    for name, value in {"HOME": str(tmp_path / "home"), "GIT_DIR": str(tmp_path), "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0":
                        "diff.renames", "GIT_CONFIG_VALUE_0": "copies", "GIT_OBJECT_DIRECTORY": "/nowhere"}.items():
        monkeypatch.setenv(name, value)
    assert read(clone, tmp_path)[1] == plain


# --- what leads elsewhere


@pytest.fixture
def private(tmp_path):
    """Another repository of the machine, whose content must not come out."""
    root = tmp_path / "private"
    git(tmp_path, "init", "-q", "-b", "main", str(root))
    for number in range(2):
        (root / "pkg").mkdir(exist_ok=True)
        (root / "pkg" / "core.py").write_text(f"# {SECRET} {number}\n")
        git(root, "add", "-A")
        git(root, "commit", "-q", "-m", f"{SECRET} {number}")
    git(root, "gc", "-q")
    return root


def alternates(clone, private):
    (clone / ".git" / "objects" / "info").mkdir(exist_ok=True)
    (clone / ".git" / "objects" / "info" / "alternates").write_text(f"{private}/.git/objects\n")
    (clone / ".git" / "refs" / "heads" / "main").write_text(git(private, "rev-parse", "HEAD") + "\n")


def git_file(clone, private):
    shutil.rmtree(clone / ".git")
    (clone / ".git").write_text(f"gitdir: {private}/.git\n")


def git_link(clone, private):
    shutil.rmtree(clone / ".git")
    (clone / ".git").symlink_to(private / ".git")


def pack_link(clone, private):
    shutil.rmtree(clone / ".git" / "objects" / "pack", ignore_errors=True)
    (clone / ".git" / "objects" / "pack").symlink_to(private / ".git" / "objects" / "pack")
    (clone / ".git" / "refs" / "heads" / "main").write_text(git(private, "rev-parse", "HEAD") + "\n")


def pack_file_links(clone, private):
    for path in (private / ".git" / "objects" / "pack").iterdir():
        (clone / ".git" / "objects" / "pack" / path.name).symlink_to(path)
    (clone / ".git" / "refs" / "heads" / "main").write_text(git(private, "rev-parse", "HEAD") + "\n")


def objects_link(clone, private):
    shutil.rmtree(clone / ".git" / "objects")
    (clone / ".git" / "objects").symlink_to(private / ".git" / "objects")
    (clone / ".git" / "refs" / "heads" / "main").write_text(git(private, "rev-parse", "HEAD") + "\n")


def common_directory(clone, private):
    (clone / ".git" / "commondir").write_text(f"{private}/.git\n")


def reference_link(clone, private):
    alternates(clone, private)
    (clone / ".git" / "refs" / "heads" / "main").unlink()
    (clone / ".git" / "refs" / "heads" / "main").symlink_to(private / ".git" / "refs" / "heads" / "main")


def working_tree(clone, private):
    git(clone, "config", "core.worktree", str(private))


LEADS = [alternates, git_file, git_link, pack_link, pack_file_links, objects_link, common_directory, reference_link, working_tree]


@pytest.mark.parametrize("lead", LEADS)
def test_nothing_of_another_repository_comes_out(clone, private, tmp_path, lead):
    lead(clone, private)
    try:
        _, seen = read(clone, tmp_path)
    except UserError as error:
        assert str(error).count("\n") == 0
        seen = []
    assert SECRET not in repr(seen)


# --- what has no end


def quickly(function, *arguments):
    """Whether a function gives a result; UserError is an end, too, and so is a minute, which fails the test."""
    def late(*_):
        raise AssertionError("has no end")  # no OSError, which is caught

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    try:
        return function(*arguments) is not None
    except UserError as error:
        assert str(error).count("\n") == 0
        return False
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ["HEAD", "config", "packed-refs", "refs/heads/main", "shallow"])
def test_pipes_in_place_of_files(clone, tmp_path, name):
    path = clone / ".git" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    quickly(read, clone, tmp_path)


@pytest.mark.parametrize("name", ["refs/heads", "refs/tags"])
def test_references_of_nothing(clone, tmp_path, name):
    """References are short; what is large, and costs its author nothing, is not read."""
    for number in range(200):
        with open(clone / ".git" / name / f"hole{number}", "wb") as stream:
            stream.truncate(63_000_000)
    started = sum(os.times()[:4])
    quickly(read, clone, tmp_path)
    assert sum(os.times()[:4]) - started < 10


def store(root, kind, data):
    """Writes an object as it is, whatever git thinks of it."""
    return git(root, "hash-object", "-t", kind, "-w", "--literally", "--stdin", data=data)


def tree_of(*entries):
    """A tree object's bytes from (mode, name, hash)."""
    return b"".join(f"{mode} ".encode() + name + b"\0" + bytes.fromhex(blob) for mode, name, blob in entries)


def commit_tree(root, tree, message="bomb"):
    commit = git(root, "commit-tree", "-p", "HEAD", "-m", message, tree)
    git(root, "update-ref", "HEAD", commit)


def test_tree_bomb(clone, tmp_path):
    """A few objects that are 10^12 files: the changes that have them are passed over, the others are there."""
    at = store(clone, "blob", b"x\n")
    at = store(clone, "tree", tree_of(*(("100644", b"%d.py" % n, at) for n in range(10))))
    for _ in range(11):
        at = store(clone, "tree", tree_of(*(("40000", b"%d" % n, at) for n in range(10))))
    commit_tree(clone, at)
    found = Clone(clone)
    changes = list(found.changes())
    assert len(changes) == 3
    assert not quickly(split, found, changes[0]) and quickly(split, found, changes[1])


def test_blob_bomb(clone, tmp_path):
    """A megabyte that unpacks to a gigabyte is not unpacked."""
    size = 1 << 30
    packer = zlib.compressobj(9)
    parts = [packer.compress(b"blob %d\0" % size)]
    block = bytes(1 << 20)
    parts += [packer.compress(block) for _ in range(size >> 20)] + [packer.flush()]
    blob = "ab" + "0" * 38
    (clone / ".git" / "objects" / "ab").mkdir(exist_ok=True)
    (clone / ".git" / "objects" / "ab" / blob[2:]).write_bytes(b"".join(parts))
    folder = store(clone, "tree", tree_of(("100644", b"core.py", blob)))
    commit_tree(clone, store(clone, "tree", tree_of(("40000", b"pkg", folder))))
    found = Clone(clone)
    assert not quickly(split, found, next(found.changes()))
    assert not quickly(found.text_files, found.head)


def test_commit_bomb(clone):
    """A commit whose message has 60 MB is not read."""
    facts = git(clone, "cat-file", "commit", "HEAD").split("\n")
    text = "\n".join(["tree " + git(clone, "rev-parse", "HEAD^{tree}"), "parent " + git(clone, "rev-parse", "HEAD"), *facts[2:4],
                      "", ""]).encode() + b"x " * 30_000_000
    body = b"commit %d\0" % len(text) + text
    name = hashlib.sha1(body).hexdigest()
    (clone / ".git" / "objects" / name[:2]).mkdir(exist_ok=True)
    (clone / ".git" / "objects" / name[:2] / name[2:]).write_bytes(zlib.compress(body, 1))
    (clone / ".git" / "refs" / "heads" / "main").write_text(name + "\n")
    del text, body
    tracemalloc.start()
    try:
        quickly(lambda: list(Clone(clone).changes()))
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("message", [b"x" + b" " * 300_000 + b"y", b"fixes" + b":" * 300_000 + b" #1",
                                     b"fixes " + b"a" * 300_000, b"x\n" + b"fixes a" * 100_000, b"(#" * 300_000,
                                     b"Merge pull request #" + b"9" * 5000 + b" from x/y\n\nz"])
def test_endless_messages(clone, message):
    tree = git(clone, "rev-parse", "HEAD^{tree}")
    head = git(clone, "rev-parse", "HEAD")
    text = f"tree {tree}\nparent {head}\nauthor a <a@b> 1700000000 +0000\ncommitter a <a@b> 1700000000 +0000\n\n".encode() + message
    git(clone, "update-ref", "HEAD", store(clone, "commit", text))
    assert quickly(lambda: list(Clone(clone).changes()))


def test_endless_lines_in_settings_of_the_project(clone, tmp_path):
    (clone / "setup.cfg").write_text("\n" * 400_000 + "x\n")
    git(clone, "add", "-A")
    git(clone, "commit", "-q", "-m", "blank")
    found = Clone(clone)
    assert quickly(found.archive, found.head, tmp_path)


@pytest.mark.parametrize("name", [b"../evil.py", b"/etc/evil.py", b"a" * 300 + b".py", b"..", b"x\x01y.py", b"bad\xff.py"])
def test_paths_of_trees_stay_inside(clone, tmp_path, name):
    blob = store(clone, "blob", b"evil = 1\n")
    entries = sorted([("100644", name, blob), ("100644", b"fine.py", blob)], key=lambda entry: entry[1])
    commit_tree(clone, store(clone, "tree", tree_of(*entries)))
    found = Clone(clone)
    texts = found.text_files(found.head)
    assert "fine.py" in texts and all(not path.startswith(("/", ".")) and len(path) < 256 for path in texts)
    spec = found.archive(found.head, tmp_path / "archives")
    assert set(repository.unpack(spec)) >= {"repo/fine.py"}
    assert not (tmp_path / "evil.py").exists() and not pathlib.Path("/etc/evil.py").exists()


@pytest.mark.parametrize("url", ["https://github.com/a/..", "https://github.com/../..", "x:/" + "a" * 300, "https://h/a/.git",
                                 "https://github.com/a/b\\..\\..\\c", "git@h:a/.hidden.git"])
def test_names_from_the_origin_are_plain(clone, tmp_path, url):
    git(clone, "config", "remote.origin.url", url)
    found, _ = read(clone, tmp_path)
    for name in (found.owner, found.name):
        assert "/" not in name and not name.startswith(".") and len(name.encode()) <= 100
    assert all(path.parent == tmp_path / "archives" for path in (tmp_path / "archives").iterdir())


def test_options_as_references(clone, tmp_path):
    with pytest.raises(UserError, match="no git clone with a commit at --git-dir"):
        Clone(clone, "--git-dir")
