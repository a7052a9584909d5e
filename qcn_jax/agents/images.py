"""Agents in the images of tasks that have one of their own: SWE-bench's instances, ours in other languages, Harbor's.

An agent is root in a container of the image, without a network, with the repository's history cut down to one commit;
what counts is the diff that it leaves, which is graded in other containers. In Harbor's folders there need be no
repository: what counts are all files of the container.
"""

import contextlib
import shlex
from collections.abc import Callable, Sequence

import docker

from qcn_jax.agents.scaffolds import Scaffold
from qcn_jax.agents.tools import ToolExecutor, ToolResult
from qcn_jax.agents.workspace import ROOT, WorkspaceError
from qcn_jax.chat.rendering import ToolCall
from qcn_jax.envs import patches
from qcn_jax.envs.patches import PatchError
from qcn_jax.envs.sandbox import images
from qcn_jax.envs.sandbox.base import ExecResult, TestRun
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.synthesis.build.container import Bounds, Container
from qcn_jax.envs.tasks import harbor_runs
from qcn_jax.envs.tasks.schema import FOLDER_GRADER, Task
from qcn_jax.errors import UserError

BOUNDS = Bounds(memory_mb=8192, processes=1024)  # as swebench gives its tests
_GIT = "git -c user.name=a -c user.email=a@b -c core.hooksPath=/dev/null -c core.fsmonitor= -c commit.gpgSign=false"
# One commit of what was tracked: no history to find the fix in, and a state to tell changes from.
_CUT = f"""
set -e
git ls-files -z >/tmp/tracked 2>/dev/null || find . -type f -not -path './.git/*' -print0 >/tmp/tracked
rm -rf .git
{_GIT} init -q
{_GIT} add -f --pathspec-from-file=/tmp/tracked --pathspec-file-nul
{_GIT} commit -q --allow-empty -m start
rm -f /tmp/tracked
{_GIT} rev-parse HEAD
"""
_SECONDS = 300.0  # for any of these
# SWE-bench's images put the environment of the tests into .bashrc; as mini-swe-agent's configuration for them does.
_ENVIRONMENT = {"BASH_ENV": "/root/.bashrc", "PAGER": "cat", "MANPAGER": "cat", "LESS": "-R"}


class ImageWorkspace:
    """A task's files in a container of its image; see agents.workspace.Workspace.

    Raises:
      UserError: the image is not here, or the task's defect does not fit it.
      SandboxError: the engine failed.
    """

    def __init__(self, client: docker.DockerClient, task: Task) -> None:
        image = images.base_image(client, task.image_name)
        self._container = Container(client, image, bounds=BOUNDS)
        try:
            if task.bug_patch:
                state = self._container.read(patches.touched(task.bug_patch))
                self._container.write(patches.apply_changes(state, task.bug_patch))
            cut = self._container.exec(_CUT, _SECONDS)
            if cut.exit_code:
                raise UserError(f"task {task.instance_id}: image {task.image_name} has no usable repository in {ROOT}: "
                                f"{' '.join(cut.output.split())[-200:]}")
            self._start = cut.output.split()[-1]
        except PatchError as error:
            self.close()
            raise UserError(f"task {task.instance_id}: bug_patch does not apply: {error}") from error
        except BaseException:
            self.close()
            raise

    def read(self, path: str) -> str:
        """Text of a file; raises WorkspaceError."""
        found = self._container.read({path})
        if path not in found:
            raise WorkspaceError(f"{path}: no such file")
        return found[path]

    def write(self, path: str, text: str | None) -> None:
        """Writes or removes a file; raises WorkspaceError."""
        try:
            self._container.write({path: text})
        except SandboxError as error:
            if not self._container.alive():
                raise
            raise WorkspaceError(f"{path}: cannot be written") from error

    def paths(self) -> list[str]:
        """All files but hidden ones."""
        found = self._container.exec("find . -xdev -type f -not -path '*/.*' -not -name '*.pyc'", _SECONDS)
        return sorted(line.removeprefix("./") for line in found.output.splitlines())

    def bash(self, command: str, timeout: float) -> ExecResult:
        """Runs a command in bash, where there is one."""
        quoted = shlex.quote(command)
        return self._container.exec(f"[ -x /bin/bash ] && exec /bin/bash -c {quoted}; exec sh -c {quoted}", timeout,
                                    env=_ENVIRONMENT)

    def run_tests(self, node_ids: Sequence[str] | None, timeout: float, fail_fast: bool) -> TestRun:
        """Raises WorkspaceError: how these tests run, images do not say."""
        raise WorkspaceError("not available here; run the tests in the shell")

    def diff(self) -> str:
        """Unified diff from the starting state; empty where the agent has destroyed the repository."""
        made = self._container.exec(f"{_GIT} add -A >/dev/null 2>&1; {_GIT} diff --cached --no-color --no-ext-diff "
                                    f"--no-textconv --no-renames {self._start}", _SECONDS)
        return made.output if made.exit_code == 0 else ""

    def close(self) -> None:
        """Removes the container."""
        with contextlib.suppress(SandboxError):
            self._container.destroy()


class FolderWorkspace(ImageWorkspace):
    """Files in a container of the image of one of Harbor's task folders, in the image's working folder.

    Raises:
      UserError: the folder is no task any more.
      SandboxError: the image cannot be had, or the engine failed.
    """

    def __init__(self, client: docker.DockerClient, task: Task) -> None:
        self._place = harbor_runs.Place(client, task)
        self._container = self._place.container

    def diff(self) -> str:
        """All changes of files as a patch; empty where they are too large for one."""
        try:
            return self._place.changes()
        except PatchError:
            return ""


class ImageExecutor:
    """Runs a scaffold's tools in a task's image; a container is started with the first calls."""

    def __init__(self, open_workspace: Callable[[], ImageWorkspace], executor: ToolExecutor) -> None:
        self._open, self._executor = open_workspace, executor
        self._workspace: ImageWorkspace | None = None

    def execute(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """As `ToolExecutor.execute`."""
        if self._workspace is None:
            self._workspace = self._executor.workspace = self._open()
        return self._executor.execute(calls)

    def diff(self) -> str:
        """As `ToolExecutor.diff`."""
        return self._workspace.diff() if self._workspace is not None else ""

    def close(self) -> None:
        """Removes the container."""
        if self._workspace is not None:
            self._workspace.close()


def opener(client: docker.DockerClient) -> Callable[[Task, Scaffold], ImageExecutor]:
    """What `Services.image` is, over an engine."""
    def open_executor(task: Task, scaffold: Scaffold) -> ImageExecutor:
        kind = FolderWorkspace if task.log_parser == FOLDER_GRADER else ImageWorkspace
        return ImageExecutor(lambda: kind(client, task), scaffold.executor(task, None))

    return open_executor
