"""One side of honest_patches.py: grades what it is told with whichever qcn_jax stands on PYTHONPATH.

    python _grading_side.py BACK_END STATE_FOLDER       one JSON object a line in, one out

In: {"name", "archive"} prepares a repository; {"task", "patch"} grades. Out: {"outcome", "caught", "detail", "seconds"}.
"""

import json
import sys
import time

from qcn_jax.envs.sandbox import RepositorySpec, make_provider

try:
    from qcn_jax.envs.tasks.grading import Grader
    from qcn_jax.envs.tasks.schema import Task
except ImportError:  # before envs.tasks was a package
    from qcn_jax.envs.grading import Grader
    from qcn_jax.envs.tasks import Task


def main(kind, state):
    """Answers until its input ends."""
    with make_provider(kind, state) as provider:
        grader = Grader(provider)
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
