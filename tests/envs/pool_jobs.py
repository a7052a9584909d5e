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
