"""Validated tasks per core-hour, side by side with the swesmith package's generators and validation.

    python -m venv /tmp/swesmith && /tmp/swesmith/bin/pip install 'swesmith[generate,validate]' 'swebench<5' pytest
    litellm
    python benchmarks/synthesis_vs_swesmith.py --swesmith=/tmp/swesmith/bin/python --out=bench/swesmith

The same repositories, the same interpreter and pytest inside, both in Docker containers of one engine, one after the
other in one run. swesmith's procedural generators make its candidates and `swesmith.harness.valid` validates a sample
of each kind; ours are those of the kinds that correspond. A candidate of swesmith's is validated when a test fails
that passed before; one of ours when it is kept, which asks more: fixed by the reverse patch, the same again in a
second run, a statement from observed behaviour that does not tell the fix.

Processor time is that of the containers (from the control groups, read while they run; what a container uses after
the last reading is lost, in favour of swesmith) and of the processes that drive them. The Docker daemon's own is left
out.
"""

import collections
import os
import pathlib
import resource
import subprocess
import sys
import tarfile
import tempfile
import threading
import time

import docker
from absl import app, flags

from qcn_jax import files
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.sandbox import docker as backend
from qcn_jax.envs.sandbox import images, repository
from qcn_jax.envs.synthesis import plan, sources, statement, synthesize
from qcn_jax.recipes.nano import repositories

# swesmith's thirteen kinds and ours that do the same.
KINDS = {
    "func_pm_class_rm_base": ("drop_base",), "func_pm_class_rm_funcs": ("drop_method",),
    "func_pm_class_shuffle_funcs": ("shuffle_methods",), "func_pm_ctrl_invert_if": ("swap_branches",),
    "func_pm_ctrl_shuffle": ("shuffle_lines",), "func_pm_remove_assign": ("drop_assignment", "drop_statement"),
    "func_pm_remove_cond": ("drop_guard", "drop_conditional"), "func_pm_remove_loop": ("drop_loop",),
    "func_pm_remove_wrapper": ("drop_wrapper", "unwrap"), "func_pm_op_break_chains": ("break_chain",),
    "func_pm_op_change_const": ("change_constant",), "func_pm_op_change": ("change_arithmetic",),
    "func_pm_op_swap": ("swap_operands",),
}
_OUT = flags.DEFINE_string("out", "bench/swesmith", "Folder for results.")
_SWESMITH = flags.DEFINE_string("swesmith", None, "Interpreter that has the swesmith package.", required=True)
_REPOS = flags.DEFINE_list("repos", ["toolz==1.2.0", "tinydb==4.9.0", "voluptuous==0.16.0"], "Repositories.")
_PER_KIND = flags.DEFINE_integer("per_kind", 4, "swesmith's candidates validated of each kind and repository.")
_WORKERS = flags.DEFINE_integer("workers", 2, "Side by side, on either side.")


class Meter:
    """Processor seconds of containers that start while it runs and for which `mine(container)` is true."""

    FOLDERS = ("/sys/fs/cgroup/cpuacct/docker/{}/cpuacct.usage", "/sys/fs/cgroup/system.slice/docker-{}.scope/cpu.stat",
               "/sys/fs/cgroup/docker/{}/cpu.stat")

    def __init__(self, client, mine):
        self._client, self._mine, self._used, self._known = client, mine, {}, {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    @property
    def seconds(self):
        """What was seen so far."""
        return sum(self._used.values())

    def _watch(self):
        while not self._stop.wait(0.2):
            for row in self._client.api.containers():
                name = row["Id"]
                if name not in self._known:
                    self._known[name] = self._mine(row)
                if self._known[name]:
                    self._used[name] = self._read(name) or self._used.get(name, 0.0)

    def _read(self, name):
        for place in self.FOLDERS:
            try:
                text = pathlib.Path(place.format(name)).read_text()
            except OSError:
                continue
            if text.startswith("usage_usec"):
                return int(text.split()[1]) / 1e6
            return int(text) / 1e9
        return 0.0


def children_seconds():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(row.ru_utime + row.ru_stime for row in used)


def ours(client, specs, out):
    """Synthesis of the kinds that correspond; containers of this process's workers are counted."""
    def mine(row):
        owner = row["Labels"].get(backend.OWNER, "0").split("-")[0]
        try:
            parent = int(pathlib.Path(f"/proc/{owner}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            return False
        return parent == os.getpid()

    kinds = tuple(kind for group in KINDS.values() for kind in group)
    settings = plan.Settings(kinds=kinds, candidates_per_repo=3 * _PER_KIND.value * len(KINDS),
                             statement_characters=statement.FULL, tests_may_tell=True)
    before, started = children_seconds(), time.monotonic()
    with Meter(client, mine) as meter:
        with tempfile.TemporaryDirectory() as state:
            with EnvPool(_WORKERS.value, {"kind": "docker", "state_dir": state}) as pool:
                result = synthesize.synthesize(pool, specs, settings, out / "ours", print)
    wall = time.monotonic() - started
    group = {kind: theirs for theirs, found in KINDS.items() for kind in found}
    rows = [{"repository": v.repository, "kind": group[v.kind], "kept": v.task is not None,
             "fails": v.outcome not in ("survived", "broken", "crashed", "timeout")} for v in result.verdicts]
    return {"rows": rows, "wall": wall, "cpu": meter.seconds + children_seconds() - before,
            "outcomes": result.outcomes()}


def image_for(client, spec):
    """An image with the repository at /testbed under git, and the interpreter and pytest of our sandboxes."""
    base = images.base_image(client)
    runtime = images.runtime_image(client, base)
    settings = repository.settings(spec, repository.unpack(spec))
    places = ":".join("/testbed/" + path.removeprefix("repo").strip("/") for path in settings["python_path"]
                      if path != "meta")
    with tempfile.TemporaryDirectory() as folder:
        for name, member in repository.unpack(spec).items():
            if name.startswith("repo/"):
                path = pathlib.Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(member.data)
        pathlib.Path(folder, "Dockerfile").write_text(f"""FROM {base}
RUN mkdir -p /var/log/apt && apt-get update -qq && apt-get install -y -qq --no-install-recommends git procps
COPY --from={runtime} /opt/qcn /opt/qcn
ENV PYTHONPATH={places} PYTHONHASHSEED=0
COPY repo /testbed
RUN cd /testbed && git init -q && git add -Af && git -c user.name=a -c user.email=a@b commit -q -m start
""")
        tag = f"qcn-bench-swesmith:{spec.name.replace('==', '-')}"
        client.images.build(path=folder, tag=tag, rm=True, forcerm=True)
    return tag


def theirs(client, specs, out):
    """swesmith's generators and validation, in a process of their own."""
    out = (out / "swesmith").resolve()
    out.mkdir(parents=True, exist_ok=True)
    job = {"seed": 24, "per_kind": _PER_KIND.value, "workers": _WORKERS.value, "repositories": []}
    for spec in specs:
        name = spec.name.partition("==")[0]
        folder = out / "sources" / name
        if not folder.exists():
            with tarfile.open(spec.archive) as archive:
                archive.extractall(folder, filter="data")
        job["repositories"].append({
            "repo": name, "commit": "0" * 40, "folder": str(next(path for path in folder.iterdir() if path.is_dir())),
            "image": image_for(client, spec),
            "test": "/opt/qcn/bin/python -m pytest -p no:cacheprovider --disable-warnings --color=no --tb=no "
                    "--verbose"})
    files.write_json(out / "job.json", job)
    before, started = children_seconds(), time.monotonic()
    with Meter(client, lambda row: any(name.startswith("/swesmith.val.") for name in row["Names"])) as meter:
        script = pathlib.Path(__file__).with_name("_swesmith_side.py").resolve()
        subprocess.run([_SWESMITH.value, str(script), "job.json"], cwd=out, check=True)
    result = files.read_json(out / "result.json")
    return {"rows": result["rows"], "wall": time.monotonic() - started,
            "cpu": meter.seconds + children_seconds() - before, "seconds": result["seconds"]}


def main(argv):
    """Runs both sides and prints the table."""
    del argv
    out, client = pathlib.Path(_OUT.value), docker.from_env()
    specs = [sources.locate(name) for name in repositories.pinned(*_REPOS.value)]
    sides = {"swesmith": theirs(client, specs, out), "qcn_jax": ours(client, specs, out)}
    files.write_json(out / "results.json", sides)
    table = {side: collections.defaultdict(lambda: [0, 0]) for side in sides}
    for side, found in sides.items():
        for row in found["rows"]:
            table[side][row["kind"]][0] += 1
            table[side][row["kind"]][1] += row["kept"]
    print(f"\n{'kind':<30}{'swesmith':>16}{'qcn_jax':>16}")
    for kind in KINDS:
        cells = [f"{kept}/{tried} {kept / tried:>4.0%}" if tried else "-"
                 for tried, kept in (table[side][kind] for side in ("swesmith", "qcn_jax"))]
        print(f"{kind:<30}{cells[0]:>16}{cells[1]:>16}")
    rates = {}
    for side, found in sides.items():
        kept, tried = sum(row["kept"] for row in found["rows"]), len(found["rows"])
        rates[side] = kept / found["cpu"] * 3600
        print(f"{side}: {kept} of {tried} validated ({kept / tried:.0%}), {found['cpu']:.0f} core-seconds, "
              f"{found['wall']:.0f} s wall: {rates[side]:.0f} per core-hour, "
              f"{kept / found['wall'] * 3600:.0f} per hour")
    print(f"ratio: {rates['qcn_jax'] / rates['swesmith']:.2f} in validated tasks per core-hour")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    app.run(main)
