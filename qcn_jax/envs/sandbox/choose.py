"""Which back end: docker where an engine answers and an image can be had, otherwise local."""

from typing import Any

from qcn_jax.envs.sandbox.base import Limits, Provider
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.sandbox.docker import IMAGE_BUDGET_MB, DockerProvider
from qcn_jax.envs.sandbox.local import LocalProvider
from qcn_jax.errors import UserError


def make_provider(kind: str = "auto", state_dir: str = ".cache/sandbox", limits: Limits = Limits(),
                  isolation: str = "shared", image: str = "", spares: int = 0, image_budget_mb: int = IMAGE_BUDGET_MB,
                  network: str = "none", **local_options: Any) -> Provider:
    """A provider of sandboxes; `.kind` and `.describe()` say what was chosen, `.reason` why not docker.

    Args:
      kind: auto, docker or local.
      state_dir: folder for what is prepared once and kept.
      limits: bounds of each sandbox.
      isolation: "shared" (warm servers, a workspace and user id for each sandbox) or "container" (a server of its own,
        and with docker a fresh container, for each sandbox).
      image: base image for docker; by default one is found, pulled or made.
      spares: servers kept started ahead of need with isolation "container".
      image_budget_mb: disk space for images above the base; the longest unused are removed.
      network: of agents' sandboxes: "none", or "filtered" (package indexes and documentation, see envs/network).
        Sandboxes in which patches are graded have none.
      **local_options: `containment` of LocalProvider.

    Raises:
      UserError: docker was demanded and is not to be had, or `kind` is unknown.
    """
    if kind not in ("auto", "docker", "local"):
        raise UserError(f"--config.sandbox: expected auto, docker or local, got {kind!r}")
    reason = ""
    if kind != "local":
        try:
            return DockerProvider(state_dir, limits, isolation, image, spares, image_budget_mb, network)
        except SandboxError as error:
            if kind == "docker":
                raise UserError(f"--config.sandbox=docker: {error}") from error
            reason = str(error)
    provider = LocalProvider(state_dir, limits, isolation, spares=spares, network=network, **local_options)
    provider.reason = provider.reason or reason
    return provider
