"""An expert that must have looked at the tests, and the objective it is trained by."""

import dataclasses

import jax.numpy as jnp

from qcn_jax.pipeline.experts.expert import OWN, Expert


class Careful(Expert):
    """What resolves the task is worth half where nobody looked at the tests."""

    def outcome(self, result, verdict, unfinished_penalty):
        found = super().outcome(result, verdict, unfinished_penalty)
        return found if result.attempts else dataclasses.replace(found, reward=found.reward / 2)

    def metrics(self, rows):
        found = super().metrics(rows)
        found[self.name]["looked"] = sum(row["attempts"] > 0 for row in rows) / max(1, len(rows))
        return found | {"looked": found[self.name]["looked"]}


CAREFUL = Careful("careful", "careful <expert>", column="careful", comparisons=((OWN, "sft"), (OWN, "expert_swe")),
                  summary=("looked",))


def plain_gradient(logprobs, old_logprobs, advantages, config):
    """REINFORCE: no ratio, no clip."""
    return -logprobs * advantages, jnp.zeros_like(logprobs)
