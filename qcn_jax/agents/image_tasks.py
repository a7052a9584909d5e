"""Tasks that have images of their own: who checks and grades them there, and lets agents act in them.

SWE-bench's instances (release 5) are graded by that set's rules, tasks of ours in other languages by ours, and Harbor's
folders (Terminal-Bench) by their own tests.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qcn_jax.agents.scaffolds import Scaffold
from qcn_jax.agents.services import Services
from qcn_jax.envs.sandbox import SandboxError
from qcn_jax.envs.tasks import swebench
from qcn_jax.envs.tasks.schema import FOLDER_GRADER, Task
from qcn_jax.envs.tasks.verdicts import Verdict
from qcn_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ImageTasks:
    """What `connect` opens.

    Attributes:
      client: of the Docker engine.
      instances: SWE-bench's among the tasks, by id.
      timeout: seconds of an instance's tests.
      verifier_network: whether solutions and tests of Harbor's folders reach the network.
    """

    client: Any
    instances: Mapping[str, swebench.Instance]
    timeout: float
    verifier_network: bool = False

    def image_fault(self, task: Task) -> str:
        """Why a task's image cannot be had here; "" where it can."""
        from qcn_jax.envs.sandbox import images
        from qcn_jax.envs.tasks import harbor_runs

        try:
            if task.log_parser == FOLDER_GRADER:
                harbor_runs.image(self.client, task)
            else:
                images.base_image(self.client, task.image_name)
        except (UserError, SandboxError) as error:
            return str(error)
        return ""

    def grade(self, task: Task, patch: str) -> Verdict:
        """The verdict on a patch; an engine that fails makes it infrastructure."""
        from qcn_jax.envs.synthesis.languages import grade as languages
        from qcn_jax.envs.tasks import harbor_runs

        if task.log_parser == FOLDER_GRADER:
            return harbor_runs.grade(self.client, task, patch, self.timeout, self.verifier_network)
        if task.instance_id in self.instances:
            return swebench.run(self.client, self.instances[task.instance_id], patch, self.timeout)[0]
        try:
            return languages.grade(self.client, task, patch)
        except SandboxError as error:  # with the patch and without it
            return Verdict(task.instance_id, "infrastructure", detail=str(error))

    def check(self, task: Task) -> str:
        """What is wrong with a task, "" where nothing is: the gold patch must resolve it, and nothing must not.

        Raises:
          SandboxError: the engine failed; nothing is said about the task.
        """
        if task.log_parser == FOLDER_GRADER:
            from qcn_jax.envs.tasks import harbor_runs

            return harbor_runs.problems(self.client, task, self.timeout, self.verifier_network)
        if task.instance_id not in self.instances:
            from qcn_jax.envs.synthesis.languages import grade

            return "; ".join(grade.verify(self.client, task).problems)
        instance, problems = self.instances[task.instance_id], []
        for words, patch, nothing in (("the gold patch", task.patch, False), ("without a patch it", "", True)):
            verdict, _ = swebench.run(self.client, instance, patch, self.timeout, skip_patch=nothing)
            if verdict.outcome == "infrastructure":
                raise SandboxError(verdict.detail)
            if verdict.resolved == nothing:
                problems.append(f"{words} gives {verdict.outcome}")
        return "; ".join(problems)

    def services(self, others: Services) -> Services:
        """Services for tasks with and without images, the latter as `others` do; every grading is done once."""
        from qcn_jax.agents.images import opener

        known = dataclasses.replace(others, grade=self.grade).remembering()

        def grade(task: Task, patch: str) -> Verdict:
            return (known if task.eval_script else others).grade(task, patch)

        return dataclasses.replace(others, grade=grade, image=opener(self.client))

    def close(self) -> None:
        """Closes the connection."""
        self.client.close()


def connect(instances: Mapping[str, swebench.Instance], timeout: float, field: str,
            verifier_network: bool = False) -> ImageTasks:
    """Connects to the engine, and removes what crashed runs have left there.

    Raises:
      UserError: there is none; `field` names the tasks that need it.
    """
    from qcn_jax.envs.sandbox import docker as back_end
    from qcn_jax.envs.sandbox import images
    from qcn_jax.envs.synthesis.build.container import engine

    try:
        client = images.engine(timeout=timeout + 120) if instances else engine()
        back_end.remove_leftovers(client)
    except SandboxError as error:
        raise UserError(f"{field}: tasks with images of their own need Docker: {error}") from error
    return ImageTasks(client, instances, timeout, verifier_network)


def check_agent(scaffold: Scaffold, network: str, prefix: str, field: str) -> None:
    """Raises UserError where a scaffold or its network has no place in an image; flags are `prefix` and a name."""
    if network != "none":
        raise UserError(f"{prefix}network={network}: agents in tasks' own images have no network; leave it out, or "
                        "these tasks")
    if not scaffold.has_shell:
        raise UserError(f"{field}: {scaffold.name!r}; tasks with images of their own need one with a shell, such as "
                        "mini_swe_agent or swe_agent")
