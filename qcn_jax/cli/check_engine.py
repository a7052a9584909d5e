"""Checks that a checkpoint says the same however it is run, and how far rounding takes it.

  qcn check-engine --checkpoint=DIR
  qcn check-engine --checkpoint=DIR --mesh=expert=4,tensor=2

Log-probabilities of random tokens by a full pass in the plainest form are held against those by whole rows, padding on
either side, packed rows, pieces through a cache, the engine with turns, copies, saved states, used slots, weights given
anew, sampling and a cache that grows, and the scheduler with prompts that begin alike. The bound is measured: what a
change in the last bit of the weights does. Status 1 where a form breaks it. --kernels adds those for TPUs, which
anything but a TPU interprets: hours for a large model.
"""

import json
import math
from collections.abc import Sequence

from absl import flags

from qcn_jax.cli import parsing


def main(argv: Sequence[str]) -> int:
    """Parses flags, loads the checkpoint, prints a line for every form."""
    values = flags.FlagValues()
    flags.DEFINE_string("checkpoint", None, "Folder with weights in Hugging Face form.", flag_values=values,
                        required=True)  # fmt: skip
    flags.DEFINE_integer("sequences", 6, "Random sequences.", flag_values=values, lower_bound=3)
    flags.DEFINE_integer("length", 96, "Tokens of the longest.", flag_values=values, lower_bound=64)
    flags.DEFINE_integer("seed", 0, "Of sequences, pieces and draws.", flag_values=values, lower_bound=0)
    flags.DEFINE_bool("kernels", False, "Also hold the TPU's kernels against it.", flag_values=values)
    mesh = parsing.define_mesh(values)
    parsing.parse(values, "check-engine", __doc__, argv)

    from qcn_jax.inference import conformance
    from qcn_jax.inference.checkpoint import load_to_act

    config, params, parallel = load_to_act(values.checkpoint, mesh())
    forms, broken = conformance.FORMS + (conformance.KERNELS,) * values.kernels, 0
    for found in conformance.check(config, params, count=values.sequences, length=values.length, seed=values.seed,
                                   parallel=parallel, forms=forms):
        broken += not found.holds
        row = {"form": found.form, "holds": found.holds, "worst": _rounded(found.worst), "bound": _rounded(found.bound),
               "tokens": found.compared, "flips": found.flips} | ({"refused": found.refused} if found.refused else {})
        print(json.dumps(row, allow_nan=False), flush=True)
    return int(broken > 0)


def _rounded(nats: float) -> float | None:
    return float(f"{nats:.3g}") if math.isfinite(nats) else None
