"""qcn doctor: the table is about this machine, and the exit status about the main job."""

import http.server
import json
import os
import threading

import pytest

from qcn_jax.cli import doctor


@pytest.fixture(name="index")
def _index(monkeypatch):
    """A package index on this machine that answers 200."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://user:secret@127.0.0.1:{server.server_port}/simple"
    monkeypatch.setenv("PIP_INDEX_URL", url)
    monkeypatch.setattr(doctor, "DOCKER_REGISTRY", "http://127.0.0.1:9/v2/")
    yield url
    server.shutdown()


def _findings(capsys, *arguments):
    status = doctor.main(["--json", "--timeout=2", *arguments])
    return status, json.loads(capsys.readouterr().out)


def test_table_is_about_this_machine(index, capsys, tmp_path):
    status, found = _findings(capsys, f"--path={tmp_path}")
    assert status == int(any(f["needed"] and not f["ok"] for f in found.values()))
    assert found["python"]["ok"] and found["jax"]["ok"] and "cpu" in found["jax"]["detail"]
    assert str(len(os.sched_getaffinity(0))) in found["cores"]["detail"]
    assert str(tmp_path) in found["disk"]["detail"]
    assert found["package index"]["ok"] and not found["docker registry"]["ok"]


def test_secrets_of_the_index_address_are_not_printed(index, capsys):
    assert "secret" in index
    _, found = _findings(capsys)
    assert "secret" not in json.dumps(found)


def test_without_an_index_the_status_is_1_and_the_line_says_so(monkeypatch, capsys):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setattr(doctor, "DOCKER_REGISTRY", "http://127.0.0.1:9/v2/")
    assert doctor.main(["--timeout=1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("!!") and "package index" in line and "not reached" in line]


def test_a_full_disk_and_a_missing_folder_are_named(index, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "NEED_DISK_GB", 1e9)
    status, found = _findings(capsys, f"--path={tmp_path}")
    assert status == 1 and "wants" in found["disk"]["detail"]
    status, found = _findings(capsys, f"--path={tmp_path}/none")
    assert status == 1 and "No such file" in found["disk"]["detail"]
