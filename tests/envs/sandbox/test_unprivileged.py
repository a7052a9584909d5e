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
containment, folder = sys.argv[1:3]
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
            out["missing"], out["allowed"] = list(provider.missing), provider.commands_allowed
            for name, command in json.loads(sys.stdin.read()).items() if out["allowed"] else ():
                result = place.exec(command, timeout=10)
                out[name] = [result.exit_code, result.output.strip()]
            if not out["allowed"]:
                raise UserError(place.run_python("def main(args):\\n    return 'refused'").value)
            with provider.create("victim") as other:  # a neighbour, on the same server and of the same user
                other.write("mine.txt", "mine")
                place.write("evil.py", sys.argv[3])
                work = os.path.dirname(os.path.dirname(other.run_python("def main(args):\\n    return ROOT").value))
                root = os.path.join(work, str(other._workspace), "repo")  # where it rests while others work
                out["evil"] = place.exec("python evil.py " + root + " " + folder, timeout=20).output.split()
                place.run_tests(["tests/test_calc.py::test_mean"])
                out["neighbour"] = [other.read("mine.txt"), other.changes(), other.exec("echo alive").output]
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
# Each line that it prints is an attack that worked, on what shares its user: neighbours, supervisors, the host.
EVIL = """
import ctypes, os, resource, signal, socket, sys
root, folder = sys.argv[1:]
def tried(name, attack):
    try:
        attack()
        print(name, flush=True)
    except (OSError, ValueError):
        pass
def connect(kind, path):
    with socket.socket(socket.AF_UNIX, kind) as s: s.connect(path)
def called(*arguments):  # numbers as on x86-64; elsewhere these are other calls, with no such arguments
    if libc.syscall(*arguments) != 0: raise OSError
def send(path):
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ends[0].sendto(b"x", path)
tried("edited", lambda: open(root + "/mine.txt", "w"))
tried("read", lambda: open(root + "/mine.txt").read())
tried("planted", lambda: open(root + "/planted.py", "w"))
tried("listed", lambda: os.listdir(root))
tried("linked", lambda: os.link(root + "/mine.txt", "stolen"))
tried("stream", lambda: connect(socket.SOCK_STREAM, folder + "/stream.sock"))
tried("datagram", lambda: connect(socket.SOCK_DGRAM, folder + "/datagram.sock"))
tried("pair", lambda: send(folder + "/datagram.sock"))
tried("shm", lambda: open("/dev/shm/" + os.path.basename(folder), "r+").write("x"))
tried("tmp", lambda: open("/tmp/" + os.path.basename(folder) + ".txt", "r+").write("x"))
libc = ctypes.CDLL(None, use_errno=True)
for pid in [1, *range(2, 400)] if os.getpid() < 400 else [os.getppid(), *range(os.getppid() - 5, os.getppid())]:
    if pid in (os.getpid(), 0) or not os.path.exists(f"/proc/{pid}") and pid != os.getppid(): continue
    tried("prlimit", lambda: resource.prlimit(pid, resource.RLIMIT_CPU, (1, 1)))
    tried("nice", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19))
    tried("schedule", lambda: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)))
    tried("affinity", lambda: os.sched_setaffinity(pid, {0}))
    tried("memory", lambda: open(f"/proc/{pid}/mem", "rb").read(1))
    tried("slack", lambda: open(f"/proc/{pid}/timerslack_ns", "w").write("9999999999"))
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL):
        tried("kill", lambda: os.kill(pid, number))
        tried("group", lambda: os.kill(-pid, number))
        tried("thread", lambda: called(234, pid, pid, number))
        tried("task", lambda: called(200, pid, number))
        tried("descriptor", lambda: signal.pidfd_send_signal(os.pidfd_open(pid), number))
tried("all", lambda: os.kill(-1, signal.SIGKILL))
"""


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
    command = [python, "-c", PROGRAM, containment, str(folder), EVIL]
    if os.geteuid() == 0:
        subprocess.run(["chown", "-R", f"{USER}:{USER}", str(folder)], check=True)
        command = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs", *command]
    shared = [pathlib.Path("/dev/shm", folder.name), pathlib.Path("/tmp", f"{folder.name}.txt")]
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as stream, \
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
        stream.bind(f"{folder}/stream.sock")
        stream.listen()
        datagram.bind(f"{folder}/datagram.sock")
        for path in shared:
            path.write_text("the host's")
        for path in (*shared, folder / "stream.sock", folder / "datagram.sock"):
            path.chmod(0o666)
        commands = {name: text.format(folder=folder, port=listener.getsockname()[1]) for name, text in COMMANDS.items()}
        try:
            done = subprocess.run(command, input=json.dumps(commands), capture_output=True, text=True, cwd=folder, timeout=300,
                                  env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": str(site)}, check=False)
        finally:
            for path in shared:
                path.unlink()
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "written": (folder / "written").exists()}


def _check(found: dict) -> None:
    assert found["user"] != 0 and found["allowed"] == (found["missing"] == [])
    if not found["allowed"]:
        assert found["error"] == "refused" and "agents' commands are refused" in found["description"]
        return
    assert sorted(found["baseline"].values()) == ["passed"] * 6 + ["skipped", "xfailed"]
    assert list(found["first"].values()) == ["passed"] and list(found["second"].values()) == ["failed"]
    for name in ("secret", "state", "write", "network"):
        assert found[name][0] != 0, name
    assert "s3cret" not in found["secret"][1] and not found["written"]
    assert found["own"] == [0, "y"] and found["alive"] == [0, "alive"]
    assert found["timed_out"] and found["left"] == []
    assert found["evil"] == [] and found["neighbour"] == ["mine", {"mine.txt": "mine"}, "alive\n"]


def test_user_namespace(run):
    found = run("namespaces")
    if "containment" not in found:
        pytest.skip(found["error"])
    assert found["containment"] == "namespaces" and "user namespace" in found["description"]
    _check(found)


def test_filters(run):
    if not filters.landlock_version():
        pytest.skip("this kernel has no Landlock")
    found = run("filters")
    assert found["containment"] == "filters" and "no network" in found["description"]
    _check(found)
