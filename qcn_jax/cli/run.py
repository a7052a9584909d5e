"""Runs the whole chain: tasks, midtrain, sft, experts, distill, evaluate, report.

Each stage leaves its results in WORKDIR/<stage>; the same command given again resumes where it stopped. The report
is WORKDIR/report/index.html, its numbers WORKDIR/report/summary.json.

  qcn run --config=configs/nano.py --workdir=runs/nano
  qcn run --config=configs/nano.py --workdir=runs/nano --stages=evaluate,report
  qcn run --config=configs/nano.py --workdir=runs/other --config.sft.train.steps=300 --config.sandbox=local

On several hosts give every process the same command, with a WORKDIR that all see, and on TPU pods nothing more;
elsewhere --coordinator=HOST:PORT --processes=N --process_id=I. Where a process ends, so do all, within some 90 seconds;
the same command given to all again resumes.
"""

import os
import pathlib
from collections.abc import Sequence

from absl import flags

from qcn_jax import config_checks
from qcn_jax.cli import parsing


def main(argv: Sequence[str]) -> int:
    """Parses flags and runs the stages."""
    values = flags.FlagValues()
    config = parsing.define_config(values, argv)
    flags.DEFINE_string("workdir", None, "Folder of the run; made if missing, resumed if it holds a run.",
                        flag_values=values, required=True)
    flags.DEFINE_list("stages", None, "Comma-separated stages to run; default: all of them.", flag_values=values)
    flags.DEFINE_list("restart", None, "Comma-separated stages to make anew; they and every later one are moved to "
                      "WORKDIR/discarded first.", flag_values=values)
    join = parsing.define_hosts(values)
    parsing.parse(values, "run", __doc__, argv)
    # Set before JAX is imported: a resumed run does not compile again.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(values.workdir).absolute() / "xla_cache"))
    from qcn_jax.pipeline import run
    from qcn_jax.sharding import distributed

    settings, stages = config(), tuple(run.STAGES) if values.stages is None else values.stages
    config_checks.check_sizes(settings, stages)  # before waiting for other processes
    join()
    with distributed.ends_at_once("qcn run"):
        run.run(settings, values.workdir, stages, values.restart or ())
    return 0
