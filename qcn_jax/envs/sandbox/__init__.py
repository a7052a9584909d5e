"""Sandboxes for untrusted code: `make_provider` chooses the back end, `Provider.create` makes a Sandbox."""

from qcn_jax.envs.sandbox.base import ExecResult, Limits, Provider, PythonResult, Sandbox, TestRun
from qcn_jax.envs.sandbox.channel import SandboxError
from qcn_jax.envs.sandbox.choose import make_provider
from qcn_jax.envs.sandbox.repository import RepositorySpec

__all__ = ["ExecResult", "Limits", "Provider", "PythonResult", "RepositorySpec", "Sandbox", "SandboxError", "TestRun",
           "make_provider"]
