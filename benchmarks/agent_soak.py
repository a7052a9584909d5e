"""Episodes of agents while everything that they need is killed: nothing lost, nothing doubled, every outcome the right one.

  python benchmarks/agent_soak.py --episodes=200 --out=DIR        resumable: run it again after an interruption
  python benchmarks/agent_soak.py --episodes=16 --kind=local --out=DIR

`qcn evaluate` plays tasks with scaffold mini_swe_agent against an endpoint whose models play right, wrong, empty,
malformed, looping, too long, cut off and slow turns, say nothing until they are asked again, or fail with 429, 500 and a
broken stream before they answer; and then, a fifth of the episodes, against `qcn serve` of a checkpoint that mends or gives
up by chance. On the way are killed, in turn: a pool worker, the endpoint or the engine, `qcn evaluate` itself, and (docker)
a container and the Docker daemon, which is one of its own. What was killed is started again, and the same `qcn evaluate`
command given again, until all episodes count. The exit status is 0 if every episode is there once, with the outcome that
its model has, and nothing is left.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import docker
from _daemon import Daemon, descendants, own_daemon
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qcn_jax.agents.scaffolds.mini_swe_agent import MINI_SWE_AGENT  # noqa: E402
from qcn_jax.envs.sandbox import images  # noqa: E402
from qcn_jax.envs.tasks.schema import write_tasks  # noqa: E402
from tests.agents import playing  # noqa: E402
from tests.inference import speaking  # noqa: E402
from tests.pipeline import chain  # noqa: E402

_EPISODES = flags.DEFINE_integer("episodes", 200, "how many")
_KIND = flags.DEFINE_enum("kind", "docker", ["docker", "local"], "back end")
_OUT = flags.DEFINE_string("out", None, "folder for results and the daemon's data")
_SEED = flags.DEFINE_integer("seed", 0, "of the faults")
_EVERY = flags.DEFINE_integer("every", 6, "episodes that end between two kills, in the mean")
_SERVE = flags.DEFINE_integer("serve", 0, "be the endpoint, on this port")

# What a model plays, and what must become of its episodes.
MODELS = {"gold": "resolved", "wrong": "unresolved", "flaky": "resolved", "empty": "unresolved", "looping": "limit",
          "malformed": "unresolved", "overlong": "limit", "cut_off": "unresolved", "tardy": "resolved",
          "stalled": "resolved"}
ENGINE = "engine"  # the model of a checkpoint: its episodes are resolved where it wrote MENDED
MENDED = playing.block(playing.edit("count"))
ATTEMPTS = 5  # of a task, where there are enough episodes
RERUNS = 60  # of the command, after which something is wrong


class World:
    """What is started, and can be killed: who answers, the run, the daemon. Folder `out` is one part's alone."""

    def __init__(self, out: pathlib.Path, daemon: Daemon | None, models: Sequence[str], episodes: int) -> None:
        self.out, self.daemon, self.counts = out, daemon, collections.Counter()
        self.checkpoint = out / "checkpoint" if ENGINE in models else None
        out.mkdir(exist_ok=True)
        out.chmod(0o755)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.count = max(episodes // ATTEMPTS, len(models))
        self.attempts = max(episodes // self.count, 1)
        self.tasks = {}
        for number in range(self.count):
            model = models[number % len(models)]
            name = "count" if model == ENGINE else sorted(playing.DEFECTS)[number % 3]
            task = dataclasses.replace(playing.words(name), instance_id=f"{name}-{number}-{model}",
                                       problem_statement=f"Mend {name}. Play {model}.")
            self.tasks[task.instance_id] = (task, model)
        chain.write(out)
        write_tasks(out / "tasks.jsonl", [task for task, _ in self.tasks.values()])
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(out.parent / "cache")}
        self.endpoint = self.run = None

    def serve(self) -> None:
        """Starts who answers, and waits until it does."""
        command = [sys.executable, __file__, f"--serve={self.port}"]
        if self.checkpoint:
            if not self.checkpoint.exists():
                words = [MINI_SWE_AGENT.system, MINI_SWE_AGENT.instance]
                speaking.write(self.checkpoint, [MENDED, playing.SUBMIT], words)
            command = [sys.executable, "-m", "qcn_jax", "serve", f"--checkpoint={self.checkpoint}",
                       f"--port={self.port}", "--slots=4", "--max_length=8192", "--name=as-told"]
        with open(self.out / "serve.log", "ab") as log:
            self.endpoint = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if self.endpoint.poll() is not None:
                raise SystemExit(f"nobody answers; see {self.out}/serve.log")
            time.sleep(0.05)

    def evaluate(self) -> None:
        """Starts the run, or has it go on."""
        patience = 300.0 if self.checkpoint else playing.IMPATIENT  # a new engine compiles first
        command = [sys.executable, "-m", "qcn_jax", "evaluate", f"--endpoint=http://127.0.0.1:{self.port}/v1",
                   "--model=as-told", f"--tasks={self.out}/tasks.jsonl", f"--out={self.out}/evaluated",
                   f"--repo={self.out}/words-1.0", f"--sandbox={_KIND.value}", "--invalid=keep", "--max_turns=4",
                   f"--attempts={self.attempts}", "--workers=2", "--parallel=4", "--temperature=1",
                   f"--request_seconds={patience}"]
        with open(self.out / "evaluate.log", "ab") as log:
            self.run = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def kill(self, what: str, rng: random.Random) -> bool:
        """Kills something; False where there is none of it."""
        if what == "worker":
            found = [pid for pid in descendants(self.run.pid) if b"envs.pool.worker" in _command(pid)]
            if not found:
                return False
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(found), signal.SIGKILL)
        elif what in ("endpoint", "engine"):
            self.endpoint.kill()
            self.endpoint.wait()
            time.sleep(rng.uniform(0, 3))
            self.serve()
        elif what == "run":
            self.run.kill()
            self.run.wait()
            self.evaluate()
        elif what == "container":
            client = images.engine()
            running = client.api.containers()
            if not running:
                return False
            with contextlib.suppress(docker.errors.APIError):  # it may have gone by itself
                client.api.kill(rng.choice(running)["Id"])
        else:
            self.daemon.restart(rng.choice([signal.SIGTERM, signal.SIGKILL]))
        return True

    def finish(self) -> None:
        """Lets the run come to its end, with faults on the way; raises SystemExit where it never does."""
        rng, kinds = random.Random(_SEED.value), ["engine" if self.checkpoint else "endpoint", "worker", "run"]
        kinds = itertools.cycle([*kinds, "container", "daemon"] if self.daemon else kinds)
        due, what = self.ended() + 1, next(kinds)
        while True:
            try:
                status = self.run.wait(0.1)
            except subprocess.TimeoutExpired:
                if self.ended() >= due and self.kill(what, rng):
                    self.counts[what] += 1
                    due, what = self.ended() + 1 + rng.randrange(2 * _EVERY.value), next(kinds)
                continue
            if status == 0 and all(row["outcome"] != "infrastructure" for row in self.rows().values()):
                return
            self.counts["(given again)"] += 1
            if self.counts["(given again)"] > RERUNS:
                raise SystemExit(f"the run comes to no end; see {self.out}/evaluate.log")
            self.evaluate()

    def due(self, key: str) -> str:
        """The outcome that an episode must have."""
        model = self.tasks[key.rpartition("/")[0]][1]
        if model != ENGINE:
            return MODELS[model]
        said = json.loads((self.out / f"evaluated/trajectories/{key}.traj.json").read_text())["messages"]
        mended = any(message["role"] == "assistant" and message["content"] == MENDED for message in said)
        return "resolved" if mended else "unresolved"

    def ended(self) -> int:
        """How many episodes are written down."""
        path = self.out / "evaluated/episodes.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def rows(self) -> dict[str, dict]:
        """The last record of every episode."""
        return {entry["key"]: entry for entry in self.entries()}

    def entries(self) -> list[dict]:
        """All records, in the order in which they were written, with their keys."""
        lines = (self.out / "evaluated/episodes.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line)["value"] for line in lines]
        return [row | {"key": f"{row['instance_id']}/{row['attempt']}"} for row in rows]


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def soak(world: World) -> list[str]:
    """The run and its table; returns what failed."""
    started = time.monotonic()
    world.serve()
    world.evaluate()
    try:
        world.finish()
    finally:
        world.run.kill()
        world.endpoint.kill()
        world.run.wait()
        world.endpoint.wait()
    seconds, entries, rows = time.monotonic() - started, world.entries(), world.rows()
    wanted = {f"{name}/{attempt}" for name in world.tasks for attempt in range(world.attempts)}
    counting = collections.Counter(row["key"] for row in entries if row["outcome"] != "infrastructure")
    model_of = {key: world.tasks[key.rpartition("/")[0]][1] for key in wanted}
    told = {key for key in wanted if (world.out / f"evaluated/trajectories/{key}.traj.json").is_file()}
    wrong = [key for key in told & rows.keys() if rows[key]["outcome"] != world.due(key) or (
        rows[key]["outcome"] == "resolved" and rows[key]["patch"] != world.tasks[key.rpartition("/")[0]][0].patch)]
    left = descendants(os.getpid(), world.daemon and world.daemon.process.pid)
    containers = len(images.engine().api.containers(all=True)) if world.daemon else 0
    print(f"\n{_KIND.value}, {world.out.name}: {len(wanted)} episodes in {seconds:.0f} s; "
          f"{sum(row['retries'] for row in rows.values())} "
          f"requests were asked again, {len(entries) - sum(counting.values())} episodes were lost to the "
          f"infrastructure and played again\n\n| model | outcome | episodes |\n|---|---|---|")
    table = collections.Counter((model_of[key], rows[key]["outcome"]) for key in wanted & rows.keys())
    print("\n".join(f"| {model} | {outcome} | {count} |" for (model, outcome), count in sorted(table.items())))
    print("\n| killed | times |\n|---|---|\n" + "\n".join(f"| {name} | {count} |" for name, count in sorted(
        world.counts.items())))
    lost, doubled = wanted - counting.keys(), [key for key, count in counting.items() if count > 1]
    print(f"\nlost {len(lost)}, doubled {len(doubled)}, wrong {len(wrong)}, without a conversation {len(wanted - told)}; "
          f"left behind: {len(left)} processes, {containers} containers", flush=True)
    for key in wrong[:10]:
        print(f"  wrong: {key}: {rows[key]['outcome']}, {rows[key]['reason']}, {rows[key]['detail'][:200]}")
    failed = {"lost": lost, "doubled": doubled, "wrong": wrong, "told": wanted - told, "left": left or containers}
    return [f"{world.out.name}: {name}" for name, value in failed.items() if value]


def main(_) -> None:
    """Runs, then counts what was lost, doubled, wrong or left."""
    if _SERVE.value:
        with playing.serve(port=_SERVE.value):
            signal.pause()
    if not _OUT.value:
        raise SystemExit("--out: name a folder")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the daemon is ended in order
    out = pathlib.Path(_OUT.value).absolute()
    out.mkdir(parents=True, exist_ok=True)
    os.chmod(out, 0o755)
    with own_daemon(out) if _KIND.value == "docker" else contextlib.nullcontext() as daemon:
        share = _EPISODES.value // 5
        failures = soak(World(out / "scripted", daemon, list(MODELS), _EPISODES.value - share))
        failures += soak(World(out / ENGINE, daemon, [ENGINE], share))
    if failures:
        raise SystemExit(f"FAILED: {', '.join(failures)}")


if __name__ == "__main__":
    app.run(main)
