"""One worker of the pool as a process of this machine, and the line to it."""

import dataclasses
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any, Protocol

STOP_GRACE = 10.0  # seconds for a worker to close its sandboxes before it is killed


@dataclasses.dataclass
class Job:
    """One thing that a worker does: `Worker`'s method `kind` on `arguments`, within `deadline` seconds."""

    number: int
    kind: str
    arguments: tuple[Any, ...]
    future: Future
    deadline: float
    attempts: int


class WorkerLine(Protocol):
    """A worker, as the thread that feeds it sees it."""

    def run(self, job: Job) -> tuple[str, Any]:
        """(state, value) of a job: ok, error, infrastructure (try again) or dead (the worker is of no more use)."""

    def abort(self) -> None:
        """Makes a `run` that another thread waits in return "dead" soon."""

    def kill(self) -> None:
        """Ends the worker at once; its servers notice and end themselves."""

    def stop(self) -> None:
        """Lets the worker close its sandboxes and end."""


class ProcessWorker:
    """A worker in a process of this machine."""

    def __init__(self, provider_args: Mapping[str, Any]):
        mine, its = socket.socketpair()
        # A fresh interpreter of the module alone: fork would copy the trainer's threads, and multiprocessing's spawn
        # would import the program's main module, JAX with it.
        environment = {**os.environ, "PYTHONPATH": module_path()}
        command = [sys.executable, "-m", "qcn_jax.envs.pool.worker", str(its.fileno()), str(os.getpid())]
        self.process = subprocess.Popen(command, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL, env=environment,
                                        start_new_session=True)
        its.close()
        self.connection = Connection(mine.detach())
        self.connection.send(dict(provider_args))

    def run(self, job: Job) -> tuple[str, Any]:
        """As WorkerLine says."""
        try:
            message = pickle.dumps((job.number, job.kind, job.arguments))
        except Exception as error:
            return "error", (error, "the job cannot be sent to a worker")
        try:
            self.connection.send_bytes(message)
            if not self.connection.poll(job.deadline):
                return "dead", f"job {job.kind} did not end in {job.deadline:.0f} s"
            number, state, value = pickle.loads(self.connection.recv_bytes())
        except (OSError, EOFError):
            return "dead", f"a pool worker died (exit status {self._status()})"
        return (state, value) if number == job.number else ("dead", "a pool worker answered another job")

    def _status(self) -> int | None:
        try:
            return self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return None

    def abort(self) -> None:
        """As WorkerLine says; the connection shows the end."""
        self.process.kill()

    def kill(self) -> None:
        """As WorkerLine says."""
        self.connection.close()
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """As WorkerLine says."""
        self.connection.close()
        try:
            self.process.wait(STOP_GRACE)
        except subprocess.TimeoutExpired:
            self.kill()


def module_path() -> str:
    """PYTHONPATH for a worker: it imports what this process can."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)
