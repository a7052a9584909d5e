"""What is left of XLA's last words where another process has ended: one line."""

import io
import subprocess
import sys

import pytest

from qcn_jax.errors import UserError
from qcn_jax.sharding import last_line

# As XLA prints them, shortened.
ABORT = b"""\
E1128 14:00:37.211398   30699 coordination_service_agent.cc:289] Polled an error from coordination service. The following tasks are unhealthy:
1
The tasks have crashed. Check the task logs for an earlier error, or scheduler events to debug further.
F1128 14:00:37.211398   30699 client.h:80] Terminating process because the JAX distributed service detected fatal \
errors. This most likely indicates that another task died; see the other task logs. absl::Status: UNAVAILABLE: Failed
Additional GRPC error information from remote target coordination_service while calling PollForError:
:UNKNOWN:Error received from peer  {grpc_status:14, grpc_message:"Socket closed"}
*** Check failure stack trace: ***
    @     0x7fa99f040634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""


def filtered(text: bytes) -> bytes:
    target = io.BytesIO()
    last_line.run(io.BytesIO(text), target)
    return target.getvalue()


def test_an_abort_becomes_one_line_and_the_rest_passes() -> None:
    line = last_line.LOST.encode() + b"\n"
    assert filtered(b"a warning\nlast words without an end") == b"a warning\nlast words without an end"
    assert filtered(b"a warning\n[Gloo] Rank 1 is connected to 1 peer ranks\n" + ABORT) == b"a warning\n" + line
    assert filtered(line + ABORT) == line  # Python saw it first
    assert filtered(b"[Gloo] Rank 0 is connected\na warning\n") == b"a warning\n"
    assert filtered(b"".join(ABORT.splitlines(keepends=True)[:3]) + line) == line  # and XLA did not abort


def test_the_errors_of_a_lost_connection_are_known() -> None:
    lost = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:13969")
    assert last_line.is_lost(lost)
    wrapped = UserError("checkpoint cannot be written")
    wrapped.__cause__ = lost
    assert last_line.is_lost(wrapped)
    for other in (UserError("--config.seed: -1"), ValueError("shapes differ"), ConnectionResetError("Connection reset")):
        assert not last_line.is_lost(other)


@pytest.mark.parametrize("end", ["os.abort()", "os._exit(3)"])
def test_a_process_is_heard_to_its_end(end: str) -> None:
    code = ("import os, sys; from qcn_jax.sharding import last_line; last_line.filter_stderr()\n"
            "print('a warning', file=sys.stderr, flush=True)\n"
            f"os.write(2, {ABORT!r}); {end}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode in (-6, 3) and done.stderr == f"a warning\n{last_line.LOST}\n"
