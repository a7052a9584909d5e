"""Scaffolds: what an agent is told, which tools it has, and how their results read."""

from qcn_jax.envs.spans import MAX_LINE_TOKENS, dedent, line_token

__all__ = ["MAX_LINE_TOKENS", "dedent", "line_token"]
