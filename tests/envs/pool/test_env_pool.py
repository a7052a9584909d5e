"""The pool: jobs, sessions, order, back-pressure, failures of workers, and what is left when its owner is killed."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.sandbox import RepositorySpec, SandboxError
from tests.envs.pool import pool_jobs
from tests.sandboxes import BROKEN, CALC, FAILING, PASSING, SOURCE, make_provider, make_task, write_repository


@pytest.fixture(scope="module", params=["local", pytest.param("docker", marks=pytest.mark.docker)])
def place(request, tmp_path_factory):
    """(provider arguments, spec) with everything prepared."""
    folder = tmp_path_factory.mktemp(f"pool-{request.param}")
    spec = RepositorySpec("victim==1.2.3", str(write_repository(folder / "victim")))
    with make_provider(request.param, folder / "state") as provider:
        provider.prepare(spec)
    return {"kind": request.param, "state_dir": str(folder / "state")}, spec


@pytest.fixture(scope="module")
def pool(place):
    """A pool of two workers."""
    arguments, spec = place
    with EnvPool(2, arguments, [spec]) as made:
        yield made


def test_jobs(pool, place):
    arguments, spec = place
    assert pool.describe()["kind"] == arguments["kind"]
    assert len(pool.prepare(spec).result().outcomes) == 8
    assert not pool.run_tests(spec.name, {SOURCE: BROKEN}, FAILING).result().passed(FAILING)
    assert pool.run_tests(spec.name, {}, FAILING).result().passed(FAILING)
    assert "jax" not in pool.submit(pool_jobs.imported_modules).result()


def test_grading_is_cached_and_shared(pool):
    task = make_task()
    before = pool.counts["resolved"]
    futures = [pool.grade(task, task.patch) for _ in range(6)]
    assert all(future.result().resolved for future in futures) and pool.counts["resolved"] == before + 1
    assert pool.grade(task, task.patch).done() and pool.counts["cached"] >= 1
    assert pool.grade(task, "").result().outcome == "empty_patch"


def test_cache_file_is_used_by_the_next_pool(place, tmp_path):
    arguments, spec = place
    task = make_task()
    with EnvPool(1, arguments, [spec], cache=tmp_path / "verdicts.jsonl") as first:
        assert first.grade(task, task.patch).result().resolved
    with EnvPool(1, {"kind": "no such back end"}, [spec], cache=tmp_path / "verdicts.jsonl") as second:
        assert second.grade(task, task.patch).result().resolved


def test_sessions_keep_their_sandbox(pool, place):
    _, spec = place
    with pool.open_session(spec.name, {SOURCE: BROKEN}) as one, pool.open_session(spec.name, {}) as two:
        one.write(SOURCE, CALC)
        two.write("notes.txt", "two")
        assert one.run_tests(FAILING).result().passed(FAILING)
        assert SOURCE in one.diff().result() and two.diff().result().count("+++") == 1
        assert two.exec("cat notes.txt").result().output == "two"
        assert one.call(pool_jobs.read_upper, "README.md").result() == "X\n"
        with pytest.raises(FileNotFoundError):
            one.read("notes.txt").result()


def test_exceptions_of_jobs_arrive_with_their_traceback(pool):
    with pytest.raises(ZeroDivisionError) as caught:
        pool.submit(pool_jobs.divide, 0).result()
    assert "in divide" in str(caught.value.__cause__)
    with pytest.raises(Exception, match="pickle|local"):
        pool.submit(lambda provider: None).result()


def test_dead_worker_is_replaced_and_the_job_repeated(pool, tmp_path):
    before = pool.counts["infrastructure_failures"]
    assert pool.submit(pool_jobs.die_once, str(tmp_path / "flag")).result() == "alive"
    assert pool.counts["infrastructure_failures"] == before + 1
    with pytest.raises(SandboxError, match="worker died"):
        pool.submit(pool_jobs.die).result()


def test_session_of_a_dead_worker_is_an_infrastructure_failure(place):
    arguments, spec = place
    with EnvPool(1, arguments, [spec]) as pool:
        session = pool.open_session(spec.name, {})
        session.opened.result()
        with pytest.raises(SandboxError):
            session.call(pool_jobs.die).result()
        with pytest.raises(SandboxError):
            session.read(SOURCE).result()
        assert pool.run_tests(spec.name, {}, PASSING[:1]).result().passed(PASSING[:1])


def test_deadline_kills_the_worker(place, monkeypatch):
    monkeypatch.setattr("qcn_jax.envs.pool.env_pool.DEADLINE_GRACE", 0.0)
    arguments, spec = place
    with EnvPool(1, arguments, [spec], attempts=1) as pool:
        with pytest.raises(SandboxError, match="did not end in 1 s"):
            pool.submit(pool_jobs.sleep, 600, deadline=1.0).result()
        assert pool.submit(pool_jobs.sleep, 0).result() == 0


def test_order_back_pressure_progress_and_cancellation(pool, tmp_path):
    under_way, most, seen, lock = [0], [0], [], threading.Lock()

    def start(item):
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        future = pool.submit(pool_jobs.sleep, 0.01 * (item % 3))

        def ended(_):
            with lock:
                under_way[0] -= 1
        future.add_done_callback(ended)
        return future

    assert list(pool.map(start, range(12), ahead=4, progress=seen.append)) == [0.01 * (i % 3) for i in range(12)]
    assert most[0] <= 4 and seen == list(range(1, 13))
    blockers = [pool.submit(pool_jobs.hold, str(tmp_path), number, 3) for number in range(2)]
    while len(os.listdir(tmp_path)) < 2:
        time.sleep(0.02)
    waiting = [pool.submit(pool_jobs.sleep, 0) for _ in range(5)]
    assert pool.cancel_pending() == 5 and all(future.cancelled() for future in waiting)
    (tmp_path / "go").touch()
    assert [future.result() for future in blockers] == [0, 1]


OWNER = """
import sys
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.sandbox.repository import RepositorySpec
spec = RepositorySpec("victim==1.2.3", sys.argv[3])
pool = EnvPool(2, {"kind": sys.argv[1], "state_dir": sys.argv[2]}, [spec])
for _ in range(4):
    pool.run_tests(spec.name, {"victim/calc.py": "import time\\ntime.sleep(1000)\\n"}, timeout=900.0)
sessions = [pool.open_session(spec.name, {}) for _ in range(2)]
print("ready", flush=True)
import time
time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL])
def test_killed_owner_leaves_no_process_and_no_container(place, number):
    arguments, spec = place
    owner = subprocess.Popen([sys.executable, "-c", OWNER, arguments["kind"], arguments["state_dir"], spec.archive],
                             stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        before = _below(owner.pid)
        containers = _containers(arguments, before)
        # Workers, and containers or locally their servers, zygotes and test runs.
        if len(before) >= 2 and len(containers) >= 2 if arguments["kind"] == "docker" else len(before) >= 10:
            break
        time.sleep(0.2)
    else:
        raise AssertionError(f"{len(before)} processes, {len(containers)} containers")
    owner.send_signal(number)
    owner.wait()
    deadline = time.monotonic() + 300
    while (_running(before) or containers & _containers(arguments)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _running(before) and not containers & _containers(arguments)


def _parents() -> dict[int, tuple[int, str]]:
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stream:
                fields = stream.read().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if fields[0] != "Z":
            found[int(name)] = (int(fields[1]), fields[19])
    return found


def _below(pid: int) -> list[tuple[int, str]]:
    """(pid, start time) of all descendants."""
    parents, found, front = _parents(), [], {pid}
    while front:
        front = {child for child, (parent, _) in parents.items() if parent in front}
        found += [(child, parents[child][1]) for child in front]
    return found


def _running(processes: list[tuple[int, str]]) -> list[int]:
    now = _parents()
    return [pid for pid, start in processes if pid in now and now[pid][1] == start]


def _containers(arguments, owners=None) -> set[str]:
    """Containers of the given owners (all of this package's, if None)."""
    if arguments["kind"] != "docker":
        return set()
    from qcn_jax.envs.sandbox import images
    found = images.engine().api.containers(all=True, filters={"label": ["qcn_jax.owner"]})
    pids = None if owners is None else {str(pid) for pid, _ in owners}
    return {c["Id"] for c in found if pids is None or c["Labels"]["qcn_jax.owner"].split("-")[0] in pids}
