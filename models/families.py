"""What the published families call things: tensors and fields of config.json.

Llama, Qwen2/2.5, Qwen3 (transformers), Dream (arXiv:2508.15487) and LLaDA
(arXiv:2502.09992) as data for the one network of transformer.py. A field that
changes numbers and is absent is never filled from a family's defaults, and a
value that the network does not compute is refused.
"""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

from giantsteps.models import safetensors_folder, transformer

FolderError = safetensors_folder.FolderError
_show = safetensors_folder.show


class Family(NamedTuple):
  """One dialect.

  Attributes:
    architecture: class of the published code.
    names: path in the parameters -> tensor, {} for the layer.
    keys: field of `transformer.Config` -> field of config.json.
    fixed: fields of `transformer.Config` that are no field of config.json.
    optional: field -> its value where config.json has none, from the fields
      read so far and config.json; one that raises KeyError is missing.
    only: field of config.json -> the values that the network computes, the
      first is written; None stands for absent.
  """

  architecture: str
  names: dict[str, str]
  keys: dict[str, str]
  fixed: dict[str, Any]
  optional: dict[str, Callable[[dict, dict], Any]]
  only: dict[str, tuple]


def _false(fields: dict, raw: dict) -> bool:
  return False  # wrong guesses leave a tensor unused or missing


def _none(fields: dict, raw: dict) -> None:
  return None


def _head_dim(fields: dict, raw: dict) -> int:
  width, heads = fields["width"], fields["num_heads"]
  if width % heads:
    raise FolderError(
      f"config.json: {heads} heads do not divide the width {width}, and "
      "head_dim is missing"
    )
  return width // heads


def _num_heads(fields: dict, raw: dict) -> int:
  return fields["num_heads"]


_LLAMA_NAMES = {
  "embed/embedding": "model.embed_tokens.weight",
  "norm/scale": "model.norm.weight",
  "head": "lm_head.weight",
  "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
  "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
  "layers/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
  "layers/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
  "layers/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
  "layers/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
  "layers/q/bias": "model.layers.{}.self_attn.q_proj.bias",
  "layers/k/bias": "model.layers.{}.self_attn.k_proj.bias",
  "layers/v/bias": "model.layers.{}.self_attn.v_proj.bias",
  "layers/q_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
  "layers/k_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
  "layers/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
  "layers/up/kernel": "model.layers.{}.mlp.up_proj.weight",
  "layers/down/kernel": "model.layers.{}.mlp.down_proj.weight",
}
_LLADA_NAMES = {
  "embed/embedding": "model.transformer.wte.weight",
  "norm/scale": "model.transformer.ln_f.weight",
  "head": "model.transformer.ff_out.weight",  # of a block: the way down
  "layers/attention_norm/scale": "model.transformer.blocks.{}.attn_norm.weight",
  "layers/mlp_norm/scale": "model.transformer.blocks.{}.ff_norm.weight",
  "layers/q/kernel": "model.transformer.blocks.{}.q_proj.weight",
  "layers/k/kernel": "model.transformer.blocks.{}.k_proj.weight",
  "layers/v/kernel": "model.transformer.blocks.{}.v_proj.weight",
  "layers/o/kernel": "model.transformer.blocks.{}.attn_out.weight",
  "layers/q/bias": "model.transformer.blocks.{}.q_proj.bias",
  "layers/k/bias": "model.transformer.blocks.{}.k_proj.bias",
  "layers/v/bias": "model.transformer.blocks.{}.v_proj.bias",
  "layers/gate/kernel": "model.transformer.blocks.{}.ff_proj.weight",
  "layers/up/kernel": "model.transformer.blocks.{}.up_proj.weight",
  "layers/down/kernel": "model.transformer.blocks.{}.ff_out.weight",
}
_LLAMA_KEYS = {
  "vocab_size": "vocab_size",
  "width": "hidden_size",
  "depth": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "num_kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "mlp_width": "intermediate_size",
  "eps": "rms_norm_eps",
  "tie_embeddings": "tie_word_embeddings",
}
_LLAMA_ONLY = {
  "hidden_act": ("silu",),
  "use_sliding_window": (None, False),
  "partial_rotary_factor": (None, 1, 1.0),
  "is_causal": (None, True),
  "quantization_config": (None,),
}
_NO_BIAS = {"attention_bias": (False, None)}
_LLAMA = Family(
  architecture="LlamaForCausalLM",
  names=_LLAMA_NAMES,
  keys=_LLAMA_KEYS,
  fixed={"causal": True, "shifted": False, "qkv_bias": False, "qk_norm": False},
  optional={
    "num_kv_heads": _num_heads,
    "head_dim": _head_dim,
    "tie_embeddings": _false,
  },
  only=_LLAMA_ONLY | _NO_BIAS | {"mlp_bias": (False, None)},
)
_QWEN2 = _LLAMA._replace(
  architecture="Qwen2ForCausalLM",
  fixed=_LLAMA.fixed | {"qkv_bias": True},
  optional={"head_dim": _head_dim, "tie_embeddings": _false},
  only=_LLAMA_ONLY,
)
FAMILIES = {
  "llama": _LLAMA,
  "qwen2": _QWEN2,
  "qwen3": _QWEN2._replace(
    architecture="Qwen3ForCausalLM",
    fixed=_LLAMA.fixed | {"qk_norm": True},
    optional={"tie_embeddings": _false},
    only=_LLAMA_ONLY | _NO_BIAS,
  ),
  "Dream": _QWEN2._replace(
    architecture="DreamModel",
    fixed=_QWEN2.fixed | {"causal": False, "shifted": True},
    only=_LLAMA_ONLY | {"is_causal": (None, False), "use_mrope": (None, False)},
  ),
  "llada": Family(
    architecture="LLaDAModelLM",
    names=_LLADA_NAMES,
    keys={
      "vocab_size": "vocab_size",
      "embedding_size": "embedding_size",
      "width": "d_model",
      "depth": "n_layers",
      "num_heads": "n_heads",
      "num_kv_heads": "n_kv_heads",
      "mlp_width": "mlp_hidden_size",
      "eps": "rms_norm_eps",
      "qkv_bias": "include_qkv_bias",
      "tie_embeddings": "weight_tying",
      "scale_embeddings": "input_emb_norm",
      "scale_logits": "scale_logits",
    },
    fixed={"causal": False, "shifted": False, "qk_norm": False},
    optional={
      "embedding_size": _none,
      "num_kv_heads": _num_heads,
      "head_dim": _head_dim,
      "mlp_width": lambda fields, raw: raw["mlp_ratio"] * fields["width"],
      "qkv_bias": _false,
      "tie_embeddings": _false,
      "scale_embeddings": _false,
      "scale_logits": _false,
    },
    only={
      "activation_type": ("silu",),
      "block_type": ("llama",),
      "layer_norm_type": ("rms",),
      "layer_norm_with_affine": (True, None),
      "bias_for_layer_norm": (False, None),
      "include_bias": (False, None),
      "block_group_size": (1, None),
      "alibi": (False, None),
      "rope": (True, None),
      "rope_full_precision": (True, None),
      "rope_scaling": (None,),
      "attention_layer_norm": (False, None),
      "multi_query_attention": (None, False),
      "clip_qkv": (None,),
      "quantization_config": (None,),
    },
  ),
}
_ROPE = {  # rope_type -> field of `transformer.Config` -> of config.json
  "default": {},
  "linear": {"rope_factor": "factor"},
  "llama3": {
    "rope_factor": "factor",
    "rope_low": "low_freq_factor",
    "rope_high": "high_freq_factor",
    "rope_original_length": "original_max_position_embeddings",
  },
}
_ROPE_KEYS = (
  *("rope_type", "type", "rope_theta", "partial_rotary_factor"),
  *_ROPE["llama3"].values(),
)
_TYPES = typing.get_type_hints(transformer.Config)


def read(raw: dict[str, Any]) -> tuple[Family, transformer.Config]:
  """The family and the shape that a config.json describes.

  Both dialects of transformers: rope_theta with rope_scaling (4), and
  rope_parameters (5).

  Args:
    raw: the object in config.json.

  Raises:
    FolderError: for a model_type, a value or an absence that the network
      cannot stand for, with the field and the value.
  """
  model_type = raw.get("model_type")
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    raise FolderError(
      f"config.json: model_type={_show(model_type)} is not known, there are "
      f"{', '.join(FAMILIES)}"
    )
  family = FAMILIES[model_type]
  for key, accepted in family.only.items():
    if raw.get(key) not in accepted:
      raise FolderError(
        f"config.json: {key}={_show(raw.get(key))} is not computed here, only "
        f"{' or '.join('absent' if v is None else repr(v) for v in accepted)}"
      )
  _check_layer_types(raw)
  fields: dict[str, Any] = dict(family.fixed)
  for field in _TYPES:  # in the order of `Config`: the optional ones look back
    if field in family.keys or field in family.optional:
      fields[field] = _field(family, field, fields, raw)
  fields |= _read_rope(raw)
  try:
    return family, transformer.Config(**fields)
  except ValueError as error:
    raise FolderError(f"config.json: {error}") from error


def write(
  config: transformer.Config, model_type: str | None = None
) -> dict[str, Any]:
  """config.json of a network; `read` gives the network back.

  Args:
    config: its dtype becomes torch_dtype, its remat is left out.
    model_type: of a family; None: the one with these biases, norms and masks.

  Raises:
    ValueError: if the family cannot say what `config` holds.
  """
  if model_type is None:
    model_type = _infer(config)
  if model_type not in FAMILIES:
    raise ValueError(f"family={model_type!r}: one of {', '.join(FAMILIES)}")
  family = FAMILIES[model_type]
  raw = {
    "architectures": [family.architecture],
    "model_type": model_type,
    "torch_dtype": config.param_dtype,
    "rope_theta": config.rope_theta,
  }
  for field, key in family.keys.items():
    if getattr(config, field) is not None:
      raw[key] = getattr(config, field)
  for key, (value, *_) in family.only.items():
    if value is not None:
      raw[key] = value
  if config.rope_type != "default":
    keys = _ROPE[config.rope_type]
    numbers = {key: getattr(config, field) for field, key in keys.items()}
    raw["rope_scaling"] = {"rope_type": config.rope_type, **numbers}
  _check_said(config, model_type, raw)
  return raw


def _infer(config: transformer.Config) -> str:
  for model_type, family in FAMILIES.items():
    if all(getattr(config, k) == v for k, v in family.fixed.items()):
      return model_type
  names = ("causal", "shifted", "qkv_bias", "qk_norm")
  said = ", ".join(f"{name}={getattr(config, name)}" for name in names)
  raise ValueError(f"{said}: no family is such, {', '.join(FAMILIES)}")


def _check_said(config: transformer.Config, model_type: str, raw: dict) -> None:
  """Reads back what was written: a field must not get lost."""
  try:
    _, again = read(raw)
  except FolderError as error:
    raise ValueError(f"family={model_type!r} cannot say it: {error}") from error
  for field in dataclasses.fields(config):
    here, there = getattr(config, field.name), getattr(again, field.name)
    if field.name not in _UNSAID and here != there:
      raise ValueError(
        f"family={model_type!r}: config.json cannot say "
        f"{field.name}={here!r}, it would be read as {there!r}"
      )


_UNSAID = ("dtype", "param_dtype", "remat", "experts_per_token")


def _field(family: Family, field: str, fields: dict, raw: dict) -> Any:
  key = family.keys.get(field, field)
  value = raw.get(key) if field in family.keys else None
  if value is None:
    if field not in family.optional:
      raise FolderError(_missing(key))
    try:
      value = family.optional[field](fields, raw)
    except (KeyError, TypeError) as error:
      raise FolderError(_missing(key)) from error
    if value is None:
      return None
  return _typed(key, value, _TYPES[field])


def _missing(key: str) -> str:
  return (
    f"config.json: {key} is missing; it changes what is computed, so no "
    "default is taken: write the published model's value"
  )


def _typed(key: str, value: Any, kind: Any) -> Any:
  """The value as bool, int or float, and of a size that can be meant."""
  if kind is bool:
    ok = type(value) is bool
  elif kind is float:
    ok = type(value) in (int, float) and 0 < value < 1e30
  else:
    ok = type(value) is int and 0 < value < 2**31
  if not ok:
    name = {bool: "true or false", float: "a number above 0, below 1e30"}
    raise FolderError(
      f"config.json: {key}={_show(value)} must be "
      f"{name.get(kind, 'a positive integer below 2**31')}"
    )
  return float(value) if kind is float else value


def _check_layer_types(raw: dict) -> None:
  kinds = raw.get("layer_types") or []
  kinds = kinds if isinstance(kinds, list) else [kinds]
  other = next((k for k in kinds if k != "full_attention"), None)
  if other is not None:
    raise FolderError(
      f"config.json: layer_types has {_show(other)}, only full_attention is "
      "computed here"
    )


def _read_rope(raw: dict) -> dict[str, Any]:
  """The rope_ fields of `transformer.Config`, from either dialect."""
  said = {}
  for name in ("rope_scaling", "rope_parameters"):
    value = raw.get(name)
    if value is not None and not isinstance(value, dict):
      raise FolderError(
        f"config.json: {name}={_show(value)} must be an object or null"
      )
    said |= value or {}
  kind = said.get("rope_type", said.get("type", "default"))
  if not isinstance(kind, str) or kind not in _ROPE:
    raise FolderError(
      f"config.json: rope_type={_show(kind)} is not known, there are "
      f"{', '.join(_ROPE)}"
    )
  unknown = next((k for k in said if k not in _ROPE_KEYS), None)
  if unknown is not None and said[unknown] is not None:
    raise FolderError(
      f"config.json: {_show(unknown)}={_show(said[unknown])} of the rotary "
      f"positions is not known, there are {', '.join(_ROPE_KEYS)}"
    )
  theta = said.get("rope_theta", raw.get("rope_theta"))
  if theta is None:
    raise FolderError(_missing("rope_theta"))
  if raw.get("rope_theta") not in (None, theta):
    raise FolderError(
      f"config.json: rope_theta={_show(raw['rope_theta'])}, but "
      f"{_show(theta)} in rope_parameters: which of them?"
    )
  if said.get("partial_rotary_factor", 1) not in (None, 1):
    raise FolderError(
      "config.json: partial_rotary_factor="
      f"{_show(said['partial_rotary_factor'])} is not computed here, only 1"
    )
  fields = {"rope_type": kind, "rope_theta": _typed("rope_theta", theta, float)}
  for field, key in _ROPE[kind].items():
    if said.get(key) is None:
      raise FolderError(_missing(f"{key} of rope_type={kind!r}"))
    fields[field] = _typed(key, said[key], _TYPES[field])
  return fields
