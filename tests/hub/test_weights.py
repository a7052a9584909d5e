"""Checkpoints in and out: bit-equal both ways, streamed into any layout, every fault named in one line."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from qcn_jax import files, hub
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.config import ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.hub import description, layout, reading, writing
from qcn_jax.model import abstract_params
from tests.hub.models import SMALL, TINY, equal, random_params


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_hidden_layers": 8, "num_nextn_predict_layers": 0},
        {"tie_word_embeddings": True},
        {"num_hidden_layers": 3, "num_nextn_predict_layers": 0},
        {"full_attention_interval": 1, "num_hidden_layers": 2},
        {"full_attention_interval": 2, "num_hidden_layers": 5},
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_loads_bit_for_bit(change, dtype, tmp_path):
    config = dataclasses.replace(SMALL, dtype=dtype, param_dtype=dtype, **change)
    params = random_params(config, dtype=dtype)
    hub.save(tmp_path / "m", config, params)
    read, again = hub.load(tmp_path / "m")
    assert read == config
    assert equal(params, again)


def test_the_layout_is_the_models_tree():
    for change in ({}, {"tie_word_embeddings": True}, {"num_hidden_layers": 8}, {"full_attention_interval": 1}):
        config = dataclasses.replace(SMALL, **change)
        tree = {
            tuple(key.key for key in path): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config))
        }
        assert layout.leaf_shapes(config) == tree


def test_tensor_names_and_count_of_the_published_model():
    """74,391 tensors without MTP and 1,553 of MTP, as counted on the hub."""
    config = ModelConfig(num_nextn_predict_layers=1)
    names = [tensor.name for tensor in layout.tensors(config)]
    assert len(set(names)) == len(names)
    assert sum(name.startswith("mtp.") for name in names) == 1_553
    assert len(names) == 74_391 + 1_553
    sizes = {tensor.name: tensor.shape for tensor in layout.tensors(config)}
    assert sizes["model.layers.47.mlp.experts.511.down_proj.weight"] == (2048, 512)
    assert sizes["model.layers.0.linear_attn.conv1d.weight"] == (8192, 1, 4)
    assert sizes["mtp.fc.weight"] == (2048, 4096)


@pytest.mark.torch
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_weights_come_and_go_bit_for_bit(tmp_path, tied):
    import torch
    import transformers

    values = hub.config_to_hf(dataclasses.replace(SMALL, num_nextn_predict_layers=0, tie_word_embeddings=tied))
    for name in (
        "rope_theta",
        "partial_rotary_factor",
        "rope_scaling",
        "full_attention_interval",
        "model_type",
        "architectures",
    ):
        del values[name]  # transformers' own dialect; it writes back only this one
    model = transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**values))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    config, params = hub.load(tmp_path / "theirs")
    assert config.rope_theta == SMALL.rope_theta and config.full_attention_interval == 4
    hub.save(tmp_path / "ours", config, params)
    ours = transformers.Qwen3NextForCausalLM.from_pretrained(tmp_path / "ours")
    theirs, mine = model.state_dict(), ours.state_dict()
    assert theirs.keys() == mine.keys() and all(torch.equal(theirs[name], mine[name]) for name in theirs)
    assert ours.config.layer_types == model.config.layer_types
    assert ours.config.rope_parameters == model.config.rope_parameters
    # What transformers writes and what this library writes hold the same tensors.
    read = lambda folder: {
        name: value
        for file in folder.glob("*.safetensors")
        for name, value in safetensors.numpy.load_file(file).items()
    }
    first, second = read(tmp_path / "theirs"), read(tmp_path / "ours")
    assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.torch
def test_both_config_dialects_give_the_model_that_transformers_builds(tmp_path):
    import transformers

    flat = {
        name: value for name, value in hub.config_to_hf(SMALL).items() if name not in ("rope_parameters", "layer_types")
    }
    files.write_json(tmp_path / "config.json", flat)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "folded")
    folded = json.loads((tmp_path / "folded" / "config.json").read_text())
    assert "rope_parameters" in folded and "rope_theta" not in folded
    assert hub.load_config(tmp_path) == hub.load_config(tmp_path / "folded") == SMALL


def stack_experts(folder):
    """Rewrites per-expert tensors as transformers holds them in memory."""
    table = {
        name: value
        for file in folder.glob("*.safetensors")
        for name, value in safetensors.numpy.load_file(file).items()
    }
    for name in [name for name in table if ".experts.0.gate_proj" in name]:
        prefix = name.split(".experts.")[0] + ".experts."
        part = lambda i, kind: table.pop(f"{prefix}{i}.{kind}_proj.weight")
        pairs = [np.concatenate([part(i, "gate"), part(i, "up")]) for i in range(SMALL.num_experts)]
        table[f"{prefix}gate_up_proj"] = np.stack(pairs)
        table[f"{prefix}down_proj"] = np.stack([part(i, "down") for i in range(SMALL.num_experts)])
    for file in folder.glob("model*"):
        file.unlink()
    safetensors.numpy.save_file(table, folder / "model.safetensors")
    return table


def test_stacked_expert_names_are_read_too(copy):
    stack_experts(copy)
    assert equal(hub.load(copy)[1], random_params(SMALL))


def test_small_pieces_and_device_filled_arrays_give_the_same(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE_BYTES", 300)
    monkeypatch.setattr(reading, "STAGED_BYTES", 20_000)
    monkeypatch.setattr(writing, "PIECE_BYTES", 300)
    params = hub.load(saved)[1]
    assert equal(params, random_params(SMALL))
    hub.save(tmp_path / "again", SMALL, params, shard_bytes=100_000)
    for file in saved.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_dtype_and_host_arrays(saved, tmp_path):
    made = {}

    def allocate(path, shape, dtype):
        made[path] = np.lib.format.open_memmap(tmp_path / ("_".join(path) + ".npy"), "w+", dtype=dtype, shape=shape)
        return made[path]

    config, params = hub.load(saved, dtype="float16", allocate=allocate)
    assert config.param_dtype == "float16"
    assert params["norm"]["weight"] is made["norm", "weight"]
    assert equal(params, jax.tree.map(lambda leaf: leaf.astype("float16"), random_params(SMALL)))


def sharded_round_trip():
    """Runs in a process with eight devices: FSDP, expert and replicated axes, staged and device-filled."""
    import tempfile

    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("copy", "rows", "columns"))
    config, params = TINY, random_params(TINY)

    def spec(leaf):  # shard the last two axes where they divide; the axis "copy" replicates
        axes = [None] * leaf.ndim
        for position, name in ((-1, "columns"), (-2, "rows")):
            if leaf.ndim >= -position and leaf.shape[position] % 2 == 0:
                axes[position] = name
        return NamedSharding(mesh, PartitionSpec(*axes))

    shardings = jax.tree.map(spec, params)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        hub.save(folder / "m", config, params)
        for staged in (1 << 30, 8_000):
            reading.STAGED_BYTES = staged
            _, read = hub.load(folder / "m", shardings=shardings)
            assert jax.tree.leaves(jax.tree.map(lambda a, s: a.sharding == s, read, shardings)).count(False) == 0
            assert equal(read, params)
        hub.save(folder / "again", config, read)
        assert (folder / "again" / "model.safetensors").read_bytes() == (
            folder / "m" / "model.safetensors"
        ).read_bytes()
    print("same")


def test_sharded_arrays_are_filled_and_saved(run_with_devices):
    assert "same" in run_with_devices(sharded_round_trip, 8)


def test_mtp_is_read_where_present_and_missing_without_complaint(saved, tmp_path):
    config, params = hub.load(saved)
    assert config.num_nextn_predict_layers == 1 and "mtp" in params
    hub.save(
        tmp_path / "m",
        dataclasses.replace(config, num_nextn_predict_layers=0),
        {k: v for k, v in params.items() if k != "mtp"},
    )
    values = files.read_json(tmp_path / "m" / "config.json") | {"num_nextn_predict_layers": 1}
    files.write_json(tmp_path / "m" / "config.json", values)
    config, params = hub.load(tmp_path / "m")
    assert config.num_nextn_predict_layers == 0 and "mtp" not in params


def test_saving_is_atomic_and_guards_other_folders(tmp_path, monkeypatch):
    params = random_params(SMALL)
    hub.save(tmp_path / "m", SMALL, params)
    before = (tmp_path / "m" / "model.safetensors").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(description, "config_to_hf", fail)
        with pytest.raises(UserError, match="No space left on device"):
            hub.save(tmp_path / "m", SMALL, random_params(SMALL, seed=1))
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    hub.save(tmp_path / "m", SMALL, random_params(SMALL, seed=1))
    assert (tmp_path / "m" / "model.safetensors").read_bytes() != before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="holds other things"):
        hub.save(tmp_path / "other", SMALL, params)


@pytest.mark.torch
def test_a_saved_tokenizer_works_in_transformers(tmp_path):
    import transformers

    tokenizer = Tokenizer.train(
        [pathlib.Path(__file__).read_text()], 400, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"]
    )
    hub.save(tmp_path / "m", SMALL, random_params(SMALL), tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "<|im_start|>user\nHi é 👩‍👩‍👧 <tool_call> x  =  1<|im_end|>\n"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    for case in json.loads((pathlib.Path(__file__).parent.parent / "golden/qwen3_coder_chat.json").read_text())[
        "cases"
    ]:
        text = theirs.apply_chat_template(
            case["messages"], case["tools"], tokenize=False, add_generation_prompt=case["add_generation_prompt"]
        )
        assert text == case["text"]
    assert theirs.eos_token == "<|im_end|>" and theirs.pad_token == "<|endoftext|>"
    assert Tokenizer.from_folder(tmp_path / "m").encode(text) == tokenizer.encode(text)
    assert files.read_json(tmp_path / "m" / "config.json")["eos_token_id"] == tokenizer.id("<|im_end|>")
