"""The Harbor half of grader_agreement.py; runs in an interpreter of Python 3.12 that has harbor, not ours.

    python _harbor_side.py JOB.json       prints {name: reward or error} as JSON

Harbor's own Task and Verifier run unchanged on task folders. Its environments want Docker Compose; here the environment is
a container that is started with the docker command, of an image that was made before.
"""

import asyncio
import json
import pathlib
import subprocess
import sys
import tempfile

from harbor.environments.base import ExecResult
from harbor.models.task.config import TaskOS
from harbor.models.task.task import Task
from harbor.models.trial.paths import TrialPaths
from harbor.verifier.verifier import Verifier


def docker(*arguments, text=None):
    """Runs a docker command."""
    return subprocess.run(["docker", *arguments], input=text, capture_output=True, text=True, check=False)


class Container:
    """What Verifier asks of an environment."""

    os = TaskOS.LINUX

    def __init__(self, image, python_path):
        self.name = docker("run", "-d", "--network=none", "-e", f"PYTHONPATH={python_path}", "-e", "PYTHONDONTWRITEBYTECODE=1", image,
                           "sleep", "3600").stdout.strip()

    def is_path_mounted(self, *_):
        """Nothing is."""
        return False

    async def exec(self, command, env=None, user=None, **_):
        """A command in the container."""
        given = [word for name, value in (env or {}).items() for word in ("-e", f"{name}={value}")]
        done = docker("exec", *given, self.name, "bash", "-c", command)
        return ExecResult(stdout=done.stdout, stderr=done.stderr, return_code=done.returncode)

    async def upload_dir(self, source_dir, target_dir):
        """Copies a folder in."""
        docker("exec", self.name, "mkdir", "-p", target_dir)
        docker("cp", f"{source_dir}/.", f"{self.name}:{target_dir}")

    async def download_dir(self, source_dir, target_dir):
        """Copies a folder out."""
        pathlib.Path(target_dir).mkdir(parents=True, exist_ok=True)
        docker("cp", f"{self.name}:{source_dir}/.", str(target_dir))


def reward(row):
    """What Harbor's verifier gives on a folder's starting state with a patch, or with its own solution."""
    task, container = Task(pathlib.Path(row["folder"])), Container(row["image"], row["python_path"])
    try:
        docker("exec", container.name, "mkdir", "-p", "/logs/verifier")
        if row["patch"] is None:
            docker("cp", f"{row['folder']}/solution", f"{container.name}:/solution")
            applied = docker("exec", container.name, "bash", "/solution/solve.sh")
        else:
            applied = docker("exec", "-i", "-w", "/testbed", container.name, "sh", "-c", "cat > /tmp/p; [ ! -s /tmp/p ] || git apply /tmp/p",
                             text=row["patch"])
        if applied.returncode:
            return f"the patch does not apply: {applied.stderr[-300:]}"
        with tempfile.TemporaryDirectory() as place:
            paths = TrialPaths(pathlib.Path(place))
            paths.verifier_dir.mkdir(parents=True, exist_ok=True)
            return asyncio.run(Verifier(task=task, trial_paths=paths, environment=container).verify()).rewards["reward"]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        docker("rm", "-f", "-v", container.name)


if __name__ == "__main__":
    rows = json.loads(pathlib.Path(sys.argv[1]).read_text())
    print(json.dumps({row["name"]: reward(row) for row in rows}))
