"""What becomes of all changes in the histories of git clones: how many are tasks, and why the others are none.

    python benchmarks/mining.py --clones=DIR[,DIR] [--out=bench/mining] [--setup=COMMAND]

Each clone is mined twice, once by SWE-bench's criteria and once without asking for a linked issue, and every task is
verified afterwards with one further run of both states. An interrupted run continues from its journal. The table goes
to OUT/table.md.
"""

import collections
import dataclasses
import pathlib
import re
import time

from absl import app, flags

from qcn_jax import files
from qcn_jax.envs.pool.env_pool import EnvPool
from qcn_jax.envs.synthesis import sources, verify
from qcn_jax.envs.synthesis.mine import Criteria, Mined, mine
from qcn_jax.envs.tasks.schema import write_tasks

_CLONES = flags.DEFINE_list("clones", None, "Git clones with their histories.", required=True)
_OUT = flags.DEFINE_string("out", "bench/mining", "Folder of tasks, journals and table.")
_WORKERS = flags.DEFINE_integer("workers", 2, "Changes side by side.")
_SANDBOX = flags.DEFINE_enum("sandbox", "auto", ["auto", "docker", "local"], "Where code runs.")
_SETUP = flags.DEFINE_multi_string("setup", [], "As of qcn synthesize.")
_SHOWN_WORDS = 60  # characters of a reason
CRITERIA = {"linked issue": True, "any change": False}


def reasons(mined: Mined) -> str:
    """Why executed changes are no tasks, the most frequent words first."""
    counts = collections.Counter(re.sub(r"\s+", " ", words)[:_SHOWN_WORDS] for words in mined.details.values())
    return "; ".join(f"{count} {words}" for words, count in counts.most_common(4))


def main(argv: list[str]) -> None:
    """Mines, verifies, writes the table."""
    del argv
    out = pathlib.Path(_OUT.value)
    arguments = {"kind": _SANDBOX.value, "isolation": "shared", "state_dir": str(out / "sandbox")}
    lines = ["| clone | criteria | changes | tasks | sound | flaky | seconds | the others | of those executed |",
             "|---|---|---|---|---|---|---|---|---|"]
    with EnvPool(_WORKERS.value, arguments) as pool:
        print(pool.describe()["description"])
        for clone in _CLONES.value:
            for name, need_issue in CRITERIA.items():
                started, work = time.monotonic(), out / name.replace(" ", "_")
                criteria = Criteria(need_issue=need_issue, timeout=10.0, setup=tuple(_SETUP.value))
                mined = mine(pool, clone, criteria, work, lambda line: print(line, flush=True))
                seconds = time.monotonic() - started
                write_tasks(work / f"{mined.name}.jsonl", mined.tasks)
                # The pool knows the states that were mined; those of the tasks may be others.
                specs = [sources.locate(str(mined.archives / f"{task.repo}.tar.gz")) for task in mined.tasks]
                pool.register([dataclasses.replace(spec, setup=criteria.setup) for spec in specs])
                checks = list(verify.verify(pool, mined.tasks, 1))
                sound, flaky = sum(not check.problems for check in checks), sum(bool(check.flaky) for check in checks)
                others = ", ".join(f"{reason} {count}" for reason, count in mined.outcomes.items() if reason != "kept")
                lines.append(f"| {mined.name} | {name} | {sum(mined.outcomes.values())} | {len(mined.tasks)} | {sound} | "
                             f"{flaky} | {seconds:.0f} | {others} | {reasons(mined)} |")
                print(lines[-1], flush=True)
    files.write_text(out / "table.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    app.run(main)
