"""What a process of several prints when another one has ended: one line, whatever ends it.

Where a process is lost, XLA aborts the others from a thread of its own, with dozens of lines and without asking Python.
So stderr goes through this file, run as a program of its own (only the standard library, no site packages): it passes
everything on, but for the last words of XLA, of which it makes one line.
"""

import os
import re
import signal
import subprocess
import sys
from typing import BinaryIO

LOST = ("qcn run: another process of this run has ended or cannot be reached; its last line says why. Give all "
        "processes the same command again: it resumes")
# XLA's messages on the way to the abort, and the abort itself.
_NOISE = re.compile(rb"^(\[Gloo\]|[IWE]\d{4} .*(coordination_service|preemption|distributed_runtime))")
# Its message of another process's end goes over several lines, until one that begins anew.
_LONG = re.compile(rb"^E\d{4} .*coordination_service")
_ANEW = re.compile(rb"^([IWEF]\d{4} |\[|qcn |Traceback )")
_ABORT = re.compile(rb"^F\d{4} .*distributed service detected fatal errors")
# Errors that Python sees of a connection to a process that is gone.
_TRANSPORT = re.compile(r"Gloo|Connection (closed|reset)|Socket closed|heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED|"
                        r"[Cc]oordination service|Barrier failed|unhealthy")


def is_lost(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that another process is gone."""
    seen: BaseException | None = error
    while seen is not None:
        if not isinstance(seen, OSError) and _TRANSPORT.search(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def filter_stderr() -> None:
    """Sends this process's stderr, and that of its children to come, through a filter process; call it once."""
    child = subprocess.Popen([sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE)
    os.dup2(child.stdin.fileno(), sys.stderr.fileno())
    child.stdin.close()


def run(source: BinaryIO, target: BinaryIO) -> None:
    """Copies lines from `source` to `target` until its end; behind XLA's abort nothing but one line."""
    over = inside = False
    for line in source:
        inside = bool(_LONG.match(line)) or (inside and not _ANEW.match(line))
        if over or inside or _NOISE.match(line):
            continue
        over = bool(_ABORT.match(line)) or line.startswith(LOST.encode())
        target.write(LOST.encode() + b"\n" if over else line)
        target.flush()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with the process whose stderr it is
    run(sys.stdin.buffer, sys.stderr.buffer)
