"""The host's end of the line to a server inside a sandbox: frames over two byte streams, one request at a time."""

import builtins
import contextlib
import json
import os
import select
import struct
import subprocess
import threading
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from qcn_jax.envs.network.proxy import Gate


class SandboxError(RuntimeError):
    """The sandbox itself failed, not what ran in it: an infrastructure failure, worth another try."""


class Stream(Protocol):
    """Bytes to and from a server."""

    def send(self, data: bytes, deadline: float) -> None:
        """Sends everything; raises SandboxError."""

    def receive(self, size: int, deadline: float) -> bytes:
        """Exactly `size` bytes; raises SandboxError at the end of the stream or the deadline."""

    def alive(self) -> bool:
        """Whether the other side still runs."""

    def close(self) -> None:
        """Ends the other side and everything below it."""


class Server:
    """One server; `call` is safe to use from several threads, requests queue up."""

    def __init__(self, stream: Stream, start_timeout: float = 60.0):
        self.stream, self.trees, self.broken = stream, set(), False
        self.gate: Gate | None = None  # the way out of the sandboxes that it serves
        self._lock = threading.Lock()
        try:
            self.facts, _ = self.call({"op": "hello"}, b"", start_timeout)
        except BaseException:
            self.close()
            raise

    def call(self, request: dict[str, Any], payload: bytes, timeout: float,
             during: AbstractContextManager[Any] | None = None) -> tuple[dict[str, Any], bytes]:
        """Sends a request and waits for its reply; `during` is entered while it is served, after those before it.

        Raises:
          SandboxError: no reply in `timeout` seconds, or the server died (it is closed), or this request failed there.
          OSError or a subclass: the server refused (no such file, for instance).
        """
        with self._lock, during or contextlib.nullcontext():
            if self.broken:
                raise SandboxError("the sandbox's server is gone")
            deadline = time.monotonic() + timeout
            try:
                body = json.dumps(request).encode()
                self.stream.send(struct.pack(">II", len(body), len(payload)) + body + payload, deadline)
                length, extra = struct.unpack(">II", self.stream.receive(8, deadline))
                reply = json.loads(self.stream.receive(length, deadline))
                data = self.stream.receive(extra, deadline) if extra else b""
            except BaseException:
                self.broken = True  # the next reply could be the answer to this request
                self.stream.close()
                raise
        if "failed" in reply:
            raise SandboxError(f"the sandbox failed: {reply['failed']}")
        if "refused" in reply:
            kind = getattr(builtins, reply["refused"], OSError)
            raise (kind if isinstance(kind, type) and issubclass(kind, OSError) else OSError)(reply["message"])
        return reply, data

    def alive(self) -> bool:
        """Whether requests can still be made."""
        return not self.broken and self.stream.alive()

    def close(self) -> None:
        """Ends the server."""
        self.broken = True
        if self.gate is not None:
            self.gate.close()
        self.stream.close()


class PipeStream:
    """A server as a child process with pipes."""

    def __init__(self, command: list[str], env: dict[str, str], descriptors: tuple[int, ...] = ()):
        # A session of its own: a terminal's Ctrl-C is for the program in front, which then closes this in order.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        env=env, start_new_session=True, bufsize=0, pass_fds=descriptors)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            os.set_blocking(pipe.fileno(), False)
        self.errors = b""

    def _wait(self, readable: bool, deadline: float) -> None:
        pipe = self.process.stdout if readable else self.process.stdin
        watched = [pipe, self.process.stderr] if readable else [self.process.stderr]
        left = deadline - time.monotonic()
        if left <= 0:
            raise SandboxError("the sandbox's server does not answer")
        ready, _, _ = select.select(watched, [] if readable else [pipe], [], left)
        if self.process.stderr in ready:
            with contextlib.suppress(BlockingIOError):
                self.errors = (self.errors + (os.read(self.process.stderr.fileno(), 65536) or b""))[-4000:]

    def send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self.process.stdin.fileno(), view):]
            except BlockingIOError:
                self._wait(False, deadline)
            except OSError as error:
                raise SandboxError(f"the sandbox's server ended: {self.last_words()}") from error

    def receive(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                part = os.read(self.process.stdout.fileno(), min(1 << 20, size - len(data)))
            except BlockingIOError:
                self._wait(True, deadline)
                continue
            if not part:
                raise SandboxError(f"the sandbox's server ended: {self.last_words()}")
            data += part
        return bytes(data)

    def last_words(self) -> str:
        """The last line on the server's standard error, for messages."""
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
            self.process.wait(1.0)
            self.errors += os.read(self.process.stderr.fileno(), 65536) or b""
        lines = self.errors.decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self.process.poll()}"

    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        if self.process.stdin.closed:
            return
        self.process.stdin.close()  # the server ends, and with it all that it started
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()
