"""A Docker daemon of a benchmark's own, which it may kill, and the processes that are below another."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator

from qcn_jax.envs.sandbox import images


class Daemon:
    """A Docker daemon of this run alone."""

    def __init__(self, folder: pathlib.Path):
        # A socket's path may have 107 characters.
        self.place = pathlib.Path(tempfile.mkdtemp(prefix="qcn-soak-"))
        self.folder, self.process, self.restarts = folder, None, 0
        self.socket = f"unix://{self.place}/docker.sock"

    def start(self) -> None:
        """Starts it and waits until it answers; one that gives up is started again, as a service manager would do."""
        for _ in range(5):
            if self._start_once():
                return
        raise RuntimeError(f"the daemon does not start; see {self.folder}/dockerd.log")

    def _start_once(self) -> bool:
        # In a network namespace of its own: a daemon without a bridge removes the one of the machine's daemon.
        command = ["unshare", "--net", "dockerd", f"--data-root={self.folder}/data", f"--exec-root={self.place}/exec",
                   f"--pidfile={self.place}/pid", f"--host={self.socket}", "--bridge=none", "--iptables=false",
                   "--ip6tables=false"]
        with open(self.folder / "dockerd.log", "ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            start_new_session=True)
        deadline = time.monotonic() + 120
        while True:
            try:
                images.engine().close()
                return True
            except images.SandboxError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.end(signal.SIGKILL)
                    return False
                time.sleep(0.2)

    def end(self, number: int = signal.SIGTERM) -> None:
        """Ends it; by SIGKILL it has no time to stop its containers."""
        self.process.send_signal(number)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for path in (self.place / "pid", self.place / "exec" / "containerd" / "containerd.pid"):
            path.unlink(missing_ok=True)  # stale after SIGKILL, and the number may be another's by then

    def shims(self) -> dict[int, str]:
        """Containers of this daemon's shims that run, by the shim's process."""
        found = {}
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                words = pathlib.Path(f"/proc/{name}/cmdline").read_bytes().decode(errors="replace").split("\0")
                if "containerd-shim" in words[0] and any(str(self.place) in word for word in words) and "-id" in words:
                    found[int(name)] = words[words.index("-id") + 1]
        return found

    def forgotten(self, known: set[str]) -> set[str]:
        """Containers that containerd lists, without a task that began, and the engine, which knows `known`, does not.

        None where there is no ctr to ask.
        """
        client = ["ctr", f"--address={self.place}/exec/containerd/containerd.sock", "--namespace=moby"]
        try:
            containers, tasks = (subprocess.run([*client, kind, "list"], capture_output=True, text=True, check=True).stdout
                                 for kind in ("containers", "tasks"))
        except (OSError, subprocess.CalledProcessError):
            return set()
        rows = [line.split() for line in tasks.splitlines()[1:]]
        begun = {row[0] for row in rows if row and row[-1] not in ("CREATED", "UNKNOWN")}
        return {line.split()[0] for line in containers.splitlines()[1:] if line.strip()} - begun - known

    def restart(self, number: int) -> None:
        """An end and a start."""
        self.end(number)
        self.start()
        self.restarts += 1


@contextlib.contextmanager
def own_daemon(folder: pathlib.Path) -> Iterator[Daemon]:
    """Starts a daemon whose data stand in `folder`, as this process's engine while the block runs."""
    daemon, machines = Daemon(folder), os.environ.get("DOCKER_HOST")
    loaded = (folder / "data").exists()
    os.environ["DOCKER_HOST"] = daemon.socket
    try:
        daemon.start()
        if not loaded:
            _set_host(machines)
            copy_base(daemon.socket)
            os.environ["DOCKER_HOST"] = daemon.socket
        yield daemon
    finally:
        _set_host(machines)
        daemon.end()
        for pid in daemon.shims():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(daemon.place, ignore_errors=True)


def _set_host(value: str | None) -> None:
    os.environ.pop("DOCKER_HOST", None)
    if value:
        os.environ["DOCKER_HOST"] = value


def copy_base(socket: str) -> None:
    """Gives our daemon the base image of the machine's, if that has one (otherwise it is made as usual)."""
    client = images.engine()
    try:
        name = client.images.get(images.base_image(client)).tags[0]
    except (images.SandboxError, IndexError):
        return
    source = {name: value for name, value in os.environ.items()}
    save = subprocess.Popen(["docker", "save", name], stdout=subprocess.PIPE, env=source)
    subprocess.run(["docker", "-H", socket, "load", "-q"], stdin=save.stdout, stdout=subprocess.DEVNULL, check=True)
    save.stdout.close()
    save.wait()


def descendants(pid: int, besides: int | None = None) -> list[int]:
    """Processes below `pid`, without `besides` and what is below that."""
    parents: dict[int, int] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            fields = pathlib.Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()
            if fields[0] != "Z":
                parents[int(name)] = int(fields[1])
    found, front = [], {pid}
    while front:
        front = {child for child, parent in parents.items() if parent in front and child != besides}
        found += front
    return found
