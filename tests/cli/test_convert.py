"""`qcn convert`: there and back, bit for bit, and its refusals."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from qcn_jax import hub
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.cli.main import main
from qcn_jax.config import ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.hub import description
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


def test_what_stands_beside_the_weights_is_kept_byte_for_byte(model, tmp_path):
    source = pathlib.Path(shutil.copytree(model, tmp_path / "source"))
    (source / "chat_template.jinja").write_text("{{ my_own }}")
    described = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").write_text(json.dumps(described["model"]["vocab"]))
    (source / "merges.txt").write_text("\n".join(" ".join(merge) for merge in described["model"]["merges"]))
    (source / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": [2, 3]}
    (source / "config.json").write_text(json.dumps(config))
    assert main(["convert", f"--from={source}", f"--to={tmp_path / 'orbax'}"]) == 0
    assert main(["convert", f"--from={tmp_path / 'orbax'}", f"--to={tmp_path / 'back'}"]) == 0
    assert {path.name for path in (tmp_path / "back").iterdir()} == {path.name for path in source.iterdir()}
    for name in ("chat_template.jinja", "vocab.json", "merges.txt", "generation_config.json", "tokenizer_config.json"):
        assert (source / name).read_bytes() == (tmp_path / "back" / name).read_bytes(), name
    assert json.loads((tmp_path / "back/config.json").read_text())["eos_token_id"] == [2, 3]
    assert description.eos_ids(tmp_path / "back", 5) == {2, 3} and description.eos_ids(source, 99) == {2, 3, 5}


def _thesis(folder, config='{"model_type": "qwen3_next"}'):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config)
    return folder


@pytest.mark.parametrize("add, line", [
    (lambda f: (f / "thesis.tex").write_text("years"), "such as thesis.tex;"),
    (lambda f: (f / "params").mkdir() or (f / "params/thesis.tex").write_text("years"), "such as params/thesis.tex;"),
    (lambda f: (f / "data").mkdir(), "such as data;"),
    (lambda f: (f / "model.safetensors").mkdir(), "such as model.safetensors;"),
    (lambda f: (f / "link").symlink_to("config.json"), "such as link;"),
    (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "config.json of model_type 'llama'"),
    (lambda f: (f / "config.json").write_text("{"), "without a readable config.json"),
    (lambda f: (f / "config.json").rename(f / "tokenizer.json"), "without a readable config.json"),
])  # fmt: skip
def test_only_a_model_of_ours_is_replaced(model, tmp_path, capsys, add, line):
    target = _thesis(tmp_path / "target")
    add(target)
    before = {path: path.is_file() and path.read_bytes() for path in sorted(target.rglob("*"))}
    assert main(["convert", f"--from={model}", f"--to={target}"]) == 1
    assert line in capsys.readouterr().err
    assert {path: path.is_file() and path.read_bytes() for path in sorted(target.rglob("*"))} == before
    with pytest.raises(UserError, match="exists and holds other things"):  # also where a stage or a user saves
        hub.save(target, CONFIG, hub.load(model)[1])


def test_source_and_target_may_not_lie_within_one_another(model, tmp_path, capsys):
    source = pathlib.Path(shutil.copytree(model, tmp_path / "models/inner"))
    for target in (tmp_path / "models", source / "orbax", tmp_path / "models/x/../inner/orbax"):
        assert main(["convert", f"--from={source}", f"--to={target}"]) == 1
        assert "lie within one another" in capsys.readouterr().err
    assert (source / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_a_source_that_links_into_the_target_is_refused(model, tmp_path, capsys):
    target = pathlib.Path(shutil.copytree(model, tmp_path / "target"))
    source = pathlib.Path(shutil.copytree(model, tmp_path / "source"))
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to(target / "model.safetensors")
    (tmp_path / "alias").symlink_to(target)
    for name in ("target", "alias"):
        assert main(["convert", f"--from={source}", f"--to={tmp_path / name}"]) == 1
        assert "model.safetensors of --from is a link into it; name another" in capsys.readouterr().err
    assert hub.load(source)[0] == CONFIG
    (tmp_path / "into").symlink_to(source)
    assert main(["convert", f"--from={source}", f"--to={tmp_path / 'into'}"]) == 1
    assert "--to: is the same folder as --from" in capsys.readouterr().err


def test_an_earlier_model_is_replaced_and_its_folders_rights_stay(model, tmp_path):
    target = _thesis(tmp_path / "disk/model")
    (target / "model-00001-of-00002.safetensors").write_text("old")
    target.chmod(0o2750)
    (tmp_path / "link").symlink_to(target)
    assert main(["convert", f"--from={model}", f"--to={tmp_path / 'link'}"]) == 0
    assert (tmp_path / "link").is_symlink() and target.stat().st_mode & 0o7777 == 0o2750
    assert not (target / "model-00001-of-00002.safetensors").exists() and hub.load(target)[0] == CONFIG
    assert main(["convert", f"--from={model}", f"--to={target}"]) == 0  # what was Orbax form is replaced too


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
