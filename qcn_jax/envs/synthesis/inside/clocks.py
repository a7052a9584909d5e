"""Runs inside a sandbox, before other scripts of this folder: whether code asks what time or day it is.

What it then gives holds at that time alone. Code that is given a time, by a test that replaces the clock, does not ask.
"""

import datetime
import sys

CLOCKS = {"time", "time_ns", "localtime", "gmtime", "ctime"}  # of the module time


def tells_time(function):
    """Whether a built-in function tells the time of day."""
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if isinstance(owner, type) and issubclass(owner, datetime.date):
        return name in ("now", "today", "utcnow")
    return name in CLOCKS and getattr(function, "__module__", "") == "time"


class Watch:
    """Notes whether the block that runs within it asks for the time."""

    def __init__(self):
        self.asked = False

    def note(self, frame, event, function):
        if event == "c_call" and tells_time(function):
            self.asked = True

    def __enter__(self):
        sys.setprofile(self.note)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)
