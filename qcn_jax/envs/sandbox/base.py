"""Sandboxes: where code that nobody vouches for runs, behind one interface for every back end.

A Provider prepares repositories (once each) and makes Sandboxes; a Sandbox is a fresh copy of a repository in
which commands and tests run without network, without privileges and within limits. The work is done by the
program in `inside/server.py`; back ends differ in what stands around it (`local.py`, `docker.py`).
"""

import contextlib
import dataclasses
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from qcn_jax.envs import patches
from qcn_jax.envs.network import policy
from qcn_jax.envs.sandbox import channel, preparing
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.sandbox.limits import Limits
from qcn_jax.envs.sandbox.preparing import ANSWER_GRACE, STARVATION, Prepared
from qcn_jax.envs.sandbox.preparing import PREPARE_TIMEOUT as PREPARE_TIMEOUT  # theirs who explain a first run
from qcn_jax.envs.sandbox.repository import RepositorySpec
from qcn_jax.envs.sandbox.runs import PASSING as PASSING  # theirs who use providers
from qcn_jax.envs.sandbox.runs import ExecResult, PythonResult, TestRun, test_run
from qcn_jax.envs.sandbox.spares import Spares
from qcn_jax.envs.web import page_tests
from qcn_jax.envs.web import running as pages
from qcn_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A sandbox's state that outlives it, as `Provider.create` takes it: changes to a repository's files.

    `edits` came after the starting state, which is the pristine repository with `overlay` on top. `before` is the date
    from which on releases of the repository are withheld where there is a network (network.policy.fix_date).
    """

    repository: str
    overlay: Mapping[str, str | None]
    edits: Mapping[str, str | None]
    before: str = ""


class Sandbox:
    """A repository copy in which to act. Not safe for use from two threads at once; `destroy` when done."""

    def __init__(self, provider: "Provider", server: channel.Server, prepared: "Prepared",
                 overlay: Mapping[str, str | None], workspace: int, before: str = ""):
        self.repository, self.overlay, self.before = prepared.spec.name, dict(overlay), before
        self._provider, self._server, self._prepared, self._workspace = provider, server, prepared, workspace

    def _call(self, op: str, payload: bytes = b"", during: AbstractContextManager[Any] | None = None,
              **request: Any) -> tuple[Any, bytes]:
        if self._workspace is None:
            raise SandboxError("the sandbox was destroyed")
        return self._server.call({"op": op, "workspace": self._workspace, **request}, payload,
                                 STARVATION * request.get("timeout", 0.0) + ANSWER_GRACE, during)

    def exec(self, command: str, timeout: float = 30.0, env: Mapping[str, str] | None = None) -> ExecResult:
        """Runs a shell command in the repository folder; everything it started is killed when it ends.

        Raises:
          PermissionError: nothing on this machine would keep the command in (LocalProvider, containment "none").
        """
        if not self._provider.commands_allowed:
            raise PermissionError("commands are refused: this machine cannot isolate them")
        visit = None if self._server.gate is None else self._server.gate.open(
            policy.withheld(self.repository, self._prepared.files, self.before))
        reply, _ = self._call("execute", during=visit, command=command, timeout=timeout, env=dict(env or {}))
        return ExecResult(reply["exit_code"], reply["output"], reply["timed_out"], reply["out_of_memory"],
                          reply["seconds"], {} if visit is None else dict(visit.counts))

    def read(self, path: str) -> str:
        """Text of a file; raises FileNotFoundError, IsADirectoryError or PermissionError."""
        return self._call("read", path=_inside(path))[1].decode("utf-8", "surrogateescape")

    def write(self, path: str, text: str) -> None:
        """Creates or replaces a file; raises PermissionError or OSError (disk full)."""
        try:
            payload = text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise OSError(f"{path}: the text holds half a character") from error
        self._call("write", payload=payload, path=_inside(path))

    def run_tests(self, node_ids: Sequence[str] | None = None, timeout: float = 30.0,
                  fail_fast: bool = False, evidence: bool | str = False) -> TestRun:
        """Runs tests by pytest node id (None: all).

        With `fail_fast` they run in the order given and stop at the first failure. A test id that pytest does
        not find is absent from the outcomes. With `evidence` tests may make claims (inside/evidence.py), and
        with "blind" the code in that process finds no variables of its callers.
        """
        if self._prepared.browser:
            paths = {*self._prepared.files, *self.overlay}
            texts = {path: self._starting_text(path) for path in paths if page_tests.is_tests(path)}
            suites = page_tests.suites({path: text for path, text in texts.items() if text is not None})
            return test_run(pages.run_tests(self.ask_python, suites, node_ids, timeout, fail_fast))
        reply, _ = self._call("tests", node_ids=None if node_ids is None else list(node_ids),
                              timeout=timeout, fail_fast=fail_fast, evidence=evidence)
        return test_run(reply)

    def ask_python(self, script: str, args: Any, timeout: float, without: Sequence[str] | None = None
                   ) -> dict[str, Any]:
        """The server's reply about a harness script (see `run_python`).

        Where `without` names files, the script runs in a copy of the sandbox that lacks them, with no files but regular
        ones, of another user.
        """
        return self._call("python", script=script, args=args, timeout=timeout, without=without)[0]

    def run_python(self, script: str, args: Any = None, timeout: float = 30.0) -> PythonResult:
        """Runs a trusted harness script in the repository, in a process with pytest imported.

        The script defines `main(args)` and returns a JSON value. It finds two names: `ROOT`, the repository folder,
        and `run_pytest(node_ids, plugins=(), fail_fast=False)` -> (exit status, outcomes, messages).
        """
        reply = self.ask_python(script, args, timeout)
        return PythonResult(reply["status"], reply["value"], reply["error"], reply["output"], reply["seconds"])

    def changes(self) -> dict[str, str | None]:
        """What differs from the starting state: {path: text, or None where deleted}; regular text files only."""
        return self._call("changes")[0]["changed"]

    def diff(self) -> str:
        """The changes as a unified diff."""
        changed = self.changes()
        before = {path: self._starting_text(path) for path in changed}
        return patches.make_diff(before, changed)

    def _starting_text(self, path: str) -> str | None:
        return self.overlay[path] if path in self.overlay else self._prepared.files.get(path)

    def fork(self) -> "Sandbox":
        """A second sandbox in the same state (files; nothing runs between calls)."""
        reply, _ = self._call("fork")
        return Sandbox(self._provider, self._server, self._prepared, self.overlay, reply["workspace"], self.before)

    def snapshot(self) -> Snapshot:
        """The state of the files (regular text files, as `changes`), from which `Provider.restore` makes sandboxes."""
        return Snapshot(self.repository, dict(self.overlay), self.changes(), self.before)

    def reset(self) -> None:
        """Back to the starting state."""
        self._call("reset")

    def destroy(self) -> None:
        """Kills and deletes everything of this sandbox; calling it again does nothing."""
        workspace, self._workspace = self._workspace, None
        if workspace is not None:
            self._provider.release(self._server, workspace)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: Any) -> None:
        self.destroy()


class Provider:
    """Makes sandboxes; safe for use from several threads, which then wait for each other.

    Subclasses start servers (`_start`) and say how they are isolated (`describe`).
    """

    kind = ""
    commands_allowed = True

    def __init__(self, state_dir: str, limits: Limits = Limits(), isolation: str = "shared", spares: int = 0,
                 network: str = "none"):
        """Args:
          state_dir: folder for what is prepared once and kept.
          limits: bounds of each sandbox.
          isolation: see `choose.make_provider`.
          spares: servers kept started where each sandbox gets one of its own (isolation "container").
          network: of agents' sandboxes, one of network.policy.NETWORKS; others never have any.
        """
        if network not in policy.NETWORKS:
            raise UserError(f"--config.network: expected {' or '.join(policy.NETWORKS)}, got {network!r}")
        if isolation not in ("shared", "container"):
            raise ValueError(f"isolation must be shared or container, got {isolation!r}")
        self.state_dir, self.limits, self.isolation = os.path.abspath(state_dir), limits, isolation
        self.prepared: dict[str, Prepared] = {}
        self._warm: dict[str, channel.Server] = {}
        self.network, self._outside = network, None
        self._starting = threading.Lock()
        self._spares = Spares(self._start_loaded, spares) if spares and isolation == "container" else None
        os.makedirs(self.state_dir, exist_ok=True)

    def describe(self) -> str:
        """One line for people: what keeps tested code in."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Names the interpreter and pytest that byte code is prepared for."""
        raise NotImplementedError

    def _start(self, prepared: RepositorySpec | None, networked: bool = False, browser: bool = False
               ) -> channel.Server:
        """Starts a server, with a browser where one is asked for.

        Of one that is `networked`, the door is open (`_open_gate`).
        """
        raise NotImplementedError

    def _open_gate(self, server: channel.Server, line: socket.socket) -> channel.Server:
        """Answers on the listening socket that `server` sends over `line`."""
        from qcn_jax.envs.network import proxy

        if self._outside is None:
            self._outside = proxy.Outside()
        line.settimeout(ANSWER_GRACE)
        try:
            _, descriptors, _, _ = socket.recv_fds(line, 1, 1)
            server.gate = proxy.Gate(socket.socket(fileno=descriptors[0]), self._outside)
        except (OSError, IndexError) as error:
            server.close()
            raise SandboxError(f"the sandbox gives no way to the network: {error}") from error
        return server

    def prepare(self, spec: RepositorySpec) -> Prepared:
        """Makes a repository known: unpacked, cleaned, compiled, its tests run once. Kept in `state_dir`.

        Raises:
          UserError: the archive is missing, damaged or not the one that was meant.
          SandboxError: no sandbox could be started.
        """
        known = self.prepared.get(spec.name)
        if known is not None and known.spec == spec:
            return known
        prepared = preparing.prepare(spec, self.state_dir, self.fingerprint(), self._start)
        self.prepared[spec.name] = prepared
        return prepared

    def files(self, name: str) -> Mapping[str, str]:
        """Pristine text files of a prepared repository, by path."""
        return self.prepared[name].files

    def create(self, name: str, overlay: Mapping[str, str | None] | None = None, role: str = "agent",
               before: str = "") -> Sandbox:
        """A fresh sandbox of a prepared repository with `overlay` on top (None deletes a file).

        `role` separates what must never meet: agents' sandboxes and grading ("grading") use different servers. In a
        sandbox for grading the repository's files belong to another user: tested code can add to them, not change them;
        and it never has a network. `before`: see Snapshot.

        Raises:
          SandboxError: the back end failed; trying again may help.
        """
        return self.restore(Snapshot(name, dict(overlay or {}), {}, before), role)

    def restore(self, snapshot: Snapshot, role: str = "agent") -> Sandbox:
        """A fresh sandbox in the state of `snapshot`; `changes` and `diff` are told from its starting state.

        Raises:
          SandboxError: as `create`.
        """
        prepared = self.prepared[snapshot.repository]
        try:
            return self._create(prepared, snapshot, role)
        except SandboxError:
            return self._create(prepared, snapshot, role)  # the server had died; this one is new

    def _create(self, prepared: Prepared, snapshot: Snapshot, role: str) -> Sandbox:
        overlay, edits = dict(snapshot.overlay), dict(snapshot.edits)
        server = self._server(prepared, role)
        try:
            with self._starting:
                self._load(server, prepared)
            request = {"op": "create", "tree": prepared.key, "overlay": overlay, "edits": edits,
                       "guarded": role == "grading"}
            reply, _ = server.call(request, b"", ANSWER_GRACE)
        except BaseException:
            if self.isolation == "container" or server.broken:
                server.close()
            raise
        return Sandbox(self, server, prepared, overlay, reply["workspace"], snapshot.before)

    def _load(self, server: channel.Server, prepared: Prepared) -> None:
        """Gives a server the repository's files, once."""
        if prepared.key not in server.trees:
            with open(prepared.archive, "rb") as stream:
                payload = stream.read()
            request = {"op": "load", "tree": prepared.key, "settings": dict(prepared.settings)}
            server.call(request, payload, ANSWER_GRACE)
            server.trees.add(prepared.key)

    def _start_loaded(self, prepared: Prepared) -> channel.Server:
        server = self._start(prepared.spec, browser=prepared.browser)
        try:
            self._load(server, prepared)
        except BaseException:
            server.close()
            raise
        return server

    def _server(self, prepared: Prepared, role: str) -> channel.Server:
        networked = self.network != "none" and role == "agent"
        if self.isolation == "container":
            spare = self._spares.take(prepared) if self._spares is not None and not networked else None
            return spare or self._start(prepared.spec, networked, prepared.browser)
        needs = f" browser {prepared.spec.modules}" * prepared.browser + " builds" * prepared.builds
        name = self._warm_name(prepared, role) + needs
        with self._starting:  # two threads must not start it twice: the first one's would be lost
            if name in self._warm and not self._warm[name].alive():
                self._warm.pop(name).close()
            if name not in self._warm:
                self._warm[name] = self._start(prepared.spec, networked, prepared.browser)
            return self._warm[name]

    def _warm_name(self, prepared: Prepared, role: str) -> str:
        """Which warm server serves a repository; one per role where all share the same interpreter."""
        return role

    def release(self, server: channel.Server, workspace: int) -> None:
        """Deletes a workspace; in container isolation its whole container."""
        if self.isolation == "container":
            server.close()
        elif server.alive():
            with contextlib.suppress(SandboxError, OSError):  # its user id is then not given to another
                server.call({"op": "destroy", "workspace": workspace}, b"", ANSWER_GRACE)

    def close(self) -> None:
        """Ends all servers of this provider."""
        if self._spares is not None:
            self._spares.close()
        for server in self._warm.values():
            server.close()
        self._warm = {}
        if self._outside is not None:
            self._outside.close()
            self._outside = None

    def __enter__(self) -> "Provider":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


@contextlib.contextmanager
def sandbox(provider: Provider, name: str, overlay: Mapping[str, str | None] | None = None,
            role: str = "agent", before: str = "") -> Iterator[Sandbox]:
    """`provider.create` for a with statement."""
    made = provider.create(name, overlay, role, before)
    try:
        yield made
    finally:
        made.destroy()


def _inside(path: str) -> str:
    """Paths may be written as agents see them, below /testbed."""
    if path == "/testbed" or path.startswith("/testbed/"):
        return path[len("/testbed/"):] or "."
    return path
