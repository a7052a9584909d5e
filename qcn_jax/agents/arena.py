"""Tasks with everything that it takes to act on them and to grade what comes of it.

That is a pool of sandboxes, and Docker for tasks that have images of their own.
"""

import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qcn_jax import files
from qcn_jax.agents import image_tasks
from qcn_jax.agents.image_tasks import ImageTasks
from qcn_jax.agents.scaffolds import Scaffold
from qcn_jax.agents.services import Services, check_shell, pool_services
from qcn_jax.envs.pool.env_pool import EnvPool, make_pool
from qcn_jax.envs.sandbox import RepositorySpec, make_provider
from qcn_jax.envs.sandbox.base import TestRun
from qcn_jax.envs.synthesis import verify
from qcn_jax.envs.tasks import swebench
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.tasks.verdicts import Verdict
from qcn_jax.envs.web.judge import Judge
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
    verifier_network: bool = False  # of solutions and tests of Harbor's folders


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
    _images: ImageTasks | None

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
            found = threads.map(lambda name: self._images.check(self.tasks[name]), foreign)
            yield from zip(foreign, found, strict=True)


@contextlib.contextmanager
def open_arena(tasks: Mapping[str, Task], specs: Sequence[RepositorySpec], place: Place,
               instances: Mapping[str, swebench.Instance] | None = None, scaffold: Scaffold | None = None,
               judge: Judge | None = None) -> Iterator[Arena]:
    """Opens what it takes, and closes it.

    Args:
      tasks: by id.
      specs: their repositories, of those without images.
      place: where code runs.
      instances: SWE-bench's, by id; all tasks are then such.
      scaffold: of agents that will act; None where patches are only graded.
      judge: of pages; None has the checks of envs.web.judge alone.

    Raises:
      UserError: a back end that is asked for or needed is missing; the scaffold has a shell that nothing keeps in.
    """
    instances = instances or {}
    arguments = {"kind": place.sandbox, "isolation": place.isolation, "state_dir": str(files.cache_folder("sandbox")),
                 "network": place.network}
    with contextlib.ExitStack() as stack:
        services, pool, kind, images = _no_services(), None, "docker", None
        if specs or any(not task.eval_script for task in tasks.values()):
            pool = stack.enter_context(make_pool(place.pool, place.workers, arguments, specs,
                                                 ray_address=place.ray_address))
            kind = pool.describe()["kind"]  # or says why there is none
            provider = stack.enter_context(contextlib.closing(make_provider(**{**arguments, "kind": kind})))
            if scaffold is not None:
                check_shell(scaffold, provider, "--scaffold")
            services = pool_services({spec.name: spec for spec in specs}, provider, pool, False, judge)
        if any(task.eval_script for task in tasks.values()):
            if scaffold is not None:
                image_tasks.check_agent(scaffold, place.network, "--", "--scaffold")
            images = stack.enter_context(contextlib.closing(
                image_tasks.connect(instances, place.timeout, "--tasks", place.verifier_network)))
            services = images.services(services)
        yield Arena(tasks, instances, services, kind, place.workers, pool, images)


def _no_services() -> Services:
    def missing(*_: Any) -> Any:
        raise AssertionError("no task without an image")

    return Services(missing, missing, missing)
