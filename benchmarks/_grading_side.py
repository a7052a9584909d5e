"""One side of a comparison of commits: grades what it is told with whichever qcn_jax stands on PYTHONPATH.

    python _grading_side.py BACK_END STATE_FOLDER [fail_fast]      one JSON object a line in, one out

In: {"name", "archive"} prepares a repository; {"task", "patch"} grades. Out: {"outcome", "caught", "detail", "seconds"}.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

from qcn_jax.envs.sandbox import RepositorySpec, make_provider

try:
    from qcn_jax.envs.tasks.grading import Grader
    from qcn_jax.envs.tasks.schema import Task
except ImportError:  # before envs.tasks was a package
    from qcn_jax.envs.grading import Grader
    from qcn_jax.envs.tasks import Task


class Side:
    """A process that grades as the package in a checkout does.

    Args:
      checkout: folder of the package's repository.
      folder: for what it keeps.
      kind: back end of its sandboxes.
      options: further arguments of this program.
    """

    def __init__(self, checkout, folder, kind, *options):
        self.checkout, self.folder, self.process = pathlib.Path(checkout).resolve(), pathlib.Path(folder).resolve(), None
        self.environment = os.environ | {"PYTHONPATH": str(self.checkout), "XDG_CACHE_HOME": str(self.folder / "cache")}
        self._command = [sys.executable, __file__, kind, str(self.folder / "cache" / "qcn_jax" / "sandbox"), *options]

    def ask(self, row):
        """The answer to one row."""
        if self.process is None:
            self.process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environment)
        self.process.stdin.write((json.dumps(row) + "\n").encode())
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        """Ends the process."""
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def main(kind, state, *options):
    """Answers until its input ends."""
    with make_provider(kind, state) as provider:
        grader = Grader(provider, fail_fast="fail_fast" in options)
        for line in sys.stdin:
            asked, started = json.loads(line), time.monotonic()
            if "archive" in asked:
                provider.prepare(RepositorySpec(asked["name"], asked["archive"]))
                found = {}
            else:
                verdict = grader.grade(Task.from_json(asked["task"]), asked["patch"])
                found = {"outcome": verdict.outcome, "caught": list(verdict.caught), "detail": verdict.detail}
            print(json.dumps(found | {"seconds": round(time.monotonic() - started, 3)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
