"""Tasks with everything that it takes to act on them and to grade what comes of it.

That is a pool of sandboxes, and Docker for tasks that have images of their own.
"""

import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qcn_jax import files
from qcn_jax.agents.scaffolds import Scaffold
from qcn_jax.agents.services import Services, check_shell, pool_services
from qcn_jax.envs.pool.env_pool import EnvPool, make_pool
from qcn_jax.envs.sandbox import RepositorySpec, SandboxError, make_provider
from qcn_jax.envs.sandbox.base import TestRun
from qcn_jax.envs.synthesis import verify
from qcn_jax.envs.tasks import swebench
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.tasks.verdicts import Verdict
from qcn_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Place:
    """Where code runs; the flags of the same names."""

    sandbox: str = "auto"
    isolation: str = "container"
    pool: str = "process"
    ray_address: str = ""
    workers: int = 2
    timeout: float = swebench.TIMEOUT  # seconds of the tests of a SWE-bench instance
    network: str = "none"  # of agents with a shell (network.policy.NETWORKS)


@dataclasses.dataclass(frozen=True)
class Arena:
    """What `open_arena` opens.

    Attributes:
      tasks: by id; of SWE-bench's instances also `instances`.
      services: for episodes, gradings included.
      sandbox: kind of the sandboxes, docker or local.
      workers: gradings side by side.
    """

    tasks: Mapping[str, Task]
    instances: Mapping[str, swebench.Instance]
    services: Services
    sandbox: str
    workers: int
    _pool: EnvPool | None
    _client: Any
    _timeout: float

    def without(self, names: Sequence[str]) -> "Arena":
        """Without some tasks."""
        return dataclasses.replace(self, tasks={name: task for name, task in self.tasks.items() if name not in names})

    def prepare(self, spec: RepositorySpec) -> TestRun:
        """All tests of a repository as it is; raises SandboxError."""
        assert self._pool is not None  # opened with a repository
        return self._pool.prepare(spec).result()

    def grade_all(self, patches: Sequence[tuple[str, str]], progress: Callable[[], Any]) -> list[Verdict]:
        """Verdicts on (id, patch) pairs, in their order; a task that cannot be used gives infrastructure."""
        def one(pair: tuple[str, str]) -> Verdict:
            try:
                found = self.services.grade(self.tasks[pair[0]], pair[1])
            except UserError as error:
                found = Verdict(pair[0], "infrastructure", detail=str(error))
            progress()
            return found

        with concurrent.futures.ThreadPoolExecutor(4 * self.workers) as threads:
            return list(threads.map(one, patches))

    def check(self, names: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yields (id, what is wrong, "" where nothing is): the gold patch must resolve, and nothing must not.

        Raises:
          SandboxError: the sandboxes failed; nothing is said about the task.
        """
        ours = [self.tasks[name] for name in names if not self.tasks[name].eval_script]
        if ours:
            for found in verify.verify(self._pool, ours):
                yield found.instance_id, "; ".join(found.problems)
        foreign = [name for name in names if self.tasks[name].eval_script]
        with concurrent.futures.ThreadPoolExecutor(self.workers) as threads:
            yield from zip(foreign, threads.map(self._check_image, foreign), strict=True)

    def _check_image(self, name: str) -> str:
        if name not in self.instances:
            from qcn_jax.envs.synthesis.languages import grade

            return "; ".join(grade.verify(self._client, self.tasks[name]).problems)
        instance, problems = self.instances[name], []
        gold = self.tasks[name].patch
        for words, patch, nothing in (("the gold patch", gold, False), ("without a patch it", "", True)):
            verdict, _ = swebench.run(self._client, instance, patch, self._timeout, skip_patch=nothing)
            if verdict.outcome == "infrastructure":
                raise SandboxError(verdict.detail)
            if verdict.resolved == nothing:
                problems.append(f"{words} gives {verdict.outcome}")
        return "; ".join(problems)


@contextlib.contextmanager
def open_arena(tasks: Mapping[str, Task], specs: Sequence[RepositorySpec], place: Place,
               instances: Mapping[str, swebench.Instance] | None = None, scaffold: Scaffold | None = None
               ) -> Iterator[Arena]:
    """Opens what it takes, and closes it.

    Args:
      tasks: by id.
      specs: their repositories, of those without images.
      place: where code runs.
      instances: SWE-bench's, by id; all tasks are then such.
      scaffold: of agents that will act; None where patches are only graded.

    Raises:
      UserError: a back end that is asked for or needed is missing; the scaffold has a shell that nothing keeps in.
    """
    instances = instances or {}
    arguments = {"kind": place.sandbox, "isolation": place.isolation, "state_dir": str(files.cache_folder("sandbox")),
                 "network": place.network}
    with contextlib.ExitStack() as stack:
        services, pool, kind, client = _no_services(), None, "docker", None
        if specs or any(not task.eval_script for task in tasks.values()):
            pool = stack.enter_context(make_pool(place.pool, place.workers, arguments, specs,
                                                 ray_address=place.ray_address))
            kind = pool.describe()["kind"]  # or says why there is none
            provider = stack.enter_context(contextlib.closing(make_provider(**{**arguments, "kind": kind})))
            if scaffold is not None:
                check_shell(scaffold, provider, "--scaffold")
            services = pool_services({spec.name: spec for spec in specs}, provider, pool, fail_fast=False)
        if any(task.eval_script for task in tasks.values()):
            client = _engine(instances, place)
            services = _with_images(services, client, instances, place, scaffold)
        yield Arena(tasks, instances, services, kind, place.workers, pool, client, place.timeout)


def _no_services() -> Services:
    def missing(*_: Any) -> Any:
        raise AssertionError("no task without an image")

    return Services(missing, missing, missing)


def _engine(instances: Mapping[str, swebench.Instance], place: Place) -> Any:
    from qcn_jax.envs.sandbox import docker as back_end
    from qcn_jax.envs.sandbox import images
    from qcn_jax.envs.synthesis.build.container import engine

    try:
        client = images.engine(timeout=place.timeout + 120) if instances else engine()
        back_end.remove_leftovers(client)
        return client
    except SandboxError as error:
        raise UserError(f"--tasks: tasks with images of their own need Docker: {error}") from error


def _with_images(services: Services, client: Any, instances: Mapping[str, swebench.Instance], place: Place,
                 scaffold: Scaffold | None) -> Services:
    from qcn_jax.agents.images import opener
    from qcn_jax.envs.synthesis.languages import grade as languages

    if scaffold is not None and place.network != "none":
        raise UserError(f"--network={place.network}: agents in tasks' own images have no network; leave it out, or "
                        "these tasks")
    if scaffold is not None and not scaffold.has_shell:
        raise UserError(f"--scaffold: {scaffold.name!r}; tasks with images of their own need one with a shell, such as "
                        "mini_swe_agent or swe_agent")

    def grade(task: Task, patch: str) -> Verdict:
        if not task.eval_script:
            return services.grade(task, patch)
        if task.instance_id in instances:
            return swebench.run(client, instances[task.instance_id], patch, place.timeout)[0]
        try:
            return languages.grade(client, task, patch)
        except SandboxError as error:  # with the patch and without it
            return Verdict(task.instance_id, "infrastructure", detail=str(error))

    return dataclasses.replace(services, grade=grade, image=opener(client))
