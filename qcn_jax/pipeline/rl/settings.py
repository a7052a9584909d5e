"""What the settings of an update come to, and which mean nothing together. No JAX."""

import dataclasses
from collections.abc import Iterator

from qcn_jax.config import ExpertsConfig, ModelConfig

AVERAGES = ("token", "episode")
ROUTINGS = ("auto", "free", "replay", "frozen", "first")
ACTED = ("replay", "frozen")  # routings by the experts that tokens went to when the policy acted
ADVANTAGE_BASELINES, ADVANTAGE_SCALES = ("mean", "leave_one_out"), ("std", "none")


def settled(config: ExpertsConfig, model: ModelConfig) -> ExpertsConfig:
    """The configuration with `routing` decided: off policy, routers of a model with experts replay their choice."""
    if config.routing != "auto":
        return config
    stale = config.max_staleness > 0 and model.num_experts > 0
    return dataclasses.replace(config, routing="replay" if stale else "free")


def contradictions(config: ExpertsConfig, model: ModelConfig) -> Iterator[str]:
    """Lines about settings of the loss that mean nothing together."""
    if config.routing not in ("auto", "free") and not model.num_experts:
        yield f"--config.experts.routing: {config.routing!r}, but the model has no experts; allowed: auto, free"
    if config.minibatches == 1:
        if config.routing == "first":
            yield ("--config.experts.routing: 'first' with minibatches 1, where the first is the only one; allowed: "
                   "auto, free, replay, frozen, or minibatches above 1")
        if needs_proximal(config):
            yield ("--config.experts.objective: 'decoupled' with minibatches 1, where the moved policy and the one "
                   "before the update are the same; allowed: another objective, or minibatches above 1")


def needs_proximal(config: ExpertsConfig) -> bool:
    """Whether the loss wants log-probabilities of the weights before the update."""
    return config.objective == "decoupled"
