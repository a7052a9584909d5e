"""The software-engineering expert: several turns with tools in a sandbox; tests decide."""

from qcn_jax.pipeline.experts.expert import BASELINE, OWN, Expert

SWE = Expert("swe", "SWE expert (RL)", headline=True, comparisons=(
    ("sft", "midtrain"), (OWN, "sft"), (OWN, "sft_control"), (OWN, BASELINE), ("unified", "sft")))
