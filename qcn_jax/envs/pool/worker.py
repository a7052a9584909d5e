"""A worker process of the pool: `python -m qcn_jax.envs.pool.worker FD`; never imports JAX.

Receives pickled (number, kind, arguments) over the inherited socket FD and answers (number, state, value); state is ok,
infrastructure (try again), or error (a defect or bad input; the value is the exception and its traceback).
"""

import ctypes
import os
import pickle
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from qcn_jax.envs.sandbox import make_provider
from qcn_jax.envs.sandbox.base import Provider, Sandbox, TestRun, sandbox
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.sandbox.repository import RepositorySpec
from qcn_jax.envs.tasks.grading import Grader
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.tasks.verdicts import Verdict
from qcn_jax.errors import UserError

_PR_SET_PDEATHSIG = 1


class Worker:
    """What jobs act on: a provider made on first use, and the sandboxes of open sessions."""

    def __init__(self, provider_args: dict[str, Any]):
        self._provider_args, self._provider = provider_args, None
        self._sessions: dict[int, Sandbox] = {}

    def provider(self, spec: RepositorySpec | None = None) -> Provider:
        """The provider, with `spec` prepared."""
        if self._provider is None:
            try:
                self._provider = make_provider(**self._provider_args)
            except UserError as error:
                if isinstance(error.__cause__, SandboxError):  # an engine that is being restarted, for instance
                    raise SandboxError(str(error)) from error
                raise
        if spec is not None:
            self._provider.prepare(spec)
        return self._provider

    def describe(self) -> dict[str, str]:
        """What the provider is: kind, description and, where Docker was passed over, the reason."""
        provider = self.provider()
        return {"kind": provider.kind, "description": provider.describe(), "reason": getattr(provider, "reason", "")}

    def prepare(self, spec: RepositorySpec) -> TestRun:
        """Prepares a repository and returns the run of its tests on the pristine state."""
        return self.provider(spec).prepared[spec.name].baseline

    def run_tests(self, spec: RepositorySpec, overlay: dict[str, str | None], node_ids: list[str] | None,
                  timeout: float, fail_fast: bool, role: str) -> TestRun:
        """Tests in a sandbox of their own."""
        with sandbox(self.provider(spec), spec.name, overlay, role) as place:
            return place.run_tests(node_ids, timeout, fail_fast)

    def grade(self, spec: RepositorySpec, task: Task, patch: str, fail_fast: bool, strict: bool) -> Verdict:
        """A verdict; raises SandboxError where there is none, so that the pool tries again, with a pause."""
        verdict = Grader(self.provider(spec), fail_fast, strict).grade(task, patch)
        if verdict.outcome == "infrastructure":
            raise SandboxError(verdict.detail)
        return verdict

    def apply(self, spec: RepositorySpec | None, function: Any, arguments: tuple[Any, ...]) -> Any:
        """`function(provider, *arguments)`."""
        return function(self.provider(spec), *arguments)

    def open(self, spec: RepositorySpec, session: int, overlay: dict[str, str | None], before: str) -> None:
        """Makes the sandbox of a session."""
        self._sessions[session] = self.provider(spec).create(spec.name, overlay, before=before)

    def call(self, session: int, function: Any, arguments: tuple[Any, ...]) -> Any:
        """`function(sandbox, *arguments)` on a session's sandbox."""
        if session not in self._sessions:
            raise SandboxError("the session's worker was replaced, its sandbox is gone")
        return function(self._sessions[session], *arguments)

    def end(self, session: int) -> None:
        """Destroys a session's sandbox."""
        place = self._sessions.pop(session, None)
        if place is not None:
            place.destroy()

    def close(self) -> None:
        """Ends all servers."""
        if self._provider is not None:
            self._provider.close()


JOBS = {name: getattr(Worker, name) for name in ("describe", "prepare", "run_tests", "grade", "apply", "open", "call",
                                                 "end")}


def die_with(parent: int) -> None:
    """Makes this process end when `parent`, which started it, ends, even by SIGKILL (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def main() -> None:
    """Serves jobs until the other end closes."""
    connection = Connection(int(sys.argv[1]))
    die_with(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    worker = None
    try:
        worker = Worker(connection.recv())
        while True:
            connection.send_bytes(execute(worker, *pickle.loads(connection.recv_bytes())))
    except (EOFError, ConnectionError):
        pass
    finally:
        if worker is not None:
            worker.close()


def execute(worker: Worker, number: int, kind: str, arguments: tuple[Any, ...]) -> bytes:
    """Does a job; returns the pickled (number, state, value)."""
    try:
        state, value = "ok", JOBS[kind](worker, *arguments)
    except SandboxError as error:
        state, value = "infrastructure", str(error)
    except Exception as error:
        state, value = "error", (error, traceback.format_exc())
    try:
        return pickle.dumps((number, state, value))
    except Exception as error:  # a result or an exception that cannot travel
        return pickle.dumps((number, "error", (TypeError(f"cannot be sent: {error}"), str(value)[:2000])))


if __name__ == "__main__":
    main()
