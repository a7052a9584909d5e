"""A pytest plugin: `pytest_plugins = ["qcn_jax.testing.plugin"]` in a conftest.py."""

import pathlib
from collections.abc import Callable, Iterator

import pytest

from qcn_jax.testing import processes


@pytest.fixture(name="run_with_devices", scope="session")
def _run_with_devices() -> Callable[..., str]:
    """See `qcn_jax.testing.run_with_devices`."""
    return processes.run_with_devices


@pytest.fixture(name="hosts")
def _hosts() -> Iterator[Callable[..., processes.Hosts]]:
    """Starts `qcn_jax.testing.Hosts` with the given arguments; what still runs when the test ends is killed."""
    started: list[processes.Hosts] = []

    def start(*arguments, **keywords) -> processes.Hosts:
        started.append(processes.Hosts(*arguments, **keywords))
        return started[-1]

    yield start
    for hosts in started:
        hosts.__exit__()


@pytest.fixture(name="tiny_checkpoint", scope="session")
def _tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A Hugging Face folder of a tiny random model; see `qcn_jax.testing.save_tiny`."""
    from qcn_jax.testing import models

    return models.save_tiny(tmp_path_factory.mktemp("tiny") / "model")
