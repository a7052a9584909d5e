"""Writing files: what a kill leaves is cleared up, links and mounts are kept, rights are asked for before work."""

import os
import subprocess
import sys

import pytest

from qcn_jax import files
from qcn_jax.errors import UserError
from tests.rights import ordinary_user


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def _surplus(folder):
    return None if (folder / "config.json").exists() else "a file"


def _make(path, text="made"):
    with files.atomic_directory(path, _surplus) as folder:
        (folder / "config.json").write_text(text)


CHILD = """
import os, sys, time
from qcn_jax import files
when, path = sys.argv[1:]
rename = os.rename
def renamed(source, target):
    if when == "before the first" or (when == "between" and target == path):
        print("there", flush=True)
        time.sleep(600)
    rename(source, target)
os.rename = renamed
with files.atomic_directory(path, lambda folder: None) as folder:
    (folder / "config.json").write_text("new")
    os.rename = lambda source, target: renamed(str(source), str(target))
"""


@pytest.mark.parametrize("when", ["before the first", "between"])
def test_a_kill_around_the_renames_keeps_the_old_folder(tmp_path, when):
    path = tmp_path / "model"
    _make(path, "old")
    child = subprocess.Popen([sys.executable, "-c", CHILD, when, str(path)], stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        assert child.stdout.readline() == "there\n"
        assert path.exists() == (when != "between")
        _make(tmp_path / "model2")  # another's target
        if when != "between":  # a living process keeps what it is writing
            _make(path, "meanwhile")
            assert len(_names(tmp_path)) == 3
    finally:
        child.kill()
        child.wait()
    if when == "between":
        with pytest.raises(UserError, match="exists and holds other things"), files.atomic_directory(path):
            pass  # not replaceable, but put back
        assert (path / "config.json").read_text() == "old"
    _make(path, "newest")
    assert _names(tmp_path) == ["model", "model2"] and (path / "config.json").read_text() == "newest"


def test_recover_clears_up_below_a_folder(tmp_path):
    for name in ("a/.model.abc_1234.tmp/shard", "a/.x.json.abc_1234.tmp", "a/b/.model.abc_1234.tmp.old/config.json",
                 "c/.model.abc_1234.tmp.old/config.json", "c/model/config.json", "c/.profile", "c/.mine.tmp/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    files.recover(tmp_path)
    assert _names(tmp_path / "a") == ["b"] and _names(tmp_path / "a/b") == ["model"]
    assert (tmp_path / "a/b/model/config.json").read_text() == "a/b/.model.abc_1234.tmp.old/config.json"
    assert _names(tmp_path / "c") == [".mine.tmp", ".profile", "model"]
    assert (tmp_path / "c/model/config.json").read_text() == "c/model/config.json"


def test_a_link_stays_and_its_target_is_written(tmp_path):
    disk = tmp_path / "disk"
    (disk / "model").mkdir(parents=True)
    (tmp_path / "model").symlink_to(disk / "model")
    (tmp_path / "report.json").symlink_to(disk / "report.json")  # which is not there yet
    _make(tmp_path / "model")
    files.write_json(tmp_path / "report.json", 1)
    assert (tmp_path / "model").is_symlink() and (tmp_path / "report.json").is_symlink()
    assert _names(disk) == ["model", "report.json"] and _names(disk / "model") == ["config.json"]
    assert _names(tmp_path) == ["disk", "model", "report.json"]


def test_a_mounted_folder_is_refused_before_work(tmp_path):
    """A disk of its own, and a folder of the same disk as Docker's volumes are, with a name that needs escaping."""
    folders = [tmp_path / "a disk", tmp_path / "volume"]
    (tmp_path / "source").mkdir()
    for folder in folders:
        folder.mkdir()
    mounts = (["-t", "tmpfs", "tmpfs"], ["--bind", tmp_path / "source"])
    if subprocess.run(["mount", *mounts[0], folders[0]], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        subprocess.run(["mount", *mounts[1], folders[1]], check=True)
        try:
            for folder in folders:
                assert files.is_mount(folder) and not files.is_mount(folder.parent)
                with pytest.raises(UserError, match=f"--to={folder}: is where a disk is mounted.* a folder in it"):
                    files.check_replaceable(folder, _surplus, "to")
                with pytest.raises(UserError, match="--to=.*a disk is mounted in it, at "):
                    files.check_replaceable(folder.parent, lambda folder: None, "to")
                _make(folder / "model")
                files.check_folder(folder, "out")
        finally:
            subprocess.run(["umount", folders[1]], check=True)
    finally:
        subprocess.run(["umount", folders[0]], check=True)


def test_rights_stay_and_what_came_meanwhile_is_kept(tmp_path):
    (tmp_path / "model").mkdir(mode=0o700)
    (tmp_path / "key.json").write_text("")
    (tmp_path / "key.json").chmod(0o600)
    _make(tmp_path / "model")
    files.write_json(tmp_path / "key.json", 1)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("model", "key.json")] == [0o700, 0o600]
    with pytest.raises(UserError, match="holds other things, such as thesis"):
        with files.atomic_directory(tmp_path / "new") as folder:
            (folder / "config.json").write_text("new")
            (tmp_path / "new").mkdir()
            (tmp_path / "new/thesis").write_text("years")
    assert _names(tmp_path / "new") == ["thesis"] and _names(tmp_path) == ["key.json", "model", "new"]


def test_what_cannot_be_written_is_said_before_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder/sub").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe")
    for path, words in (("folder", "is a folder"), ("pipe", "not a plain file"), ("file/x", "file is not a folder")):
        with pytest.raises(UserError, match=f"--out={tmp_path / path}: .*{words}"):
            files.check_file(tmp_path / path, "out")
    with pytest.raises(UserError, match="--out=.*: .*file is not a folder"):
        files.check_folder(tmp_path / "file", "out")
    for check in (files.check_file, files.check_folder):
        check(tmp_path / "new/deep", "out")
    assert not (tmp_path / "new").exists()


def test_rights_of_an_ordinary_user():
    with ordinary_user() as folder:
        for name, mode in (("full", 0o500), ("closed", 0o000), ("unlisted", 0o300)):
            (folder / name).mkdir()
            (folder / name / "x").write_text("{}")
            (folder / name).chmod(mode)
        for check in (lambda path: files.check_file(path, "out"), lambda path: files.check_folder(path.parent, "out"),
                      lambda path: files.check_replaceable(path, flag="out")):
            for name in ("full", "closed"):
                with pytest.raises(UserError, match="--out=.*: cannot be written: no permission to write into "):
                    check(folder / name / "new")
            check(folder / "unlisted/new")
        with pytest.raises(UserError, match="--to=.*unlisted: cannot be read: Permission denied"):
            files.check_replaceable(folder / "unlisted", _surplus, "to")
        for call in (files.write_json, lambda path, _: _make(path)):
            with pytest.raises(UserError, match="full/new: cannot be written: "):
                call(folder / "full/new", 1)
        with pytest.raises(UserError, match="closed/x: cannot be read: Permission denied"):
            files.read_json(folder / "closed/x")
        with pytest.raises(UserError, match="closed/x: cannot be read: Permission denied"):
            files.is_file(folder / "closed/x")
        assert files.is_file(folder / "full/x") and not files.is_file(folder / "full/x/y")
        assert not files.is_file(folder / "full") and files.is_dir(folder / "full")
