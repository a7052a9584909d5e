"""The fingerprint of weights: any change shows, no layout does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.pipeline.train.fingerprint import fingerprint
from qcn_jax.testing.processes import run_with_devices


def tree(dtype="float32"):
    values = np.random.default_rng(0).normal(size=(8, 6))
    return {"a": jnp.asarray(values, dtype), "b": {"c": jnp.asarray(values[0], dtype), "n": jnp.arange(3)}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_every_change_shows(dtype):
    start = tree(dtype)
    known = {fingerprint(start)}
    assert fingerprint(tree(dtype)) in known and len(*known) == 16
    values = np.array(start["a"])
    raw = values.view(np.uint8)
    changed = []
    for place in ((0, 0), (3, 5), (7, 2)):  # the lowest and the highest bit of a number
        for byte, bit in ((0, 1), (values.itemsize - 1, 128)):
            raw[place[0], place[1] * values.itemsize + byte] ^= bit
            changed.append(fingerprint(start | {"a": jnp.asarray(values)}))
            raw[place[0], place[1] * values.itemsize + byte] ^= bit
    changed += [fingerprint(start | {"a": start["a"].T}), fingerprint(start | {"a": start["a"].reshape(6, 8)}),
                fingerprint({"d": start["a"], "b": start["b"]}), fingerprint(start | {"a": start["a"][::-1]})]
    assert known.isdisjoint(changed)
    assert len(set(changed)) == len(changed)


def on_meshes() -> None:
    """Prints the fingerprint of one tree on one device, and split in three ways over eight."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    for spec in (None, PartitionSpec("x"), PartitionSpec("y", None), PartitionSpec("x", "y")):
        place = lambda leaf, spec=spec: leaf if spec is None or leaf.ndim < 2 else jax.device_put(
            leaf, NamedSharding(mesh, spec))
        print(fingerprint(jax.tree.map(place, tree())))


def test_other_layouts_have_the_same():
    found = run_with_devices(on_meshes, 8).split()
    assert len(found) == 4 and set(found) == {fingerprint(tree())}
