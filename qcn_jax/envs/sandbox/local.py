"""The back end without Docker: the strongest isolation that this machine allows.

namespaces  (as root, or through a user namespace) a root file system of its own in memory, no network, its own
            processes, and, as root, a user id for each workspace
filters     (Landlock and seccomp, no privilege needed) no network, no files but the system's programs and the workspace
none        limits, a scrubbed environment and process clean-up; tested code reaches what the calling user reaches

Commands of agents are refused where a protection is missing (`missing`), unless "none" was asked for by name.

Of the thirty attacks (tests/attacks, numbers as there) docker and namespaces stop the same, with one difference: here
memory is limited for each process and not for the sandbox, so that many processes together can take the machine's
(27); files in memory that no process maps are refused. Without root all sandboxes have one user, and Landlock keeps
their files, their signals and their supervisor apart. Filters do not stop 6 where a fixed copy is among the machine's
installed packages, nor 27 for disk space, and give no shared memory (/dev/shm is the machine's). With
none also 3, 4, 5 and 28 (the network), 6 and 14 (what the user may read and write) and 30 (shared folders) are not
stopped.
"""

import base64
import compileall
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shutil
import socket
import sys
import tempfile
import venv
from typing import Any

from qcn_jax.envs.sandbox import channel
from qcn_jax.envs.sandbox.base import Provider
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.sandbox.inside import filters, folders
from qcn_jax.envs.sandbox.limits import Limits, bounds
from qcn_jax.envs.sandbox.repository import RepositorySpec, lock
from qcn_jax.envs.web import runtime as web
from qcn_jax.envs.web import vendored
from qcn_jax.errors import UserError

INSIDE = pathlib.Path(__file__).parent / "inside"
DISTRIBUTIONS = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")  # pytest and what it needs, all pure Python
SCRIPT = '#!/bin/sh\nexec "${0%%/*}/python" -m %s "$@"\n'
NETWORK_WORDS = {"none": "no network", "filtered": "package indexes and documentation for agents, otherwise no network"}


class LocalProvider(Provider):
    """Sandboxes as child processes of this machine."""

    kind = "local"

    def __init__(self, state_dir: str, limits: Limits = Limits(), isolation: str = "shared", containment: str = "auto",
                 spares: int = 0, network: str = "none"):
        """`containment` is auto (the strongest that works), namespaces, filters or none.

        Raises:
          UserError: tested code could only be run as root, or the containment or network asked for cannot be had.
        """
        super().__init__(state_dir, limits, isolation, spares, network)
        self.runtime = build_runtime(self.state_dir, packages(network))
        self.reason, self.commands_allowed, self._spare = "", True, None
        self._remove_leftovers()
        if containment in ("auto", "namespaces"):
            try:
                self.containment = "namespaces"
                self._spare = self._namespaces()  # the first server, and the proof that it works
            except SandboxError as error:
                self.reason = str(error).removeprefix("the sandbox's server ended: ")
                if containment == "namespaces":
                    raise UserError(
                        f"--config.sandbox=local: namespaces are not allowed here ({self.reason})") from error
                self.containment = "filters" if filters.landlock_version() else "none"
        else:
            self.containment = containment
        if network != "none" and self.containment != "namespaces":
            raise UserError(f"--config.network={network}: needs docker, or namespaces of this machine"
                            + (f" ({self.reason})" if self.reason else ""))
        self.missing = missing(self.containment)
        self.commands_allowed = not self.missing or containment == "none"
        if self.containment != "namespaces" and os.geteuid() == 0 and not self._separate():
            raise UserError("--config.sandbox=local: as root this needs namespaces (CAP_SYS_ADMIN), or an interpreter "
                            "and a folder for state that other users can read: nothing is ever run as root")

    def describe(self) -> str:
        if self.containment == "namespaces":
            users = "a user id per workspace" if os.geteuid() == 0 else "an unprivileged user namespace"
            return (f"local: namespaces ({NETWORK_WORDS[self.network]}, own root file system, {users}), "
                    f"resource limits{self._lacks()}")
        users = "a user id per workspace" if self._separate() else "the calling user"
        reason = f" (no namespaces: {self.reason})" if self.reason else ""
        if self.containment == "filters":
            return (f"local: Landlock and seccomp (no network, no files of others, no shared memory), {users}, "
                    f"resource limits except for disk{reason}{self._lacks()}")
        return f"local: resource limits and {users} only; the network and the machine's files are within reach{reason}"

    def _lacks(self) -> str:
        return f"; missing, so that agents' commands are refused: {', '.join(self.missing)}" if self.missing else ""

    def fingerprint(self) -> str:
        return os.path.basename(self.runtime)

    def _start(self, prepared: RepositorySpec | None, networked: bool = False, browser: bool = False
               ) -> channel.Server:
        if prepared is not None and (prepared.image or prepared.setup):
            raise UserError(f"repository {prepared.name}: image and setup need --config.sandbox=docker")
        if networked:
            line, door = socket.socketpair()
            with line, door:
                return self._open_gate(self._namespaces(door, prepared if browser else None), line)
        if browser:
            if self.containment != "namespaces":
                raise UserError(f"repository {prepared.name}: its pages are tested in a browser, which needs docker or "
                                f"namespaces of this machine{f' ({self.reason})' if self.reason else ''}")
            return self._namespaces(pages=prepared)
        server, self._spare = self._spare, None
        if server is not None:
            if server.alive():
                return server
            server.close()
        return self._namespaces() if self.containment == "namespaces" else self._plain()

    def close(self) -> None:
        super().close()
        if self._spare is not None:
            self._spare.close()
            self._spare = None

    def _namespaces(self, door: socket.socket | None = None, pages: RepositorySpec | None = None) -> channel.Server:
        browser = pages is not None
        descriptors = () if door is None else (door.fileno(),)
        options = self._options("/work", True, browser) | {"door": None if door is None else door.fileno()}
        settings = {"runtime": self.runtime, "prefix": os.path.realpath(sys.base_prefix),
                    "megabytes": options["limits"]["disk"] >> 20, "options": encode(options),
                    "views": web.views(self.state_dir, "local", vendored.at_hand(pages.modules)) if browser else {}}
        command = [sys.executable, "-I", "-S", f"{self.runtime}/inside/enter.py", encode(settings)]
        return channel.Server(channel.PipeStream(command, {"PATH": os.defpath}, descriptors))

    def _plain(self) -> channel.Server:
        folder = pathlib.Path(self.state_dir, "work")
        folder.mkdir(exist_ok=True)
        os.chmod(folder, 0o711)
        work = tempfile.mkdtemp(prefix="server-", dir=folder)
        held = os.open(work, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)  # passed on to the server: whoever can lock the folder may delete it
        options = self._options(work, self._separate())
        command = [f"{self.runtime}/bin/python", "-B", f"{self.runtime}/inside/server.py", encode(options)]
        try:
            return channel.Server(channel.PipeStream(command, {"PATH": os.defpath, "PYTHONHASHSEED": "0"}, (held,)))
        finally:
            os.close(held)

    def _options(self, work: str, separate: bool, browser: bool = False) -> dict[str, Any]:
        limits, own_users = bounds(self.limits, browser), separate and (
            os.geteuid() == 0 or self.containment == "namespaces")
        namespaces = self.containment == "namespaces"
        return {"work": work, "separate_users": separate and os.geteuid() == 0, "contained": namespaces,
                "readable": self._readable(), "own_root": namespaces, "calls": self._calls(browser),
                # Without ids of our own the limit would count all of the user's processes.
                "limits": limits if own_users else {**limits, "processes": None}}

    def _calls(self, browser: bool) -> dict[str, bool]:
        """Which system calls are refused: arguments of `filters.program`.

        A browser's processes share files in memory, which nothing counts here; there they are not refused.
        """
        return {"counted": browser, "alone": os.geteuid() == 0, "offline": self.containment != "filters"}

    def _readable(self) -> list[str] | None:
        """What Landlock lets tested code read; None where users of their own keep workspaces apart.

        With filters these are programs and libraries, not the packages installed beside them. In a user namespace all
        have one user, and it is all but the workspaces.
        """
        if self.containment == "namespaces" and os.geteuid() != 0 and filters.landlock_version():
            prefix = os.path.realpath(sys.base_prefix).split("/")[1:2]
            return [f"/{name}" for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "opt", "etc",
                                            "proc", "dev", *prefix)]
        if self.containment != "filters":
            return None
        return ["/usr/bin", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/usr/local/lib", "/bin", "/lib", "/lib64",
                "/etc/ld.so.cache", "/etc/passwd", "/etc/group", "/etc/localtime", "/etc/alternatives",
                "/etc/mime.types",
                self.runtime, os.path.join(os.path.realpath(sys.base_prefix), "bin"),
                os.path.join(os.path.realpath(sys.base_prefix), "lib")]

    def _separate(self) -> bool:
        """Whether another user could run the interpreter and reach the workspaces."""
        return os.geteuid() == 0 and all(_reachable(path) for path in (
            os.path.realpath(sys.base_prefix), self.runtime, self.state_dir))

    def _remove_leftovers(self) -> None:
        """Deletes work folders whose server is gone (a server holds a lock on its folder)."""
        for folder in pathlib.Path(self.state_dir, "work").glob("server-*"):
            with contextlib.suppress(OSError):
                descriptor = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    folders.erase_contents(folder)
                finally:
                    os.close(descriptor)


def missing(containment: str) -> tuple[str, ...]:
    """What would keep agents' commands in and this machine cannot give, in a few words each."""
    version = filters.landlock_version()
    one_user = os.geteuid() != 0  # then sandboxes and what supervises them have the same user
    lacks = {"no network, no files of others": containment == "none",
             "refused system calls (seccomp)": not filters.known(),
             "workspaces apart (Landlock)": one_user and version == 0,
             f"signals apart (Landlock {filters.SCOPES}, Linux 6.12)": one_user and version < filters.SCOPES}
    return tuple(words for words, true in lacks.items() if true)


def encode(value: Any) -> str:
    """A value as one command-line word."""
    return base64.b64encode(json.dumps(value).encode()).decode()


def _reachable(path: str) -> bool:
    return all(os.stat(place).st_mode & 0o001 for place in (path, *map(str, pathlib.Path(path).parents)))


def packages(network: str) -> tuple[str, ...]:
    """Distributions that sandboxes have: pytest, and pip where there is something to install from.

    Raises:
      UserError: this Python has no pip.
    """
    if network == "none":
        return DISTRIBUTIONS
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"--config.network={network}: {sys.executable} has no pip to give to sandboxes; "
                        "python -m ensurepip")
    return (*DISTRIBUTIONS, "pip")


@functools.cache
def inside_digest(distributions: tuple[str, ...] = DISTRIBUTIONS) -> str:
    """A hash of the programs that run inside and of the packages they come with."""
    digest = hashlib.sha256()
    for source in sorted(INSIDE.glob("*.py")):
        digest.update(source.read_bytes())
    for name in distributions:
        digest.update(f"{name}=={importlib.metadata.version(name)}".encode())
    return digest.hexdigest()[:12]


# Of Pygments' five hundred lexers pytest uses two; compiling the rest would take longer than everything else.
_LEXERS = frozenset({"__init__.py", "_mapping.py", "python.py", "diff.py"})


def _wanted(file: importlib.metadata.PackagePath) -> bool:
    if ".." in file.parts or "__pycache__" in file.parts:
        return False
    return file.parts[:2] != ("pygments", "lexers") or file.name in _LEXERS


def copy_packages(target: pathlib.Path, distributions: tuple[str, ...]) -> None:
    """Copies distributions from this interpreter into the folder `target`, compiled."""
    for name in distributions:
        distribution = importlib.metadata.distribution(name)
        for file in distribution.files or ():
            if _wanted(file):
                place = target / file
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(distribution.locate_file(file), place)
    compileall.compile_dir(target, quiet=2)


def write_scripts(target: pathlib.Path, distributions: tuple[str, ...]) -> None:
    """Writes the commands pytest and, where it is among the distributions, pip into the folder `target`."""
    for name in {"pytest", "pip"} & set(distributions):
        (target / name).write_text(SCRIPT % name)
        (target / name).chmod(0o755)


def build_runtime(state_dir: str, distributions: tuple[str, ...] = DISTRIBUTIONS) -> str:
    """The folder with interpreter link, pytest and our programs; built once per version. Returns its path."""
    version = f"{sys.implementation.cache_tag}-{hashlib.sha256(sys.base_prefix.encode()).hexdigest()[:6]}"
    target = pathlib.Path(state_dir, "runtime", f"{version}-{inside_digest(distributions)}")
    with lock(state_dir, "runtime"):
        if target.exists():
            return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(dir=target.parent))
        os.chmod(temporary, 0o755)
        venv.EnvBuilder(symlinks=True, with_pip=False).create(temporary)
        copy_packages(next(temporary.glob("lib/python*/site-packages")), distributions)
        shutil.copytree(INSIDE, temporary / "inside", ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(temporary / "inside", quiet=2)
        (temporary / "root").mkdir()
        write_scripts(temporary / "bin", distributions)
        os.rename(temporary, target)
    return str(target)
