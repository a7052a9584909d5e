"""Tests of file rights, which root does not have to keep."""

import contextlib
import grp  # noqa: F401  (imported by libraries when they first look at a file, which may then be too late)
import os
import pathlib
import pwd  # noqa: F401
import shutil
import tempfile
from collections.abc import Iterator

NOBODY = 65534


@contextlib.contextmanager
def ordinary_user() -> Iterator[pathlib.Path]:
    """Makes this process an ordinary user within the block, and gives a folder of that user's own.

    Where tests run as root the effective ids change, by which the kernel judges access to files. What a test imports
    should be imported before, as the package itself may lie where nobody else may read.
    """
    root = os.geteuid() == 0
    folder = pathlib.Path(tempfile.mkdtemp(prefix="qcn_rights_"))
    try:
        if root:
            os.chown(folder, NOBODY, NOBODY)
            os.setegid(NOBODY)
            os.seteuid(NOBODY)
        try:
            yield folder
        finally:
            for path, _, _ in os.walk(folder):  # top down, so that each can be entered next
                os.chmod(path, 0o700)
            if root:
                os.seteuid(0)
                os.setegid(0)
    finally:
        shutil.rmtree(folder)
