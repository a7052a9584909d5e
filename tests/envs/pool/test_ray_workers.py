"""The pool on Ray: the same interface on a cluster of two nodes, one of which is killed on the way."""

import os
import sys
import time

import pytest

from qcn_jax import envs
from qcn_jax.envs.pool.env_pool import make_pool
from qcn_jax.envs.sandbox import RepositorySpec, SandboxError
from qcn_jax.errors import UserError
from tests.envs.pool import pool_jobs
from tests.sandboxes import BROKEN, CALC, FAILING, PASSING, SOURCE, make_provider, make_task, write_repository

ray = pytest.importorskip("ray", reason="not installed: ray")


@pytest.fixture(scope="module")
def cluster():
    """A head, where the driver is, and a second node."""
    from ray.cluster_utils import Cluster

    for last in (False, False, True):
        made = Cluster()
        try:
            made.add_node(num_cpus=1, include_dashboard=False, object_store_memory=80_000_000)
            made.second = made.add_node(num_cpus=1, object_store_memory=80_000_000)
            ray.init(address=made.address, log_to_driver=False, configure_logging=False)
            break
        except Exception:  # on a machine that is busy elsewhere Ray's own start runs out of its time
            ray.shutdown()
            made.shutdown()
            if last:
                raise
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(provider arguments, spec)."""
    folder = tmp_path_factory.mktemp("ray")
    spec = RepositorySpec("victim==1.2.3", str(write_repository(folder / "victim")))
    make_provider("local", folder / "state").close()  # or skip
    return {"kind": "local", "state_dir": str(folder / "state")}, spec


def test_refusals(monkeypatch):
    with pytest.raises(UserError, match="expected process or ray, got 'threads'"):
        make_pool("threads", 1, {})
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "qcn_jax.envs.pool.ray_workers", raising=False)
    monkeypatch.delattr(envs, "pool_ray", raising=False)
    with pytest.raises(UserError, match="Ray is not installed"):
        make_pool("ray", 1, {})


def test_same_interface_and_a_killed_node(cluster, place, tmp_path):
    arguments, spec = place
    with make_pool("ray", 2, arguments, [spec]) as pool:
        assert pool.describe()["kind"] == "local"
        (tmp_path / "1").mkdir()
        nodes = {future.result() for future in [pool.submit(pool_jobs.node, str(tmp_path / "1"), n, 2) for n in range(2)]}
        assert len(nodes) == 2  # workers are spread
        # Both prepare the repository; the archive comes to the second node through the object store.
        runs = [pool.run_tests(spec.name, {SOURCE: text}, FAILING) for text in (BROKEN, CALC) * 3]
        assert [run.result().outcome for run in runs] == ["failed", "passed"] * 3
        assert len(os.listdir(os.path.join(arguments["state_dir"], "archives"))) == 1
        task = make_task()
        assert pool.grade(task, task.patch).result().resolved
        assert pool.grade(task, task.bug_patch).result().outcome == "patch_failed"
        with pytest.raises(ZeroDivisionError) as caught:
            pool.submit(pool_jobs.divide, 0).result()
        assert "in divide" in str(caught.value.__cause__)
        with pool.open_session(spec.name, {SOURCE: BROKEN}) as session:
            session.write(SOURCE, CALC)
            assert session.run_tests(PASSING[:1]).result().passed(PASSING[:1])
        assert pool.submit(pool_jobs.die_once, str(tmp_path / "flag")).result() == "alive"
        (tmp_path / "2").mkdir()
        nodes = {future.result() for future in [pool.submit(pool_jobs.node, str(tmp_path / "2"), n, 2) for n in range(2)]}
        assert len(nodes) == 2  # the new worker is where the lost one was, whichever that is

        # The second node goes down under load: every result arrives once, and none is made up.
        failures = pool.counts["infrastructure_failures"]
        trace = tmp_path / "trace"
        futures = [pool.submit(pool_jobs.append_line, str(trace), number, 0.6) for number in range(12)]
        assert futures[0].result() == 0
        cluster.remove_node(cluster.second, allow_graceful=False)
        assert [future.result() for future in futures] == list(range(12))
        assert sorted(set(map(int, trace.read_text().split()))) == list(range(12))
        assert pool.counts["infrastructure_failures"] > failures
        assert pool.run_tests(spec.name, {SOURCE: CALC}, FAILING).result().passed(FAILING)
        (tmp_path / "3").mkdir()
        hanging = pool.submit(pool_jobs.hold, str(tmp_path / "3"), 0, 2)
        while not os.listdir(tmp_path / "3"):
            time.sleep(0.05)
        pool.close(grace=0.0)
        with pytest.raises(SandboxError):
            hanging.result()
