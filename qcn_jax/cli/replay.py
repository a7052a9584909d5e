"""Derives every update of a run's experts again, from the journals of their episodes: RL without environments.

  qcn replay runs/nano
  qcn replay runs/nano --experts=swe --instead=objective=gspo,clip_low=3e-4,clip_high=4e-4 --instead=routing=free
  qcn replay runs/nano --groups --out=influence

No sandbox is opened and nothing acts; what is needed of RUN is experts/ with its journals, and the model that the
experts began from. Before every update the weights' fingerprint is compared with the one that the journal holds; on the
processor, mesh and JAX of the run they are equal bit for bit, elsewhere their distance in the end is given over the way
that the run went.

--instead asks what the same episodes would have taught under other settings of config.experts: the cosine between both
gradients and how long one is of the other, on the run's weights at every update; it may be given several times.
--groups says which groups moved the weights most (a gradient each). All verdicts are listed by how little they fit what
else is known of their episodes, the least likely first: look there for flaky tests and rewards that were not earned.

A run of several hosts has a journal for each. Replay it on as many devices: of one process or, as the run was, of one
on each host, which all see RUN and are all given the same command; for --coordinator see qcn run --help.

DIR (RUN/replay by default) gets for every expert metrics.jsonl, episodes.jsonl and summary.json; given again, the
command goes on where it was.
"""

import os
import pathlib
from collections.abc import Sequence

from absl import flags

from qcn_jax import files
from qcn_jax.cli import parsing
from qcn_jax.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Parses flags, replays, prints what came of it."""
    values = flags.FlagValues()
    flags.DEFINE_list("experts", [], "Which; default: all that have a journal.", flag_values=values)
    flags.DEFINE_multi_string("instead", [], "NAME=VALUE,... of config.experts: settings to compare with the run's.",
                              flag_values=values)
    flags.DEFINE_bool("groups", False, "Measure what every group moved.", flag_values=values)
    flags.DEFINE_string("out", None, "Folder for the results; default: RUN/replay.", flag_values=values)
    mesh, join = parsing.define_mesh(values), parsing.define_hosts(values)
    words = parsing.parse(values, "replay", __doc__, argv, words="RUN")
    if len(words) != 1:
        raise UserError("give one run's work directory: qcn replay RUN")
    root = pathlib.Path(words[0]).absolute()
    out = pathlib.Path(values.out).absolute() if values.out else root / "replay"
    files.check_folder(out, "out" if values.out else None)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "xla_cache"))
    from qcn_jax.pipeline import replay
    from qcn_jax.sharding import distributed

    request = replay.Request(root, out, values.experts, values.instead, values.groups, mesh())
    join()
    with distributed.ends_at_once("qcn replay"):
        say = (lambda line: print(line, flush=True)) if distributed.is_first() else (lambda line: None)
        results = replay.replay(request, say)
        say(replay.table(results))
    return 0 if all(found["last_equal"] is not False for found in results.values()) else 1
