"""A container to build and test in: commands with a limit enforced inside, files in and out, states kept as images.

Unlike the sandboxes of envs/sandbox these have a writable root and, while something is installed, a network; what is
installed comes from the repository's own declarations. Tests then run in a container without one, as a user who owns
nothing there: what installs and judges belongs to root, all that tests can write is in memory and bounded, and what
they print is read, and ended when it is too late, by the host. Containers carry the labels of the docker back end, so
that a crashed run's leftovers are removed with its.
"""

import contextlib
import dataclasses
import io
import os
import pathlib
import posixpath
import select
import shlex
import socket
import tarfile
import time
import uuid
from collections.abc import Collection, Mapping
from typing import Any

import docker
import docker.errors

from qcn_jax.envs.sandbox import docker as backend
from qcn_jax.envs.sandbox.base import ExecResult
from qcn_jax.envs.sandbox.channel import SandboxError

ROOT = "/testbed"
_LOG = "/.qcn-output"  # of the last command
OUTPUT_BYTES = 4 << 20  # of a command; the middle of longer output is left out
FLOOD_BYTES = 200_000_000  # of tests: whoever prints more is ended
TESTER = "65534:65534"  # nobody: owns no file, may not signal or trace root's processes
SCRATCH_MB = 768  # what tests may write, in memory
LOST_OUTPUTS = 3  # tries
SILENCE = 1.0  # seconds without output after which the engine is asked whether the command still runs
GRACE = 10.0  # seconds beyond a limit inside after which the host ends the container
_GO_CACHE = "/tmp/go-cache"  # Go builds nothing without a cache that it can write
_CLIENT_SECONDS = 4 * 3600.0  # limits are enforced inside; this only ends what hangs beyond all of them
# What a container should trust as this machine does: behind a proxy that re-signs, downloads fail otherwise.
_CERTIFICATES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT", "NODE_EXTRA_CA_CERTS",
                 "GIT_SSL_CAINFO")
_BUNDLE, _INSIDE_BUNDLE = "/etc/ssl/certs/ca-certificates.crt", "/opt/qcn-build/ca.crt"


def engine() -> docker.DockerClient:
    """A client whose calls may last as long as a build."""
    try:
        client = docker.from_env(timeout=_CLIENT_SECONDS)
        client.ping()
        return client
    except (docker.errors.DockerException, OSError) as error:
        raise SandboxError(f"no Docker engine answers ({str(error).splitlines()[0]})") from error


def certificates() -> bytes | None:
    """This machine's certificate bundle, if it has one."""
    path = pathlib.Path(os.environ.get("SSL_CERT_FILE", _BUNDLE))
    return path.read_bytes() if path.is_file() else None


class Bounded:
    """Keeps the first and the last half of `limit` bytes of a stream."""

    def __init__(self, limit: int):
        self._half, self._head, self._tail, self.total = limit // 2, bytearray(), bytearray(), 0

    def add(self, data: bytes) -> None:
        """Takes what comes next."""
        self.total += len(data)
        room = max(0, self._half - len(self._head))
        self._head += data[:room]
        self._tail = (self._tail + data[room:])[-self._half:]

    def text(self) -> str:
        """What was kept, with a mark where something is left out."""
        cut = b"\n[...]\n" if self.total > len(self._head) + len(self._tail) else b""
        return (bytes(self._head) + cut + bytes(self._tail)).decode("utf-8", "replace")


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Of one container."""

    memory_mb: int = 2048
    processes: int = 512
    cpus: float = 2.0


class Container:
    """A running container; `destroy` when done. Not safe for use from two threads at once.

    Args:
      client: of `engine`.
      image: id or name.
      network: whether commands reach the network.
      bounds: what it may use.
      scratch: without a network, what is written to /tmp is in memory, and what the image has there is not seen.

    Raises:
      SandboxError: it cannot be started.
    """

    def __init__(self, client: docker.DockerClient, image: str, network: bool = False, bounds: Bounds = Bounds(),
                 scratch: bool = True):
        self.client, self.image = client, image
        self._time = int(time.time())
        memory = f"{bounds.memory_mb}m"
        try:
            self._container = client.containers.run(
                image, ["sleep", "infinity"], detach=True, init=True, user="0:0", entrypoint=[],
                network_mode="bridge" if network else "none", mem_limit=memory, memswap_limit=memory,
                ulimits=[docker.types.Ulimit(name="core", soft=0, hard=0)],
                tmpfs={} if network or not scratch else {
                    "/tmp": f"rw,exec,nosuid,nodev,size={SCRATCH_MB}m,mode=1777",
                    "/var/tmp": "rw,exec,nosuid,nodev,size=16m,mode=1777",
                    "/run/lock": "rw,nosuid,nodev,size=1m,mode=1777"},
                pids_limit=bounds.processes, nano_cpus=int(bounds.cpus * 1e9), security_opt=["no-new-privileges"],
                cap_drop=["ALL"], cap_add=["CHOWN", "DAC_OVERRIDE", "FOWNER", "SETUID", "SETGID", "KILL"],
                environment=dict.fromkeys(_CERTIFICATES, _INSIDE_BUNDLE) if network else {},
                labels={backend.OWNER: backend.owner(os.getpid()), backend.HOST: backend.host_identity()})
        except (docker.errors.DockerException, OSError) as error:
            raise SandboxError(f"container of {image} cannot be started: {str(error).splitlines()[0]}") from error
        self._warm = False
        bundle = certificates() if network else None
        if bundle:
            self.write({_INSIDE_BUNDLE: bundle})

    @property
    def id(self) -> str:
        """The engine's name of it."""
        return self._container.id

    def exec(self, command: str, timeout: float = 60.0, folder: str = ROOT,
             env: Mapping[str, str] | None = None) -> ExecResult:
        """Runs a shell command; it and what it started are killed at the limit.

        Raises:
          SandboxError: the engine or the container is gone.
        """
        half, end = OUTPUT_BYTES // 2, f"[{uuid.uuid4().hex}]"
        script = (f"timeout -k 2 {timeout} sh -c {shlex.quote(command)} > {_LOG} 2>&1; s=$?; n=$(stat -c %s {_LOG}); "
                  f"if [ $n -gt {OUTPUT_BYTES} ]; then (head -c {half} {_LOG}; echo; echo '[...]'; "
                  f"tail -c {half} {_LOG}) > {_LOG}.cut; mv {_LOG}.cut {_LOG}; fi; cat {_LOG}; printf '{end}'; exit $s")
        started = time.monotonic()
        try:
            code, raw = self._container.exec_run(["sh", "-c", script], workdir=folder, environment=dict(env or {}))
            output = raw.decode("utf-8", "replace")
            if not output.endswith(end):  # a busy engine can lose what a short command prints
                output = self.read({_LOG}).get(_LOG, "") + end
        except (docker.errors.DockerException, OSError) as error:
            raise SandboxError(f"the container does not answer: {str(error).splitlines()[0]}") from error
        output = output.removesuffix(end)
        seconds = time.monotonic() - started
        late = code in (124, 137) and seconds >= timeout - 0.05
        return ExecResult(code, output, late, code == 137 and not late, round(seconds, 3))

    def run_tests(self, command: str, timeout: float) -> ExecResult:
        """Runs a shell command as a user who owns nothing; the host reads what it prints and ends what is too late.

        Raises:
          SandboxError: the engine or the container is gone.
        """
        end = f"[{uuid.uuid4().hex}]"
        for left in reversed(range(LOST_OUTPUTS)):
            try:
                result = self._run_tests(f"exec 2>&1\n(\n{command}\n)\ns=$?\nprintf %s '{end}'\nexit $s", timeout)
            except (docker.errors.DockerException, OSError) as error:
                raise SandboxError(f"the container does not answer: {str(error).splitlines()[0]}") from error
            if result.output.endswith(end) or result.exit_code == 137 or not left:
                break  # a busy engine can lose what a short command prints
        return dataclasses.replace(result, output=result.output.removesuffix(end))

    def _run_tests(self, script: str, timeout: float) -> ExecResult:
        api, output = self.client.api, Bounded(OUTPUT_BYTES)
        if not self._warm:
            self._warm = True
            self._container.exec_run(["sh", "-c", f'[ ! -d "$GOCACHE" ] || {{ cp -r "$GOCACHE" {_GO_CACHE}; '
                                      f'chown -R {TESTER} {_GO_CACHE}; }}'])
        made = api.exec_create(self._container.id, ["timeout", "-s", "KILL", str(timeout), "sh", "-c", script],
                               user=TESTER, workdir=ROOT, environment={"HOME": "/tmp", "GOCACHE": _GO_CACHE})["Id"]
        started = time.monotonic()
        with contextlib.closing(api.exec_start(made, socket=True)) as attached:
            whole = self._read(getattr(attached, "_sock", attached), output, made, started + timeout + GRACE)
        code, seconds = api.exec_inspect(made)["ExitCode"], time.monotonic() - started
        timed_out = seconds >= timeout - 0.05 and (code == 137 or not whole)
        if not whole:
            self._container.wait(timeout=60)
            self._container.start()  # with all files; what lived in memory is gone
            self._warm = False
        elif timed_out:
            self._container.exec_run(["sh", "-c", "kill -9 -1"], user=TESTER)
        return ExecResult(137 if code is None or not whole else code, output.text(), timed_out,
                          code == 137 and not timed_out and whole, round(seconds, 3))

    def _read(self, stream: socket.socket, output: "Bounded", command: str, deadline: float) -> bool:
        """Reads what a command prints until it ends; False where that is too late, or too much.

        An engine can leave the stream open when the command has ended, so after each silence it is asked.
        """
        pending = bytearray()
        while True:
            ready, _, _ = select.select([stream], [], [], SILENCE)
            part = stream.recv(1 << 20) if ready else b""
            pending += part
            while len(pending) >= 8 and len(pending) >= 8 + (size := int.from_bytes(pending[4:8], "big")):
                output.add(bytes(pending[8:8 + size]))
                del pending[:8 + size]
            if time.monotonic() > deadline or output.total > FLOOD_BYTES:
                self._container.kill()
                while select.select([stream], [], [], GRACE)[0] and stream.recv(1 << 20):
                    pass  # an engine ends no container while somebody owes it reading
                return False
            if not part and (ready or not self.client.api.exec_inspect(command)["Running"]):
                return True

    def alive(self) -> bool:
        """Whether the container still runs."""
        try:
            self._container.reload()
            return self._container.status == "running"
        except (docker.errors.DockerException, OSError):
            return False

    def write(self, files: Mapping[str, str | bytes | None]) -> None:
        """Writes files (relative to ROOT, or absolute); None deletes."""
        buffer, gone = io.BytesIO(), []
        self._time += 2  # every write is newer than the last: byte code is told apart by whole seconds
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for path, data in sorted(files.items()):
                place = posixpath.normpath(posixpath.join(ROOT, path))
                if data is None:
                    gone.append(place)
                    continue
                raw = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
                info = tarfile.TarInfo(place.lstrip("/"))
                info.size, info.mode, info.mtime = len(raw), 0o644, self._time
                archive.addfile(info, io.BytesIO(raw))
        if len(gone) < len(files):
            self.unpack(buffer.getvalue())
        try:
            if gone:
                self._container.exec_run(["rm", "-f", "--", *gone])
        except (docker.errors.DockerException, OSError) as error:
            raise SandboxError(f"files cannot be written: {str(error).splitlines()[0]}") from error

    def unpack(self, archive: bytes) -> None:
        """Unpacks a tar archive at the root."""
        try:
            self._container.put_archive("/", archive)
        except (docker.errors.DockerException, OSError) as error:
            raise SandboxError(f"files cannot be written: {str(error).splitlines()[0]}") from error

    def read(self, paths: Collection[str]) -> dict[str, str]:
        """Texts of the files that exist, by path relative to ROOT."""
        found = {}
        for path in sorted(paths):
            try:
                chunks, _ = self._container.get_archive(posixpath.join(ROOT, path))
            except docker.errors.NotFound:
                continue
            except docker.errors.DockerException as error:
                raise SandboxError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
            with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
                member = next(iter(archive))
                if member.isfile():
                    found[path] = archive.extractfile(member).read().decode("utf-8", "surrogateescape")
        return found

    def read_all(self, folder: str = ROOT) -> dict[str, bytes]:
        """All regular files below a folder, by path relative to it."""
        try:
            chunks, _ = self._container.get_archive(folder)
            data = io.BytesIO(b"".join(chunks))
        except docker.errors.DockerException as error:
            raise SandboxError(f"{folder} cannot be read: {str(error).splitlines()[0]}") from error
        found = {}
        with tarfile.open(fileobj=data) as archive:
            for member in archive:
                if member.isfile():
                    found[member.name.partition("/")[2]] = archive.extractfile(member).read()
        return found

    def commit(self, name: str, changes: tuple[str, ...] = ()) -> str:
        """Keeps the present state as an image; returns its id."""
        repository, _, tag = name.partition(":")
        image: Any = self._container.commit(repository=repository, tag=tag or "latest", changes=list(changes))
        return image.id

    def destroy(self) -> None:
        """Kills and removes the container; calling it again does nothing."""
        container, self._container = self._container, None
        if container is not None:
            backend.remove(self.client, container.id)

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *_: Any) -> None:
        self.destroy()
