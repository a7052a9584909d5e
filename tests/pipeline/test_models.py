"""Models of a run: where they are read from, how they are computed, and that nothing is copied."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from qcn_jax import files, hub, testing
from qcn_jax.config import MeshConfig, RunConfig
from qcn_jax.errors import UserError
from qcn_jax.pipeline import models
from qcn_jax.pipeline.context import Shared, StageContext

MODEL = dataclasses.replace(testing.TINY, initializer_range=0.02)
COMPUTED = dict(dtype="bfloat16", remat="full", scan_layers=False, delta_rule="recurrent", chunk_size=32,
                attention="splash", moe="dense")


@pytest.fixture(name="folder")
def _folder(tmp_path):
    return testing.save_tiny(tmp_path / "theirs", MODEL)


def _context(tmp_path, init, **changes):
    config = RunConfig(init=str(init), model=dataclasses.replace(MODEL, **changes))
    return StageContext(config, tmp_path / "run", "midtrain", Shared(config, tmp_path / "run"))


def test_how_a_model_is_computed_is_the_runs_and_what_it_is_the_checkpoints(folder):
    wanted = dataclasses.replace(MODEL, **COMPUTED, param_dtype="bfloat16", hidden_size=999, num_experts=7)
    model, params = models.read(folder, wanted)
    assert model == dataclasses.replace(MODEL, **COMPUTED, param_dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_a_checkpoint_is_read_from_where_it_lies_and_noted(folder, tmp_path):
    context = _context(tmp_path, folder, num_nextn_predict_layers=1)
    model, params = models.load(context, "base")
    _, theirs = hub.load(folder)
    mtp = params.pop("mtp")
    assert model == context.config.model and jax.tree.all(jax.tree.map(np.array_equal, params, theirs))
    assert float(np.abs(mtp["fc"]["kernel"]).max()) > 0
    assert [path.name for path in (tmp_path / "run" / "midtrain").iterdir()] == ["init.json"]
    assert models.note_initial(context) == {"init": str(folder), "folder": str(folder), "sha256": hub.identity(folder)}
    assert "mtp" not in models.initial(_context(tmp_path, folder).config)[1]


def test_a_checkpoint_that_was_exchanged_is_refused(folder, tmp_path):
    context = _context(tmp_path, folder)
    models.note_initial(context)
    shutil.move(folder, tmp_path / "moved")
    with pytest.raises(UserError, match="holds no config.json"):
        models.load(context, "base")
    models.load(_context(tmp_path, tmp_path / "moved"), "base")  # another place, the same checkpoint
    testing.save_tiny(folder, dataclasses.replace(MODEL, rope_theta=7.0))
    with pytest.raises(UserError, match="no longer the checkpoint that the run started from"):
        models.load(context, "base")


def test_the_identity_of_a_checkpoint(folder, tmp_path):
    known = hub.identity(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert hub.identity(copy) == known
    hub.save(copy, *hub.load(folder, dtype="bfloat16"))
    assert hub.identity(copy) != known
    hub.save(copy, *hub.load(folder), shard_bytes=50_000)
    assert hub.identity(copy) != known
    hub.orbax_folder.save(tmp_path / "orbax", *hub.load(folder))
    assert hub.identity(tmp_path / "orbax") == hub.identity(shutil.copytree(tmp_path / "orbax", tmp_path / "again"))
    files.write_text(tmp_path / "again" / "params" / "more", "x")
    assert hub.identity(tmp_path / "orbax") != hub.identity(tmp_path / "again")
    with pytest.raises(UserError, match="holds neither"):
        hub.identity(tmp_path)


def test_another_architecture_is_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="--config.model.hidden_size: 64, but the checkpoint in .* has 32"):
        models.load(_context(tmp_path, folder, hidden_size=64), "base")
    with pytest.raises(UserError, match="--config.init=/nowhere: .*holds no config.json"):
        models.load(_context(tmp_path, "/nowhere"), "base")


def _on_a_mesh():
    """With eight devices: made, and completed, where its parts lie; the same numbers as on one device."""
    import pathlib
    import tempfile

    from qcn_jax.pipeline.train.layout import param_shardings
    from qcn_jax.sharding.mesh import make_parallel

    parallel = make_parallel(MeshConfig(fsdp=2, expert=4))
    model = dataclasses.replace(MODEL, num_nextn_predict_layers=1)
    with tempfile.TemporaryDirectory() as folder:
        for init in ("random", str(testing.save_tiny(pathlib.Path(folder) / "theirs", MODEL))):
            config = RunConfig(init=init, seed=3, model=model)
            _, params = models.initial(config, parallel)
            assert jax.tree.all(jax.tree.map(lambda leaf, s: leaf.sharding == s, params, param_shardings(model, parallel)))
            _, alone = models.initial(config)
            for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)


def test_the_initial_model_is_the_same_on_a_mesh(run_with_devices):
    run_with_devices(_on_a_mesh, 8)
