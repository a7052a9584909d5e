"""`qcn convert`: there and back, bit for bit, and its refusals."""

import pathlib

import jax
import numpy as np
import pytest

from qcn_jax import hub
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.cli.main import main
from qcn_jax.config import ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.model import abstract_params

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    linear_num_key_heads=1,
    linear_key_head_dim=8,
    linear_num_value_heads=2,
    linear_value_head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=8,
    full_attention_interval=2,
    num_nextn_predict_layers=1,
    dtype="bfloat16",
    param_dtype="bfloat16",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(jax.numpy.bfloat16), abstract_params(CONFIG))
    path = tmp_path_factory.mktemp("convert") / "hf"
    hub.save(path, CONFIG, params, Tokenizer.train(["some text"], 300, ["<|endoftext|>", "<|im_end|>"]))
    return path


def test_there_and_back_is_bit_for_bit(model, tmp_path, capsys):
    orbax, back = tmp_path / "orbax", tmp_path / "back"
    assert main(["convert", f"--from={model}", f"--to={orbax}"]) == 0
    assert "parameters in Orbax form" in capsys.readouterr().out
    assert main(["convert", f"--from={orbax}", f"--to={back}"]) == 0
    assert sorted(path.name for path in back.iterdir()) == sorted(path.name for path in model.iterdir())
    for file in model.iterdir():
        assert file.read_bytes() == (back / file.name).read_bytes(), file.name
    config, params = hub.load(orbax)  # what every stage and verb does with --checkpoint or init
    assert config == CONFIG
    assert jax.tree.all(
        jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), params, hub.load(model)[1])
    )


def test_dtype_is_changed_on_request(model, tmp_path):
    assert main(["convert", f"--from={model}", f"--to={tmp_path / 'o'}", "--dtype=float32"]) == 0
    config, params = hub.load(tmp_path / "o")
    assert config.param_dtype == "float32"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    assert hub.load(tmp_path / "o", dtype="bfloat16")[0].param_dtype == "bfloat16"


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--to=x"], "--from is required"),
        (["--from=/nowhere", "--to=x"], "--from=/nowhere: there is no such folder"),
        (["--from={model}", "--to={model}"], "--to: is the same folder"),
        (["--from={tmp}", "--to=x"], "config.json: cannot be read"),
        (["--from={model}", "--to={full}"], "holds other things"),
        (["--from={model}", "--to=x", "--dtype=int8"], "--dtype"),
    ],
)
def test_refusals_are_one_line(model, tmp_path, capsys, arguments, line):
    (tmp_path / "full").mkdir()
    pathlib.Path(tmp_path / "full" / "notes").write_text("x")
    places = {"model": model, "tmp": tmp_path, "full": tmp_path / "full"}
    assert main(["convert", *(argument.format(**places) for argument in arguments)]) == 1
    error = capsys.readouterr().err
    assert line in error.splitlines()[-1]


def test_a_store_that_does_not_fit_its_config_is_named(model, tmp_path):
    main(["convert", f"--from={model}", f"--to={tmp_path / 'o'}"])
    text = (tmp_path / "o" / "config.json").read_text()
    (tmp_path / "o" / "config.json").write_text(text.replace('"num_experts": 4', '"num_experts": 8'))
    with pytest.raises(UserError, match=r"experts/gate_proj has shape|mlp/\S+ has shape"):
        hub.load(tmp_path / "o")
