"""Thousands of task executions while things break: nothing lost, nothing doubled, nothing left behind, memory flat.

  python benchmarks/soak.py --executions=5000 --out=DIR        resumable: run it again after an interruption
  python benchmarks/soak.py --executions=200 --kind=local --out=DIR

Each execution grades one patch in a fresh sandbox through the pool. Most are right or wrong fixes; the others hang,
fork without end, allocate without end, fill their disk, print 100 MB, or leave the interpreter. One in twenty is
hostile: a patch that forges its verdict, a row whose patch is none, or an agent's sandbox in which a command does what
it can to its server and neighbours, and after which its files must still be read. Meanwhile pool
workers, containers and (docker) the whole Docker daemon are killed at random times. The daemon is one of its own, with
its own folders and socket below DIR; the machine's other daemon is only asked for its base image. A result is right if
its outcome is one that its patch can have; "infrastructure" is none. DIR/results.jsonl holds one line for each result.
An engine that is killed between the start of a container's shim and the record of it forgets the container: containerd
then lists it without a task, or with one that never began, the engine not at all, and nothing can remove it through the engine. Such shims are asked for
(`ctr`) and counted apart. The exit status is 0 if nothing was lost, doubled, wrong or leaked, and memory stayed flat.
"""

import _thread
import collections
import concurrent.futures
import contextlib
import json
import os
import pathlib
import random
import signal
import statistics
import sys
import threading
import time

import docker
import tqdm
from _daemon import Daemon, descendants, own_daemon
from absl import app, flags

from qcn_jax.envs import patches
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.sandbox import Limits, RepositorySpec, SandboxError, images
from qcn_jax.envs.tasks.schema import Task

_EXECUTIONS = flags.DEFINE_integer("executions", 5000, "how many, those of earlier runs in the same folder included")
_KIND = flags.DEFINE_enum("kind", "docker", ["docker", "local"], "back end")
_WORKERS = flags.DEFINE_integer("workers", 4, "pool workers")
_OUT = flags.DEFINE_string("out", None, "folder for results and the daemon's data", required=True)
_SEED = flags.DEFINE_integer("seed", 0, "of the mix of patches and of the faults")
_FAULT_SECONDS = flags.DEFINE_float("fault_seconds", 20.0, "mean time between two kills of workers or containers")
_RESTART_SECONDS = flags.DEFINE_float("restart_seconds", 150.0, "mean time between two ends of the Docker daemon")

SOURCE = 'def clamp(value, low, high):\n    return max(low, min(value, high))\n'
BROKEN = SOURCE.replace("max(low", "min(low")
TESTS = ("import pytest\nfrom victim.calc import clamp\n\n@pytest.mark.parametrize('x', range(8))\ndef test_clamp(x):\n"
         "    assert clamp(x, 3, 5) == sorted((3, x, 5))[1]\n")
FAILING = tuple(f"tests/test_calc.py::test_clamp[{n}]" for n in range(8) if n != 3)
PASSING = ("tests/test_calc.py::test_clamp[3]",)
TIMEOUT = 2.0
FORGOTTEN = "shims that the engine forgot"
# Patch kind: (share, code put before the source, whether that is the right one, outcomes that it can have).
DEAD = ("timeout", "killed", "out_of_memory", "unresolved")
KINDS = {
    "right": (48, "", True, ("resolved",)), "wrong": (27, "", False, ("unresolved",)),
    "exit": (4, "import os\nos._exit(0)\n", True, ("killed", "unresolved")),
    "hang": (4, "import signal, time\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(600)\n", True, ("timeout",)),
    # A copy of the runner that outlives the bomb writes records of its own, which are taken for forged ones.
    "fork_bomb": (3, "import os\nwhile True:\n    os.fork()\n", True, (*DEAD, "suspected_exploit")),
    "memory_bomb": (3, "x = []\nwhile True:\n    x.append(bytearray(1 << 24))\n", True, DEAD),
    "disk_fill": (3, "import os\nfor d in ('.', '/tmp', '/dev/shm'):\n  for n in range(40):\n    try:\n"
                     "      open(f'{d}/big{n}', 'wb').write(bytes(15_000_000))\n    except OSError: pass\n", True,
                  (*DEAD, "resolved")),
    # The next three are one in twenty.
    "forger": (2, "import sys\nfor h in sys.meta_path:\n    for o in h.config.hook.pytest_runtest_call.get_hookimpls() if "
                  "hasattr(h, 'config') else ():\n        if not (o.hookwrapper or o.wrapper):\n            o.function, "
                  "o.argnames = (lambda item: None), ('item',)\n", False, ("suspected_exploit", "unresolved")),
    "hostile_row": (1, "", False, ("patch_failed", "empty_patch")), "hostile_sandbox": (2, "", False, ("contained",)),
    "flood": (3, "import os\nfor _ in range(100):\n    os.write(1, b'x' * 1_000_000)\n", True, (*DEAD, "resolved")),
}


HOSTILE_ROWS = ("\ud800", "diff", "--- a/../../x\n+++ b/../../x\n@@ -0,0 +1 @@\n+x\n", "--- /dev/null\n+++ b/victim/" + "a" * 300 + (
    ".py\n@@ -0,0 +1 @@\n+x\n"), "--- /dev/null\n+++ b/victim/calc.py/x.py\n@@ -0,0 +1 @@\n+x\n", "--- a/victim/calc.py\n+++ "
    "b/victim/calc.py\n@@ -1,2 +1,2 @@\n" + "-x\n+y\n" * 50_000, "GIT binary patch\nliteral 1\nIcmZQz\n")
HOSTILE_COMMANDS = (
    "python -c \"import os\nfor _ in range(5_000): os.mkdir('d'); os.chdir('d')\"",
    "python -c \"import os\nos.mkdir('h')\nfor n in range(3_000): open(f'h/{n}', 'w').truncate(2_000_000)\"",
    "python -c \"import os\nfor n in range(60_000): os.symlink('x', f'l{n}')\"", "cd ..; mv repo gone; ln -s /proc/self repo",
    "for d in . /tmp /dev/shm; do head -c 15000000 /dev/zero > $d/big; done", "chmod 0 . .. victim; touch /tmp/note",
    "(trap '' TERM HUP; setsid sleep 600 &) ; (setsid sh -c 'while :; do :; done' &) ; true", "kill -9 -1; kill -9 1",
    "python -c \"import os\nfor n in range(999): open(b'\\xff%d' % n, 'w')\nos.mkfifo('p')\"", "yes | head -c 30000000")


def hostile_sandbox(pool: EnvPool, number: int) -> str:
    """Lets a hostile command run in an agent's sandbox; "contained" where its files are told and a new one is as ever."""
    command = random.Random(f"{_SEED.value} {number} command").choice(HOSTILE_COMMANDS)
    for _ in range(12):  # a worker or an engine that was killed takes its sandboxes along
        with contextlib.suppress(SandboxError):
            with pool.open_session("victim==1", {}) as session:
                session.exec(command, TIMEOUT).result()
                with contextlib.suppress(OSError):  # its own affair
                    session.diff().result()
            with pool.open_session("victim==1", {}) as session:
                found = session.exec("cat victim/calc.py; ls /tmp /dev/shm | wc -w", TIMEOUT).result()
                same = (found.output.startswith(SOURCE), session.diff().result())
                return "contained" if same == (True, "") else f"left {found.output[-200:]!r}"
        time.sleep(1.0)
    return "infrastructure"


def task() -> Task:
    """The task that all executions grade."""
    bug = patches.make_diff({"victim/calc.py": SOURCE}, {"victim/calc.py": BROKEN})
    return Task("soak", "victim==1", "", patches.reverse(bug), "", "clamp is wrong", FAILING, PASSING, bug_patch=bug,
                timeout=TIMEOUT)


def patch(number: int) -> tuple[str, str]:
    """(kind, patch) of an execution; no two patches are equal, so that no verdict comes from a cache."""
    rng = random.Random(f"{_SEED.value} {number}")
    kind = rng.choices(list(KINDS), [share for share, *_ in KINDS.values()])[0]
    _, code, right, _ = KINDS[kind]
    if kind == "hostile_row":
        return kind, rng.choice(HOSTILE_ROWS) + f"# {number}\n"
    text = code + (SOURCE if right else BROKEN) + f"# {number}\n"
    return kind, patches.make_diff({"victim/calc.py": BROKEN}, {"victim/calc.py": text})


class Faults(threading.Thread):
    """Kills things at random times until told to stop."""

    def __init__(self, pool: EnvPool, daemon: Daemon | None):
        super().__init__(daemon=True)
        self.pool, self.engine, self.counts, self.stopped = pool, daemon, collections.Counter(), threading.Event()
        self.rng, self.error = random.Random(_SEED.value), None

    def run(self) -> None:
        """The thread; ends the whole program where it cannot repair what it broke."""
        try:
            self._run()
        except Exception as error:
            self.error = error
            _thread.interrupt_main()

    def _run(self) -> None:
        restart = time.monotonic() + self.rng.expovariate(1 / _RESTART_SECONDS.value)
        while not self.stopped.wait(self.rng.expovariate(1 / _FAULT_SECONDS.value)):
            if self.engine is not None and time.monotonic() > restart:
                number = self.rng.choice([signal.SIGTERM, signal.SIGKILL])
                self.engine.restart(number)
                self.counts[f"daemon {signal.Signals(number).name}"] += 1
                restart = time.monotonic() + self.rng.expovariate(1 / _RESTART_SECONDS.value)
            elif self.engine is not None and self.rng.random() < 0.4:
                client = images.engine()
                running = client.api.containers()
                with contextlib.suppress(docker.errors.APIError):  # it may have gone by itself
                    if running:
                        client.api.kill(self.rng.choice(running)["Id"])
                        self.counts["container"] += 1
            else:
                line = self.rng.choice(self.pool._lines)
                if line is not None and line.process.poll() is None:
                    line.process.kill()
                    self.counts["worker"] += 1


def memory(pids: list[int]) -> float:
    """Resident MB of processes."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return total * os.sysconf("SC_PAGE_SIZE") / 2**20


def left_behind(daemon: Daemon | None, state: pathlib.Path) -> dict[str, int]:
    """What is still there when everything should be gone."""
    found = {"processes": len(descendants(os.getpid(), daemon and daemon.process.pid)),
             "files": sum(1 for _ in (state / "work").rglob("*")) if (state / "work").exists() else 0}
    if daemon is not None:
        client = images.engine()
        found["containers"] = len(client.api.containers(all=True))
        found["volumes"] = len(client.volumes.list())
        shims = daemon.shims()
        forgotten = daemon.forgotten({one["Id"] for one in client.api.containers(all=True)}) & set(shims.values())
        found["shims"] = sum(container not in forgotten for container in shims.values())
        found[FORGOTTEN] = len(shims) - found["shims"]
    return found


def execute(pool: EnvPool, journal: pathlib.Path, known: dict[int, str]) -> tuple[collections.Counter, list[float]]:
    """Runs what is not known yet; returns how often each number came, and samples of this process's memory."""
    came, samples, lock = collections.Counter(dict.fromkeys(known, 1)), [], threading.Lock()
    one = task()
    todo = [number for number in range(_EXECUTIONS.value) if number not in known]
    with open(journal, "a", encoding="utf-8") as stream, concurrent.futures.ThreadPoolExecutor(4) as threads, tqdm.tqdm(
            total=_EXECUTIONS.value, initial=len(known), desc="executions", file=sys.stderr, mininterval=5) as bar:
        def start(number):
            kind, text = patch(number)
            future = threads.submit(hostile_sandbox, pool, number) if kind == "hostile_sandbox" else pool.grade(one, text)
            future.add_done_callback(lambda done: note(number, kind, done))
            return future

        def note(number, kind, done):
            if done.cancelled():
                return
            error = done.exception()
            found = None if error else done.result()
            outcome = f"{type(error).__name__}: {error}" if error else getattr(found, "outcome", found)
            with lock:
                if stream.closed:  # the run was interrupted, and this one is done again
                    return
                came[number] += 1
                known[number] = outcome
                stream.write(json.dumps({"number": number, "kind": kind, "outcome": outcome}) + "\n")
                stream.flush()
                bar.update()
                if came.total() % 20 == 0:
                    samples.append(memory([os.getpid()]))

        for future in pool.map(start, todo, ahead=4 * _WORKERS.value):
            del future
    return came, samples


def main(_) -> None:
    """Runs, then counts what was lost, doubled, wrong or left."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the daemon is ended in order
    out = pathlib.Path(_OUT.value).absolute()
    out.mkdir(parents=True, exist_ok=True)
    journal, known = out / "results.jsonl", {}
    if journal.exists():
        lines = journal.read_text(encoding="utf-8").split("\n")
        known = {row["number"]: row["outcome"] for row in map(json.loads, filter(_whole, lines))}
        journal.write_text("".join(line + "\n" for line in lines if _whole(line)), encoding="utf-8")
    tree, state = out / "tree", out / "state"
    for path, text in {"victim/__init__.py": "", "victim/calc.py": SOURCE, "tests/test_calc.py": TESTS}.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text)
    os.chmod(out, 0o755)
    with own_daemon(out) if _KIND.value == "docker" else contextlib.nullcontext() as daemon:
        failures = soak(daemon, tree, state, journal, known)
    if failures:
        raise SystemExit(f"FAILED: {', '.join(failures)}")


def _whole(line: str) -> bool:
    try:
        return "outcome" in json.loads(line)
    except ValueError:
        return False


def soak(daemon: Daemon | None, tree: pathlib.Path, state: pathlib.Path, journal: pathlib.Path,
         known: dict[int, str]) -> list[str]:
    """The run itself and its table; returns what failed."""
    earlier, started = len(known), time.monotonic()
    arguments = {"kind": _KIND.value, "state_dir": str(state), "limits": Limits(
        memory_mb=256, processes=32, disk_mb=64, file_mb=16, cpus=1.0)}
    spec = RepositorySpec("victim==1", str(tree))
    with EnvPool(_WORKERS.value, arguments, [spec], attempts=12) as pool:
        pool.prepare(spec).result()
        faults = Faults(pool, daemon)
        faults.start()
        try:
            came, samples = execute(pool, journal, known)
        except KeyboardInterrupt:
            pool.close(grace=0.0)
            raise SystemExit(f"interrupted ({faults.error or 'from outside'}); run again to go on") from None
        faults.stopped.set()
        faults.join()
        retried = pool.counts["infrastructure_failures"]
    seconds = time.monotonic() - started
    time.sleep(3.0)
    left = left_behind(daemon, state)
    kinds = {number: patch(number)[0] for number in range(_EXECUTIONS.value)}
    wrong = {number: known[number] for number in known if known[number] not in KINDS[kinds[number]][3]}
    lost = [number for number in kinds if came[number] == 0]
    doubled = [number for number in kinds if came[number] > 1]
    table = collections.Counter((kinds[number], outcome) for number, outcome in known.items())
    print(f"\n{_KIND.value}, {_WORKERS.value} workers, {len(known)} executions ({earlier} of them in earlier runs), "
          f"{len(known) - earlier} now in {seconds:.0f} s\n\n| patch | outcome | count |\n|---|---|---|")
    for (kind, outcome), count in sorted(table.items()):
        print(f"| {kind} | {outcome} | {count} |")
    print("\n| fault | count |\n|---|---|\n" + "\n".join(f"| {name} | {count} |" for name, count in
                                                          sorted(faults.counts.items())))
    growth = 0.0
    if len(samples) >= 8:
        quarter = len(samples) // 4
        first, last = statistics.median(samples[quarter:2 * quarter]), statistics.median(samples[-quarter:])
        growth = last / first - 1
        print(f"\nmemory of this process: {first:.0f} MB in the second quarter, {last:.0f} MB in the last")
    print(f"tries repeated after a failure of the infrastructure: {retried}\nlost {len(lost)}, doubled {len(doubled)}, "
          f"wrong {len(wrong)}; left behind: " + ", ".join(f"{count} {name}" for name, count in left.items()))
    for number, outcome in list(wrong.items())[:10]:
        print(f"  wrong: {number} {kinds[number]} {outcome[:200]}")
    left.pop(FORGOTTEN, None)
    failed = {"lost": lost, "doubled": doubled, "wrong": wrong, "left": any(left.values()), "memory": growth > 0.1}
    return [name for name, value in failed.items() if value]


if __name__ == "__main__":
    app.run(main)
