"""What the kernel tells about jobs: how they ended, what they waited for, what they died of."""

import contextlib
import os


def exit_code(status):
    """Shell convention: 128 + signal for a job that a signal ended."""
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def waited(pid):
    """Seconds for which a job stood ready and was not given a processor: the longest of any of its processes.

    A time limit is for what runs in the sandbox; it must not turn a busy machine into a wrong verdict.
    """
    longest, front = 0.0, [pid] if pid else []
    while front:
        process = front.pop()
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{process}/schedstat") as stream:
                longest = max(longest, int(stream.read().split()[1]) / 1e9)
            with open(f"/proc/{process}/task/{process}/children") as stream:
                front += stream.read().split()
    return longest


def out_of_memory_kills():
    """How often the kernel killed a process of this container for memory; 0 where that is not told."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        with contextlib.suppress(OSError), open(path) as stream:
            for line in stream:
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0

