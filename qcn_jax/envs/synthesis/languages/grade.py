"""Grading tasks that carry their own eval_script and image: a fresh container for every run, no network."""

import time
from collections.abc import Mapping

import docker
import docker.errors

from qcn_jax.envs import patches
from qcn_jax.envs.sandbox.base import TestRun
from qcn_jax.envs.synthesis.build import verifier
from qcn_jax.envs.synthesis.build.container import Container
from qcn_jax.envs.synthesis.languages import LANGUAGES
from qcn_jax.envs.synthesis.verify import Check
from qcn_jax.envs.tasks import verdicts
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.errors import UserError


def _run(container: Container, task: Task, changes: Mapping[str, str | None]) -> TestRun:
    container.write(changes)
    done = verifier.run(container, verifier.Verifier(task.eval_script, task.log_parser, task.timeout))
    return TestRun("timeout" if done.timed_out else "ok", done.outcomes, {}, done.seconds, done.log[-4000:], 0)


def _state(container: Container, task: Task, diff: str) -> dict[str, str]:
    """The files that a diff names, as they are in the container."""
    return container.read({path for path in patches.touched(diff)}) if diff else {}


def _start(container: Container, task: Task) -> dict[str, str | None]:
    bug = patches.apply_changes(_state(container, task, task.bug_patch), task.bug_patch) if task.bug_patch else {}
    container.write(bug)
    return bug


def grade(client: docker.DockerClient, task: Task, patch: str) -> verdicts.Verdict:
    """The verdict on a patch, in SWE-bench's semantics; what it changes besides sources is left out.

    Raises:
      UserError: the task's image is not here.
      SandboxError: the engine failed.
    """
    started = time.monotonic()
    speaks = LANGUAGES[task.language]
    with _container(client, task) as container:
        _start(container, task)
        try:
            changes = patches.apply_changes(_state(container, task, patch), patch) if patch.strip() else {}
        except patches.PatchError as error:
            return verdicts.Verdict(task.instance_id, "patch_failed", detail=str(error))
        kept = {path: text for path, text in changes.items() if speaks.is_source(path)}
        dropped = tuple(sorted(set(changes) - set(kept)))
        if not kept:
            return verdicts.Verdict(task.instance_id, "empty_patch", dropped=dropped)
        if task.test_patch:
            kept |= patches.apply_changes(_state(container, task, task.test_patch), task.test_patch)
        return verdicts.judge(task, _run(container, task, kept), dropped, seconds=time.monotonic() - started)


def verify(client: docker.DockerClient, task: Task, reruns: int = 0) -> Check:
    """Gold resolves, nothing does not; with `reruns`, flaky tests are named. Raises as `grade`."""
    started, problems = time.monotonic(), []
    verdict = grade(client, task, task.patch)
    if not verdict.resolved:
        problems.append(f"the gold patch gives {verdict.outcome}")
    with _container(client, task) as container:
        _start(container, task)
        runs = [_run(container, task, {}) for _ in range(1 + reruns)]
    passing = [name for name in task.FAIL_TO_PASS if runs[0].outcomes.get(name) == "passed"]
    broken = [name for name in task.PASS_TO_PASS if runs[0].outcomes.get(name) == "failed"]
    if passing or not task.FAIL_TO_PASS:
        problems.append(f"without a patch {passing[0]} of FAIL_TO_PASS passes" if passing else "FAIL_TO_PASS is empty")
    if broken:
        problems.append(f"without a patch {broken[0]} of PASS_TO_PASS fails")
    flaky = {}
    for name in (*task.FAIL_TO_PASS, *task.PASS_TO_PASS):
        count = sum(run.outcomes.get(name) == "passed" for run in runs)
        if 0 < count < len(runs):
            flaky[name] = f"{count} of {len(runs)} pass with the defect"
    return Check(task.instance_id, tuple(problems), round(time.monotonic() - started, 3), flaky)


def _container(client: docker.DockerClient, task: Task) -> Container:
    try:
        client.images.get(task.image_name)
    except docker.errors.ImageNotFound as error:
        raise UserError(f"task {task.instance_id}: image {task.image_name} is not here; qcn synthesize "
                        "--strategies=build builds it from the repository") from error
    return Container(client, task.image_name)
