"""A pool of processes in which sandboxes are driven, so that the trainer's process only waits.

Each worker has a provider and warm servers of its own; it is a process of this machine (`pool_process.py`) or, for
many machines, an actor of a Ray cluster (`pool_ray.py`), and nothing else differs. Jobs return futures; an
infrastructure failure (a dead worker, a sandbox that does not answer, a job past its deadline) is tried again and then
raised as SandboxError or returned as a Verdict with outcome "infrastructure": it is never a zero reward. Everything
else a job raises is raised unchanged.
"""

import collections
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from qcn_jax.envs.pool.process import Job, ProcessWorker, WorkerLine
from qcn_jax.envs.sandbox.base import STARVATION, Sandbox, TestRun
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.sandbox.repository import RepositorySpec
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.tasks.verdicts import Verdict, VerdictCache, verdict_key
from qcn_jax.errors import UserError

POOLS = ("process", "ray")
PREPARE_DEADLINE = 900.0  # the first use of a repository may build an image and run all its tests
DEADLINE_GRACE = 90.0  # beyond the time limits that are enforced inside the sandbox
CLOSE_GRACE = 60.0  # seconds that `close` lets running jobs go on before their workers are killed


class RemoteTraceback(Exception):
    """Cause of an exception that a job raised in a worker; its text is the traceback there."""


def make_pool(kind: str, workers: int, provider_args: Mapping[str, Any], *arguments: Any, ray_address: str = "",
              **keywords: Any) -> "EnvPool":
    """A pool of `kind` process (this machine) or ray (a cluster); further arguments are EnvPool's.

    Args:
      kind: one of POOLS.
      workers: of the whole pool.
      provider_args: keyword arguments of `make_provider`.
      ray_address: of a running cluster; by default that of the environment, or else a cluster of this machine alone.

    Raises:
      UserError: unknown kind, Ray is not installed, or no cluster answers at the address.
    """
    if kind == "process":
        return EnvPool(workers, provider_args, *arguments, **keywords)
    if kind == "ray":
        try:
            from qcn_jax.envs.pool import ray_workers
        except ImportError as error:
            raise UserError("--config.pool=ray: Ray is not installed; pip install 'qcn_jax[ray]'") from error
        return EnvPool(workers, provider_args, *arguments, start_worker=ray_workers.connect(ray_address), **keywords)
    raise UserError(f"--config.pool: expected {' or '.join(POOLS)}, got {kind!r}")


class EnvPool:
    """Workers that prepare repositories, run tests, grade patches and hold sandboxes of sessions.

    Args:
      workers: processes.
      provider_args: keyword arguments of `make_provider`.
      repositories: specs by the name that tasks use; more may be added by `register`.
      cache: file in which verdicts are kept between runs.
      attempts: how often a job is tried when the infrastructure fails.
      backlog: `submit` blocks while more jobs than this wait.
      start_worker: starts one worker, given `provider_args`.

    `counts` holds how the jobs ended: verdicts by outcome, test runs by outcome below "tests/", infrastructure failures
    that were tried again or given up.
    """

    def __init__(self, workers: int, provider_args: Mapping[str, Any], repositories: Iterable[RepositorySpec] = (),
                 cache: str | os.PathLike[str] | None = None, attempts: int = 3, backlog: int = 1024,
                 start_worker: Callable[[Mapping[str, Any]], WorkerLine] = ProcessWorker):
        self._start_worker = start_worker
        self._lines: list[WorkerLine | None] = [None] * workers
        self._provider_args, self._attempts, self._backlog = dict(provider_args), attempts, backlog
        self._provider_args["state_dir"] = os.path.abspath(self._provider_args.get("state_dir", ".cache/sandbox"))
        self._specs = {spec.name: spec for spec in repositories}
        self._cache = VerdictCache(cache)
        self._grading: dict[str, Future] = {}
        self._numbers = itertools.count()
        self._changed, self._choosing = threading.Condition(), threading.Lock()
        self._queue: collections.deque[Job] = collections.deque()
        self._pinned = [collections.deque() for _ in range(workers)]
        self._open = [0] * workers  # sessions per worker
        self._closing = False
        self.counts: collections.Counter[str] = collections.Counter()
        self._threads = [threading.Thread(target=self._drive, args=(index,), daemon=True, name=f"pool-{index}")
                         for index in range(workers)]
        for thread in self._threads:
            thread.start()

    # --- jobs

    def register(self, specs: Iterable[RepositorySpec]) -> None:
        """Makes repositories known by name."""
        self._specs.update({spec.name: spec for spec in specs})

    def describe(self) -> dict[str, str]:
        """The back end that the workers use: kind, description, reason; raises UserError where none can be had."""
        try:
            return self._submit("describe", (), PREPARE_DEADLINE).result()
        except SandboxError as error:
            raise UserError(str(error)) from error

    def prepare(self, spec: RepositorySpec) -> Future:
        """Prepares a repository; the future holds the TestRun of its pristine state."""
        self.register([spec])
        return self._submit("prepare", (spec,), PREPARE_DEADLINE)

    def run_tests(self, repository: str, overlay: Mapping[str, str | None], node_ids: Sequence[str] | None = None,
                  timeout: float = 30.0, fail_fast: bool = False, role: str = "agent") -> "Future[TestRun]":
        """Runs tests of a repository with `overlay` on top, in a sandbox of their own."""
        arguments = (self._specs[repository], dict(overlay), node_ids and list(node_ids), timeout, fail_fast, role)
        future = self._submit("run_tests", arguments, PREPARE_DEADLINE + STARVATION * timeout)
        future.add_done_callback(self._count_tests)
        return future

    def _count_tests(self, done: Future) -> None:
        if done.cancelled():
            return
        error = done.exception()
        outcome = done.result().outcome if error is None else \
            "infrastructure" if isinstance(error, SandboxError) else "error"
        with self._changed:
            self.counts[f"tests/{outcome}"] += 1

    def grade(self, task: Task, patch: str, fail_fast: bool = False, strict: bool = True) -> "Future[Verdict]":
        """The verdict on a patch. Known verdicts return at once; equal requests under way are answered together."""
        key = verdict_key(task, patch, fail_fast, strict)
        with self._changed:
            known, running = self._cache.get(key), self._grading.get(key)
            future: Future = Future()
            if known is not None:
                self.counts["cached"] += 1
                future.set_result(known)
                return future
            if running is None:
                self._grading[key] = future
        if running is not None:
            running.add_done_callback(lambda done: _copy(done, future))
            return future
        arguments = (self._specs[task.repo], task, patch, fail_fast, strict)
        deadline = PREPARE_DEADLINE + STARVATION * task.timeout
        self._submit("grade", arguments, deadline).add_done_callback(
            lambda done: self._graded(key, task.instance_id, done, future))
        return future

    def _graded(self, key: str, instance_id: str, done: Future, future: Future) -> None:
        if done.cancelled():
            with self._changed:
                del self._grading[key]
            future.cancel()
            return
        error = done.exception()
        if isinstance(error, SandboxError):
            verdict = Verdict(instance_id, "infrastructure", detail=str(error))
        elif error is None:
            verdict = done.result()
            self._cache.put(key, verdict)
        with self._changed:
            del self._grading[key]
            if error is None or isinstance(error, SandboxError):
                self.counts[verdict.outcome] += 1
        if error is None or isinstance(error, SandboxError):
            future.set_result(verdict)
        else:
            future.set_exception(error)

    def submit(self, function: Callable[..., Any], *arguments: Any, repository: str | None = None,
               deadline: float = 300.0) -> Future:
        """Runs `function(provider, *arguments)` in a worker; `function` must be importable there (a module's own).

        `repository` is prepared before. `deadline` is in seconds from when a worker takes the job.
        """
        spec = self._specs[repository] if repository is not None else None
        return self._submit("apply", (spec, function, arguments), deadline)

    def map(self, function: Callable[[Any], Future], items: Iterable[Any], ahead: int | None = None,
            progress: Callable[[int], None] | None = None) -> Iterator[Any]:
        """Yields results of `function(item)` (which returns a future) in order, with at most `ahead` under way."""
        ahead = ahead or 4 * len(self._threads)
        waiting: collections.deque[Future] = collections.deque()
        source, done = iter(items), 0
        while True:
            for item in itertools.islice(source, ahead - len(waiting)):
                waiting.append(function(item))
            if not waiting:
                return
            result = waiting.popleft().result()
            done += 1
            if progress is not None:
                progress(done)
            yield result

    def open_session(self, repository: str, overlay: Mapping[str, str | None],
                     before: str = "") -> "Session":
        """A sandbox that stays with one worker; calls on it may be batched, the first waits for its creation.

        Where agents have a network, releases of the repository from the date `before` on are withheld
        (policy.fix_date).
        """
        with self._changed:
            worker = min(range(len(self._open)), key=self._open.__getitem__)
            self._open[worker] += 1
        number = next(self._numbers)
        arguments = (self._specs[repository], number, dict(overlay), before)
        opened = self._submit("open", arguments, PREPARE_DEADLINE, worker, 1)
        return Session(self, worker, number, opened)

    def _submit(self, kind: str, arguments: tuple[Any, ...], deadline: float, worker: int | None = None,
                attempts: int | None = None) -> Future:
        job = Job(next(self._numbers), kind, arguments, Future(), deadline + DEADLINE_GRACE,
                   self._attempts if attempts is None else attempts)
        with self._changed:
            while not self._closing and worker is None and len(self._queue) >= self._backlog:
                self._changed.wait()
            if self._closing:
                raise RuntimeError("the pool is closed")
            (self._queue if worker is None else self._pinned[worker]).append(job)
            self._changed.notify_all()
        return job.future

    # --- life

    def cancel_pending(self) -> int:
        """Cancels what no worker has taken yet; returns how many jobs that were."""
        with self._changed:
            jobs, self._queue = list(self._queue), collections.deque()
            self._changed.notify_all()
        for job in jobs:
            job.future.cancel()
        return len(jobs)

    def close(self, grace: float = CLOSE_GRACE) -> None:
        """Cancels what waits, lets running jobs go on for `grace` seconds, ends all workers.

        A job that is still running then fails with SandboxError. `grace` 0 cancels everything at once.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self.cancel_pending()
        deadline = time.monotonic() + grace
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for thread, line in zip(self._threads, self._lines):
            if thread.is_alive() and line is not None:
                line.abort()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _next(self, index: int) -> Job | None:
        """The next job of a worker; None when the pool closes."""
        with self._changed:
            while True:
                for queue in (self._pinned[index], self._queue):
                    while queue:
                        job = queue.popleft()
                        self._changed.notify_all()
                        if self._closing:
                            job.future.cancel()
                        elif job.future.set_running_or_notify_cancel():
                            return job
                if self._closing:
                    return None
                self._changed.wait()

    def _drive(self, index: int) -> None:
        """A worker's thread: hands jobs to it, replaces it when it dies."""
        # A process ends with this thread (PR_SET_PDEATHSIG counts from the starting thread), so both live alike.
        while (job := self._next(index)) is not None:
            state, value = self._attempt(index, job)
            if state == "ok":
                job.future.set_result(value)
            elif state == "infrastructure":
                job.future.set_exception(SandboxError(value))
            else:
                error, trace = value
                error.__cause__ = RemoteTraceback(trace)
                job.future.set_exception(error)
        if self._lines[index] is not None:
            self._lines[index].stop()

    def _started(self) -> WorkerLine:
        """A new worker. The first one's choice of a back end holds for all: none falls back to another on its own."""
        with self._choosing:
            line = self._start_worker(self._provider_args)
            if self._provider_args.get("kind", "auto") == "auto":
                state, value = line.run(Job(-1, "describe", (), Future(), PREPARE_DEADLINE, 1))
                if state == "ok":
                    self._provider_args["kind"] = value["kind"]
            return line

    def _attempt(self, index: int, job: Job) -> tuple[str, Any]:
        """Tries a job until it is done or out of attempts; returns ok, error or infrastructure, and a value."""
        for attempt in range(job.attempts):
            try:
                if self._lines[index] is None:
                    self._lines[index] = self._started()
                state, value = self._lines[index].run(job)
            except Exception as error:  # whatever a cluster raises: the thread must live on
                state, value = "infrastructure", f"no worker can be started: {error}"
            if state == "dead":
                self._lines[index].kill()
                self._lines[index], state = None, "infrastructure"
            if state != "infrastructure":
                break
            with self._changed:
                self.counts["infrastructure_failures"] += 1
            if self._closing:
                break
            time.sleep(min(5.0, 0.2 * 4**attempt))
        return state, value


class Session:
    """A sandbox that lives in one worker."""

    def __init__(self, pool: EnvPool, worker: int, number: int, opened: Future):
        self._pool, self._worker, self._number, self._closed = pool, worker, number, False
        self.opened = opened  # raises SandboxError when the sandbox could not be made

    def call(self, function: Callable[..., Any], *arguments: Any, deadline: float = 300.0) -> Future:
        """Runs `function(sandbox, *arguments)` there; raises SandboxError when the worker was lost since."""
        return self._pool._submit("call", (self._number, function, arguments), deadline, self._worker, 1)

    def exec(self, command: str, timeout: float = 30.0) -> Future:
        """`Sandbox.exec`."""
        return self.call(Sandbox.exec, command, timeout, deadline=STARVATION * timeout)

    def read(self, path: str) -> Future:
        """`Sandbox.read`."""
        return self.call(Sandbox.read, path)

    def write(self, path: str, text: str) -> Future:
        """`Sandbox.write`."""
        return self.call(Sandbox.write, path, text)

    def run_tests(self, node_ids: Sequence[str] | None = None, timeout: float = 30.0,
                  fail_fast: bool = False) -> "Future[TestRun]":
        """`Sandbox.run_tests`."""
        return self.call(Sandbox.run_tests, node_ids, timeout, fail_fast, deadline=STARVATION * timeout)

    def diff(self) -> "Future[str]":
        """`Sandbox.diff`."""
        return self.call(Sandbox.diff)

    def close(self) -> None:
        """Destroys the sandbox, after the calls made before; does not wait."""
        if not self._closed:
            self._closed = True
            with self._pool._changed:
                self._pool._open[self._worker] -= 1
                closing = self._pool._closing
            if not closing:
                self._pool._submit("end", (self._number,), 30.0, self._worker, 1)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _copy(done: Future, future: Future) -> None:
    if done.cancelled():
        future.cancel()
    elif done.exception() is not None:
        future.set_exception(done.exception())
    else:
        future.set_result(done.result())
