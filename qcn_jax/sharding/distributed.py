"""Several hosts: every process calls `start` before anything touches a device; then they wait for one another here."""

import contextlib
import itertools
import os
import pathlib
import pickle
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from qcn_jax import files
from qcn_jax.errors import UserError
from qcn_jax.sharding import last_line

# A process that is silent for this long is taken for dead, and the others end; the same command resumes.
HEARTBEAT_SECONDS = 60
# Processes wait for one another as long as one of them works, be it on trajectories for days; one that dies is noticed.
PATIENCE_SECONDS = 30 * 24 * 3600
FAREWELL_SECONDS = 2.0  # for which the first process, without which no other can live, lets the others say theirs
AUTO = "auto"
_meetings = itertools.count()


def start(coordinator: str | None, processes: int | None = None, process_id: int | None = None,
          environment: Mapping[str, str] = os.environ) -> bool:
    """Joins the processes of a run; returns whether there are several.

    Args:
      coordinator: HOST:PORT of process 0; "auto" to ask the environment (Cloud TPU pods, multi-slice, SLURM, Open
        MPI, as jax.distributed knows them); None joins where a TPU environment names several hosts, else nothing.
      processes, process_id: with HOST:PORT, how many processes there are, and which from 0 this one is.
      environment: environment variables.

    Raises:
      UserError: flags that do not go together, or no answer from the others.
    """
    explicit = coordinator not in (None, AUTO)
    if explicit != (processes is not None) or explicit != (process_id is not None):
        raise UserError("--coordinator=HOST:PORT, --processes=N and --process_id=I go together; --coordinator=auto "
                        "needs neither")
    if explicit and not 0 <= process_id < processes:
        raise UserError(f"--process_id={process_id}: allowed: 0 to {processes - 1}")
    if explicit and ":" not in coordinator:
        raise UserError(f"--coordinator={coordinator}: is not HOST:PORT")
    if coordinator is None and not several_tpu_hosts(environment):
        return False
    arguments = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process_id}
    last_line.filter_stderr()
    try:
        jax.distributed.initialize(**(arguments if explicit else {}), heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                                   shutdown_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(f"--coordinator={coordinator or AUTO}: the processes do not come together: {line}") from error
    return not alone()


def several_tpu_hosts(environment: Mapping[str, str]) -> bool:
    """Whether this is one of several hosts of a TPU pod or of several slices."""
    hosts = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    slices = environment.get("MEGASCALE_NUM_SLICES", "1")
    return len(hosts) > 1 or slices not in ("", "1")


def devices() -> list[jax.Device]:
    """The devices of all processes; starts JAX's back end where nothing has yet.

    Raises:
      UserError: JAX_PLATFORMS names what this machine or this JAX does not have, or a driver fails.
    """
    try:
        return jax.devices()
    except Exception as error:  # a plugin that is missing is an AssertionError without a word, a driver's anything
        asked = os.environ.get("JAX_PLATFORMS", "")
        line = " ".join(str(error).split())[:300] or "this machine has no such device, or JAX no plugin for it"
        raise UserError(f"JAX_PLATFORMS={asked}: {line}") from error


def first_device() -> jax.Device:
    """This process's first device; raises what `devices` raises."""
    devices()
    return jax.local_devices()[0]


def alone() -> bool:
    """Whether this is the only process; starts no device to find out."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def place() -> tuple[int, int]:
    """This process's number, from 0, and how many there are."""
    return (0, 1) if alone() else (jax.process_index(), jax.process_count())


def is_first() -> bool:
    """Whether this is the process that writes what only one may write."""
    return alone() or jax.process_index() == 0


@contextlib.contextmanager
def ends_at_once(who: str) -> Iterator[None]:
    """A block after which this process, one of several, ends at once where the block fails.

    Left alone, it would wait for the others to leave in order, and they may be gone or wait for this one. What ends it
    is said in one line; a fault of the program itself with its traceback. Alone, and where signals end the block in all
    processes together, nothing is different.
    """
    try:
        yield
    except Exception as error:
        if alone():
            raise
        lost = last_line.is_lost(error)
        if lost or isinstance(error, UserError):
            print(last_line.LOST if lost else f"{who}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        if is_first() and not lost:
            time.sleep(FAREWELL_SECONDS)
        os._exit(1)


def barrier(name: str) -> None:
    """Returns when every process has come here, however long that takes; without a device's help."""
    if not alone():
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=f"{name} {next(_meetings)}", timeout_ms=PATIENCE_SECONDS * 1000)


class OutOfStep(RuntimeError):
    """The processes have come to different places of the program; a fault of this library."""


def gathered(name: str, values: Sequence[int]) -> list[list[int]]:
    """Returns every process's `values` (32 bits each); every process must call this, with the same name.

    Raises:
      OutOfStep: others wait at another place of the program.
    """
    if alone():
        return [list(values)]
    barrier("agreement")  # a collective of devices would not wait as long
    found = multihost_utils.process_allgather(np.array([zlib.crc32(name.encode()) >> 1, *values], np.int32))
    if len(np.unique(found[:, 0])) > 1:
        raise OutOfStep(f"{name}: other processes are elsewhere in the program")
    return found[:, 1:].tolist()


def all_agree(name: str, fine: bool) -> bool:
    """Returns whether `fine` is true in every process; see `gathered`."""
    return all(row[0] for row in gathered(name, [fine]))


def exchanged(name: str, value: Any) -> list[Any]:
    """Returns every process's `value`, anything that pickle takes, in their order; see `gathered`."""
    if alone():
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = [row[0] for row in gathered(name, [len(data)])]
    padded = np.pad(data, (0, max(sizes) - len(data)))
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def together(name: files.Path) -> Iterator[None]:
    """A block that every process enters, and that fails in all of them where it fails in one.

    Raises:
      UserError: the block's own; or, where it was another process's, that it was.
    """
    failure = None
    try:
        yield
    except UserError as error:
        failure = error
    except OSError as error:
        failure = UserError(f"{name}: cannot be written: {error.strerror or error}")
        failure.__cause__ = error
    fine = all_agree(f"together {pathlib.Path(name).name}", failure is None)
    if failure is not None:
        raise failure
    if not fine:
        raise UserError(f"{name}: failed in another process, whose last line says why")


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """The block runs in process 0, then in the others, which find what it has written.

    The others do not run it where it failed in process 0. Nothing inside may wait for another process.

    Raises:
      UserError: it failed in process 0.
    """
    if not is_first() and not all_agree(name, True):
        raise UserError(f"{name}: failed in the first process, whose last line says why")
    try:
        yield
    except OutOfStep:
        raise
    except BaseException:
        if is_first():
            all_agree(name, False)
        raise
    if is_first():
        all_agree(name, True)


def write_json(path: files.Path, value: Any) -> None:
    """Writes what every process has found alike, by the first of them; returns when it is there."""
    with first_before_others(pathlib.Path(path).name):
        if is_first():
            files.write_json(path, value)


@contextlib.contextmanager
def shared_directory(path: files.Path, surplus: files.Surplus | None = None) -> Iterator[pathlib.Path]:
    """`files.atomic_directory` for all processes: each fills the same temporary folder, which the first one makes.

    It takes the place of `path` when the block has ended without UserError and OSError in every process, and is there
    when this returns.

    Args:
      path, surplus: see `files.atomic_directory`.

    Raises:
      UserError: what `files.atomic_directory` and `together` say, or the disk is not one that all hosts see.
    """
    path = pathlib.Path(path)
    with together(path), contextlib.ExitStack() as stack:
        name = ""
        with together(path):
            if is_first():
                name = stack.enter_context(files.atomic_directory(path, surplus)).name
        folder = path.parent / _of_first(name)
        with together(path):
            if not folder.is_dir():
                raise UserError(f"{path}: is not on a disk that all hosts share")
        with together(path):
            yield folder


def _of_first(name: str) -> str:
    """The first process's `name`, of a file: at most 255 bytes."""
    if alone():
        return name
    text = np.frombuffer(name.encode().ljust(256, b"\0"), np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(text)).rstrip(b"\0").decode()


def met(program: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a jitted function that several processes with CPU devices run at one time; elsewhere `program` itself.

    Gloo, by which such devices talk, gives another process 30 seconds to answer the first call and to bring its part of
    a psum_scatter, whatever XLA's flags say. One that compiles, reads or saves for longer would end all of them. So
    each compiles alone, at the first call, and waits for the others before every call.

    Args:
      program: jitted; its arguments have the same shapes and shardings at every call.
    """
    if alone() or jax.default_backend() != "cpu":
        return program
    compiled = False

    def call(*arguments: Any) -> Any:
        nonlocal compiled
        if not compiled:
            program.lower(*arguments).compile()  # where the call itself finds it
            compiled = True
        barrier("a step")
        return program(*arguments)

    return call
