"""Repositories: what is unpacked, what is left out, what names them."""

import hashlib
import io
import tarfile
import zipfile

import pytest

from qcn_jax.envs.sandbox import RepositorySpec, repository
from qcn_jax.errors import UserError
from tests.sandboxes import MARKER, write_repository


def _sdist(path, files, links=()):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = len(text), 0o755 if name.endswith(".sh") else 0o600, 1000
            archive.addfile(info, io.BytesIO(text.encode()))
        for name, kind, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    return RepositorySpec("x", str(path), hashlib.sha256(path.read_bytes()).hexdigest())


def test_sdist(tmp_path):
    spec = _sdist(tmp_path / "x-1.tar.gz", {
        "x-1/src/x/__init__.py": "a = 1\n", "x-1/run.sh": "#!/bin/sh\n", "x-1/PKG-INFO": "Name: My.Pkg\nVersion: 2.0\n",
        "x-1/../../evil.py": "1", "/abs.py": "1", "x-1/build/lib/x.py": "1", "x-1/a.pyc": "1"},
        [("x-1/link.py", tarfile.SYMTYPE, "/etc/passwd"), ("x-1/hard.py", tarfile.LNKTYPE, "/etc/passwd"),
         ("x-1/pipe", tarfile.FIFOTYPE, "")])
    members = repository.unpack(spec)
    assert sorted(members) == ["meta/My_Pkg-2.0.dist-info/METADATA", "repo/PKG-INFO", "repo/run.sh", "repo/src/x/__init__.py"]
    assert members["repo/run.sh"].mode == 0o755 and members["repo/src/x/__init__.py"].mode == 0o644
    assert repository.settings(spec, members)["python_path"] == ["repo/src", "repo", "meta"]


@pytest.mark.parametrize("name", ["build", "dist"])
def test_packages_that_are_called_build_or_dist(tmp_path, name):
    """They are no build results: what lies in a folder of that name is left out unless the folder is a package."""
    files = {f"{name}/lib/x/__init__.py": "1", f"src/{name}/__init__.py": "1", f"src/{name}/env.py": "1",
             f"src/{name}/sub/{name}/x.py": "1", "setup.py": "1"}
    kept = ["repo/setup.py", f"repo/src/{name}/__init__.py", f"repo/src/{name}/env.py"]
    spec = _sdist(tmp_path / f"{name}-1.tar.gz", {f"{name}-1/{path}": text for path, text in files.items()})
    assert sorted(repository.unpack(spec)) == kept
    for path, text in files.items():
        (tmp_path / "made" / name / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "made" / name / path).write_text(text)
    assert sorted(repository.unpack(RepositorySpec(name, str(tmp_path / "made" / name)))) == kept
    flat = _sdist(tmp_path / "flat.tar.gz", {f"{name}-1/{name}/__init__.py": "1", f"{name}-1/a.py": "1"})
    assert sorted(repository.unpack(flat)) == sorted(["repo/a.py", f"repo/{name}/__init__.py"])


def test_zip_and_folder_and_root(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("x-1/pkg/__init__.py", "")
        archive.writestr("x-1/../../evil", "")
    assert list(repository.unpack(RepositorySpec("x", str(tmp_path / "x.zip")))) == ["repo/pkg/__init__.py"]
    folder = write_repository(tmp_path / "checkout")
    members = repository.unpack(RepositorySpec("x", str(folder)))
    assert not any(".git/" in path or "build" in path or path.endswith((".pyc", ".orig")) for path in members)
    assert sum(MARKER.encode() in member.data for member in members.values()) == 1
    assert list(repository.unpack(RepositorySpec("x", str(folder), root="victim"))) == [
        "repo/__init__.py", "repo/calc.py"]


@pytest.mark.parametrize("make, words", [
    (lambda p: RepositorySpec("x", str(p / "none.tar.gz")), "cannot be read"),
    (lambda p: RepositorySpec("x", str(p / "bad.tar.gz")), "not a source distribution"),
    (lambda p: RepositorySpec("x", str(p / "ok.tar.gz"), sha256="0" * 64), "expected 000"),
    (lambda p: RepositorySpec("x", str(p / "ok.tar.gz"), root="nowhere"), "holds no files")])
def test_bad_archives_are_one_clear_line(tmp_path, make, words):
    (tmp_path / "bad.tar.gz").write_bytes(b"nonsense")
    _sdist(tmp_path / "ok.tar.gz", {"x/a.py": "1"})
    with pytest.raises(UserError, match=words) as caught:
        repository.unpack(make(tmp_path))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_key_follows_content_and_settings(tmp_path):
    one = _sdist(tmp_path / "a.tar.gz", {"x/a.py": "1"})
    two = _sdist(tmp_path / "b.tar.gz", {"x/a.py": "2"})
    keys = {repository.key(one, "f"), repository.key(two, "f"), repository.key(one, "g"),
            repository.key(RepositorySpec("x", one.archive, one.sha256, ("-q",)), "f")}
    assert len(keys) == 4 and repository.key(one, "f") == repository.key(one, "f")
    with pytest.raises(UserError, match="cannot be read"):
        repository.key(RepositorySpec("x", str(tmp_path / "none")), "f")


def test_store_and_load(tmp_path):
    members = {"repo/a.py": repository.Member(b"x = 1\n", 0o644, 5), "repo/b.bin": repository.Member(b"\xff\x00", 0o644, 5),
               "repo/__pycache__/a.pyc": repository.Member(b"c", 0o644, 5)}
    stored = repository.store(str(tmp_path), "k", members, {"modules": []}, {"status": "ok"})
    assert stored.files == {"a.py": "x = 1\n"} and stored.baseline == {"status": "ok"}
    assert repository.load(str(tmp_path), "other") is None
    (tmp_path / "repositories" / "k.json").unlink()  # as after a crash between the two files
    assert repository.load(str(tmp_path), "k") is None
