"""Functions that the pool's tests send to workers; they must be importable there."""

import os
import sys
import time


def imported_modules(provider):
    """Top-level modules of the worker."""
    return sorted({name.split(".")[0] for name in sys.modules})


def sleep(provider, seconds):
    """Sleeps and returns for how long."""
    time.sleep(seconds)
    return seconds


def hold(provider, folder, number, go):
    """Says in `folder` that it has begun, and returns when there are `go` such notes and files."""
    with open(os.path.join(folder, str(number)), "w"):
        pass
    while len(os.listdir(folder)) < go:
        time.sleep(0.02)
    return number


def divide(provider, number):
    """Raises ZeroDivisionError for 0."""
    return 1 / number


def die(place):
    """Ends the worker."""
    os._exit(9)


def die_once(provider, flag):
    """Ends the worker unless the file `flag` exists."""
    if not os.path.exists(flag):
        with open(flag, "w"):
            os._exit(9)
    return "alive"


def read_upper(sandbox, path):
    """Acts on a session's sandbox."""
    return sandbox.read(path).upper()


def node(provider, folder, number, go):
    """Identity of the cluster's node that this runs on, after `hold`."""
    import ray

    hold(provider, folder, number, go)
    return ray.get_runtime_context().get_node_id()


def append_line(provider, path, line, seconds):
    """Leaves a trace of every execution that came to its end, and returns what was asked."""
    time.sleep(seconds)
    with open(path, "a") as stream:
        stream.write(f"{line}\n")
    return line
