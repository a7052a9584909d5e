"""Claim: an asynchronous run that is killed over and over loses nothing, takes nothing twice and leaves nothing behind.

    python benchmarks/kills.py --kills=20 --out=benchmarks/results/kills.json
    python benchmarks/kills.py --kills=8 --kind=local

Two processes of four emulated devices run stage `experts` (max_staleness 1) of a tiny model. Every conversation has a
sandbox of its own in which each turn appends a line to a file, and whose last one counts them: a turn that was said
twice, or forgotten, would show. Killed are, in turn, at moments drawn from --seed: a pool's worker; the process of one
host, whose workers must notice; a whole host, processes and workers at once; both hosts' processes; (docker) the daemon,
one of this benchmark's own. The same command is given again until all updates are done. Then
  - what the journals of both hosts held at each kill still stands at their beginning, bytes alike;
  - every update has its groups whole, each sample with a verdict once, no group is taken in two updates, and each group
    that began was taken, is counted as lost, or open in the end;
  - `qcn replay` derives every update again from the journals with the weights that the run had;
  - no process, container, or temporary file of the run is left.
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
import subprocess
import sys
import tempfile
import time
import uuid
from typing import Any

import _two_hosts
from _daemon import Daemon, descendants, own_daemon
from absl import app, flags

from qcn_jax import files, testing
from qcn_jax.config import ExpertsConfig
from qcn_jax.envs.sandbox import images
from qcn_jax.envs.sandbox.base import SandboxError
from qcn_jax.pipeline.experts.expert import Expert
from qcn_jax.pipeline.rl.events import Events
from qcn_jax.pipeline.rl.orchestrator import UPDATE
from qcn_jax.pipeline.rl.recorded import Journals
from tests.pipeline import vowels

OUT = flags.DEFINE_string("out", "", "JSON for what came of it; empty: none.")
KILLS = flags.DEFINE_integer("kills", 20, "How many.", lower_bound=1)
KIND = flags.DEFINE_enum("kind", "docker", ["docker", "local"], "Sandboxes.")
SEED = flags.DEFINE_integer("seed", 0, "Of kinds' order and moments.")
UPDATES = flags.DEFINE_integer("updates", 40, "Of the run.", lower_bound=2)
DELAY = flags.DEFINE_float("delay", 12.0, "Seconds within which a kill follows what it waits for.")
HOSTS, MARK = 2, "QCN_KILLS"
TURN, COUNT = "echo turn >> /tmp/turns", "wc -l < /tmp/turns"


@dataclasses.dataclass(frozen=True)
class Counting(Expert):
    """Rewards vowels; each turn leaves a line in the conversation's sandbox."""

    def conversation(self, prompt, encoder, services, **options):
        """See Expert.conversation."""
        conversation = super().conversation(prompt, encoder, services, **options | {"graded": False})
        reply, outcome, close = conversation.reply, conversation.outcome, conversation.close
        held: dict[str, Any] = {"turns": 0, "failed": False}

        def run(line):
            if "session" not in held:
                held["session"] = services.open(prompt.task)
            return held["session"].exec(line).result().output

        def replied(tokens, stopped):
            held["turns"] += 1
            try:
                run(TURN)
            except SandboxError:
                held["failed"] = True
            return reply(tokens, stopped)

        def scored(truncated):
            lines = -1
            try:
                if not held["failed"]:
                    lines = int(run(COUNT))
            except SandboxError:
                held["failed"] = True
            found = vowels.rewarded(conversation, outcome(truncated))
            closed()
            return dataclasses.replace(found, infrastructure=held["failed"],
                                       detail={"turns": held["turns"], "lines": lines})

        def closed():
            if "session" in held:
                held["session"].close()
            close()

        conversation.reply, conversation.outcome, conversation.close = replied, scored, closed
        return conversation


COUNTING = Counting("counting", "counting expert", headline=True)


@dataclasses.dataclass
class Run:
    """The run, and what is done to it."""

    folder: pathlib.Path
    daemon: Daemon | None
    variables: dict[str, str]
    hosts: testing.Hosts | None = None

    @property
    def experts(self) -> pathlib.Path:
        """Folder of the expert's results."""
        return self.folder / "run" / "experts" / "counting"

    def command(self) -> list[str]:
        """The same every time."""
        return _two_hosts.command(
            self.folder, "run", "experts", *_two_hosts.SETTINGS, "--config.experts.names=kills:COUNTING",
            f"--config.experts.updates={UPDATES.value}", "--config.experts.checkpoint_every=3", "--config.workers=3",
            f"--config.sandbox={KIND.value}")

    def start(self) -> None:
        """Gives the command to both hosts."""
        self.hosts = testing.Hosts(self.command(), environment=self.variables, quick=False)

    def heads(self) -> list[bytes]:
        """What the journals hold, up to the last tick that both tell of."""
        folders = [self.experts / "journal" / str(host) for host in range(HOSTS)]
        if not all((folder / "events.jsonl").exists() for folder in folders):
            return [b""] * HOSTS
        texts = [(folder / "events.jsonl").read_bytes() for folder in folders]
        rows = [[line for line in text.splitlines(keepends=True) if line.endswith(b"\n")] for text in texts]
        last = min((json.loads(lines[-1])["t"] if lines else -1) for lines in rows)
        return [b"".join(line for line in lines if json.loads(line)["t"] <= last) for lines in rows]

    def updates(self) -> int:
        """How many the first host's journal tells of."""
        path = self.experts / "journal" / "0" / "events.jsonl"
        return path.read_bytes().count(b'"kind": "update"') if path.exists() else 0

    def kill(self, what: str, rng: random.Random) -> bool:
        """Kills something; False where there is none of it."""
        pids = [process.pid for process in self.hosts._processes]
        if what == "worker":
            found = [pid for pid in descendants(os.getpid()) if b"envs.pool.worker" in _command(pid)]
            if not found:
                return False
            _end([rng.choice(found)])
            return True
        if what == "daemon":
            self.daemon.restart(rng.choice([signal.SIGTERM, signal.SIGKILL]))
            return True
        host = rng.randrange(HOSTS)
        if what == "host":
            _end([pids[host], *descendants(pids[host])])
        else:
            _end(pids if what == "both" else [pids[host]])
        return True

    def ended(self) -> bool:
        """Whether one of the processes has."""
        return any(process.poll() is not None for process in self.hosts._processes)

    def settle(self) -> list[int]:
        """Waits for both processes to end; their exit statuses."""
        return [self.hosts.wait(host) for host in range(HOSTS)]

    def marked(self) -> list[int]:
        """Processes, of whatever parent, that hold the run's mark."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if f"{MARK}={self.variables[MARK]}".encode() in pathlib.Path(f"/proc/{name}/environ").read_bytes():
                    found.append(int(name))
        return found


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _end(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def killed(run: Run) -> tuple[list[dict[str, Any]], list[list[bytes]]]:
    """Runs to the end with kills on the way; returns a row for each, and what the journals held then."""
    rng, kills, heads = random.Random(SEED.value), [], []
    order = itertools.cycle(["worker", "process", "host", "both", *(["daemon"] if run.daemon else [])])
    began = time.monotonic()
    run.start()
    while True:
        if len(kills) < KILLS.value:
            what, known = next(order), run.updates()
            # Most wait until the run has come further; a quarter comes while it begins, or begins again.
            early = rng.random() < 0.25 and what != "worker"
            while not early and not run.ended() and run.updates() == known:
                time.sleep(0.2)
            time.sleep(rng.uniform(0, DELAY.value))
            if run.ended() or not run.kill(what, rng):
                if not run.ended():
                    continue
            else:
                kills.append({"what": what, "second": round(time.monotonic() - began, 1), "early": early})
                print(f"kill {len(kills)}: {what} after {run.updates()} updates, {kills[-1]['second']} s", flush=True)
        statuses = None
        if len(kills) >= KILLS.value or run.ended() or kills[-1]["what"] not in ("worker", "daemon"):
            statuses = run.settle()
        if statuses is None:
            continue
        outputs = [run.hosts.output(host) for host in range(HOSTS)]
        run.hosts.__exit__()
        if statuses == [0] * HOSTS:
            return kills, heads
        heads.append(run.heads())
        if not any(status == -signal.SIGKILL for status in statuses):
            raise SystemExit(f"kills: the run ended with {statuses}: {outputs[0][-2000:]}{outputs[1][-2000:]}")
        run.start()


def checked(run: Run, heads: list[list[bytes]]) -> dict[str, Any]:
    """What the journals and the curve say; raises AssertionError where something was lost or taken twice."""
    texts = [(run.experts / "journal" / str(host) / "events.jsonl").read_bytes() for host in range(HOSTS)]
    for head in heads:
        assert all(text.startswith(part) for text, part in zip(texts, head)), "a journal lost what it had held"
    rows = [json.loads(line) for line in (run.experts / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, UPDATES.value + 1)), "steps of the curve"
    journals = [Events(run.experts / "journal" / str(host), writable=False).read() for host in range(HOSTS)]
    updates = [[{name: row[name] for name in ("t", "version", "chosen", "lost", "weights")}
                for row in journal if row["kind"] == UPDATE] for journal in journals]
    assert updates[0] == updates[1] and [row["version"] for row in updates[0]] == list(range(UPDATES.value))
    used = [number for row in updates[0] for number in (*row["chosen"], *row["lost"])]
    assert len(used) == len(set(used)), "a group was taken twice"
    begun = len(used) + 2 * _two_hosts.PROMPTS  # as many are open when an update begins
    assert set(used) <= set(range(begun)), "a group that never began"
    told = Journals(run.experts / "journal", ExpertsConfig(group_size=_two_hosts.GROUP))
    records = 0
    for row in updates[0]:
        found, _ = told.next()
        real = collections.Counter(record.prompt for record in found if not record.outcome.infrastructure)
        full = {number for number in row["chosen"] if real[number] == _two_hosts.GROUP}
        assert set(real) <= set(row["chosen"]) and all(real[number] in (0, _two_hosts.GROUP) for number in row["chosen"])
        assert len({(record.prompt, record.sample) for record in found}) == len(found), "a sample was taken twice"
        for record in found:
            detail = record.outcome.detail
            assert record.outcome.infrastructure or detail["turns"] == detail["lines"] == len(record.turns), detail
        records += len(full) * _two_hosts.GROUP
    told.close()
    total = lambda name: int(sum(row[name] for row in rows))
    return {"updates": len(updates[0]), "groups": len(used), "episodes": records,
            "lost_groups": sum(len(row["lost"]) for row in updates[0]), "refilled": total("refilled"),
            "given_up_groups": total("given_up_groups"), "put_back": total("put_back")}


def replayed(run: Run) -> dict[str, Any]:
    """`qcn replay`, on two hosts: weights before how many updates are those of the run, and the last."""
    command = [sys.executable, "-m", "qcn_jax", "replay", str(run.folder / "run"), f"--out={run.folder / 'replay'}"]
    with testing.Hosts(command, environment=run.variables, quick=False) as hosts:
        hosts.finish()
    found = json.loads((run.folder / "replay" / "counting" / "summary.json").read_text())
    return {name: found[name] for name in ("equal_weights", "last_equal")}


def left(run: Run, temporary: pathlib.Path) -> dict[str, int]:
    """What is still there when everything should be gone."""
    found = {"processes": len(run.marked()), "temporary": len(list(temporary.iterdir())),
             "files": sum(1 for work in (run.folder / "run" / "sandbox").rglob("work") for _ in work.rglob("*"))}
    if run.daemon is not None:
        client = images.engine()
        found |= {"containers": len(client.api.containers(all=True)), "volumes": len(client.volumes.list())}
    return found


def main(argv: list[str]) -> None:
    """Kills, checks, prints a table."""
    with tempfile.TemporaryDirectory(prefix="qcn-kills-") as name:
        folder = pathlib.Path(name)
        temporary = folder / "tmp"
        temporary.mkdir()
        variables = _two_hosts.environment(folder, TMPDIR=str(temporary), **{MARK: uuid.uuid4().hex})
        _two_hosts.prepare(folder, variables)
        subprocess.run(["mv", str(folder / "tasks"), str(folder / "run")], check=True)
        with own_daemon(folder) if KIND.value == "docker" else contextlib.nullcontext() as daemon:
            host = {"DOCKER_HOST": daemon.socket} if daemon else {}
            run = Run(folder, daemon, variables | host)
            began = time.monotonic()
            kills, heads = killed(run)
            seconds = time.monotonic() - began
            deadline = time.monotonic() + 60  # a killed process's helpers need a moment to notice
            while any((remains := left(run, temporary)).values()) and time.monotonic() < deadline:
                time.sleep(1)
            found: dict[str, Any] = checked(run, heads) | {"left": remains} | replayed(run)
    found |= {"kills": dict(collections.Counter(kill["what"] for kill in kills)), "starts": len(heads) + 1,
              "seconds": round(seconds), "moments": kills, "kind": KIND.value, "seed": SEED.value}
    print(json.dumps(found, indent=1))
    if OUT.value:
        files.write_json(pathlib.Path(OUT.value), found)
    wrong = [name for name, fine in {
        "leaked": not any(found["left"].values()), "too few kills": len(kills) >= KILLS.value,
        "other weights": found["last_equal"] is True and found["equal_weights"] == found["updates"]}.items() if not fine]
    if wrong:
        raise SystemExit(f"kills: {', '.join(wrong)}")


if __name__ == "__main__":
    app.run(main)
