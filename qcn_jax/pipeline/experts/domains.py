"""Domains that experts are trained in: how a task becomes a prompt, and what its reward is.

  swe          several turns with tools in a sandbox; tests decide
  single_turn  the function is in the prompt, the answer is one edit; tests decide
  tool_format  as single_turn, the answer in the tool-call template that the prompt names

An episode's files live in memory; only test runs and gradings go to sandboxes, through `Services`.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from qcn_jax.agents.episode import EndReason, Episode
from qcn_jax.envs.tasks.grading import Grader, Verdict
from qcn_jax.agents.guard import Guard
from qcn_jax.envs.sandbox.base import Provider, TestRun
from qcn_jax.agents.scaffolds import SCAFFOLDS, Scaffold
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.agents.tools import ToolExecutor
from qcn_jax.agents.workspace import ProviderRunner, open_overlay
from qcn_jax.chat.encoder import ChatEncoder
from qcn_jax.pipeline.rl.rewards import format_outcome, task_outcome
from qcn_jax.pipeline.rl.rollout import Outcome, Reply

if TYPE_CHECKING:
    from qcn_jax.envs.pool.env_pool import EnvPool
    from qcn_jax.envs.sandbox.repository import RepositorySpec
    from qcn_jax.pipeline.context import StageContext

T = TypeVar("T")
DOMAINS = ("swe", "single_turn", "tool_format")


class Once:
    """Computes the value of a key once, however many threads ask for it at the same time.

    The samples of a prompt often agree; their tests need to run only once. A value that `keep` refuses (a run
    that failed for reasons of its own) is given to those who wait for it, and computed again for the next. The
    oldest values are forgotten where there are more than `limit`.
    """

    def __init__(self, keep: Callable[[Any], bool] = lambda value: True, limit: int = 4096) -> None:
        self._keep, self._limit = keep, limit
        self._lock = threading.Lock()
        self._values: dict[Any, concurrent.futures.Future[Any]] = {}
        self.asked = self.computed = 0

    def get(self, key: Any, compute: Callable[[], T]) -> T:
        """The value of `key`; `compute()` if nobody has, or is about to have, it."""
        with self._lock:
            self.asked += 1
            future = self._values.get(key)
            mine = future is None
            if future is None:
                self.computed += 1
                future = self._values[key] = concurrent.futures.Future()
                if len(self._values) > self._limit:
                    del self._values[next(iter(self._values))]  # whoever waits for it holds the future itself
        if mine:
            try:
                value = compute()
            except BaseException as error:
                self._forget(key, future)
                future.set_exception(error)
                raise
            if not self._keep(value):
                self._forget(key, future)
            future.set_result(value)
        return future.result()

    def _forget(self, key: Any, future: concurrent.futures.Future[Any]) -> None:
        with self._lock:
            if self._values.get(key) is future:
                del self._values[key]


@dataclasses.dataclass(frozen=True)
class Services:
    """What episodes need from outside, each function callable from many threads at once.

    files: repository name -> its pristine text files.
    run_tests: (repository, changed files, node ids, timeout, fail fast) -> TestRun.
    grade: (task, patch) -> Verdict, in a fresh sandbox.
    """

    files: Callable[[str], Mapping[str, str]]
    run_tests: Callable[[str, Mapping[str, str | None], Sequence[str] | None, float, bool], TestRun]
    grade: Callable[[Task, str], Verdict]

    def remembering(self) -> "Services":
        """The same services, every test run and grading done once; only clean results are remembered."""
        runs = Once(lambda run: run.status in ("ok", "timeout"))
        verdicts = Once(lambda verdict: verdict.outcome != "infrastructure")

        def run_tests(repo, changed, node_ids, timeout, fail_fast):
            key = (repo, _digest(changed), None if node_ids is None else tuple(node_ids), fail_fast)
            return runs.get(key, lambda: self.run_tests(repo, changed, node_ids, timeout, fail_fast))

        def grade(task, patch):
            return verdicts.get((task.instance_id, patch), lambda: self.grade(task, patch))

        return Services(self.files, run_tests, grade)


def _digest(changed: Mapping[str, str | None]) -> str:
    return hashlib.sha256(json.dumps(sorted(changed.items())).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A task as one domain presents it."""

    domain: str
    task: Task
    template: str = ""  # of domain tool_format

    @property
    def scaffold(self) -> Scaffold:
        """How the task is presented and answered."""
        return _scaffold(self.domain, self.template)


@functools.cache
def _scaffold(domain: str, template: str) -> Scaffold:
    scaffold = SCAFFOLDS.resolve("nano")
    if domain == "tool_format":
        return scaffold.in_template(template)
    return scaffold if domain == "swe" else scaffold.single()


def make_prompts(domain: str, tasks: Sequence[Task], templates: Sequence[str] = ()) -> list[Prompt]:
    """Prompts of `domain`, one a task; those of `tool_format` take the templates in turn."""
    if domain != "tool_format":
        return [Prompt(domain, task) for task in tasks]
    return [Prompt(domain, task, templates[index % len(templates)]) for index, task in enumerate(tasks)]


class TaskConversation:
    """An episode on a task, in tokens; see pipeline.rl.rollout.Conversation."""

    def __init__(
        self, prompt: Prompt, encoder: ChatEncoder, services: Services, *, max_turns: int, unfinished_penalty: float,
        judged: bool = True,
    ) -> None:  # fmt: skip
        """Args:
          prompt: what to work on.
          encoder: text to tokens and back.
          services: sandboxes.
          max_turns: of the policy, in domains of several turns.
          unfinished_penalty: see `rewards.task_outcome`.
          judged: False where nobody asks for the reward, which saves the grading; every outcome is then 0.
        """
        self._judged = judged
        self._prompt, self._encoder, self._services = prompt, encoder, services
        self._max_turns = 1 if prompt.scaffold.single_turn else max_turns
        self._penalty = unfinished_penalty
        self._refuted: set[str] = set()  # patches on which tests failed

    @functools.cached_property
    def episode(self) -> Episode:
        """Made when first needed: a run holds far more prompts than open episodes."""
        task, scaffold, services = self._prompt.task, self._prompt.scaffold, self._services
        runner = functools.partial(services.run_tests, task.repo)
        workspace = open_overlay(task, services.files(task.repo), runner)
        executor = ToolExecutor(task, scaffold.tools, workspace, output_limit=scaffold.output_limit)
        guard = Guard() if scaffold.has_shell else None
        return Episode(task, scaffold, executor, max_turns=self._max_turns, guard=guard)

    def opening(self) -> list[int]:
        """The prompt, up to where the assistant begins."""
        return self._encoder.encode_prompt(self.episode.messages, self._prompt.scaffold.schemas())

    def reply(self, tokens: list[int], stopped: bool) -> Reply:
        """Executes the turn's calls; a turn that its own end token did not close is not executed."""
        closed = stopped and tokens[-1] == self._encoder.end
        text = self._encoder.tokenizer.decode(tokens[:-1] if stopped else tokens)
        observation = self.episode.step(text, complete=closed)
        run = self.episode.turns[-1].tests
        refuted = run is not None and not run.passed
        patch = self.episode.executor.diff() if refuted else ""
        repeated = refuted and patch in self._refuted
        self._refuted.add(patch)
        answer = () if observation.done else self._encoder.encode_turn(observation.messages, closed)
        return Reply(answer, observation.done, observation.malformed, refuted, repeated)

    def outcome(self, truncated: bool) -> Outcome:
        """Grades the patch."""
        if truncated:
            self.episode.end(EndReason.LENGTH_LIMIT)
        result = self.episode.result()
        broken = result.reason is EndReason.INFRASTRUCTURE
        if not self._judged:
            return Outcome(0.0, False, result.reason is EndReason.SUBMITTED, infrastructure=broken)
        verdict = None if broken else self._services.grade(self._prompt.task, result.patch)
        if self._prompt.domain == "tool_format":
            return format_outcome(result, verdict)
        return task_outcome(result, verdict, self._penalty)


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


def make_services(context: "StageContext") -> Services:
    """Services of a run."""
    return pool_services(context.repositories(), context.provider(), context.pool())


def pool_services(repositories: Mapping[str, "RepositorySpec"], provider: Provider, pool: "EnvPool") -> Services:
    """Services whose test runs and gradings go to `pool`'s workers, every one done once.

    `provider` only reads the pristine files of `repositories` (by the name that tasks use) in this process.
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
        grade=lambda task, patch: pool.grade(task, patch, fail_fast=True).result(),
    )
    return services.remembering()
