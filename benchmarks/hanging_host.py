"""Claim: a host whose environments hang leaves the other at 0.95 or more of its unhindered ticks a second.

    python benchmarks/hanging_host.py --out=benchmarks/results/hanging_host.json

Two processes of four emulated devices run stage `experts` asynchronously (max_staleness 1): a tiny model with a shell in
sandboxes, whose every turn is answered when a test in a sandbox of its host's own has ended. That test sleeps for
--latency seconds, on both hosts; on the hanging side those of host 1 sleep until they are stopped at --limit instead. Both
sides are run in turn, --repeats times, from the same files. Printed of host 0, without the first update, in which
programs are compiled: ticks in which its episodes generated, a second of rollouts; seconds of a rollout; which share of
the groups that updates learned from was its own; and groups that grew too old, of both hosts. The two hosts share this
machine's processors: where host 1 hangs it also leaves them to host 0.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import tempfile

import _two_hosts
from absl import app, flags

from qcn_jax import files, testing
from qcn_jax.pipeline.experts.expert import Expert
from qcn_jax.pipeline.rl.events import Events
from qcn_jax.pipeline.rl.orchestrator import UPDATE
from qcn_jax.sharding import distributed
from tests.pipeline import vowels

OUT = flags.DEFINE_string("out", "", "JSON for what was measured; empty: none.")
UPDATES = flags.DEFINE_integer("updates", 10, "Of every run.", lower_bound=2)
REPEATS = flags.DEFINE_integer("repeats", 2, "Runs of each side.", lower_bound=1)
LATENCY = flags.DEFINE_float("latency", 0.3, "Seconds that a test sleeps.")
LIMIT = flags.DEFINE_float("limit", 20.0, "Seconds after which a hanging one is stopped.")
TEST = "tests/test_waits.py"
LEAST = 0.95
_asked = itertools.count()


@dataclasses.dataclass(frozen=True)
class Waiting(Expert):
    """Rewards vowels; turns are answered when a test has ended.

    Attributes:
      hangs: the host on which that is never, before it is stopped; -1 is none.
    """

    hangs: int = -1

    def conversation(self, prompt, encoder, services, **options):
        """See Expert.conversation."""
        conversation = super().conversation(prompt, encoder, services, **options | {"graded": False})
        host, reply, outcome = distributed.place()[0], conversation.reply, conversation.outcome
        seconds = 1e6 if host == self.hangs else float(os.environ["QCN_LATENCY"])

        def replied(tokens, stopped):
            # No two alike: what was run before is remembered.
            text = f"import time\n\n\ndef test_waits():\n    time.sleep({seconds})  # {host} {next(_asked)}\n"
            services.run_tests(prompt.task.repo, {TEST: text}, [f"{TEST}::test_waits"],
                               float(os.environ["QCN_LIMIT"]), False)
            return reply(tokens, stopped)

        def scored(truncated):
            return vowels.rewarded(conversation, outcome(truncated))

        conversation.reply, conversation.outcome = replied, scored
        return conversation


ANSWERS = Waiting("waiting", "waiting expert", headline=True)
HANGS = dataclasses.replace(ANSWERS, hangs=1)


def played(folder: pathlib.Path, workdir: str, expert: str, variables: dict[str, str]) -> dict[str, float]:
    """Runs the stage on two hosts; what was measured on host 0, of the updates but the first."""
    subprocess.run(["cp", "-r", str(folder / "tasks"), str(folder / workdir)], check=True)
    run = _two_hosts.command(
        folder, workdir, "experts", *_two_hosts.SETTINGS, f"--config.experts.names=hanging_host:{expert}",
        f"--config.experts.updates={UPDATES.value}", "--config.experts.checkpoint_every=100", "--config.workers=8")
    with testing.Hosts(run, environment=variables, quick=False) as hosts:
        hosts.finish()
    return measured(folder / workdir)


def measured(workdir: pathlib.Path) -> dict[str, float]:
    """Of a run's host 0, without its first update."""
    rows = [json.loads(line) for line in (workdir / "experts/waiting/metrics.jsonl").read_text().splitlines()][1:]
    told = Events(workdir / "experts/waiting/journal/0", writable=False).read()
    own = {key[0] for row in told for key, _ in row.get("verdicts", ())}
    chosen = [number for row in told if row["kind"] == UPDATE for number in row["chosen"]][_two_hosts.PROMPTS:]
    total = lambda name: sum(row[name] for row in rows)
    return {"ticks_per_second": total("ticks") / total("seconds_rollout"), "ticks": total("ticks"),
            "seconds_of_rollout": total("seconds_rollout") / len(rows), "stale_groups": total("stale_groups"),
            "own_groups": len(own.intersection(chosen)) / len(chosen)}


def main(argv: list[str]) -> None:
    """Runs both sides in turn and prints a line for each run, and the ratio."""
    sides: dict[str, list[dict[str, float]]] = {"ANSWERS": [], "HANGS": []}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        variables = _two_hosts.environment(folder, QCN_LATENCY=str(LATENCY.value), QCN_LIMIT=str(LIMIT.value))
        _two_hosts.prepare(folder, variables)
        for repeat in range(REPEATS.value):
            for side, runs in sides.items():
                runs.append(played(folder, f"{side}{repeat}", side, variables))
                print(side, json.dumps({key: round(value, 3) for key, value in runs[-1].items()}), flush=True)
    rates = [statistics.fmean(run["ticks_per_second"] for run in runs) for runs in sides.values()]
    ratio = rates[1] / rates[0]
    print(f"ticks a second where host 1 hangs, of those where it does not: {ratio:.2f} (claimed: {LEAST} or more)")
    if OUT.value:
        files.write_json(pathlib.Path(OUT.value), {
            "updates": UPDATES.value, "latency": LATENCY.value, "limit": LIMIT.value, "ratio": round(ratio, 3),
            "runs": {side.lower(): runs for side, runs in sides.items()}})
    if ratio < LEAST:
        raise SystemExit("hanging_host: below what is claimed")


if __name__ == "__main__":
    app.run(main)
