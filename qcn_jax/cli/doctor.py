"""Says what this machine has for qcn_jax, and what is missing for which job.

Looks at Python, cores, memory, disk, JAX devices, the Docker engine, how far the local sandbox can isolate, the
package index that `qcn run` downloads repositories from, the Docker registry, and optional packages. Exit status 0
means that `qcn run` can work here; each line that stands in its way begins with "!!".
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

from absl import flags

from qcn_jax.cli import parsing

NEED_MEMORY_GB, NEED_DISK_GB = 6.0, 3.0  # what `qcn run --config=configs/nano.py` uses at its peak, rounded up
DOCKER_REGISTRY = "https://registry-1.docker.io/v2/"
OPTIONAL = {"torch": "parity tests", "transformers": "parity tests", "libtpu": "qcn compile", "ray": "many machines",
            "swebench": "logs of other languages' tests"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the table; `needed` ones that are not `ok` make the exit status 1."""

    name: str
    ok: bool
    detail: str
    needed: bool = False


def main(argv: Sequence[str]) -> int:
    """Prints the table; returns 0 where the main job can run."""
    values = flags.FlagValues()
    flags.DEFINE_string("path", ".", "Folder whose disk is looked at.", flag_values=values)
    flags.DEFINE_float("timeout", 4.0, "Seconds to wait for each network address.", flag_values=values, lower_bound=0.1)
    flags.DEFINE_boolean("json", False, "Print one JSON object instead of a table.", flag_values=values)
    parsing.parse(values, "doctor", __doc__, argv)
    checks: list[Callable[[], Finding]] = [
        _python, _cores, _memory, lambda: _disk(values.path), _jax, _docker, _local_sandbox,
        lambda: _index(values.timeout), lambda: _registry(values.timeout), _optional,
    ]
    findings = [check() for check in checks]
    if values.json:
        print(json.dumps({finding.name: dataclasses.asdict(finding) for finding in findings}, indent=1))
    else:
        for finding in findings:
            mark = "ok" if finding.ok else ("!!" if finding.needed else "--")
            print(f"{mark}  {finding.name:<15} {finding.detail}")
    return int(any(finding.needed and not finding.ok for finding in findings))


def _python() -> Finding:
    return Finding("python", sys.version_info >= (3, 11), f"{platform.python_version()} on {platform.platform()}", True)


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("cores", True, f"{cores} usable of {os.cpu_count()}")


def _memory() -> Finding:
    try:
        lines = pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return Finding("memory", True, "unknown (no /proc/meminfo)")
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    available, total = kib["MemAvailable"] / 2**20, kib["MemTotal"] / 2**20
    note = "" if available >= NEED_MEMORY_GB else f"; the main job wants {NEED_MEMORY_GB:.0f}"
    return Finding("memory", not note, f"{available:.1f} GiB available of {total:.1f}{note}", True)


def _disk(path: str) -> Finding:
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        return Finding("disk", False, f"{path}: {error.strerror}", True)
    free = usage.free / 2**30
    note = "" if free >= NEED_DISK_GB else f"; the main job wants {NEED_DISK_GB:.0f}"
    detail = f"{free:.1f} GiB free of {usage.total / 2**30:.1f} at {os.path.abspath(path)}{note}"
    return Finding("disk", not note, detail, True)


def _jax() -> Finding:
    try:
        import jax

        from qcn_jax.sharding import distributed

        devices = distributed.devices()
    except Exception as error:  # a broken installation may raise anything, and that is what the user wants to read
        return Finding("jax", False, parsing.one_line(error), True)
    kinds = ", ".join(sorted({device.device_kind for device in devices}))
    return Finding("jax", True, f"{jax.__version__}, {len(devices)} {devices[0].platform} device(s): {kinds}", True)


def _docker() -> Finding:
    import docker

    from qcn_jax.envs.sandbox import layers

    try:
        client = docker.from_env(timeout=10)
        version = client.version()
    except docker.errors.DockerException as error:
        why = parsing.one_line(error)[:90]
        return Finding("docker", False, f"no engine answers ({why}); `local` sandboxes are used")
    images, ours = len(client.images.list()), layers.usage(client)
    size = f"{len(ours)} of {sum(ours.values()) / 2**20:.0f} MiB"
    engine = f"engine {version['Version']} ({version['Os']}/{version['Arch']})"
    return Finding("docker", True, f"{engine}, {images} images; ours above their bases: {size}")


def _local_sandbox() -> Finding:
    from qcn_jax.envs.sandbox import local
    from qcn_jax.envs.sandbox.inside import filters

    root = "own user ids" if os.geteuid() == 0 else "no root, so no user ids of their own"
    probe = shutil.which("unshare") and subprocess.run(
        ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "true"], capture_output=True, check=False)
    spaces = bool(probe and probe.returncode == 0)
    kind = "namespaces" if spaces else "filters" if filters.landlock_version() else "none"
    lacks = ", ".join(local.missing(kind))
    refused = f"; missing, so that agents' commands are refused: {lacks}" if lacks else ""
    names = {"namespaces": "namespaces (network, processes)", "filters": "no namespaces, Landlock and seccomp",
             "none": "no namespaces"}
    return Finding("local sandbox", True, f"{root}; {names[kind]}; rlimits and wall-clock limits always{refused}")


def _index(timeout: float) -> Finding:
    url = _index_url()
    if not url.startswith("http"):
        return Finding("package index", os.path.isdir(url.removeprefix("file://")), url, True)
    reached = _reach(url.rstrip("/") + "/pip/", timeout)
    note = "" if reached is None else (
        f"; not reached ({reached}): stage tasks needs it, unless its downloads are cached")
    return Finding("package index", reached is None, f"{url}{note}", True)


def _index_url() -> str:
    """The index that pip would use, without user name and password."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True,
                          text=True, check=False)
    url = os.environ.get("PIP_INDEX_URL") or done.stdout.strip() or "https://pypi.org/simple"
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def _registry(timeout: float) -> Finding:
    reached = _reach(DOCKER_REGISTRY, timeout)
    detail = "reached" if reached is None else f"not reached ({reached}); images are built from this machine instead"
    return Finding("docker registry", reached is None, f"{DOCKER_REGISTRY} {detail}")


def _reach(url: str, timeout: float) -> str | None:
    """None where the address answers at all (401 is an answer), else why not."""
    try:
        with urllib.request.urlopen(url, timeout=timeout):
            return None
    except urllib.error.HTTPError as error:
        return None if error.code < 500 else f"HTTP {error.code}"
    except (OSError, ValueError) as error:
        return parsing.one_line(getattr(error, "reason", None) or error)


def _optional() -> Finding:
    parts = []
    for name, purpose in OPTIONAL.items():
        found = importlib.util.find_spec(name) is not None
        parts.append(f"{name} {importlib.metadata.version(name) if found else 'absent'} ({purpose})")
    return Finding("optional", True, ", ".join(parts))
