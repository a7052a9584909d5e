"""What the kernel tells about jobs: how they ended, what they waited for, what they died of."""

import contextlib
import os

_TICKS = os.sysconf("SC_CLK_TCK")  # of the clock of /proc's processor times


def exit_code(status):
    """Shell convention: 128 + signal for a job that a signal ended."""
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def waited(pid):
    """Seconds for which others kept a job from running: the longest that any of its processes stood ready.

    A time limit is for what runs in the sandbox; it must not turn a busy machine into a wrong verdict. What the job's
    own processes and threads ran meanwhile does not count, or a job could make its time longer by being many.
    """
    found, own, front = [], 0.0, [pid] if pid else []
    while front:
        process = front.pop()
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{process}/stat") as stream:
                fields = stream.read().rsplit(")", 1)[1].split()
            own += sum(map(int, fields[11:15])) / _TICKS  # of all its threads, and of its children that have ended
            with open(f"/proc/{process}/schedstat") as stream:
                ran, stood = stream.read().split()[:2]
            found.append(int(stood) / 1e9 + int(ran) / 1e9)
            with open(f"/proc/{process}/task/{process}/children") as stream:
                front += stream.read().split()
    return max(0.0, max(found, default=0.0) - own)


def out_of_memory_kills():
    """How often the kernel killed a process of this container for memory; 0 where that is not told."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        with contextlib.suppress(OSError), open(path) as stream:
            for line in stream:
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0

