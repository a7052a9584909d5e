"""The docker back end: the same server inside a hardened container.

No network (for agents, where it was asked for, one socket that the host answers: envs/network), read-only root, scratch
in size-limited memory, memory and swap capped together, bounded processes and processor share, no new privileges. The
server runs as the container's root with the five capabilities that it needs to switch users, own files and kill; what
is tested runs under a user id of its own with none.
"""

import contextlib
import os
import pathlib
import select
import socket
import struct
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import docker
import docker.errors

from qcn_jax.envs.sandbox import channel, images, layers, local, repository
from qcn_jax.envs.sandbox.base import Provider
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.sandbox.limits import Limits, bounds
from qcn_jax.envs.sandbox.preparing import Prepared
from qcn_jax.envs.sandbox.repository import RepositorySpec, lock
from qcn_jax.envs.web import runtime as web
from qcn_jax.envs.web import vendored

CAPABILITIES = ["SETUID", "SETGID", "KILL", "CHOWN", "DAC_OVERRIDE"]
SERVER_MB = 256  # what the server and the prepared trees may take besides the sandboxes
IMAGE_BUDGET_MB = 20_000  # what images above the base may take together
DOOR, DOOR_TIMEOUT = "/run/qcn", 10.0  # where a container finds the host's end; seconds until its network stands
BROWSER_SECONDS = 3600.0  # for Debian to install a browser, once
OWNER, HOST = "qcn_jax.owner", "qcn_jax.host"


class DockerProvider(Provider):
    """Sandboxes in containers of a Docker engine."""

    kind = "docker"

    def __init__(self, state_dir: str, limits: Limits = Limits(), isolation: str = "shared", image: str = "",
                 spares: int = 0, image_budget_mb: int = IMAGE_BUDGET_MB, network: str = "none"):
        """`image` is a base image with Python 3.11 or newer; by default one is found, pulled or made.

        Raises:
          SandboxError: no engine, or no base image.
        """
        super().__init__(state_dir, limits, isolation, spares, network)
        self._packages = local.packages(network)
        self.client = images.engine()
        remove_leftovers(self.client)
        with lock(self.state_dir, "image"), engine_failures():
            self.base = images.base_image(self.client, image)
            self.image = images.runtime_image(self.client, self.base, self._packages)
        self._containers: set[str] = set()
        # Otherwise a port stays taken for a minute after its connection was closed, also for the next workspace.
        self._sysctls = {"net.ipv4.tcp_max_tw_buckets": "0"}
        self._image_budget, self._images = image_budget_mb << 20, {}

    def describe(self) -> str:
        each = "a fresh container each" if self.isolation == "container" else "warm containers, a user id per workspace"
        return f"docker: {local.NETWORK_WORDS[self.network]}, read-only root, no capabilities for tested code, {each}"

    def fingerprint(self) -> str:
        return self.image.removeprefix("sha256:")[:16]

    def _image(self, spec: RepositorySpec | None, browser: bool = False) -> str:
        """The image of a repository's sandboxes: this provider's, or with what the repository itself needs."""
        if browser:
            with lock(self.state_dir, "image"), engine_failures():
                parent = images.base_image(self.client, spec.image) if spec is not None and spec.image else self.base
                patient = images.engine(timeout=BROWSER_SECONDS)  # nothing is said while packages are installed
                with contextlib.closing(patient):
                    parent = layers.layer(patient, "repository", parent, steps=(web.INSTALL,), network=True)
                return images.runtime_image(self.client, parent, self._packages)
        if spec is None or not (spec.image or spec.setup):
            return self.image
        key = (spec.image, spec.setup, self._own(spec))
        if key not in self._images:
            with lock(self.state_dir, "image"), engine_failures():
                parent = images.base_image(self.client, spec.image) if spec.image else self.base
                if spec.setup:
                    parent = layers.layer(self.client, "repository", parent, steps=spec.setup, network=True)
                members = repository.unpack(spec)
                roots = repository.settings(spec, members)["python_path"]
                parent = layers.scrubbed(
                    self.client, parent, {path[5:]: member.data for path, member in members.items()
                                          if path.startswith("repo/")},
                    [os.path.relpath(root, "repo") for root in roots if root.split("/")[0] == "repo"])
                self._images[key] = images.runtime_image(self.client, parent, self._packages, system_packages=True)
                layers.prune(self.client, self._image_budget)
        return self._images[key]

    @staticmethod
    def _own(spec: RepositorySpec) -> str:
        """What keeps a repository's image from being another's with the same set-up: it is scrubbed of its files."""
        return spec.archive if spec.image or spec.setup else ""

    def _warm_name(self, prepared: Prepared, role: str) -> str:
        own = (prepared.spec.image, prepared.spec.setup, self._own(prepared.spec))
        return role if own == ("", (), "") else f"{role} {own}"

    def _start(self, prepared: RepositorySpec | None, networked: bool = False, browser: bool = False
               ) -> channel.Server:
        if not networked:
            return self._container(prepared, browser=browser)
        with tempfile.TemporaryDirectory(prefix="qcn-door-") as folder, socket.socket(socket.AF_UNIX) as door:
            door.bind(os.path.join(folder, "door"))
            door.listen(1)
            server = self._container(prepared, folder, browser)
            door.settimeout(DOOR_TIMEOUT)
            try:
                line, _ = door.accept()
            except OSError as error:
                server.close()
                raise SandboxError(f"the container gives no way to the network: {error}") from error
            with line:
                return self._open_gate(server, line)

    def _container(self, prepared: RepositorySpec | None, door: str = "", browser: bool = False) -> channel.Server:
        """A server in a new container; `door` is a folder of the host in which its network is asked for."""
        views = web.views(self.state_dir, "docker", vendored.at_hand(prepared.modules)) if browser else {}
        image = self._image(prepared, browser)
        limits = bounds(self.limits, browser)
        disk = limits["disk"] >> 20
        options = {"work": "/work", "separate_users": True, "contained": False, "readable": None,
                   "door": f"{DOOR}/door" if door else None, "own_root": True,
                   "calls": {"counted": True, "alone": True, "offline": True},
                   "limits": limits}
        memory = f"{((limits['memory'] or limits['data']) >> 20) + disk + SERVER_MB}m"
        binds = {source: {"bind": place, "mode": "ro"} for place, source in views.items()}
        binds |= {door: {"bind": DOOR, "mode": "rw"}} if door else {}
        flags = "rw,exec,nosuid,nodev"
        api = self.client.api
        try:
            host = api.create_host_config(
                init=True, network_mode="none", ipc_mode="none", read_only=True, auto_remove=True,
                cap_drop=["ALL"], cap_add=CAPABILITIES, security_opt=["no-new-privileges"],
                mem_limit=memory, memswap_limit=memory, pids_limit=limits["processes"] + 64,
                nano_cpus=int(limits["cpus"] * 1e9), log_config={"Type": "none"},
                sysctls=self._sysctls,
                binds=binds or None,
                tmpfs={"/work": f"{flags},size={disk}m,nr_inodes=200k,mode=711"})
            made = api.create_container(
                image, ["/opt/qcn/bin/python", "-B", "/opt/qcn/inside/server.py", local.encode(options)],
                stdin_open=True, detach=False, host_config=host, hostname="sandbox", user="0:0", working_dir="/",
                environment={"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONHASHSEED": "0", "LANG": "C.UTF-8"},
                labels={OWNER: owner(os.getpid()), HOST: host_identity()})
        except (docker.errors.DockerException, OSError) as error:
            self._images.clear()  # the image may have been pruned: the next try looks again
            raise SandboxError(f"container cannot be made: {error}") from error
        self._containers.add(made["Id"])
        try:
            return channel.Server(ContainerStream(self, made["Id"]))
        except SandboxError as error:
            if not self._sysctls or "sysctl" not in str(error):
                raise
            self._sysctls = {}  # an engine whose kernel does not know it
            return self._container(prepared, door, browser)

    def forget(self, container: str) -> None:
        """Called when a container is gone."""
        self._containers.discard(container)

    def close(self) -> None:
        super().close()
        for container in list(self._containers):
            with contextlib.suppress(SandboxError):  # no engine, nothing runs: its next start finds the label
                remove(self.client, container)
                self.forget(container)


class ContainerStream:
    """The attached standard streams of a container that is started here."""

    def __init__(self, provider: DockerProvider, container: str):
        self.provider, self.container, self.errors = provider, container, b""
        self._buffer, self._closed = bytearray(), False
        api = provider.client.api
        try:
            attached = api.attach_socket(container, {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
            self._keep = attached  # closing the wrapper would close the socket
            self._socket: socket.socket = getattr(attached, "_sock", attached)
            self._socket.setblocking(False)
            api.start(container)
        except (docker.errors.DockerException, OSError) as error:
            with contextlib.suppress(SandboxError):
                remove(provider.client, container)
                provider.forget(container)
            raise SandboxError(f"container does not start: {error}") from error

    def send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view):]
            except (BlockingIOError, InterruptedError):
                self._wait(False, deadline)
            except OSError as error:
                raise SandboxError(f"the container ended: {error}") from error

    def receive(self, size: int, deadline: float) -> bytes:
        while len(self._buffer) < size:
            kind, length = struct.unpack(">BxxxI", self._raw(8, deadline))
            part = self._raw(length, deadline)
            if kind == 1:
                self._buffer += part
            else:
                self.errors = (self.errors + part)[-4000:]
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def _raw(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                part = self._socket.recv(min(1 << 20, size - len(data)))
            except (BlockingIOError, InterruptedError):
                self._wait(True, deadline)
                continue
            except OSError as error:
                raise SandboxError(f"the container ended: {error}") from error
            if not part:
                words = self.errors.decode("utf-8", "replace").strip().splitlines()
                raise SandboxError(f"the container ended: {words[-1] if words else 'no reason given'}")
            data += part
        return bytes(data)

    def _wait(self, readable: bool, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise SandboxError("the container does not answer")
        select.select([self._socket] if readable else [], [] if readable else [self._socket], [], left)

    def alive(self) -> bool:
        """Whether the connection stands (data is read only while a reply is awaited, so the end shows here)."""
        if self._closed:
            return False
        ready, _, _ = select.select([self._socket], [], [], 0)
        if not ready:
            return True
        with contextlib.suppress(BlockingIOError):
            try:
                return bool(self._socket.recv(1, socket.MSG_PEEK))
            except OSError:
                return False
        return True

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            with contextlib.suppress(OSError):
                self._socket.close()
            with contextlib.suppress(SandboxError):  # `DockerProvider.close` tries again
                remove(self.provider.client, self.container)
                self.provider.forget(self.container)


@contextlib.contextmanager
def engine_failures() -> Iterator[None]:
    """Failures of the engine, and of the way to it, as SandboxError."""
    try:
        yield
    except (docker.errors.DockerException, OSError) as error:
        raise SandboxError(f"the Docker engine fails: {str(error).splitlines()[0][:300]}") from error


def remove(client: docker.DockerClient, container: str) -> None:
    """Kills and removes a container and its anonymous volumes; one that is gone is fine.

    Raises:
      SandboxError: it cannot be removed, or no engine answers.
    """
    for _ in range(20):
        try:
            client.api.remove_container(container, force=True, v=True)
            return
        except docker.errors.NotFound:
            return
        except docker.errors.APIError as error:
            if "in progress" not in str(error):
                raise SandboxError(f"container {container[:12]} cannot be removed: {error}") from error
            time.sleep(0.05)
        except OSError as error:
            raise SandboxError(f"container {container[:12]} cannot be removed: {error}") from error


def host_identity() -> str:
    """This machine since its last start and this process namespace: process ids mean something only within them."""
    with contextlib.suppress(OSError):
        started = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{started}-{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def owner(pid: int) -> str:
    """A process that cannot be mistaken for a later one of the same number: "pid-starttime"; "" if there is none."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return f"{pid}-{stat.rsplit(')', 1)[1].split()[19]}"


def remove_leftovers(client: docker.DockerClient) -> int:
    """Removes containers whose owner on this machine is dead; returns how many."""
    removed = 0
    try:
        found: list[Any] = client.api.containers(all=True, filters={"label": [f"{HOST}={host_identity()}", OWNER]})
        for container in found:
            label = container["Labels"][OWNER]
            if owner(int(label.split("-")[0] or 0)) != label:
                remove(client, container["Id"])
                removed += 1
    except (docker.errors.DockerException, OSError) as error:
        raise SandboxError(f"the Docker engine does not answer: {error}") from error
    return removed
