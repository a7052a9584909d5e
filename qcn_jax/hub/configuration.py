"""config.json of a checkpoint: all its dialects in, and a file that every engine reads out.

Fields of the text model lie flat in the file, or in `text_config` where the model has an encoder of images beside it.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from qcn_jax import files
from qcn_jax.config import COMPUTE_FIELDS, ModelConfig
from qcn_jax.config_checks import check_model
from qcn_jax.errors import UserError

CONFIG_FILE = "config.json"
LINEAR, FULL = "linear_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What the config.json of a model_type is like.

    Attributes:
      architecture: transformers' class.
      steps: name of num_nextn_predict_layers.
      defaults: what transformers assumes where the file says nothing, as far as it differs from ModelConfig's own.
      absent: fields of ModelConfig that the file does not have.
    """

    architecture: str
    steps: str
    defaults: Mapping[str, Any]
    absent: frozenset[str]


_LENGTH, _VOCABULARY = {"max_position_embeddings": 32_768}, {"vocab_size": 248_320}
_KINDS = {
    "qwen3_next": _Kind(
        "Qwen3NextForCausalLM", "num_nextn_predict_layers", _LENGTH, frozenset({"intermediate_size"})),
    "qwen3_5_moe_text": _Kind(
        "Qwen3_5MoeForCausalLM", "mtp_num_hidden_layers",
        _LENGTH | _VOCABULARY | {"num_hidden_layers": 40, "num_experts": 256, "num_experts_per_tok": 8},
        frozenset({"intermediate_size", "norm_topk_prob"})),
    "qwen3_5_text": _Kind(
        "Qwen3_5ForCausalLM", "mtp_num_hidden_layers",
        _LENGTH | _VOCABULARY | {"hidden_size": 4096, "num_hidden_layers": 32, "num_key_value_heads": 4,
                                 "intermediate_size": 12_288, "num_experts": 0},
        frozenset({"num_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size",
                   "shared_expert_intermediate_size", "router_aux_loss_coef"})),
}
# Models with an encoder of images, and the model_type of their text_config.
_WITHIN = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
MODEL_TYPES = (*_KINDS, *_WITHIN)
# Fields of ModelConfig that are not config.json's: how to compute, or found from the weights.
_OWN = {*COMPUTE_FIELDS, "num_nextn_predict_layers"}
_SPECIAL = {"model_type", "rope_theta", "partial_rotary_factor", "full_attention_interval"}
# Options that would change the function computed: the one value of each that this model implements.
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None), "attention_dropout": (0, 0.0, None), "hidden_act": ("silu",),
    "mlp_only_layers": ([], None), "decoder_sparse_step": (1,), "use_sliding_window": (False, None),
    "quantization_config": (None,), "attn_output_gate": (True, None), "output_gate_type": ("silu", "swish", None),
    "mtp_use_dedicated_embeddings": (False, None),
}
_WRITTEN = {"attention_bias": False, "attention_dropout": 0, "hidden_act": "silu"}
_WRITTEN_NEXT = {"mlp_only_layers": [], "decoder_sparse_step": 1, "use_sliding_window": False, "rope_scaling": None}
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def load_config(folder: files.Path) -> ModelConfig:
    """Reads config.json of a Hugging Face folder; raises UserError that names the file and the field."""
    path = pathlib.Path(folder) / CONFIG_FILE
    return config_from_hf(files.read_object(path), str(path))


def config_from_hf(values: Mapping[str, Any], source: str = CONFIG_FILE) -> ModelConfig:
    """The ModelConfig of a config.json, flat or with `text_config`, `rope_parameters` and `layer_types`.

    Absent fields take transformers' defaults, except the rotary base: transformers' 10,000 is right for no
    published checkpoint, so a file without one is refused.

    Raises:
      UserError: another model type, an option this model does not implement, a field of a wrong type or out of its
        range.
    """
    kind_name = values.get("model_type")
    if kind_name not in MODEL_TYPES:
        raise UserError(f"{source}: model_type must be one of {', '.join(MODEL_TYPES)}, got {kind_name!r}")
    if kind_name in _WITHIN:
        kind_name, values = _WITHIN[kind_name], _text_values(values, source)
        source = f"{source}: text_config"
    kind = _KINDS[kind_name]
    for name, allowed in _FIXED.items():
        if name in values and values[name] not in allowed:
            raise UserError(f"{source}: {name}={values[name]!r} is not supported; allowed: {allowed[0]!r}")
    fields: dict[str, Any] = {"model_type": kind_name}
    for field in dataclasses.fields(ModelConfig):
        if field.name in _OWN | _SPECIAL:
            continue
        value = kind.defaults.get(field.name, field.default)
        if field.name not in kind.absent:
            value = values.get(field.name, value)
        fields[field.name] = _typed(value, type(field.default), field.name, source)
    fields |= _rotary(values, source)
    fields["full_attention_interval"] = _interval(values, fields["num_hidden_layers"], source)
    fields["num_nextn_predict_layers"] = _typed(values.get(kind.steps, 0), int, kind.steps, source)
    dtype = values.get("dtype", values.get("torch_dtype"))
    if dtype is not None:
        if dtype not in _DTYPES:
            raise UserError(f"{source}: dtype={dtype!r} is not supported; allowed: {', '.join(_DTYPES)}")
        dtype = held_dtype(dtype)
        fields |= {"dtype": dtype, "param_dtype": dtype}
    config = ModelConfig(**fields)
    check_model(config, source)
    return config


def is_within(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model with an encoder of images, whose text model is in `text_config`."""
    return values.get("model_type") in _WITHIN


def _text_values(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`text_config`, with what stands outside of it and acts in transformers."""
    text, wanted = values.get("text_config"), _WITHIN[values["model_type"]]
    if not isinstance(text, dict):
        raise UserError(f"{source}: text_config must be a JSON object, got {text!r:.80}")
    if text.get("model_type", wanted) != wanted:
        raise UserError(f"{source}: text_config.model_type must be {wanted!r}, got {text['model_type']!r}")
    outer = {name: values[name] for name in ("tie_word_embeddings", "quantization_config") if name in values}
    dtype = values.get("dtype", values.get("torch_dtype"))
    return ({} if dtype is None else {"dtype": dtype}) | text | outer


def held_dtype(name: str) -> str:
    """`name` of a dtype, or float32 where that is all that JAX holds of it (float64 without JAX_ENABLE_X64)."""
    if name != "float64":
        return name
    import jax

    return jax.dtypes.canonicalize_dtype(name).name


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json of the text model as transformers, vLLM and SGLang read it; of Qwen3-Next in both dialects."""
    kind = _KINDS[config.model_type]
    values: dict[str, Any] = {"architectures": [kind.architecture]}
    values |= {field.name: getattr(config, field.name)
               for field in dataclasses.fields(ModelConfig) if field.name not in _OWN | kind.absent}
    values |= _WRITTEN
    if config.model_type == "qwen3_next":
        values |= _WRITTEN_NEXT
        values["intermediate_size"] = config.moe_intermediate_size  # of dense layers, which this model never has
    else:
        del values["rope_theta"], values["partial_rotary_factor"]
    values["rope_parameters"] = {
        "rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": config.partial_rotary_factor}
    values["layer_types"] = layer_types(config.num_hidden_layers, config.full_attention_interval)
    if config.num_nextn_predict_layers:
        values[kind.steps] = config.num_nextn_predict_layers
    values["dtype"] = config.param_dtype
    return values


def succeeding(values: Mapping[str, Any], earlier: Mapping[str, Any], within: bool) -> dict[str, Any]:
    """A config.json with a text model's `values`, and what they do not say from the folder that it came from.

    Args:
      values: of `config_to_hf`, and special ids where the earlier folder has none.
      earlier: that folder's config.json.
      within: keep all that is beside the text model, where it `is_within`; otherwise special ids alone are kept.
    """
    outer, text = earlier, earlier["text_config"] if is_within(earlier) else earlier
    rotary = text.get("rope_parameters") or {}
    kept = {name: value for name, value in rotary.items() if name.startswith("mrope_")}  # equal positions of text
    values = {**values, "rope_parameters": kept | values["rope_parameters"]}
    if not (within and is_within(earlier)):
        ids = {name: part[name] for part in (outer, text) for name in _IDS if name in part}
        return values | ids
    steps = {kind.steps: 0 for kind in _KINDS.values() if kind.steps in text}
    inner = {name: value for name, value in values.items() if name not in ("architectures", *_IDS)}
    ids = {name: values[name] for name in _IDS if name in values}
    shared = {name: values[name] for name in ("tie_word_embeddings", "dtype")}
    return {**outer, **shared, "text_config": {**ids, **text, **steps, **inner}}


def layer_types(layers: int, interval: int) -> list[str]:
    """The kind of each layer: every `interval`-th is full attention."""
    return [LINEAR if (i + 1) % interval else FULL for i in range(layers)]


def _rotary(values: Mapping[str, Any], source: str) -> dict[str, float]:
    """Rotary base and share of rotated channels, from whichever dialect holds them."""
    groups = {"": values, **{f"{name}.": group for name, group in _rotary_groups(values, source)}}
    for prefix, group in groups.items():
        for key in ("rope_type", "type") if prefix else ():
            if group.get(key, "default") not in ("default", None):
                raise UserError(f"{source}: {prefix}{key}={group[key]!r} is not supported; allowed: 'default'")
    result = {}
    for name, default in (("rope_theta", None), ("partial_rotary_factor", ModelConfig.partial_rotary_factor)):
        given = [(f"{prefix}{name}", group[name]) for prefix, group in groups.items() if group.get(name) is not None]
        first, value = (given or [(name, default)])[0]
        if value is None:
            raise UserError(f"{source}: {name} is missing, neither flat nor in rope_parameters")
        for other, another in given[1:]:
            if another != value:
                raise UserError(f"{source}: {first} is {value!r} but {other} is {another!r}")
        result[name] = _typed(value, float, first, source)
    return result


def _rotary_groups(values: Mapping[str, Any], source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, fields) of every group of rotary fields: rope_parameters or rope_scaling, flat or by kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        group = values.get(name)
        if group is None:
            continue
        if not isinstance(group, dict):
            raise UserError(f"{source}: {name} must be a JSON object, got {group!r:.80}")
        kinds = {key: part for key, part in group.items() if key in (LINEAR, FULL) or isinstance(part, dict)}
        yield name, {key: value for key, value in group.items() if key not in kinds}
        for kind, part in kinds.items():
            if kind not in (LINEAR, FULL):
                raise UserError(f"{source}: {name}.{kind} is not supported; allowed: {FULL}, {LINEAR}")
            if part is not None and not isinstance(part, dict):
                raise UserError(f"{source}: {name}.{kind} must be a JSON object, got {part!r:.80}")
            yield f"{name}.{kind}", part or {}


def _interval(values: Mapping[str, Any], layers: int, source: str) -> int:
    """full_attention_interval, given as such or by `layer_types`; both must agree."""
    interval, types = values.get("full_attention_interval"), values.get("layer_types")
    if types is not None and not isinstance(types, list):
        raise UserError(f"{source}: layer_types must be a list, got {types!r:.80}")
    if interval is None:
        if types is None:
            return ModelConfig.full_attention_interval
        interval = (types.index(FULL) if FULL in types else layers) + 1
    interval = _typed(interval, int, "full_attention_interval", source)
    if interval < 1:
        raise UserError(f"{source}: full_attention_interval must be at least 1, got {interval}")
    if types is not None and types != layer_types(layers, interval):
        raise UserError(f"{source}: layer_types is not supported: every {interval}th of {layers} layers must be {FULL}")
    return interval


def _typed(value: Any, expected: type, name: str, source: str) -> Any:
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise UserError(f"{source}: {name} must be {expected.__name__}, got {value!r}")
    return value
