"""Damaged checkpoints: found by their checksums, said, and the one before is used."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.errors import UserError
from qcn_jax.pipeline.train import checksums
from qcn_jax.pipeline.train.checkpoints import DAMAGED, Checkpoints
from qcn_jax.testing.processes import Hosts
from tests.rights import ordinary_user


def state(step):
    return {"params": {"a": step + jnp.arange(256.0).reshape(16, 16), "b": jnp.full(3, step)}, "step": jnp.int32(step)}


def data(step):
    iterator = iter(grain.MapDataset.source(list(range(100))).to_iter_dataset())
    for _ in range(step):
        next(iterator)
    return iterator


def fill(directory, keep=2, steps=(1, 2)):
    checkpoints = Checkpoints(directory, keep)
    for step in steps:
        checkpoints.save(step, state(step), data(step), {"cursor": step})
    checkpoints.close()


def restore(directory, keep=2):
    """(step, lines), after comparing everything that came back."""
    lines, position = [], data(0)
    checkpoints = Checkpoints(directory, keep)
    try:
        step, found, extra = checkpoints.restore(state(0), position, lines.append)
    finally:
        checkpoints.close()
    assert jax.tree.all(jax.tree.map(np.array_equal, found, state(step)))
    assert extra == {"cursor": step} and next(position) == step
    return step, lines


@pytest.fixture(scope="module", name="filled")
def _filled(tmp_path_factory):
    directory = tmp_path_factory.mktemp("filled") / "checkpoints"
    fill(directory)
    return directory


@pytest.fixture(name="directory")
def _directory(filled, tmp_path):
    return pathlib.Path(shutil.copytree(filled, tmp_path / "checkpoints"))


DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one byte flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_of_any_file_is_found_and_the_checkpoint_before_is_used(filled, tmp_path, kind):
    names = sorted(path.relative_to(filled) for path in (filled / "2").rglob("*") if path.is_file())
    assert len(names) > 10
    for number, name in enumerate(names):
        directory = tmp_path / str(number) / "checkpoints"
        shutil.copytree(filled, directory)
        DAMAGE[kind](directory / name)
        step, lines = restore(directory)
        if kind == "missing" and name.name.startswith("checksums"):
            assert step == 2 and "checkpoint 2 has no checksums" in lines[0]
            continue
        assert step == 1 and len(lines) == 1, (name, lines)
        assert "checkpoint 2 is damaged" in lines[0] and lines[0].endswith("; that of step 1 is used"), lines
        assert str(name) in lines[0], (name, lines)
        assert [path.name for path in directory.iterdir()] == ["1"]
        assert [path.name for path in (directory.parent / DAMAGED).iterdir()] == ["2"]


def test_a_good_one_is_used_and_nothing_is_said(directory):
    assert restore(directory) == (2, [])
    assert restore(directory) == (2, [])


def test_training_goes_on_over_a_damaged_step(directory):
    for _ in range(2):  # the second is put beside the first
        DAMAGE["zeroed"](next((directory / "2/state").rglob("d/*")))
        assert restore(directory)[0] == 1
        fill(directory, steps=(2,))
        assert restore(directory) == (2, [])
    assert sorted(path.name for path in directory.with_name(DAMAGED).iterdir()) == ["2", "2-2"]


def test_every_one_damaged_is_one_line_that_says_what_to_do(directory):
    for step in "12":
        DAMAGE["truncated"](directory / step / "state/_METADATA")
    before = sorted(directory.rglob("*"))
    with pytest.raises(UserError, match=r"checkpoints/2: is damaged, and so are the 1 before it \(.*_METADATA has .* bytes "
                                        r"and was written with .*; delete .*checkpoints to train from the beginning"):
        restore(directory)
    assert sorted(directory.rglob("*")) == before


def test_with_one_kept_there_is_none_before(tmp_path):
    fill(tmp_path / "one", keep=1)
    (kept,) = (tmp_path / "one").iterdir()
    (kept / "commit_success.txt").write_text("other")  # which nobody reads
    with pytest.raises(UserError, match="2: is damaged, and none is before it.*; keep=2 would keep one more"):
        restore(tmp_path / "one", keep=1)
    for path in kept.glob("checksums.*.json"):  # as the line says
        path.unlink()
    step, lines = restore(tmp_path / "one", keep=1)
    assert step == 2 and "restored unchecked" in lines[0]


def test_a_kill_before_the_checksums(directory):
    """The checkpoint is used if it can be restored; damage that Orbax stumbles over leads to the one before."""
    for path in directory.glob("2/checksums.*"):
        path.unlink()
    assert restore(directory)[0] == 2
    DAMAGE["truncated"](directory / "2/state/manifest.ocdbt")
    step, lines = restore(directory)
    assert step == 1 and "checkpoint 2 is damaged" in lines[0]


def test_another_model_is_not_damage(directory):
    checkpoints = Checkpoints(directory)
    wider, other = state(0), state(0)
    wider["params"]["b"] = jnp.zeros(5)
    del other["params"]["a"]
    for wanted, words in ((wider, "of params/b it has shape [3], and shape [5] is needed"),
                          (other, "of params/a it has shape [16, 16], and none is needed")):
        with pytest.raises(UserError) as error:
            checkpoints.restore(wanted)
        assert f"2: does not fit this model and optimizer: {words}" in str(error.value)
        assert not jax.tree.leaves(wanted)[0].is_deleted()
    checkpoints.close()
    assert restore(directory) == (2, [])


def test_rights_are_not_damage(filled):
    restore(filled)  # everything is imported now
    with ordinary_user() as folder:
        fill(folder / "checkpoints")
        path = next((folder / "checkpoints/2/state").rglob("d/*"))
        for closed in (path, path.parent, folder / "checkpoints/2", folder / "checkpoints"):
            before = closed.stat().st_mode
            closed.chmod(0)
            with pytest.raises(UserError, match=f"{folder}/checkpoints.*: cannot be (made or )?read: Permission denied"):
                restore(folder / "checkpoints")
            closed.chmod(before)
        assert restore(folder / "checkpoints") == (2, [])


def test_checksums_that_cannot_be_written_are_said(tmp_path, monkeypatch):
    def full(*_):
        raise UserError("disk full")

    monkeypatch.setattr(checksums, "write", full)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match="checkpoint cannot be written: disk full"):
        checkpoints.save(1, state(1), wait=True)
    checkpoints.close()


HOST = """
import sys, pathlib, jax, jax.numpy as jnp, numpy as np
from qcn_jax.pipeline.train.checkpoints import Checkpoints
from qcn_jax.sharding import distributed
coordinator, process, directory, what = sys.argv[1:]
if coordinator:
    distributed.start(coordinator, 2, int(process))
whole = jax.sharding.NamedSharding(jax.make_mesh((4,), ("x",)), jax.sharding.PartitionSpec("x"))
state = lambda step: {"a": jax.make_array_from_callback((64, 8), whole, lambda box: step + np.arange(512.).reshape(64, 8)[box])}
checkpoints = Checkpoints(pathlib.Path(directory))
if what == "save":
    for step in (1, 2):
        checkpoints.save(step, state(step))
else:
    step, found, _ = checkpoints.restore(state(0), log=lambda line: print(line, flush=True))
    assert all(np.array_equal(a.data, b.data) for a, b in zip(found["a"].addressable_shards, state(step)["a"].addressable_shards))
    print("restored", step, flush=True)
checkpoints.close()
"""


@pytest.mark.slow
def test_each_of_two_processes_sums_what_it_wrote(tmp_path):
    directory = tmp_path / "checkpoints"

    def run(what):
        command = lambda coordinator, number: [sys.executable, "-c", HOST, coordinator, str(number), str(directory), what]
        with Hosts(command, devices=2) as hosts:
            return hosts.finish()

    run("save")
    sums = [json.loads((directory / f"2/checksums.process_{number}.json").read_text()) for number in (0, 1)]
    assert all(part["processes"] == 2 for part in sums)
    names = {str(path.relative_to(directory / "2")) for path in (directory / "2").rglob("*") if path.is_file()}
    assert set(sums[0]["files"]) | set(sums[1]["files"]) == {name for name in names if not name.startswith("checksums")}
    (theirs,) = [name for name in sums[1]["files"] if "/d/" in name and sums[1]["files"][name][0] > 500]
    assert all("process_1" in name for name in sums[1]["files"]) and theirs not in sums[0]["files"]
    assert [output.splitlines()[-1] for output in run("restore")] == ["restored 2"] * 2
    DAMAGE["one byte flipped"](directory / "2" / theirs)
    outputs = run("restore")
    assert [output.splitlines()[-1] for output in outputs] == ["restored 1"] * 2
    assert theirs in outputs[1] and "(another process says what)" in outputs[0]
    assert [path.name for path in directory.iterdir()] == ["1"]
    alone = [sys.executable, "-c", HOST, "", "0", str(directory), "restore"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
                   "PYTHONPATH": os.pathsep.join(sys.path)}
    name = next(name for name in json.loads((directory / "1/checksums.process_1.json").read_text())["files"])
    for expected, damage in ((0, None), (1, "zeroed")):
        if damage:
            DAMAGE[damage](directory / "1" / name)
        done = subprocess.run(alone, env=environment, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == expected and (not damage or f"{name} does not hold what was written" in done.stderr)
