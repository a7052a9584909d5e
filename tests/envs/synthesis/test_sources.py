"""Where repositories come from: folders, archives, downloads; one clear line when there is no network."""

import hashlib
import http.server
import json
import tarfile
import threading

import pytest

from qcn_jax.envs.sandbox import repository
from qcn_jax.envs.synthesis import sources
from qcn_jax.envs.synthesis.make_tasks import Request, make_tasks
from qcn_jax.errors import UserError
from tests.envs.synthesis.small import write_repository


@pytest.fixture
def archive(tmp_path):
    """An sdist of the small repository."""
    root = write_repository(tmp_path / "made")
    path = tmp_path / "numbers_pkg-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as bundle:
        bundle.add(root, root.name)
    return path


def test_folder_and_archive(archive):
    """Both give the same files; an archive is pinned by its hash."""
    spec = sources.locate(str(archive))
    assert spec.name == "numbers_pkg==1.0" and spec.sha256 == hashlib.sha256(archive.read_bytes()).hexdigest()
    folder = sources.locate(str(archive.parent / "made" / "numbers_pkg-1.0"))
    assert folder.name == spec.name
    contents = [{path: member.data for path, member in repository.unpack(s).items()} for s in (spec, folder)]
    assert contents[0] == contents[1] and "repo/numbers_pkg/core.py" in contents[0]


def test_cache_is_checked(archive, tmp_path, monkeypatch):
    """A cached file of the right hash is used without pip; a damaged one is fetched again."""
    cached = tmp_path / "cache" / "numbers_pkg-1.0" / archive.name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(archive.read_bytes())
    digest = sources.sha256(archive)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    assert sources.download("numbers_pkg==1.0", digest, tmp_path / "cache") == cached
    cached.write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"^numbers_pkg==1.0: cannot be downloaded: .*no network"):
        sources.download("numbers_pkg==1.0", digest, tmp_path / "cache")
    assert not cached.exists() and not list((tmp_path / "cache").glob(".download*"))
    cached.write_bytes(archive.read_bytes())
    for source in ("numbers_pkg==1.0", f"numbers_pkg==1.0#sha256={digest}"):
        spec = sources.locate(source, tmp_path / "cache")
        assert (spec.name, spec.sha256) == ("numbers_pkg==1.0", digest)
    with pytest.raises(UserError, match="^numbers_pkg==1.0: cannot be downloaded"):  # another hash: it is not taken
        sources.locate(f"numbers_pkg==1.0#sha256={'0' * 64}", tmp_path / "cache")


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(UserError) as caught:
        sources.locate("no-such-thing==1.0", tmp_path)
    assert "\n" not in str(caught.value) and "no network or no package index" in str(caught.value)


def test_downloads_come_from_the_index_without_running_the_distribution(archive, tmp_path, monkeypatch):
    class Index(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            files = [{"filename": "numbers_pkg-1.0-py3-none-any.whl", "url": "x.whl"},
                     {"filename": "numbers_pkg-1.0.tar.gz", "url": "../../files/numbers_pkg-1.0.tar.gz"}]
            known = {"/simple/numbers-pkg/": json.dumps({"files": files}).encode(),
                     "/files/numbers_pkg-1.0.tar.gz": archive.read_bytes()}
            self.send_response(200 if self.path in known else 404)
            self.end_headers()
            self.wfile.write(known.get(self.path, b""))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        monkeypatch.setattr(sources, "_pip_download", lambda *_: pytest.fail("pip was asked"))
        found = sources.download("Numbers.pkg==1.0", sources.sha256(archive), tmp_path / "cache")
        assert found.read_bytes() == archive.read_bytes()
    finally:
        server.shutdown()
        server.server_close()


def test_wrong_hash(archive, tmp_path, monkeypatch):
    """pip's stand-in delivers a file of another hash than the one pinned."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(sources, "_pip_download", lambda requirement, folder: _copy(archive, folder))
    with pytest.raises(UserError, match="has SHA-256 .* expected 00"):
        sources.download("numbers_pkg==1.0", "00", tmp_path / "cache")
    assert sources.download("numbers_pkg==1.0", None, tmp_path / "cache").read_bytes() == archive.read_bytes()


def _copy(archive, folder):
    (folder / archive.name).write_bytes(archive.read_bytes())
    return folder / archive.name


def test_repositories_of_one_name_are_not_mixed_up(archive, tmp_path):
    """The first would be lost, or its tasks run on the second's files."""
    other = write_repository(tmp_path / "other")
    (other / "numbers_pkg" / "core.py").write_text("")
    given = [str(archive), str(other)]
    with pytest.raises(UserError, match=r"^--repo: .*numbers_pkg-1.0.tar.gz and .*other.* are both called numbers_pkg==1.0"):
        sources.of_tasks(["numbers_pkg==1.0"], [], given)
    with pytest.raises(UserError, match="^--repo: .* are both called"):
        make_tasks(Request(given, tmp_path / "work", sandbox="local"))
    assert not (tmp_path / "work").exists()
    assert list(sources.distinct(map(sources.locate, [str(archive)] * 2))) == ["numbers_pkg==1.0"]


@pytest.mark.parametrize("source", ["toolz", "no/such/folder", "toolz>=1.0", "-r==1", "toolz==1.0#sha256=12", "toolz==1.0#md5=12"])
def test_neither_path_nor_requirement(source):
    with pytest.raises(UserError, match="--repo: .* is neither a folder, an sdist"):
        sources.locate(source)
