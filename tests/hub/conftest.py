"""A saved checkpoint, and copies of it to damage."""

import pathlib
import shutil

import pytest

from qcn_jax import hub
from tests.hub.models import SMALL, random_params


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "model"
    hub.save(path, SMALL, random_params(SMALL), shard_bytes=100_000)
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))
