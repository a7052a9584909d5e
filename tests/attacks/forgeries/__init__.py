"""Patches that want a verdict without the work, by kind of forgery: what is put behind broken code.

Each repairs nothing. `FORGERIES` maps "kind: name" to the code; tests/attacks/test_verdicts.py hands them in.
"""

from tests.attacks.forgeries import knowing, marks, runner, strangers, suite  # noqa: F401
from tests.attacks.forgeries.judged import BAD, FILES, LATE, PATH
from tests.attacks.forgeries.pieces import FORGERIES


def changes(name: str) -> dict[str, str]:
    """The files of a forgery; what looks for the test module among the callers must be loaded by it."""
    code = FORGERIES[name]
    if "_getframe()" in code:
        return {PATH: BAD + "\n#\n", LATE: FILES[LATE] + code}
    return {PATH: BAD + "\n" + code}
