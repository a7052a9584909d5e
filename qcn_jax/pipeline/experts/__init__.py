"""Experts, one file each. A configuration names them, or `package.module:OBJECT`."""

import dataclasses
import re
from collections.abc import Sequence

from qcn_jax.config import RunConfig
from qcn_jax.errors import UserError
from qcn_jax.pipeline.experts import metrics
from qcn_jax.pipeline.experts.expert import Expert, Reward
from qcn_jax.registry import Registry

EXPERTS = Registry("expert", Expert, {
    "swe": "qcn_jax.pipeline.experts.swe:SWE",
    "single_turn": "qcn_jax.pipeline.experts.single_turn:SINGLE_TURN",
    "tool_format": "qcn_jax.pipeline.experts.tool_format:TOOL_FORMAT",
    "web": "qcn_jax.pipeline.experts.web:WEB",
})
REWARDS: Registry[Reward] = Registry("reward", None, {})  # each expert has its own; these are given by path
_TAKEN = {"sft_control", "messages", "experts", *metrics.greedy([]), *metrics.sampled([])}


def experts_of(names: Sequence[str], field: str = "--config.experts.names") -> tuple[Expert, ...]:
    """The experts that a configuration names, one of them the headline: the first that offers to be, or the first.

    Raises:
      UserError: one cannot be found, is there twice, or is called what it cannot be called.
    """
    experts = [EXPERTS.resolve(name, field) for name in names]
    if not experts:
        raise UserError(f"{field}: is empty; name at least one expert")
    for name, expert in zip(names, experts, strict=True):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", expert.name) or expert.name in _TAKEN:
            raise UserError(f"{field}: {name!r}; is called {expert.name!r}; allowed: a lower-case word that no other "
                            "number of a model has")
        if sum(expert.name == other.name for other in experts) > 1:
            raise UserError(f"{field}: {expert.name!r} is there twice")
    return with_headline(experts)


def with_headline(experts: Sequence[Expert]) -> tuple[Expert, ...]:
    """`experts` with one headline: the first that offers to be, or the first."""
    first = next((index for index, expert in enumerate(experts) if expert.headline), 0)
    return tuple(dataclasses.replace(expert, headline=index == first) for index, expert in enumerate(experts))


def reward_of(config: RunConfig) -> Reward | None:
    """What `config.experts.reward` names; None where each expert's own reward counts.

    Raises:
      UserError: there is no such thing.
    """
    return REWARDS.resolve(config.experts.reward, "--config.experts.reward") if config.experts.reward else None


def headline(experts: Sequence[Expert]) -> Expert:
    """The one whose numbers are those of a model as a whole."""
    return next(expert for expert in experts if expert.headline)
