"""What pod_compile.py and maxtext_compile.py share: the 80B configuration's step, compiled by `qcn compile`."""

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from qcn_jax.cli import compile as qcn_compile
from qcn_jax.cli import parsing
from qcn_jax.errors import UserError

COLLECTIVES = "all-to-all | all-gather | reduce-scatter | all-reduce | permute, GB"  # columns of `collectives`
CONFIG = pathlib.Path(__file__).resolve().parent.parent / "configs" / "qwen3_coder_next.py"


def compile_step(argument: str, stage: str, overrides: Sequence[str], slices: int = 1) -> dict[str, Any]:
    """The report of `qcn compile` for the config's `argument`, or {"error": the line it ends with}."""
    values = flags.FlagValues()
    arguments = [f"--config={CONFIG}:{argument}", *(f"--config.{override}" for override in overrides)]
    config = parsing.define_config(values, arguments)
    parsing.parse(values, "compile", "", arguments)
    try:
        return qcn_compile.compile_in_child(config(), stage, config().topology, slices)
    except UserError as error:
        return {"error": str(error)}


def collectives(report: dict[str, Any]) -> str:
    """GB that one chip moves in a step, as cells of a Markdown table below COLLECTIVES."""
    moved = lambda *kinds: f"{sum(report['collective_bytes'].get(kind, 0) for kind in kinds) / 1e9:.1f}"
    return " | ".join((moved("all-to-all", "ragged-all-to-all"), moved("all-gather"), moved("reduce-scatter"),
                       moved("all-reduce"), moved("collective-permute")))
