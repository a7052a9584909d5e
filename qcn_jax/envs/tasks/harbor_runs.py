"""Harbor's task folders of anybody: acted on in their images, graded by their own tests/test.sh, in Docker.

What counts of a container in which somebody acted are its files (synthesis/build/filesystem.py), put into a fresh
container of the image, where no program of theirs runs. /tests, /solution and /logs are the verifier's: the first two
come when nobody acts any more. A verdict is worth what the folder's tests are: they share a container with what they
test, as everywhere in Harbor.
"""

import io
import os
import pathlib
import tarfile
import tempfile
import time

import docker
import docker.errors

from qcn_jax import files
from qcn_jax.envs.patches import PatchError
from qcn_jax.envs.sandbox import images
from qcn_jax.envs.sandbox.base import ExecResult
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.synthesis.build import filesystem
from qcn_jax.envs.synthesis.build.container import ROOT, Bounds, Container
from qcn_jax.envs.tasks import harbor
from qcn_jax.envs.tasks.grading import INFRASTRUCTURE_ATTEMPTS
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.tasks.verdicts import Verdict
from qcn_jax.errors import UserError

CLOSED = ("tests", "solution", "logs", "proc", "sys", "dev")  # top folders of which nothing that was done counts
_LOGS = "/logs/verifier"
_REWARDS = (f"{_LOGS}/reward.json", f"{_LOGS}/reward.txt")
_RESOLVED = 1.0  # the reward from which a task is resolved
_SECONDS = 60.0  # for small commands


def image(client: docker.DockerClient, task: Task) -> str:
    """The id of a task's image: here, pulled, or built of its folder's Dockerfile, once.

    Raises:
      UserError: the folder is no task any more.
      SandboxError: it cannot be had.
    """
    try:
        return client.images.get(task.image_name).id
    except docker.errors.ImageNotFound:
        pass
    except (docker.errors.DockerException, OSError) as error:
        raise SandboxError(f"the engine does not answer: {str(error).splitlines()[0]}") from error
    folder = pathlib.Path(task.repo)
    if not files.is_file(folder / "environment" / "Dockerfile"):
        return images.base_image(client, task.image_name)
    found = harbor.read_folder(folder)
    if found.docker_image:
        try:
            return images.base_image(client, task.image_name)
        except SandboxError:
            pass  # Harbor builds what it cannot pull, when told to; the outcome is the same image
    try:
        built, _ = client.images.build(path=str(folder / "environment"), tag=task.image_name, rm=True, forcerm=True,
                                       timeout=round(found.build_seconds))
    except (docker.errors.DockerException, OSError, TypeError) as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise SandboxError(f"{folder}: environment/Dockerfile cannot be built: {words[-1][:300]}") from error
    return built.id


class Place:
    """A running container of a task's image, its working folder also found at /testbed, where agents look for it.

    Attributes:
      folder: the image's working folder.
    """

    def __init__(self, client: docker.DockerClient, task: Task, network: bool = False):
        self.task, self.found = task, harbor.read_folder(task.repo)
        name = image(client, task)
        self.folder = client.images.get(name).attrs["Config"].get("WorkingDir") or "/"
        bounds = Bounds(memory_mb=self.found.memory_mb, processes=1024, cpus=min(self.found.cpus, os.cpu_count() or 1))
        self.container = Container(client, name, network, bounds, scratch=False)
        try:
            self.container.exec(f"mkdir -p {_LOGS} /logs/agent /logs/artifacts; [ -e {ROOT} ] || ln -s {self.folder} "
                                f"{ROOT}", _SECONDS, "/")
            self._before = filesystem.listed(self.container)
        except BaseException:
            self.close()
            raise

    def changes(self) -> str:
        """What was done to the files, as a patch; raises PatchError where it is too large, SandboxError."""
        return filesystem.changes(self.container, self._before, CLOSED)

    def script(self, part: str, name: str, timeout: float) -> ExecResult:
        """Uploads a part of the task's folder to the root, and runs a script of it in the working folder."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.add(pathlib.Path(self.task.repo, part), part, filter=_roots)
        self.container.unpack(buffer.getvalue())
        path = f"/{part}/{name}"
        return self.container.exec(f"chmod +x {path}; {path}", timeout, self.folder)

    def close(self) -> None:
        """Removes the container."""
        self.container.destroy()

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _roots(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def solve(client: docker.DockerClient, task: Task, network: bool = False) -> str:
    """What the folder's solution/solve.sh does to the files, as a patch.

    Raises:
      UserError: there is none, or it takes too long.
      SandboxError: the engine failed.
    """
    if not files.is_file(pathlib.Path(task.repo, "solution", "solve.sh")):
        raise UserError(f"{task.repo}: solution/solve.sh is missing")
    with Place(client, task, network) as place:
        done = place.script("solution", "solve.sh", place.found.agent_seconds)
        if done.timed_out:
            raise UserError(f"solution/solve.sh takes longer than {place.found.agent_seconds:g} s")
        try:
            return place.changes()
        except PatchError as error:
            raise UserError(f"solution/solve.sh: {error}") from error


def grade(client: docker.DockerClient, task: Task, patch: str, timeout: float, network: bool = False,
          untouched: bool = False) -> Verdict:
    """The verdict of a task's own tests on a patch of its image's files; an engine that fails is asked again.

    Args:
      timeout: seconds; where the folder allows its tests less, that counts.
      network: the tests reach it, as those want that download what they run with.
      untouched: with no patch at all, instead of the verdict that it is empty.

    Raises:
      UserError: the folder is no task any more.
    """
    if not patch.strip() and not untouched:
        return Verdict(task.instance_id, "empty_patch")
    for attempt in range(INFRASTRUCTURE_ATTEMPTS):
        try:
            return _graded(client, task, patch, timeout, network)
        except SandboxError as error:
            last = str(error)
        if attempt < INFRASTRUCTURE_ATTEMPTS - 1:
            time.sleep(0.5 * 4**attempt)
    return Verdict(task.instance_id, "infrastructure", detail=last)


def _graded(client: docker.DockerClient, task: Task, patch: str, timeout: float, network: bool) -> Verdict:
    started = time.monotonic()
    with Place(client, task, network) as place:
        try:
            dropped = filesystem.apply(place.container, patch, CLOSED) if patch.strip() else {}
        except PatchError as error:
            return Verdict(task.instance_id, "patch_failed", detail=str(error))
        done = place.script("tests", "test.sh", min(timeout, place.found.verifier_seconds))
        reward, words = _reward(place.container)
    outcome = ("resolved" if reward is not None and reward >= _RESOLVED else
               "timeout" if done.timed_out else "out_of_memory" if done.out_of_memory else "unresolved")
    if reward is None:
        words += f"; the tests' last words: {' '.join(done.output.split())[-300:]}"
    groups = [list(task.FAIL_TO_PASS), []] if outcome == "resolved" else [[], list(task.FAIL_TO_PASS)]
    status = {"FAIL_TO_PASS": dict(zip(("success", "failure"), groups, strict=True)),
              "PASS_TO_PASS": {"success": [], "failure": []}}
    return Verdict(task.instance_id, outcome, status, time.monotonic() - started, dropped=dropped, detail=words)


def _reward(container: Container) -> tuple[float | None, str]:
    """The reward that the tests left, and it in words or why there is none."""
    with tempfile.TemporaryDirectory(prefix="qcn-reward-") as logs:
        for path, text in container.read(_REWARDS).items():
            files.write_text(pathlib.Path(logs, path.rpartition("/")[2]), text.encode("utf-8", "replace").decode())
        try:
            reward = harbor.read_reward(logs)
        except UserError as error:
            return None, f"the tests left no reward: {str(error).removeprefix(f'{logs}: ')}"
    return (None, "the tests left no reward") if reward is None else (reward, f"reward {reward:g}")


def problems(client: docker.DockerClient, task: Task, timeout: float, network: bool = False) -> str:
    """What is wrong with a task, "" where nothing is: its solution must resolve it, and nothing must not.

    Raises:
      SandboxError: the engine failed; nothing is said about the task.
    """
    found = []
    try:
        gold = grade(client, task, solve(client, task, network), timeout, network)
        nothing = grade(client, task, "", timeout, network, untouched=True)
    except UserError as error:
        return str(error)
    for verdict in (gold, nothing):
        if verdict.outcome == "infrastructure":
            raise SandboxError(verdict.detail)
    if not gold.resolved:
        more = "" if network else "; without a network, which --verifier_network gives solution and tests"
        found.append(f"its solution gives {gold.outcome} ({gold.detail or 'no file changes'}{more})")
    if nothing.resolved:
        found.append("without a patch it gives resolved")
    return "; ".join(found)
