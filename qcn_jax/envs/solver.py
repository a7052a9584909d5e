"""The scripted solver: trajectories through the same tools, in the same sandboxes, kept only if the tests pass."""

from qcn_jax.envs.spans import minimal_edit

__all__ = ["minimal_edit"]
