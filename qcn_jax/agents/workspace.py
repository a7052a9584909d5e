"""What tools act on: the files of one task, in memory or in a live sandbox, behind one interface.

`OverlayWorkspace` keeps edited files in memory and needs a sandbox only while tests run, which makes an episode of
view, edit and undo free; `SandboxWorkspace` acts on a sandbox that lives as long as the episode, which `bash` needs.
Both give the same files, test outcomes and final patch for the same edits.
"""

import dataclasses
import os
import pathlib
import posixpath
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from qcn_jax.envs.patches import make_diff
from qcn_jax.envs.sandbox.base import ExecResult, Provider, Sandbox, TestRun, sandbox
from qcn_jax.envs.tasks.grading import starting_changes
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.memo import Once

ROOT = "/testbed"  # where agents are told the repository is, as SWE-bench's images have it
_MAX_FILE_BYTES = 1_000_000

TestRunner = Callable[[Mapping[str, str | None], Sequence[str] | None, float, bool], TestRun]
"""(files that differ from the pristine repository, node ids or None for all, timeout, fail fast) -> TestRun."""


class WorkspaceError(Exception):
    """What the agent asked of its workspace cannot be done; `str(error)` is told to the agent."""


class Workspace(Protocol):
    """The files of a task as its agent sees them; paths are relative to the repository."""

    def read(self, path: str) -> str:
        """Text of a file; raises WorkspaceError where there is none."""

    def write(self, path: str, text: str | None) -> None:
        """Writes a file; None removes it."""

    def paths(self) -> list[str]:
        """All files but hidden ones, sorted."""

    def bash(self, command: str, timeout: float) -> ExecResult:
        """Runs a shell command in the repository; raises WorkspaceError where there is no shell."""

    def run_tests(self, node_ids: Sequence[str] | None, timeout: float, fail_fast: bool) -> TestRun:
        """Runs tests on the files as they are; None means the repository's whole suite."""

    def diff(self) -> str:
        """Unified diff from the task's starting state to the files as they are."""


class OverlayWorkspace:
    """Files in memory: the pristine repository, the task's defect over it, the agent's edits over that.

    Args:
      pristine: every text file of the repository (`read_tree`); shared between episodes, never changed.
      start: files that differ from `pristine` in the task's starting state (`grading.starting_changes`).
      runner: runs tests in a real sandbox.
    """

    def __init__(self, pristine: Mapping[str, str], start: Mapping[str, str | None], runner: TestRunner) -> None:
        self._pristine, self._start, self._runner = pristine, dict(start), runner
        self._edits: dict[str, str | None] = {}

    def _initial(self, path: str) -> str | None:
        return self._start[path] if path in self._start else self._pristine.get(path)

    def read(self, path: str) -> str:
        text = self._edits[path] if path in self._edits else self._initial(path)
        if text is None:
            raise WorkspaceError(f"{path}: no such file")
        return text

    def write(self, path: str, text: str | None) -> None:
        taken = self.paths()
        is_folder = path == "." or any(name.startswith(path + "/") for name in taken)
        if is_folder or not set(map(str, pathlib.PurePosixPath(path).parents)).isdisjoint(taken):
            raise WorkspaceError(f"{path}: cannot be written")
        self._edits[path] = text

    def paths(self) -> list[str]:
        layered = {**self._pristine, **self._start, **self._edits}
        return sorted(path for path, text in layered.items() if text is not None and "/." not in "/" + path)

    def bash(self, command: str, timeout: float) -> ExecResult:
        raise WorkspaceError("bash: not available here")

    def run_tests(self, node_ids: Sequence[str] | None, timeout: float, fail_fast: bool) -> TestRun:
        layers = {**self._start, **self._edits}
        changed = {path: text for path, text in layers.items() if text != self._pristine.get(path)}
        return self._runner(changed, node_ids, timeout, fail_fast)

    def snapshot(self) -> dict[str, str | None]:
        """What `restore` takes back to."""
        return dict(self._edits)

    def restore(self, state: Mapping[str, str | None]) -> None:
        """Makes the files what they were when `snapshot` gave `state`."""
        self._edits = dict(state)

    def diff(self) -> str:
        changed = [path for path in sorted(self._edits) if self._edits[path] != self._initial(path)]
        return make_diff({path: self._initial(path) for path in changed}, {path: self._edits[path] for path in changed})


@dataclasses.dataclass(frozen=True)
class ProviderRunner:
    """A TestRunner in this process: a fresh sandbox of `repository` for each run."""

    provider: Provider
    repository: str

    def __call__(
        self, changed: Mapping[str, str | None], node_ids: Sequence[str] | None, timeout: float, fail_fast: bool
    ) -> TestRun:
        with sandbox(self.provider, self.repository, changed) as fresh:
            return fresh.run_tests(node_ids, timeout, fail_fast)


class Remembering:
    """A TestRunner that runs the same tests on the same files once; for several episodes of one task."""

    def __init__(self, runner: TestRunner) -> None:
        self._runner, self._runs = runner, Once()

    def __call__(
        self, changed: Mapping[str, str | None], node_ids: Sequence[str] | None, timeout: float, fail_fast: bool
    ) -> TestRun:
        key = (tuple(sorted(changed.items())), None if node_ids is None else tuple(node_ids), timeout, fail_fast)
        return self._runs.get(key, lambda: self._runner(changed, node_ids, timeout, fail_fast))


class SandboxWorkspace:
    """Files in a live sandbox, which must hold the task's starting state and is not destroyed here."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def read(self, path: str) -> str:
        try:
            return self._sandbox.read(path)
        except (OSError, ValueError) as error:
            raise WorkspaceError(f"{path}: no such file") from error

    def write(self, path: str, text: str | None) -> None:
        if text is None:
            self._sandbox.exec(f"rm -f -- {shlex.quote(path)}", timeout=10)
            return
        try:
            self._sandbox.write(path, text)
        except (OSError, ValueError) as error:
            raise WorkspaceError(f"{path}: cannot be written") from error

    def paths(self) -> list[str]:
        found = self._sandbox.exec("find . -type f -not -path '*/.*' -not -name '*.pyc'", timeout=10)
        return sorted(line.removeprefix("./") for line in found.output.splitlines())

    def bash(self, command: str, timeout: float) -> ExecResult:
        return self._sandbox.exec(command, timeout=timeout)

    def run_tests(self, node_ids: Sequence[str] | None, timeout: float, fail_fast: bool) -> TestRun:
        return self._sandbox.run_tests(node_ids, timeout=timeout, fail_fast=fail_fast)

    def diff(self) -> str:
        return self._sandbox.diff()


def read_tree(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Every UTF-8 text file under `folder` by its relative path; hidden, compiled and huge files are left out."""
    tree = {}
    for directory, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith(".") and name != "__pycache__")
        for name in files:
            path = pathlib.Path(directory, name)
            if name.startswith(".") or path.is_symlink() or path.stat().st_size > _MAX_FILE_BYTES:
                continue
            try:
                text = path.read_bytes().decode()
            except UnicodeDecodeError:
                continue
            if "\0" not in text:
                tree[path.relative_to(folder).as_posix()] = text
    return tree


def open_overlay(task: Task, pristine: Mapping[str, str], runner: TestRunner) -> OverlayWorkspace:
    """`task`'s starting state in memory; raises UserError where its `bug_patch` does not fit `pristine`."""
    return OverlayWorkspace(pristine, starting_changes(task, pristine), runner)


def relative_path(path: str) -> str:
    """`path` as the agent wrote it, absolute under ROOT or relative, as a clean relative path.

    Raises:
      WorkspaceError: it is empty or leaves the repository.
    """
    clean = posixpath.normpath(path.strip() or "..")
    if clean == ROOT or clean.startswith(ROOT + "/"):
        clean = clean[len(ROOT) + 1 :] or "."
    if clean.startswith(("/", "..")) or "\0" in clean or "\n" in clean:
        raise WorkspaceError(f"{path[:100]!r}: not a path inside the repository")
    return clean
