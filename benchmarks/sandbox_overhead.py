"""What a graded task costs above its tests' own time, and how many a machine does in an hour.

  python benchmarks/sandbox_overhead.py --kinds=local,docker,docker-fresh,docker-run --parallel=1,8,32 --tasks=64

Each task is a fresh copy of a repository with one file replaced, in which all tests run. Rows:
  local, docker   warm servers, a workspace and user id for each task (isolation "shared")
  docker-fresh    a container for each task (isolation "container")
  docker-run      `docker run --rm` of the same image with a bind mount, for comparison
"Own" is the sum of the tests' set-up, call and tear-down times as pytest reports them. Overhead per task is wall time
times the processors kept busy (at most the parallelism), divided by tasks, less own. Run on an otherwise idle machine.
"""

import concurrent.futures
import json
import os
import pathlib
import subprocess
import tempfile
import time

from absl import app, flags

from qcn_jax.envs.pool import EnvPool
from qcn_jax.envs.sandbox import RepositorySpec, make_provider

_KINDS = flags.DEFINE_list("kinds", ["local", "docker", "docker-fresh", "docker-run"], "rows to measure")
_PARALLEL = flags.DEFINE_list("parallel", ["1", "8", "32"], "tasks side by side")
_TASKS = flags.DEFINE_integer("tasks", 64, "tasks per measurement")
_ARCHIVE = flags.DEFINE_string("archive", "", "source distribution to use; by default a small generated repository")
_OUT = flags.DEFINE_string("out", "", "JSON file for the figures")

OWN_TIME = """
def main(args):
    class Plugin:
        seconds = 0.0
        def pytest_runtest_logreport(self, report):
            self.seconds += report.duration
    plugin = Plugin()
    run_pytest(None, plugins=[plugin])
    return plugin.seconds
"""


def repository(folder: pathlib.Path) -> RepositorySpec:
    """The repository to measure with."""
    if _ARCHIVE.value:
        return RepositorySpec("measured", os.path.abspath(_ARCHIVE.value))
    for path, text in {"small/__init__.py": "def double(x):\n    return 2 * x\n", "tests/test_small.py": "\n".join([
            "import pytest", "from small import double", "@pytest.mark.parametrize('x', range(20))",
            "def test_double(x):", "    assert double(x) == x + x", ""])}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return RepositorySpec("measured", str(folder))


def own_seconds(state: str, spec: RepositorySpec) -> float:
    """What the tests themselves take: the least of three runs."""
    with make_provider("local", state) as provider:
        provider.prepare(spec)
        with provider.create(spec.name) as place:
            return min(place.run_python(OWN_TIME, timeout=300).value for _ in range(3))


def measure_pool(kind: str, parallel: int, state: str, spec: RepositorySpec) -> float:
    """Wall seconds of all tasks through the pool."""
    arguments = {"kind": kind.split("-")[0], "state_dir": state,
                 "isolation": "container" if kind.endswith("fresh") else "shared"}
    with EnvPool(parallel, arguments, [spec]) as pool:
        pool.prepare(spec).result()
        path = "measured_marker.py"

        def task(number):
            return pool.run_tests(spec.name, {path: f"n = {number}\n"}, None, 300.0, role="grading")

        list(pool.map(task, range(2 * parallel), ahead=2 * parallel))  # every worker warm
        started = time.monotonic()
        runs = list(pool.map(task, range(_TASKS.value), ahead=4 * parallel))
        seconds = time.monotonic() - started
    assert all(run.status == "ok" and run.exit_status == 0 for run in runs), runs[0]
    return seconds


def measure_docker_run(parallel: int, state: str, folder: str) -> float:
    """Wall seconds of all tasks with one `docker run` each."""
    with make_provider("docker", state) as provider:
        image = provider.image
    command = ["docker", "run", "--rm", "--network=none", "-v", f"{folder}:/repository:ro", "-w", "/repository", image,
               "/opt/qcn/bin/python", "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider"]

    def task(_):
        subprocess.run(command, check=True, capture_output=True)

    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(parallel) as threads:
        list(threads.map(task, range(_TASKS.value)))
    return time.monotonic() - started


def main(_) -> None:
    """Measures and prints the table."""
    rows, cores = [], os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="qcn-bench-") as folder:
        os.chmod(folder, 0o755)
        state, tree = os.path.join(folder, "state"), pathlib.Path(folder, "tree")
        spec = repository(tree)
        own = own_seconds(state, spec)
        print(f"tests' own time {own:.3f} s, {cores} processors, {_TASKS.value} tasks per row, load "
              f"{os.getloadavg()[0]:.1f}\n\n| back end | parallel | tasks/hour | overhead per task (s) |\n|---|---|---|---|")
        for kind in _KINDS.value:
            for parallel in map(int, _PARALLEL.value):
                if kind == "docker-run":
                    if _ARCHIVE.value:
                        continue  # needs an unpacked tree
                    seconds = measure_docker_run(parallel, state, str(tree))
                else:
                    seconds = measure_pool(kind, parallel, state, spec)
                overhead = seconds * min(parallel, cores) / _TASKS.value - own
                rows.append({"kind": kind, "parallel": parallel, "seconds": seconds, "overhead": overhead})
                print(f"| {kind} | {parallel} | {3600 * _TASKS.value / seconds:.0f} | {overhead:.3f} |", flush=True)
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(json.dumps({"own": own, "cores": cores, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
