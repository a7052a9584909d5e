"""Fixtures for continuous integration without accelerators: emulated devices, several hosts, tiny models.

    from qcn_jax import testing

    testing.run_with_devices(check, 8)                      # a function in a process of its own with 8 devices
    with testing.Hosts(["qcn", "run", ...]) as hosts:       # two processes of four devices each, as a pod's hosts
        outputs = hosts.finish()
    testing.save_tiny(folder)                               # a Hugging Face folder with random weights and a tokenizer

The same as pytest fixtures: `pytest_plugins = ["qcn_jax.testing.plugin"]` in a conftest.py. Nothing of the library
imports this package.
"""

from qcn_jax.testing.models import TINY, random_params, save_tiny, tiny_tokenizer
from qcn_jax.testing.processes import Hosts, emulated, run_with_devices

__all__ = ["TINY", "Hosts", "emulated", "random_params", "run_with_devices", "save_tiny", "tiny_tokenizer"]
