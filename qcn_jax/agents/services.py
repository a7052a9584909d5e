"""What episodes need from outside: files, test runs and gradings, each done once however often it is asked for."""

import dataclasses
import functools
import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence

from qcn_jax.agents.episode import Episode, Executor
from qcn_jax.agents.guard import Guard, rules_for
from qcn_jax.agents.scaffolds import Scaffold
from qcn_jax.agents.sessions import SessionExecutor
from qcn_jax.agents.workspace import ProviderRunner, open_overlay
from qcn_jax.envs.network.policy import fix_date
from qcn_jax.envs.pool.env_pool import EnvPool, Session
from qcn_jax.envs.sandbox.base import Provider, TestRun
from qcn_jax.envs.sandbox.repository import RepositorySpec
from qcn_jax.envs.tasks.grading import Grader, starting_changes
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.tasks.verdicts import Verdict
from qcn_jax.envs.web import viewing
from qcn_jax.envs.web.judge import Judge, Review
from qcn_jax.errors import UserError
from qcn_jax.memo import Once

VIEWING_SECONDS = 3600.0  # for the screenshots or the review of a page, judge included


@dataclasses.dataclass(frozen=True)
class Services:
    """What episodes need from outside, each function callable from many threads at once.

    files: repository name -> its pristine text files.
    run_tests: (repository, changed files, node ids, timeout, fail fast) -> TestRun.
    grade: (task, patch) -> Verdict, in a fresh sandbox.
    open: task -> a live sandbox in the task's starting state, for agents with a shell; the caller closes it.
    network: what that sandbox reaches (network.policy.NETWORKS).
    image: (task, scaffold) -> what runs tools in the image of a task that has one of its own (agents.images).
    review: (task, patch) -> how a task's page looks and behaves with a patch (envs.web.judge).
    screenshots: (task, patch) -> PNGs of a task's page with its defect, and with a patch.
    """

    files: Callable[[str], Mapping[str, str]]
    run_tests: Callable[[str, Mapping[str, str | None], Sequence[str] | None, float, bool], TestRun]
    grade: Callable[[Task, str], Verdict]
    open: Callable[[Task], Session] | None = None
    network: str = "none"
    image: Callable[[Task, Scaffold], Executor] | None = None
    review: Callable[[Task, str], Review] | None = None
    screenshots: Callable[[Task, str], tuple[bytes, bytes]] | None = None

    def episode(self, task: Task, scaffold: Scaffold, max_turns: int) -> Episode:
        """A new episode on `task`; whoever plays it closes its executor.

        Files live in memory, and only test runs go to sandboxes; where the scaffold has a shell they live in a sandbox
        of the episode's own, and a guard looks at every call.
        """
        max_turns = 1 if scaffold.single_turn else max_turns
        if self.image is not None and task.eval_script:
            return Episode(task, scaffold, self.image(task, scaffold), max_turns=max_turns, guard=Guard())
        if scaffold.has_shell:
            live = SessionExecutor(functools.partial(self.open, task), scaffold.executor(task, None))
            return Episode(task, scaffold, live, max_turns=max_turns, guard=Guard(rules_for(self.network)))
        runner = functools.partial(self.run_tests, task.repo)
        workspace = open_overlay(task, self.files(task.repo), runner)
        return Episode(task, scaffold, scaffold.executor(task, workspace), max_turns=max_turns)

    def remembering(self) -> "Services":
        """The same services, every test run and grading done once; only clean results are remembered."""
        # The samples of a prompt often agree; a run that failed for reasons of its own is tried again.
        runs = Once(lambda run: run.status in ("ok", "timeout"))
        verdicts = Once(lambda verdict: verdict.outcome != "infrastructure")

        def run_tests(repo, changed, node_ids, timeout, fail_fast):
            key = (repo, _digest(changed), None if node_ids is None else tuple(node_ids), fail_fast)
            return runs.get(key, lambda: self.run_tests(repo, changed, node_ids, timeout, fail_fast))

        def grade(task, patch):
            return verdicts.get((task.instance_id, patch), lambda: self.grade(task, patch))

        review = self.review
        if review is not None:
            reviews, ask = Once(lambda found: True), review
            review = lambda task, patch: reviews.get((task.instance_id, patch), lambda: ask(task, patch))
        return dataclasses.replace(self, run_tests=run_tests, grade=grade, review=review)


def _digest(changed: Mapping[str, str | None]) -> str:
    return hashlib.sha256(json.dumps(sorted(changed.items())).encode()).hexdigest()


def provider_services(provider: Provider) -> Services:
    """Services that use `provider` in this process, one job at a time."""
    grader, lock = Grader(provider, fail_fast=True), threading.Lock()

    def run_tests(repo, changed, node_ids, timeout, fail_fast):
        with lock:
            return ProviderRunner(provider, repo)(changed, node_ids, timeout, fail_fast)

    def grade(task, patch):
        with lock:
            return grader.grade(task, patch)

    return Services(provider.files, run_tests, grade)


def check_shell(scaffold: Scaffold, provider: Provider, field: str) -> None:
    """Raises UserError, which begins with `field`, where a scaffold runs commands and the sandbox refuses them."""
    if scaffold.has_shell and not provider.commands_allowed:
        raise UserError(f"{field}: {scaffold.name!r}; runs shell commands, which this sandbox cannot keep in "
                        f"({provider.describe()}); use docker, or a scaffold without a shell, such as nano")


def pool_services(repositories: Mapping[str, RepositorySpec], provider: Provider, pool: EnvPool,
                  fail_fast: bool = True, judge: Judge | None = None) -> Services:
    """Services whose test runs and gradings go to `pool`'s workers, every one done once.

    Args:
      repositories: by the name that tasks use.
      provider: only reads their pristine files in this process.
      pool: of environment workers.
      fail_fast: gradings end with the first failing test, which is enough for rewards.
      judge: of pages; None has the checks of envs.web.judge alone.
    """
    pool.register(repositories.values())
    prepared, lock = {}, threading.Lock()

    def pristine(repo):
        with lock:  # a thread for every open conversation may ask for the same repository at once
            if repo not in prepared:
                prepared[repo] = provider.prepare(repositories[repo]).files
            return prepared[repo]

    services = Services(
        files=pristine,
        run_tests=lambda *arguments: pool.run_tests(*arguments).result(),
        grade=lambda task, patch: pool.grade(task, patch, fail_fast=fail_fast).result(),
        open=lambda task: pool.open_session(task.repo, starting_changes(task, pristine(task.repo)), fix_date(task)),
        network=provider.network,
        review=lambda task, patch: pool.submit(viewing.review_patch, task, patch, judge, repository=task.repo,
                                               deadline=VIEWING_SECONDS).result(),
        screenshots=lambda task, patch: pool.submit(viewing.screenshots, task, patch, repository=task.repo,
                                                    deadline=VIEWING_SECONDS).result(),
    )
    return services.remembering()
