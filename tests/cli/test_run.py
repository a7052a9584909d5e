"""qcn run on machines that lack something: one clear line, status 1, nothing left behind."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.pipeline import chain
from tests.pipeline.test_chain import processes_of

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(name="config")
def _config(tmp_path):
    tmp_path.chmod(0o755)
    return chain.write(tmp_path)


def _run(config, workdir, *more, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "qcn_jax", "run", f"--config={config}", f"--workdir={workdir}", "--stages=tasks", *more],
        capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(config.parent / "cache"), **environment})
    assert "Traceback" not in done.stderr, done.stderr
    assert not processes_of(workdir)
    return done


def _only_line(done):
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("qcn run: "), done.stderr
    return lines[0]


def test_docker_demanded_and_missing(config, tmp_path):
    done = _run(config, tmp_path / "run", "--config.sandbox=docker", DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    assert "--config.sandbox=docker" in _only_line(done)


def test_no_network(config, tmp_path):
    done = _run(config, tmp_path / "run", "--config.tasks.repos_train=('toolz==1.2.0',)",
                PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_NO_INDEX="0", PIP_RETRIES="0", PIP_TIMEOUT="2",
                PIP_CONFIG_FILE=os.devnull, PIP_FIND_LINKS="", PIP_EXTRA_INDEX_URL="")
    line = _only_line(done)
    assert "toolz==1.2.0" in line and ("network" in line or "download" in line)


def test_repository_whose_tests_fail_before_any_bug(config, tmp_path):
    tests = tmp_path / "shapes-1.0" / "tests" / "test_core.py"
    tests.write_text("def test_always_fails():\n    assert 1 == 2\n")
    line = _only_line(_run(config, tmp_path / "run"))
    assert "shapes==1.0" in line and "none of its tests passes" in line


def test_same_repository_on_both_sides(config, tmp_path):
    shutil.copytree(tmp_path / "shapes-1.0", tmp_path / "copy" / "shapes-1.0")
    done = _run(config, tmp_path / "run", f"--config.tasks.repos_heldout=('{tmp_path}/copy/shapes-1.0',)")
    assert "repos_heldout" in _only_line(done)


def test_full_disk(config, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        assert "No space left" in _only_line(_run(config, disk / "run")).replace("no space", "No space")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_unwritable_workdir(config):
    assert "--workdir=/proc/run: cannot be written" in _only_line(_run(config, pathlib.Path("/proc/run")))


def test_unknown_key(config, tmp_path):
    line = _only_line(_run(config, tmp_path / "run", "--config.tasks.trian=3"))
    assert "--config.tasks.trian" in line and not (tmp_path / "run").exists()
