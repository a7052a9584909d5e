"""The local back end for a user without privileges: in a user namespace, and with Landlock and seccomp alone."""

import importlib.metadata
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile

import pytest

import qcn_jax
from qcn_jax.envs.sandbox.inside import filters
from qcn_jax.envs.sandbox.local import DISTRIBUTIONS
from tests.sandboxes import write_repository

USER = 1_765_432_100  # nobody's
PROGRAM = """
import json, os, sys
from qcn_jax.envs.sandbox import RepositorySpec
from qcn_jax.envs.sandbox.local import LocalProvider
from qcn_jax.errors import UserError
containment, folder = sys.argv[1:]
out = {"user": os.geteuid()}
try:
    with LocalProvider(folder + "/state", containment=containment) as provider:
        out["containment"], out["description"] = provider.containment, provider.describe()
        spec = RepositorySpec("victim", folder + "/victim")
        out["baseline"] = provider.prepare(spec).baseline.outcomes
        with provider.create("victim") as place:
            out["first"] = place.run_tests(["tests/test_calc.py::test_mean"]).outcomes
            place.write("victim/calc.py", "def clamp(*a): raise KeyError\\ndef mean(v): return 0\\n")
            out["second"] = place.run_tests(["tests/test_calc.py::test_mean"]).outcomes
            for name, command in json.loads(sys.stdin.read()).items():
                result = place.exec(command, timeout=10)
                out[name] = [result.exit_code, result.output.strip()]
            out["timed_out"] = place.exec("setsid sleep 50 & sleep 50", timeout=1).timed_out
except UserError as error:
    out["error"] = str(error)
out["left"] = os.listdir(folder + "/state/work") if os.path.isdir(folder + "/state/work") else []
print(json.dumps(out))
"""
COMMANDS = {
    "secret": "cat {folder}/secret", "state": "ls {folder}/state/repositories", "write": "echo x > {folder}/written",
    "network": "python -c \"import socket; socket.create_connection(('127.0.0.1', {port}), 1)\"",
    "own": "echo y > y && cat y", "alive": "echo alive"}


@pytest.fixture
def run():
    """Runs PROGRAM as a user without privileges; returns what it found."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="qcn-unprivileged-", dir="/tmp"))
    try:
        yield lambda containment: _run(containment, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _readable_by_others(path: str) -> bool:
    return all(os.stat(place).st_mode & 0o001 for place in (path, *pathlib.Path(path).parents))


def _run(containment: str, folder: pathlib.Path) -> dict:
    python = os.path.realpath(sys.executable)
    if os.geteuid() == 0 and not _readable_by_others(python):
        python = "/usr/bin/python3.11"
        if not os.path.exists(python):
            pytest.skip("no Python 3.11 that other users can run")
    site = folder / "site"
    shutil.copytree(pathlib.Path(qcn_jax.__file__).parent, site / "qcn_jax")
    for name in (*DISTRIBUTIONS, "docker", "requests", "urllib3", "idna", "certifi", "charset-normalizer", "unidiff"):
        distribution = importlib.metadata.distribution(name)
        for file in distribution.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(distribution.locate_file(file), site / file)
    write_repository(folder / "victim")
    (folder / "secret").write_text("s3cret")
    command = [python, "-c", PROGRAM, containment, str(folder)]
    if os.geteuid() == 0:
        subprocess.run(["chown", "-R", f"{USER}:{USER}", str(folder)], check=True)
        command = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs", *command]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        commands = {name: text.format(folder=folder, port=listener.getsockname()[1]) for name, text in COMMANDS.items()}
        done = subprocess.run(command, input=json.dumps(commands), capture_output=True, text=True, cwd=folder, timeout=300,
                              env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": str(site)}, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "written": (folder / "written").exists()}


def _check(found: dict) -> None:
    assert found["user"] != 0
    assert sorted(found["baseline"].values()) == ["passed"] * 6 + ["skipped", "xfailed"]
    assert list(found["first"].values()) == ["passed"] and list(found["second"].values()) == ["failed"]
    for name in ("secret", "state", "write", "network"):
        assert found[name][0] != 0, name
    assert "s3cret" not in found["secret"][1] and not found["written"]
    assert found["own"] == [0, "y"] and found["alive"] == [0, "alive"]
    assert found["timed_out"] and found["left"] == []


def test_user_namespace(run):
    found = run("namespaces")
    if "error" in found:
        pytest.skip(found["error"])
    assert found["containment"] == "namespaces" and "user namespace" in found["description"]
    _check(found)


def test_filters(run):
    if not filters.landlock_version():
        pytest.skip("this kernel has no Landlock")
    found = run("filters")
    assert found["containment"] == "filters" and "no network" in found["description"]
    _check(found)
