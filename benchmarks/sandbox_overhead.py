"""What a graded task costs above its tests' own time, and how many a machine does in an hour.

  python benchmarks/sandbox_overhead.py --parallel=1,8,32 --tasks=64 --harness_tasks=16

Each task is a fresh copy of a repository with one file replaced, in which all tests run. Rows:
  local, docker   warm servers that fork, a workspace and user id for each task (isolation "shared")
  docker-fresh    a container for each task (isolation "container")
  docker-spare    the same with containers started ahead of need
  docker-run      `docker run --rm` of an image with the repository, for comparison
  images          `envs.tasks.swebench`: SWE-bench's instances in their images, by this package
  swebench        the `swebench` package's own harness on the same instances and image (its function `run_instances`,
                  timed in a process that has imported it)
All Docker rows stand on one base image, made here from Debian's packages. "Own" is the sum of the tests' set-up, call and
tear-down times as pytest reports them. Overhead per task is wall time times the processors kept busy (at most the
parallelism), divided by tasks, less own. Below the table stands what a second opinion on a patch that resolves costs, one
at a time. Run on an otherwise idle machine; the load is printed.
"""

import concurrent.futures
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from qcn_jax.envs import patches
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.sandbox import RepositorySpec, images, layers, make_provider
from qcn_jax.envs.sandbox.base import sandbox
from qcn_jax.envs.tasks import formats, grading, swebench
from qcn_jax.envs.tasks.schema import Task

KINDS = ["local", "docker", "docker-fresh", "docker-spare", "docker-run", "images", "swebench"]
_KINDS = flags.DEFINE_list("kinds", KINDS, "rows to measure")
_PARALLEL = flags.DEFINE_list("parallel", ["1", "8", "32"], "tasks side by side")
_TASKS = flags.DEFINE_integer("tasks", 64, "tasks per measurement")
_HARNESS_TASKS = flags.DEFINE_integer("harness_tasks", 16, "tasks per measurement of rows that start a container for each")
_OUT = flags.DEFINE_string("out", "", "JSON file for the figures")

SOURCE, PATH, TEST = "def double(x):\n    return 2 * x\n", "small/core.py", "tests/test_small.py"
FILES = {"small/__init__.py": "", PATH: SOURCE, TEST: "\n".join([
    "import pytest", "from small.core import double", "@pytest.mark.parametrize('x', range(20))", "def test_double(x):",
    "    assert double(x) == x + x", ""])}
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
HARNESS = """
import json, pathlib, sys, time
from swebench.harness.run_evaluation import run_instances
rows = [json.loads(line) for line in open("tasks.jsonl")]
made = {row["instance_id"]: {"instance_id": row["instance_id"], "model_name_or_path": "m", "model_patch": row["patch"]}
        for row in rows}
started = time.monotonic()
run_instances(made, rows, int(sys.argv[1]), f"bench{sys.argv[1]}", 300)
seconds = time.monotonic() - started
reports = [pathlib.Path(f"logs/run_evaluation/bench{sys.argv[1]}/m/{name}/report.json") for name in made]
print(json.dumps([seconds, sum(report.exists() for report in reports)]), file=sys.stderr)
"""


def own_seconds(state: str, spec: RepositorySpec) -> float:
    """What the tests themselves take: the least of three runs."""
    with make_provider("local", state) as provider:
        provider.prepare(spec)
        with provider.create(spec.name) as place:
            return min(place.run_python(OWN_TIME, timeout=300).value for _ in range(3))


def measure_pool(kind: str, parallel: int, state: str, spec: RepositorySpec, base: str) -> tuple[float, int]:
    """Wall seconds of all tasks through the pool, and how many."""
    back_end, _, variant = kind.partition("-")
    arguments = {"kind": back_end, "state_dir": state, "isolation": "container" if variant else "shared",
                 "spares": 2 if variant == "spare" else 0, **({"image": base} if back_end == "docker" else {})}
    count = _HARNESS_TASKS.value if variant else _TASKS.value
    count = max(count, parallel)
    with EnvPool(min(parallel, 8 if variant else parallel), arguments, [spec]) as pool:
        pool.prepare(spec).result()

        def task(number):
            return pool.run_tests(spec.name, {"marker.py": f"n = {number}\n"}, None, 300.0, role="grading")

        list(pool.map(task, range(2 * parallel), ahead=2 * parallel))  # every worker warm
        started = time.monotonic()
        runs = list(pool.map(task, range(count), ahead=4 * parallel))
        seconds = time.monotonic() - started
    assert all(run.outcome == "passed" for run in runs), next(run for run in runs if run.outcome != "passed")
    return seconds, count


def measure_threads(parallel: int, function) -> tuple[float, int]:
    """Wall seconds of `function(number)` in threads."""
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(parallel) as threads:
        list(threads.map(function, range(_HARNESS_TASKS.value)))
    return time.monotonic() - started, _HARNESS_TASKS.value


def measure_harness(parallel: int, rows: list[dict]) -> tuple[float, int]:
    """Wall seconds that the package's harness takes for instances of one image."""
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = subprocess.run([sys.executable, "-c", HARNESS, str(parallel)], cwd=folder, capture_output=True, text=True,
                              check=True)
    seconds, reported = json.loads(done.stderr.strip().splitlines()[-1])
    if reported < len(rows):
        print(f"(the harness gave up on {len(rows) - reported} of {len(rows)} tasks, which are not counted)")
    return seconds, reported


def instances(image: str) -> list[dict]:
    """Rows of SWE-bench 5 on one image whose gold patch mends the function."""
    bug = patches.make_diff({PATH: SOURCE}, {PATH: SOURCE.replace("2 *", "3 *")})
    names = [f"{TEST}::test_double[{x}]" for x in range(20)]
    task = Task("bench", "small==1", "HEAD", patches.reverse(bug), "", "double is wrong", tuple(names[1:]), (names[0],),
                version="1", image_name=image)
    return [{**formats.to_swebench5(task), "instance_id": f"bench-{n}"} for n in range(_HARNESS_TASKS.value)]


def measure(kind: str, parallel: int, state: str, spec: RepositorySpec, base: str, image: str) -> tuple[float, int]:
    """Wall seconds and tasks of one cell."""
    if kind == "docker-run":
        command = ["docker", "run", "--rm", "--network=none", "-w", "/testbed", image, "python", "-m", "pytest", "-q",
                   "-p", "no:cacheprovider"]
        return measure_threads(parallel, lambda _: subprocess.run(command, check=False, capture_output=True))
    if kind == "images":
        client, rows = images.engine(), instances(image)

        def one(number):
            row = rows[number]
            verdict, log = swebench.run(client, swebench.Instance.from_row(row), row["patch"], 300)
            assert verdict.resolved, log

        return measure_threads(parallel, one)
    if kind == "swebench":
        return measure_harness(parallel, instances(image))
    return measure_pool(kind, parallel, state, spec, base)


def second_opinion(kind: str, state: str, spec: RepositorySpec) -> tuple[float, float, float]:
    """Seconds of a run of a task's tests, of the verdict that resolves, and of the task's first such verdict."""
    bug = patches.make_diff({PATH: SOURCE}, {PATH: SOURCE.replace("2 *", "3 *")})
    names = [f"{TEST}::test_double[{x}]" for x in range(20)]
    task = Task("bench", spec.name, "", patches.reverse(bug), "", "double is wrong", tuple(names[1:]), (names[0],),
                bug_patch=bug)
    with make_provider(kind, state) as provider:
        provider.prepare(spec)
        grader, seconds = grading.Grader(provider), []
        for number in range(_TASKS.value):
            text = f"{SOURCE}# {number}\n"
            started = time.monotonic()
            verdict = grader.grade(task, patches.make_diff({PATH: SOURCE.replace("2 *", "3 *")}, {PATH: text}))
            seconds.append(time.monotonic() - started)
            assert verdict.resolved, verdict
        started = time.monotonic()
        for number in range(_TASKS.value):
            with sandbox(provider, spec.name, {PATH: f"{SOURCE}# {number}\n"}, "grading") as place:
                assert place.run_tests(names, 300.0).passed(names)
        run = (time.monotonic() - started) / _TASKS.value
    return run, statistics.mean(seconds[1:]), seconds[0]


def main(_) -> None:
    """Measures and prints the table."""
    rows, cores, image = [], os.cpu_count() or 1, "qcn-bench/small:1"
    docker = [kind for kind in _KINDS.value if kind != "local"]
    with tempfile.TemporaryDirectory(prefix="qcn-bench-") as folder:
        os.chmod(folder, 0o755)
        state, tree, base = os.path.join(folder, "state"), pathlib.Path(folder, "tree"), ""
        for path, text in FILES.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text)
        spec = RepositorySpec("measured", str(tree))
        if docker:
            client = images.engine()
            base = images.debian_image(client, layers.HARNESS_PACKAGES)
            repository = layers.repository_image(client, base, FILES, network=False)
            task = layers.task_image(client, repository, {PATH: SOURCE.replace("2 *", "3 *")})
            client.images.get(task).tag(*image.split(":"))
        own = own_seconds(state, spec)
        print(f"tests' own time {own:.3f} s, {cores} processors, {_TASKS.value} tasks per row ({_HARNESS_TASKS.value} where "
              f"each starts a container), load {os.getloadavg()[0]:.1f}\n\n| back end | parallel | tasks/hour | overhead per "
              "task (s) |\n|---|---|---|---|")
        for kind in _KINDS.value:
            for parallel in map(int, _PARALLEL.value):
                seconds, count = measure(kind, parallel, state, spec, base, image)
                overhead = seconds * min(parallel, cores) / count - own
                rows.append({"kind": kind, "parallel": parallel, "seconds": seconds, "tasks": count, "overhead": overhead})
                print(f"| {kind} | {parallel} | {3600 * count / seconds:.0f} | {overhead:.3f} |", flush=True)
        for kind in [kind for kind in ("local", "docker") if kind in _KINDS.value]:
            run, verdict, first = second_opinion(kind, state, spec)
            print(f"{kind}: a run of the tests {run:.3f} s, a verdict that resolves {verdict:.3f} s ({verdict - run:.3f} s "
                  f"for its second opinion), a task's first {first:.3f} s", flush=True)
        if docker:
            client.images.remove(image, force=True)
    rate = {(row["kind"], row["parallel"]): row["tasks"] / row["seconds"] for row in rows}
    for parallel in map(int, _PARALLEL.value):
        if ("swebench", parallel) in rate:
            others = [f"{kind} {rate[kind, parallel] / rate['swebench', parallel]:.1f}" for kind in _KINDS.value
                      if kind != "swebench"]
            print(f"throughput at {parallel} as a multiple of the harness's: {', '.join(others)}")
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(json.dumps({"own": own, "cores": cores, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
