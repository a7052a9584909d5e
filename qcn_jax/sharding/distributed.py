"""Start of a run over several hosts: every process calls `start` before anything touches a device."""

import contextlib
import os
from collections.abc import Iterator, Mapping

import jax
from jax.experimental import multihost_utils

from qcn_jax.errors import UserError

# A process that is silent for this long is taken for dead, and the others end; the same command resumes.
HEARTBEAT_SECONDS = 60
AUTO = "auto"


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
    try:
        jax.distributed.initialize(**(arguments if explicit else {}), heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
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


def alone() -> bool:
    """Whether this is the only process; starts no device to find out."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def is_first() -> bool:
    """Whether this is the process that writes what only one may write."""
    return alone() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if not alone():
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """The block runs in process 0, then in the others, which find what it has written."""
    if not is_first():
        barrier(name)
    yield
    if is_first():
        barrier(name)
