"""Checkpoints that are damaged or unsupported, and trees that do not fit: one line each that names the fault."""

import dataclasses
import json
import os

import numpy as np
import pytest
import safetensors.numpy

from qcn_jax import files, hub
from qcn_jax.config import ModelConfig
from qcn_jax.errors import UserError
from tests.hub.models import SMALL, random_params


def rewrite(folder, change):
    """Applies `change` to the table of the first file and brings the index up to date."""
    file = sorted(folder.glob("model-*.safetensors"))[0]
    table = safetensors.numpy.load_file(file)
    change(table)
    safetensors.numpy.save_file(table, file)
    index = files.read_json(folder / "model.safetensors.index.json")
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != file.name} | dict.fromkeys(
        table, file.name
    )
    files.write_json(folder / "model.safetensors.index.json", index)


INDEX = "model.safetensors.index.json"
NORM = "model.layers.0.input_layernorm.weight"
FAULTS = {
    "missing tensor": (lambda f: rewrite(f, lambda t: t.pop(NORM)), f"{NORM} is missing"),
    "missing expert": (
        lambda f: rewrite(f, lambda t: t.pop("model.layers.0.mlp.experts.2.up_proj.weight")),
        "experts.2.up_proj.weight is missing",
    ),
    "surplus tensor": (
        lambda f: rewrite(f, lambda t: t.update(extra=np.zeros(3, "float32"))),
        "00001-of.*: extra is not part of this model",
    ),
    "wrong shape": (
        lambda f: rewrite(f, lambda t: t.update({NORM: np.zeros(31, "float32")})),
        rf"{NORM} has shape \[31\], expected \[32\]",
    ),
    "wrong dtype": (lambda f: rewrite(f, lambda t: t.update({NORM: np.zeros(32, "int64")})), f"{NORM} has dtype I64"),
    "truncated file": (lambda f: truncate(f, 100), "00001-of-.*is truncated"),
    "cut header": (lambda f: truncate(f, None), "00001-of-.*is (truncated|damaged)"),
    "missing file": (lambda f: sorted(f.glob("model-*"))[1].unlink(), "00002-of-.*is missing"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "holds neither model.safetensors nor"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json: is not valid JSON"),
    "index names a lost tensor": (lambda f: add_to_index(f, "lost.weight"), "lost.weight is not in model-00001"),
    "index is a list": (lambda f: (f / INDEX).write_text("[1]"), "index.json: expected a JSON object whose weight_map"),
    "index without a map": (lambda f: (f / INDEX).write_text("{}"), "index.json: expected a JSON object whose weight_"),
    "index names no file": (lambda f: files.write_json(f / INDEX, {"weight_map": {"a": 3}}), "gives 3 for a; allowed"),
    "index leaves the folder": (
        lambda f: files.write_json(f / INDEX, {"weight_map": {"a": "../b.safetensors"}}),
        "gives '../b.safetensors' for a; allowed: the name of a file beside it",
    ),
    "index names an absolute path": (
        lambda f: files.write_json(f / INDEX, {"weight_map": {"a": "/etc/passwd"}}), "gives '/etc/passwd' for a"),
    "index names no printable file": (
        lambda f: files.write_json(f / INDEX, {"weight_map": {"a": "b\0.safetensors"}}), "allowed: the name of a file"),
    "index names the folder": (lambda f: files.write_json(f / INDEX, {"weight_map": {"a": ".."}}), "is no file|allowed"),
    "index names a pipe": (
        lambda f: os.mkfifo(f / "p") or files.write_json(f / INDEX, {"weight_map": {"a": "p"}}), "/p: is no file"),
    "index names a shard that is gone": (
        lambda f: files.write_json(f / INDEX, {"weight_map": {"a": "gone.safetensors"}}), "gone.safetensors: is missing"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: expected a JSON object"),
    "bare and full names": (
        lambda f: rewrite(f, lambda t: t.update({NORM.removeprefix("model."): t[NORM]})),
        "layers.0.input_layernorm.weight is there twice",
    ),
}


def truncate(folder, less):
    file = sorted(folder.glob("model-*"))[0]
    data = file.read_bytes()
    file.write_bytes(data[: len(data) - less] if less else data[:40])


def add_to_index(folder, name):
    index = files.read_json(folder / "model.safetensors.index.json")
    index["weight_map"][name] = sorted(index["weight_map"].values())[0]
    files.write_json(folder / "model.safetensors.index.json", index)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_in_one_line(fault, copy):
    damage, line = FAULTS[fault]
    damage(copy)
    with pytest.raises(UserError, match=line) as caught:
        hub.load(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key, value, line",
    [
        ("model_type", "qwen3_moe", "model_type must be one of qwen3_next, "),
        ("attention_bias", True, "attention_bias=True is not supported"),
        ("rope_scaling", {"rope_type": "yarn"}, "rope_scaling.rope_type='yarn' is not supported"),
        ("rope_scaling", {"type": "yarn"}, "rope_scaling.type='yarn' is not supported"),
        ("rope_parameters", {"type": "yarn", "rope_theta": 12345.0}, "rope_parameters.type='yarn' is not supported"),
        ("rope_parameters", {"full_attention": {"type": "linear"}}, "full_attention.type='linear' is not supported"),
        ("rope_parameters", {"full_attention": {"rope_theta": 12345.0}, "rope_type": "yarn"}, "rope_parameters.rope_type='yarn'"),
        ("rope_scaling", {"linear_attention": {"rope_type": "longrope"}}, "linear_attention.rope_type='longrope' is not"),
        ("rope_scaling", {"text": {"type": "yarn"}}, "rope_scaling.text is not supported; allowed: full_attention, lin"),
        ("rope_parameters", {"full_attention": 3}, "rope_parameters.full_attention must be a JSON object, got 3"),
        ("rope_parameters", ["default"], "rope_parameters must be a JSON object"),
        ("rope_scaling", {"rope_theta": 1.0}, "rope_theta is 12345.0 but rope_scaling.rope_theta is 1.0"),
        ("layer_types", 7, "layer_types must be a list, got 7"),
        ("layer_types", [None] * 6, "layer_types is not supported"),
        ("rms_norm_eps", -1e-6, "config.json.rms_norm_eps: -1e-06; allowed: above 0"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps: nan; allowed: above 0"),
        ("num_experts_per_tok", 9, "num_experts_per_tok: 9 is more than num_experts"),
        ("hidden_act", "gelu", "hidden_act"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1.0}, "rope_type='yarn' is not supported"),
        ("rope_theta", 1.0, "rope_theta is 1.0 but rope_parameters.rope_theta is 12345.0"),
        ("mlp_only_layers", [1], "mlp_only_layers"),
        ("layer_types", ["full_attention"] * 6, "layer_types is not supported"),
        ("decoder_sparse_step", 2, "decoder_sparse_step"),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config"),
        ("hidden_size", "32", "hidden_size must be int, got '32'"),
        ("dtype", "float8_e4m3fn", "dtype='float8_e4m3fn' is not supported"),
        ("full_attention_interval", 0, "at least 1"),
        ("num_experts", 5, r"(shape \[4, 32\], expected \[5, 32\]|experts.4.gate_proj.weight is missing)"),
    ],
)
def test_unsupported_options_are_named(copy, key, value, line):
    (copy / "config.json").write_text(json.dumps(files.read_json(copy / "config.json") | {key: value}))
    with pytest.raises(UserError, match=line) as caught:
        hub.load(copy)
    assert "\n" not in str(caught.value)


def test_a_config_without_rotary_base_is_refused_and_absent_fields_take_transformers_defaults():
    with pytest.raises(UserError, match="rope_theta is missing"):
        hub.config_from_hf({"model_type": "qwen3_next"})
    config = hub.config_from_hf({"model_type": "qwen3_next", "rope_theta": 10_000_000})
    assert config == dataclasses.replace(ModelConfig(), rope_theta=1e7, max_position_embeddings=32_768)


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda p: p["norm"].pop("weight"), "norm/weight is missing"),
        (lambda p: p.update(extra={"x": np.zeros(1, "float32")}), "extra/x is not part"),
        (lambda p: p["norm"].update(weight=np.zeros(3, "float32")), r"norm/weight has shape \[3\]"),
        (lambda p: p["norm"].update(weight=np.zeros(32)), "norm/weight has dtype float64"),
    ],
)
def test_trees_that_do_not_fit_are_refused(change, line, tmp_path):
    params = random_params(SMALL)
    change(params)
    with pytest.raises(UserError, match=line):
        hub.save(tmp_path / "m", SMALL, params)


@pytest.mark.parametrize("theta", [0, -1.0, float("inf")])
def test_a_rotary_base_that_gives_no_angles_is_refused(theta):
    with pytest.raises(UserError, match="rope_theta: .*; allowed: above 0"):
        hub.config_from_hf({"model_type": "qwen3_next", "rope_theta": theta})


@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_theta": 7.0},
        {"rope_theta": 7.0, "rope_scaling": None},
        {"rope_theta": 7.0, "rope_scaling": {"type": "default"}},
        {"rope_theta": 7.0, "rope_scaling": {"rope_type": "default", "type": "default"}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 7.0}},
        {"rope_parameters": {"type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.25}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 7.0}, "linear_attention": None}},
    ],
)
def test_every_form_of_plain_rotary_is_read_alike(rotary):
    config = hub.config_from_hf({"model_type": "qwen3_next", **rotary})
    assert (config.rope_theta, config.partial_rotary_factor) == (7.0, 0.25)
