"""What decoding made of one slot's turn."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from qcn_jax.errors import UserError
from qcn_jax.inference.sampling import Sampling

NOT_FINITE = "the model's logits are not finite: its weights hold NaN or infinity, or overflow its dtype"


@dataclasses.dataclass(frozen=True)
class Generation:
    """One turn of one slot.

    `tokens` end with the stop token when `finish` is "stop"; "length" is the limit of new tokens or of the slot;
    "paused" turns may be continued by the next `generate`. `logprobs` [len(tokens)] float32 are the
    model's own, of softmax(logits); `drawn_logprobs` those of softmax(logits / temperature), with penalties and biases
    where there are any, which reinforcement learning compares with, and at temperature 0 the same as `logprobs`.
    Neither knows of top_p, top_k and min_p. `alternatives` are the most probable (id, log-probability) by `logprobs`'
    measure beside each token, as many as its sampling asked for.
    """

    tokens: list[int]
    logprobs: np.ndarray
    drawn_logprobs: np.ndarray
    finish: Literal["stop", "length", "paused"]
    alternatives: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, made: Mapping[str, np.ndarray], limit: int, draw: Sampling, stop: np.ndarray) -> "Generation":
        """Reads a slot's turn.

        Args:
          made: its lane of Programs.run's arrays of decoding.
          limit: the most tokens that it could get.
          draw: how it was drawn.
          stop: ids that end a turn.

        Raises:
          UserError: the model's logits were not finite.
        """
        count = made["counts"]
        new, scores = made["tokens"][:count].tolist(), made["logprobs"][:, :count].copy()
        if np.isnan(scores).any():
            raise UserError(NOT_FINITE)
        finish = "stop" if new and new[-1] in stop else "length" if count == limit else "paused"
        alternatives = []
        if draw.alternatives and count:
            named = zip(*(made[name][:count, : draw.alternatives].tolist() for name in ("ids", "values")))
            # Where a vocabulary has fewer drawable tokens than were asked for, the rest are at minus infinity.
            alternatives = [[(id_, value) for id_, value in zip(*pair) if value > -np.inf] for pair in named]
        return cls(new, *scores, finish, alternatives)
