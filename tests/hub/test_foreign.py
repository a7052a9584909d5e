"""Folders that others wrote or changed: what transformers reads in them is what is read here."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy

from qcn_jax import files, hub
from qcn_jax.errors import UserError
from tests.hub.models import TINY, equal, random_params

CONFIG = dataclasses.replace(TINY, tie_word_embeddings=True)
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def folder(tmp_path):
    hub.save(tmp_path / "m", CONFIG, random_params(CONFIG))
    return tmp_path / "m"


def change(folder, alter):
    table = safetensors.numpy.load_file(folder / SINGLE)
    table = alter(table) or table
    safetensors.numpy.save_file(table, folder / SINGLE, metadata={"format": "pt"})


def without_prefix(table):
    return {name.removeprefix("model."): value for name, value in table.items()}


def with_frequencies(table):
    names = ("model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq")
    table.update({name: np.ones(8, "float32") for name in names})


def in_float64(table):
    return {name: value.astype("float64") for name, value in table.items()}


def mixed(table):
    table[NORM] = table[NORM].astype("float16")
    table["model.layers.0.linear_attn.out_proj.weight"] = table[
        "model.layers.0.linear_attn.out_proj.weight"].astype("float64")
    for name in table:
        if ".experts.2." in name:
            table[name] = table[name].astype("float16")


def stale_index(folder):
    files.write_json(folder / INDEX, {"weight_map": {NORM: "model-00001-of-00002.safetensors"}})


def two_shards(folder):
    """A tensor stands in two files; the index names the one with the right values."""
    table = safetensors.numpy.load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    names = sorted(table)
    half = len(names) // 2
    parts = {first: {n: table[n] for n in names[:half]}, second: {n: table[n] for n in names[half:]}}
    files.write_json(folder / INDEX, {"weight_map": {n: file for file, part in parts.items() for n in part}})
    parts[second][names[0]] = table[names[0]] + 1
    for file, part in parts.items():
        safetensors.numpy.save_file(part, folder / file, metadata={"format": "pt"})


CHANGES = {
    "no prefix": lambda f: change(f, without_prefix), "inv_freq": lambda f: change(f, with_frequencies),
    "float64": lambda f: change(f, in_float64), "mixed dtypes": lambda f: change(f, mixed), "stale index": stale_index,
}  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("name", CHANGES)
def test_transformers_reads_the_same(folder, tmp_path, name):
    import torch
    import transformers

    CHANGES[name](folder)
    config, params = hub.load(folder)
    assert config == CONFIG
    hub.save(tmp_path / "ours", config, hub.load(folder, dtype="float32")[1])
    theirs = transformers.Qwen3NextForCausalLM.from_pretrained(folder).state_dict()
    ours = transformers.Qwen3NextForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)
    if name != "mixed dtypes":
        assert equal(params, random_params(CONFIG))


def test_layers_of_several_dtypes_become_the_narrowest_that_holds_them(folder):
    change(folder, mixed)
    params, want = hub.load(folder)[1], random_params(CONFIG)
    experts = params["blocks"]["linear"]["mlp"]["experts"]["up_proj"]
    assert experts.dtype == np.float32
    half = want["blocks"]["linear"]["mlp"]["experts"]["up_proj"].copy()
    half[:, :, 2] = half[:, :, 2].astype("float16")
    np.testing.assert_array_equal(experts, half)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32", "float16"}


def test_a_tensor_in_two_shards_is_the_one_that_the_index_names(folder):
    two_shards(folder)
    assert equal(hub.load(folder)[1], random_params(CONFIG))


def test_an_index_beside_a_whole_file_is_no_part_of_the_models_identity(folder):
    before = hub.identity(folder)
    (folder / INDEX).write_text("stale, and no JSON")
    assert hub.identity(folder) == before and hub.inspect(folder) == CONFIG


def test_a_model_without_its_head_lacks_it_by_name(tmp_path):
    hub.save(tmp_path / "m", TINY, random_params(TINY))
    change(tmp_path / "m", lambda t: without_prefix({n: v for n, v in t.items() if n != "lm_head.weight"}))
    with pytest.raises(UserError, match="lm_head.weight is missing"):
        hub.load(tmp_path / "m")
