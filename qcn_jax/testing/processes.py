"""Processes with emulated devices: one, or several that are joined as the hosts of a pod are."""

import importlib.metadata
import inspect
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence

# Programs of tests run once: optimising them takes longer than it saves. Generating code in parts, which shortens one
# compilation on many processors, takes a sixth more processor time; the emitters of fusions double it (JAX 0.11 can no
# longer do without them).
QUICK_OPTIONS: dict[str, bool | int] = {
    "xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1}
if tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2]) < (0, 11):
    QUICK_OPTIONS["xla_cpu_use_fusion_emitters"] = False
QUICK_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK_OPTIONS.items())
TIMEOUT = 1200.0  # seconds; generous, as tests share processors with others


def emulated(devices: int, quick: bool = True) -> dict[str, str]:
    """Returns environment variables under which JAX shows `devices` CPU devices.

    Args:
      devices: how many.
      quick: compile with little optimisation, for programs that run once.
    """
    count = f"--xla_force_host_platform_device_count={devices}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {count} {QUICK_FLAGS if quick else ''}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags.split())}


def run_with_devices(code: str | Callable[[], None], devices: int, timeout: float = TIMEOUT) -> str:
    """Runs `code` in a fresh Python process with `devices` emulated CPU devices and returns its stdout.

    The process finds the modules that this one finds (`sys.path`).

    Args:
      code: source text, or a module's function that takes nothing (called by name in the child).
      devices: how many devices `jax.devices()` shows there.
      timeout: seconds.

    Raises:
      ValueError: the function was not read from a file.
      AssertionError: the process did not exit with status 0; holds the end of its output.
    """
    if callable(code):
        path, name = inspect.getsourcefile(code) or "", code.__name__
        if not os.path.isfile(path):
            raise ValueError(f"code: function {name} comes from no file, where another process could find it")
        code = f"""
            import importlib.util
            spec = importlib.util.spec_from_file_location("child_module", {path!r})
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            module.{name}()
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True,
                          timeout=timeout, check=False, env=_environment(emulated(devices)))
    assert done.returncode == 0, f"child exited with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def _environment(*additions: Mapping[str, str]) -> dict[str, str]:
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = {**os.environ, "PYTHONPATH": paths}
    for addition in additions:
        environment.update(addition)
    return environment


class Hosts:
    """Processes of one command with emulated devices each, joined as the hosts of a pod are.

    A context manager: whatever still runs at its end is killed.
    """

    def __init__(
        self, command: Sequence[str] | Callable[[str, int], Sequence[str]], processes: int = 2, devices: int = 4,
        environment: Mapping[str, str] | None = None, quick: bool = True,
    ) -> None:  # fmt: skip
        """Starts the processes.

        Args:
          command: to which --coordinator, --processes and --process_id are added (`qcn run ...`); or a function of
            (HOST:PORT of the coordinator, number of the process) that gives the whole command.
          processes, devices: how many processes, and emulated devices of each.
          environment: further variables.
          quick: see `emulated`.
        """
        coordinator = f"127.0.0.1:{free_port()}"
        self._folder = tempfile.TemporaryDirectory(prefix="qcn-hosts-")
        self._processes: list[subprocess.Popen[bytes]] = []
        for number in range(processes):
            if callable(command):
                arguments = list(command(coordinator, number))
            else:
                arguments = [*command, f"--coordinator={coordinator}", f"--processes={processes}",
                             f"--process_id={number}"]
            # Files and not pipes: a process must not stand still because nobody reads what it prints.
            with open(self._output(number), "wb") as stream:
                self._processes.append(subprocess.Popen(
                    arguments, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    env=_environment(emulated(devices, quick), environment or {})))

    def _output(self, number: int) -> pathlib.Path:
        return pathlib.Path(self._folder.name, f"{number}.log")

    def output(self, number: int) -> str:
        """Returns what process `number` has printed so far, stdout and stderr together."""
        return self._output(number).read_text(encoding="utf-8", errors="replace")

    def kill(self, number: int) -> None:
        """Ends process `number` at once, as SIGKILL or a power cut does."""
        self._processes[number].kill()
        self._processes[number].wait()

    def signal(self, number: int, which: int) -> None:
        """Sends a signal to process `number`."""
        self._processes[number].send_signal(which)

    def wait(self, number: int, timeout: float = TIMEOUT) -> int:
        """Waits for process `number` to end; returns its exit status, negative for a signal.

        Raises:
          AssertionError: it has not ended after `timeout` seconds; holds the end of its output.
        """
        try:
            return self._processes[number].wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"process {number} runs on:\n{self.output(number)[-3000:]}") from None

    def until(self, number: int, text: str | re.Pattern[str], timeout: float = TIMEOUT) -> None:
        """Waits until process `number` has printed `text`, or what matches it where it is a pattern.

        Raises:
          AssertionError: it ended without, or `timeout` seconds have passed.
        """
        deadline = time.monotonic() + timeout
        pattern = re.compile(re.escape(text)) if isinstance(text, str) else text
        while not pattern.search(self.output(number)):
            ended = self._processes[number].poll() is not None
            if (ended and not pattern.search(self.output(number))) or time.monotonic() > deadline:
                raise AssertionError(f"process {number} has not printed {text!r}:\n{self.output(number)[-3000:]}")
            time.sleep(0.05)

    def finish(self, timeout: float = TIMEOUT) -> list[str]:
        """Waits for all processes to succeed; returns what each printed.

        Raises:
          AssertionError: one did not exit with status 0; holds the end of its output.
        """
        for number in range(len(self._processes)):
            status = self.wait(number, timeout)
            assert status == 0, f"process {number} ended with {status}:\n{self.output(number)[-6000:]}"
        return [self.output(number) for number in range(len(self._processes))]

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._folder.cleanup()


def free_port() -> int:
    """Returns a TCP port of this machine that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
