"""Folders of Qwen3.5's models: the text part is read and written, what belongs to images is handed on."""

import dataclasses
import math
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from qcn_jax import files, hub
from qcn_jax.cli import main
from qcn_jax.config import ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.hub import layout, reading, writing
from qcn_jax.model import abstract_params
from tests.hub.models import SMALL, equal, random_params

_SHORT = dataclasses.replace(SMALL, num_hidden_layers=3, full_attention_interval=2)
DENSE = dataclasses.replace(
    _SHORT, model_type="qwen3_5_text", num_experts=0, intermediate_size=24, linear_num_value_heads=6,
    **{field.name: field.default for field in dataclasses.fields(ModelConfig) if field.name in (
        "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")})
SPARSE = dataclasses.replace(_SHORT, model_type="qwen3_5_moe_text", linear_num_value_heads=2)
CONFIGS = {
    "dense": DENSE, "dense, tied": dataclasses.replace(DENSE, tie_word_embeddings=True, num_hidden_layers=4),
    "experts": SPARSE, "experts, ratio 3": dataclasses.replace(SPARSE, linear_num_value_heads=6),
}
VISION = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, patch_size=4,
              num_position_embeddings=16)


@pytest.fixture(name="config", params=CONFIGS)
def _config(request):
    return CONFIGS[request.param]


def read(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors"))
            for name, value in safetensors.numpy.load_file(file).items()}


def same(one, other):
    return one.keys() == other.keys() and all(
        a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in ((one[name], other[name]) for name in one))


def test_the_layout_is_the_models_tree(config):
    tree = {tuple(key.key for key in path): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config))}
    assert layout.leaf_shapes(config) == tree


def test_every_number_is_in_one_run_and_every_published_row_too(config):
    """Runs tile the arrays of the tree, and the tensors of the files."""
    taken = {leaf: np.zeros(shape, int) for leaf, shape in layout.leaf_shapes(config).items()}
    rows: dict[str, list] = {}
    for tensor in layout.tensors(config):
        taken[tensor.leaf][(*tensor.index, *tensor.box(0, tensor.shape[0]))] += 1
        rows.setdefault(tensor.name, []).append((tensor.row, tensor.shape[0], tensor))
    assert all((leaf == 1).all() for leaf in taken.values())
    for runs in rows.values():
        covered = sorted(row + i for row, count, _ in runs for i in range(count))
        whole = runs[0][2].published
        assert covered == list(range(math.prod(whole) // math.prod(runs[0][2].shape[1:])))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_loads_bit_for_bit(config, dtype, tmp_path):
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    params = random_params(config, dtype=dtype)
    hub.save(tmp_path / "m", config, params, shard_bytes=60_000)
    loaded, again = hub.load(tmp_path / "m")
    assert loaded == config and equal(params, again)


def test_pieces_that_cut_runs_give_the_same(config, tmp_path, monkeypatch):
    params = random_params(config)
    hub.save(tmp_path / "m", config, params)
    monkeypatch.setattr(reading, "PIECE_BYTES", 300)
    monkeypatch.setattr(reading, "STAGED_BYTES", 20_000)
    monkeypatch.setattr(writing, "PIECE_BYTES", 300)
    loaded = hub.load(tmp_path / "m")[1]
    assert equal(loaded, params)
    hub.save(tmp_path / "again", config, loaded)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "m" / "model.safetensors").read_bytes()


def _spread_round_trip():
    """With eight devices, over which head groups and experts are split, a run's rows too."""
    import tempfile

    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("rows", "columns"))

    def spec(leaf):
        axes = [None] * leaf.ndim
        for position, name, parts in ((-1, "columns", 4), (-2, "rows", 2)):
            if leaf.ndim >= -position and leaf.shape[position] % parts == 0:
                axes[position] = name
        return NamedSharding(mesh, PartitionSpec(*axes))

    for config in (DENSE, SPARSE):
        params = random_params(config)
        with tempfile.TemporaryDirectory() as folder:
            first, again = pathlib.Path(folder) / "m", pathlib.Path(folder) / "again"
            hub.save(first, config, params)
            loaded = hub.load(first, shardings=jax.tree.map(spec, params))[1]
            assert equal(loaded, params)
            hub.save(again, config, loaded)
            assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_arrays_on_several_devices(run_with_devices):
    run_with_devices(_spread_round_trip, 8)


def theirs(config, with_vision=False):
    """A random transformers model of `config`, which has no multi-token prediction."""
    import torch
    import transformers

    values = hub.config_to_hf(config)
    classes = {"qwen3_5_text": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", "Qwen3_5Config",
                                "Qwen3_5ForConditionalGeneration"),
               "qwen3_5_moe_text": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", "Qwen3_5MoeConfig",
                                    "Qwen3_5MoeForConditionalGeneration")}[config.model_type]
    text_class, text_model, whole_class, whole_model = (getattr(transformers, name) for name in classes)
    text = text_class(**values | {"eos_token_id": 5})
    torch.manual_seed(0)
    if not with_vision:
        return text_model(text)
    return whole_model(whole_class(text_config=text.to_dict(), vision_config=VISION,
                                   tie_word_embeddings=config.tie_word_embeddings))


def described(model):
    """Its configuration, but for where it lies."""
    values = model.config.to_dict()
    return {name: value for name, value in values.items() if name != "_name_or_path"}


def tensors_of(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.mark.torch
@pytest.mark.parametrize("with_vision", [False, True])
def test_transformers_weights_come_and_go_bit_for_bit(config, with_vision, tmp_path):
    config = dataclasses.replace(config, num_nextn_predict_layers=0)
    model = theirs(config, with_vision)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    loaded, params = hub.load(tmp_path / "theirs")
    assert loaded == config
    hub.save(tmp_path / "ours", loaded, params, source=tmp_path / "theirs", shard_bytes=60_000)
    again, notes = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(notes.values())
    assert same(tensors_of(model), tensors_of(again))
    assert described(again) == described(type(model).from_pretrained(tmp_path / "theirs"))
    # And once more from what this library has written.
    assert equal(hub.load(tmp_path / "ours")[1], params)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["dense, tied", "experts"])
def test_the_encoder_of_images_is_handed_on_or_left_out(name, tmp_path):
    import transformers

    config = dataclasses.replace(CONFIGS[name], num_nextn_predict_layers=0)
    model, folder = theirs(config, with_vision=True), tmp_path / "theirs"
    model.save_pretrained(folder)
    files.write_json(folder / "preprocessor_config.json", {"patch_size": 4})
    vision = {name: value for name, value in read(folder).items() if name.startswith("model.visual.")}
    assert len(vision) > 10
    # Through Orbax form and back it is a whole checkpoint again.
    assert main.main(["convert", f"--from={folder}", f"--to={tmp_path / 'orbax'}"]) == 0
    assert main.main(["convert", f"--from={tmp_path / 'orbax'}", f"--to={tmp_path / 'whole'}"]) == 0
    whole = type(model).from_pretrained(tmp_path / "whole")
    assert same(tensors_of(model), tensors_of(whole))
    assert described(whole) == described(type(model).from_pretrained(folder))
    found = read(tmp_path / "whole")
    assert same(vision, {name: value for name, value in found.items() if name.startswith("model.visual.")})
    assert files.read_json(tmp_path / "whole" / "preprocessor_config.json") == {"patch_size": 4}
    # Without it, a model of text alone with the same weights.
    assert main.main(["convert", f"--from={tmp_path / 'orbax'}", f"--to={tmp_path / 'text'}", "--vision=drop"]) == 0
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert type(text).__name__ == hub.config_to_hf(config)["architectures"][0]
    assert not (tmp_path / "text" / "preprocessor_config.json").exists()
    assert not any("visual" in name for name in read(tmp_path / "text"))
    short = {name.replace("model.language_model.", "model."): value
             for name, value in tensors_of(model).items() if "visual" not in name}
    assert same(short, tensors_of(text)) and text.config.eos_token_id == 5
    assert equal(hub.load(tmp_path / "text")[1], hub.load(folder)[1])


def per_expert(table):
    """Stacked experts as a tensor each, as transformers writes some models."""
    found = {}
    for name, value in table.items():
        prefix, fused, _ = name.rpartition(".gate_up_proj")
        if fused:
            gate, up = np.split(value, 2, axis=1)
            found |= {f"{prefix}.{i}.gate_proj.weight": part for i, part in enumerate(gate)}
            found |= {f"{prefix}.{i}.up_proj.weight": part for i, part in enumerate(up)}
        elif name.endswith("experts.down_proj"):
            found |= {f"{name.removesuffix('.down_proj')}.{i}.down_proj.weight": part for i, part in enumerate(value)}
        else:
            found[name] = value
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def without_model(table):
    """As a model of text and images without its head is saved."""
    return {name.replace("model.", "language_model.", 1): value for name, value in table.items()}


@pytest.mark.parametrize("alter", [per_expert, without_model])
def test_other_names_of_the_same_tensors(alter, tmp_path):
    config = dataclasses.replace(SPARSE, tie_word_embeddings=True)
    hub.save(tmp_path / "m", config, random_params(config))
    path = tmp_path / "m" / "model.safetensors"
    safetensors.numpy.save_file(alter(safetensors.numpy.load_file(path)), path, metadata={"format": "pt"})
    assert equal(hub.load(tmp_path / "m")[1], random_params(config))


def published(**changes):
    """A config.json as Qwen publishes them, of no weights."""
    text = {
        "attention_bias": False, "attn_output_gate": True, "dtype": "bfloat16", "eos_token_id": 248_044,
        "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 1024,
        "intermediate_size": 3584, "layer_types": hub.configuration.layer_types(24, 4), "linear_num_value_heads": 16,
        "max_position_embeddings": 262_144, "mlp_only_layers": [], "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "num_attention_heads": 8,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "tie_word_embeddings": True, "mamba_ssm_dtype": "float32",
        "output_gate_type": "swish",
        "rope_parameters": {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default",
                            "rope_theta": 10_000_000, "partial_rotary_factor": 0.25}}
    return {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": text | changes,
            "tie_word_embeddings": True, "vision_config": {"depth": 12}}


def test_a_published_configuration():
    config = hub.config_from_hf(published())
    assert config == ModelConfig(
        model_type="qwen3_5_text", vocab_size=248_320, hidden_size=1024, num_hidden_layers=24, num_attention_heads=8,
        num_key_value_heads=2, rope_theta=1e7, linear_num_value_heads=16, intermediate_size=3584, num_experts=0,
        tie_word_embeddings=True, num_nextn_predict_layers=1, dtype="bfloat16", param_dtype="bfloat16")


def test_absent_fields_take_transformers_defaults():
    transformers = pytest.importorskip("transformers")
    for name in ("qwen3_5_text", "qwen3_5_moe_text"):
        config = hub.config_from_hf({"model_type": name, "rope_theta": 1e7})
        theirs = transformers.AutoConfig.for_model(name).to_dict()
        other = {key for key, value in hub.config_to_hf(config).items() if theirs.get(key, value) != value}
        assert other == {"architectures", "rope_parameters", "dtype"}


@pytest.mark.parametrize("values, line", [
    ({"model_type": "qwen3_5"}, "text_config must be a JSON object, got None"),
    ({**published(), "text_config": []}, "text_config must be a JSON object"),
    (published(model_type="qwen3_5_moe_text"), "text_config.model_type must be 'qwen3_5_text'"),
    (published(output_gate_type="sigmoid"), "text_config: output_gate_type='sigmoid' is not supported"),
    (published(attn_output_gate=False), "attn_output_gate=False is not supported"),
    (published(mtp_use_dedicated_embeddings=True), "mtp_use_dedicated_embeddings=True is not supported"),
    (published(layer_types=["full_attention"] * 24), "text_config: layer_types is not supported"),
    (published(intermediate_size=0), "intermediate_size: 0; with model_type=qwen3_5_text above 0"),
    (published(linear_num_value_heads=24), "linear_num_value_heads: 24 is not a multiple"),
    ({**published(), "quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"model_type": "qwen4_exp", "rope_theta": 1.0}, "model_type must be one of qwen3_next, qwen3_5_moe_text"),
])
def test_what_is_not_supported_is_one_line(values, line):
    with pytest.raises(UserError, match=line) as caught:
        hub.config_from_hf(values)
    assert "\n" not in str(caught.value)


def test_ids_that_end_a_text_stand_in_the_text_part(tmp_path):
    files.write_json(tmp_path / "config.json", published())
    assert hub.description.eos_ids(tmp_path, 248_320) == {248_044}
