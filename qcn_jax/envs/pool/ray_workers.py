"""One worker of the pool as an actor of a Ray cluster, for environments beyond one machine.

Actors take no share of the cluster's processors by themselves and are spread over its nodes; how many there are is the
pool's `workers`. A node that is lost takes its actors along: the pool tries their jobs again on new ones elsewhere. On
every node qcn_jax must be importable. Archives of repositories travel through Ray's object store, once for each node.
"""

import collections
import dataclasses
import hashlib
import os
import pathlib
import pickle
import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qcn_jax import files
from qcn_jax.envs.pool import worker
from qcn_jax.envs.pool.process import Job, module_path
from qcn_jax.envs.sandbox import repository
from qcn_jax.envs.sandbox.repository import RepositorySpec
from qcn_jax.errors import UserError

_FOLDER = "tree"  # a repository that is a folder travels as an archive with this folder at its top


def connect(address: str = "") -> Callable[[Mapping[str, Any]], "RayWorker"]:
    """Joins a cluster, if this process is in none, and returns what starts a worker there.

    Args:
      address: as `ray.init` takes it; by default RAY_ADDRESS, a cluster that runs here, or a new one of this machine.

    Raises:
      UserError: no cluster answers.
    """
    if not ray.is_initialized():
        try:
            ray.init(address=address or None, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            text = str(error).splitlines()[0]
            raise UserError(f"--config.ray_address={address}: no cluster answers: {text}") from error
    archives, places = _Archives(), _Places()
    return lambda provider_args: RayWorker(provider_args, archives, places)


class _Places:
    """How many workers each node has, so that a new one goes where there are fewest; safe for threads.

    A cluster takes a while to see that a node is gone, and its workers are lost at once: each that was lost since the
    node last answered counts as one that is there, so that only the first replacement is tried on the same node.
    """

    def __init__(self) -> None:
        self._lock, self._workers, self._lost = threading.Lock(), collections.Counter(), collections.Counter()

    def take(self) -> str:
        """The node of a new worker."""
        nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
        with self._lock:
            node = min(nodes, key=lambda name: (self._workers[name] + self._lost[name], self._workers[name]))
            self._workers[node] += 1
        return node

    def answered(self, node: str) -> None:
        """A worker of `node` did a job."""
        with self._lock:
            self._lost[node] = 0

    def give(self, node: str, lost: bool) -> None:
        """A worker of `node` is gone; `lost`: not because it was to end."""
        with self._lock:
            self._workers[node] -= 1
            self._lost[node] += lost


class _Archives:
    """Repositories' archives in the object store, each put there once; safe for threads."""

    def __init__(self) -> None:
        self._lock, self._known = threading.Lock(), {}

    def put(self, spec: RepositorySpec) -> tuple[str, Any]:
        """(name of the content, reference to it); the name of a folder's ends in _FOLDER."""
        with self._lock:
            if spec.archive not in self._known:
                source = pathlib.Path(spec.archive)
                folder = source.is_dir()
                data = repository.pack_folder(source, _FOLDER) if folder else source.read_bytes()
                name = hashlib.sha256(data).hexdigest() + (f".{_FOLDER}" if folder else "")
                self._known[spec.archive] = name, ray.put(data)
            return self._known[spec.archive]


class RayWorker:
    """A worker in an actor on the node that has fewest; methods as WorkerLine says."""

    def __init__(self, provider_args: Mapping[str, Any], archives: _Archives, places: _Places):
        self._archives, self._places, self._node = archives, places, places.take()
        try:
            home = ray.get_runtime_context().get_node_id()
            # Ray's own SPREAD leaves actors that ask for no resources together.
            self._actor = ray.remote(_Actor).options(
                num_cpus=0, max_restarts=0, max_task_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(self._node, soft=False),
                runtime_env={"env_vars": {"PYTHONPATH": module_path()}}).remote(dict(provider_args), home)
        except BaseException:
            places.give(self._node, lost=False)
            raise

    def run(self, job: Job) -> tuple[str, Any]:
        """As WorkerLine says."""
        try:
            message = pickle.dumps((job.number, job.kind, job.arguments))
            specs = [argument for argument in job.arguments if isinstance(argument, RepositorySpec)]
            shipped = {spec.name: self._archives.put(spec) for spec in specs}
        except Exception as error:
            return "error", (error, "the job cannot be sent to a worker")
        try:
            reply = ray.get(self._actor.run.remote(message, shipped), timeout=job.deadline)
            number, state, value = pickle.loads(reply)
        except ray.exceptions.GetTimeoutError:
            return "dead", f"job {job.kind} did not end in {job.deadline:.0f} s"
        except ray.exceptions.RayError as error:
            return "dead", f"a pool worker died ({' '.join(str(error).split())[:300]})"
        self._places.answered(self._node)
        return (state, value) if number == job.number else ("dead", "a pool worker answered another job")

    def abort(self) -> None:
        """As WorkerLine says."""
        ray.kill(self._actor)

    def kill(self) -> None:
        """As WorkerLine says."""
        self._places.give(self._node, lost=True)
        ray.kill(self._actor)

    def stop(self) -> None:
        """As WorkerLine says."""
        try:
            ray.get(self._actor.close.remote(), timeout=10.0)
        except ray.exceptions.RayError:
            pass  # it is gone already, or ends now
        self._places.give(self._node, lost=False)
        ray.kill(self._actor)


class _Actor:
    """What runs on a node."""

    def __init__(self, provider_args: dict[str, Any], home: str):
        self._worker = worker.Worker(provider_args)
        self._folder = pathlib.Path(provider_args["state_dir"], "archives")
        self._away = ray.get_runtime_context().get_node_id() != home

    def run(self, message: bytes, shipped: Mapping[str, tuple[str, Any]]) -> bytes:
        """Does a job; the reply is pool_worker's."""
        number, kind, arguments = pickle.loads(message)
        if self._away:  # the driver's paths say nothing here, even where they exist
            arguments = tuple(self._local(argument, *shipped[argument.name]) if isinstance(argument, RepositorySpec)
                              else argument for argument in arguments)
        return worker.execute(self._worker, number, kind, arguments)

    def _local(self, spec: RepositorySpec, name: str, reference: Any) -> RepositorySpec:
        """`spec` with its archive on this node."""
        path = self._folder / name
        if not path.exists():
            with files.atomic_open(path, "wb") as stream:
                stream.write(ray.get(reference))
            os.chmod(path, 0o600)  # holds the fix of every injected defect
        if name.endswith(_FOLDER):  # hashes are given for archives only
            return dataclasses.replace(spec, archive=str(path), sha256="", root=f"{_FOLDER}/{spec.root}".rstrip("/"))
        return dataclasses.replace(spec, archive=str(path))

    def close(self) -> None:
        """Ends all servers."""
        self._worker.close()
