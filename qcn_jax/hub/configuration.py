"""config.json of Qwen3-Next checkpoints: both of its dialects in, and a file that every engine reads out."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from qcn_jax import files
from qcn_jax.config import COMPUTE_FIELDS, ModelConfig
from qcn_jax.config_checks import check_model
from qcn_jax.errors import UserError

CONFIG_FILE = "config.json"
MODEL_TYPE, ARCHITECTURE = "qwen3_next", "Qwen3NextForCausalLM"
LINEAR, FULL = "linear_attention", "full_attention"
# What transformers assumes where the file says nothing, as far as it differs from ModelConfig's own defaults.
_HF_DEFAULTS = {"max_position_embeddings": 32_768}
# Fields of ModelConfig that are not config.json's: how to compute, or found from the weights.
_OWN = {*COMPUTE_FIELDS, "num_nextn_predict_layers"}
_SPECIAL = {"rope_theta", "partial_rotary_factor", "full_attention_interval"}
# Options that would change the function computed: the one value of each that this model implements.
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None), "attention_dropout": (0, 0.0, None), "hidden_act": ("silu",),
    "mlp_only_layers": ([], None), "decoder_sparse_step": (1,), "use_sliding_window": (False, None),
    "quantization_config": (None,),
}
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def load_config(folder: files.Path) -> ModelConfig:
    """Reads config.json of a Hugging Face folder; raises UserError that names the file and the field."""
    path = pathlib.Path(folder) / CONFIG_FILE
    return config_from_hf(read_object(path), str(path))


def read_object(path: files.Path) -> dict[str, Any]:
    """Reads a JSON object; raises UserError that names the file where it is none."""
    values = files.read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object")
    return values


def config_from_hf(values: Mapping[str, Any], source: str = CONFIG_FILE) -> ModelConfig:
    """The ModelConfig of a config.json, flat or with `rope_parameters` and `layer_types`.

    Absent fields take transformers' defaults, except the rotary base: transformers' 10,000 is right for no
    published checkpoint, so a file without one is refused.

    Raises:
      UserError: another model type, an option this model does not implement, a field of a wrong type or out of its
        range.
    """
    if values.get("model_type") != MODEL_TYPE:
        raise UserError(f"{source}: model_type must be {MODEL_TYPE!r}, got {values.get('model_type')!r}")
    for name, allowed in _FIXED.items():
        if name in values and values[name] not in allowed:
            raise UserError(f"{source}: {name}={values[name]!r} is not supported; allowed: {allowed[0]!r}")
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(ModelConfig):
        if field.name in _OWN | _SPECIAL:
            continue
        value = values.get(field.name, _HF_DEFAULTS.get(field.name, field.default))
        fields[field.name] = _typed(value, type(field.default), field.name, source)
    fields |= _rotary(values, source)
    fields["full_attention_interval"] = _interval(values, fields["num_hidden_layers"], source)
    steps = "num_nextn_predict_layers"
    fields[steps] = _typed(values.get(steps, 0), int, steps, source)
    dtype = values.get("dtype", values.get("torch_dtype"))
    if dtype is not None:
        if dtype not in _DTYPES:
            raise UserError(f"{source}: dtype={dtype!r} is not supported; allowed: {', '.join(_DTYPES)}")
        dtype = held_dtype(dtype)
        fields |= {"dtype": dtype, "param_dtype": dtype}
    config = ModelConfig(**fields)
    check_model(config, source)
    return config


def held_dtype(name: str) -> str:
    """`name` of a dtype, or float32 where that is all that JAX holds of it (float64 without JAX_ENABLE_X64)."""
    if name != "float64":
        return name
    import jax

    return jax.dtypes.canonicalize_dtype(name).name


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json in both dialects at once, as transformers, vLLM and SGLang read it."""
    values: dict[str, Any] = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE}
    values |= {field.name: getattr(config, field.name)
               for field in dataclasses.fields(ModelConfig) if field.name not in _OWN}
    values |= {name: allowed[0] for name, allowed in _FIXED.items() if name != "quantization_config"}
    values["rope_scaling"] = None
    values["intermediate_size"] = config.moe_intermediate_size  # of dense layers, which this model never has
    values["rope_parameters"] = {
        "rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": config.partial_rotary_factor}
    values["layer_types"] = layer_types(config.num_hidden_layers, config.full_attention_interval)
    if config.num_nextn_predict_layers:
        values["num_nextn_predict_layers"] = config.num_nextn_predict_layers
    values["dtype"] = config.param_dtype
    return values


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
