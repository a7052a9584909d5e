"""Makes verified tasks from repositories, and says how many candidates became tasks and why the others did not.

  qcn synthesize --repo=toolz==1.2.0,parse==1.22.4 --out=tasks.jsonl
  qcn synthesize --repo=path/to/folder,downloads/boltons-26.2.0.tar.gz --count=500 --out=tasks.jsonl

A candidate is kept only after execution: tests that passed now fail, and the reverse patch makes them pass again.
Interrupted runs continue from OUT.work, with the same result. Beside OUT stands OUT.yields.json.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from qcn_jax import files
from qcn_jax.cli import parsing
from qcn_jax.envs.synthesis import inject, plan, sources, statement
from qcn_jax.envs.tasks import write_tasks
from qcn_jax.errors import UserError
from qcn_jax.pipeline import repositories

STRATEGIES = ("inject",)


def main(argv: Sequence[str]) -> int:
    """Parses flags, synthesizes, prints the table of yields."""
    values = flags.FlagValues()
    flags.DEFINE_list("repo", None, "Repositories: name==version, source distributions or folders, comma-separated.",
                      flag_values=values, required=True)  # fmt: skip
    flags.DEFINE_list("strategies", ["inject"], f"Comma-separated, out of: {', '.join(STRATEGIES)}.", flag_values=values)
    flags.DEFINE_string("out", None, "Where tasks are written, as JSONL in SWE-bench's schema.", flag_values=values,
                        required=True)  # fmt: skip
    flags.DEFINE_integer("count", 0, "Stop at so many verified tasks; 0: try all candidates.", flag_values=values,
                         lower_bound=0)  # fmt: skip
    flags.DEFINE_list("kinds", [], f"Kinds of defects; default: all. Out of: {', '.join(inject.KINDS)}.",
                      flag_values=values)  # fmt: skip
    flags.DEFINE_integer("candidates_per_repo", 400, "Execute at most so many of one repository.", flag_values=values,
                         lower_bound=1)  # fmt: skip
    flags.DEFINE_integer("reruns", 1, "Further runs of each defective state that must agree with the first.",
                         flag_values=values, lower_bound=0)  # fmt: skip
    flags.DEFINE_float("timeout", 10.0, "Seconds for one run of a candidate's tests.", flag_values=values,
                       lower_bound=0.1)  # fmt: skip
    flags.DEFINE_integer("statement_characters", statement.FULL, "Longest problem statement.", flag_values=values,
                         lower_bound=120)  # fmt: skip
    flags.DEFINE_integer("seed", 0, "Seed of all choices.", flag_values=values)
    flags.DEFINE_enum("sandbox", "auto", ["auto", "docker", "local"], "Where code runs.", flag_values=values)
    flags.DEFINE_integer("workers", 2, "Candidates side by side.", flag_values=values, lower_bound=1)
    parsing.parse(values, "synthesize", __doc__, argv)
    for flag, given, allowed in (("strategies", values.strategies, STRATEGIES), ("kinds", values.kinds, inject.KINDS)):
        unknown = [name for name in given if name not in allowed]
        if unknown:
            raise UserError(f"--{flag}: unknown {unknown[0]!r}; allowed: {', '.join(allowed)}")
    return _synthesize(values)


def _synthesize(values: flags.FlagValues) -> int:
    from qcn_jax.envs.pool import EnvPool
    from qcn_jax.envs.synthesis import synthesize

    specs = [sources.locate(source, repositories.SHA256) for source in values.repo]
    settings = plan.Settings(
        target=values.count, kinds=tuple(values.kinds), candidates_per_repo=values.candidates_per_repo,
        timeout=values.timeout, reruns=values.reruns, statement_characters=values.statement_characters,
        seed=values.seed,
    )  # fmt: skip
    out = pathlib.Path(values.out)
    arguments = {"kind": values.sandbox, "state_dir": str(sources.default_cache().parent / "sandbox")}
    with EnvPool(values.workers, arguments) as pool:
        print(f"sandbox: {pool.describe()['description']}", file=sys.stderr)
        result = synthesize.synthesize(pool, specs, settings, f"{out}.work", _log)
    write_tasks(out, result.tasks)
    yields = {"kinds": result.yields(), "repositories": result.repository_yields(), "outcomes": result.outcomes(),
              "left_out": result.skipped}  # fmt: skip
    files.write_json(f"{out}.yields.json", yields)
    print(_table(yields["kinds"]))
    print(f"outcomes: {', '.join(f'{name} {count}' for name, count in yields['outcomes'].items())}")
    print(f"{len(result.tasks)} verified tasks: {out}")
    return 0


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _table(rows: dict[str, dict[str, float]]) -> str:
    lines = [f"{'kind':<18}{'candidates':>11}{'kept':>7}{'yield':>8}{'s each':>8}{'cpu s':>8}"]
    for kind, row in rows.items():
        lines.append(f"{kind:<18}{row['candidates']:>11}{row['kept']:>7}{row['yield']:>8.0%}"
                     f"{row['seconds']:>8.2f}{row['cpu_seconds']:>8.2f}")  # fmt: skip
    return "\n".join(lines)
