"""What one run is: frozen dataclasses, overrides from the command line, JSON.

A config is a Python module in experiments/configs with `get_config()`. Its
fields are set by `--set a.b=c`, read by their annotated types. The same tree is
written to config.json in the work folder, and a run in that folder with another
config is refused. Everything that can be wrong here is an `InputError`: one
line that holds the bad value and the fix.
"""

import dataclasses
import difflib
import importlib
import json
import math
import pkgutil
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar

from giantsteps import models
from giantsteps.experiments import configs
from giantsteps.models import layers

Tree = TypeVar("Tree")


class InputError(ValueError):
  """A user's mistake, said in one line; binaries print it and exit with 2."""


@dataclasses.dataclass(frozen=True)
class Data:
  """Where the rows come from.

  Attributes:
    source: digits, stdlib, scenes, checkerboard, mixture:D, npz:PATH,
      text:PATH or zarr:PATH.
    seq_len: tokens per row, for sources of tokens.
    held_out: fraction that is never trained on (digits: one half, always).
    views: pictures per scene, 2 or more; the highest power of two below is
      the most of them that a model sees.
    side: pixels of a side of a picture of a scene.
  """

  source: str = "digits"
  seq_len: int = 256
  held_out: float = 0.08
  views: int = 20
  side: int = 32


@dataclasses.dataclass(frozen=True)
class Optim:
  """The optimizer and its schedule.

  Attributes:
    name: which transform; nesterov is SGD with Nesterov's momentum.
    learning_rate: peak of the schedule.
    adam_learning_rate: muon only, the peak for everything that is no matrix
      of the stack; 0: learning_rate.
    schedule: its shape after the warmup, from the peak to end_factor * peak.
    warmup: steps of linear rise from 0.
    hold: inverse_sqrt only, steps at the peak: after it the rate is the peak /
      sqrt(step / hold), whatever `steps` is.
    end_factor: last rate / peak, of cosine and linear.
    b1, b2: decay of the moments; lars and nesterov: b1 is the momentum.
    eps: added to the root of the second moment.
    weight_decay: decoupled, per step and unit of rate; lars and nesterov: added
      to the gradient.
    trust_coefficient: lars only, |step| / |x| of a layer at rate 1.
    clip_norm: largest global norm of the gradient; 0 does not clip.
    shards: parts in which parameters and moments, float32, are held along the
      data axis, which must divide it (research/large_batch/
      sharded_update.py); a checkpoint fits all such meshes. 0: every device
      holds all.
    reduce_dtype: with shards, in which gradients are added across devices.
  """

  name: Literal["lamb", "lars", "adamw", "radam", "nesterov", "muon"] = "lamb"
  learning_rate: float = 1e-2
  adam_learning_rate: float = 0.0
  schedule: Literal["constant", "cosine", "linear", "inverse_sqrt"] = "cosine"
  warmup: int = 0
  hold: int = 35_000
  end_factor: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-6
  weight_decay: float = 0.01
  trust_coefficient: float = 0.001
  clip_norm: float = 1.0
  shards: int = 0
  reduce_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class FlowMap:
  """Of task flow: how a network of two times learns to jump
  (research/flow_maps; the defaults are those of arXiv:2505.18825).

  Attributes:
    loss: of the rows that jump; none: a velocity is learned, no map. All of
      them teach themselves, without a second network. progressive halves the
      jump (PSD-M), progressive_uniform splits it anywhere (PSD-U),
      discrete_lagrangian needs no jvp (steps of a tenth of the jump).
    diagonal: share of the batch with s = t, which learns the velocity.
    times: triangle is uniform; logit_normal is MeanFlow's.
    interpolant: the path from noise to data.
    weight: of a row's loss, which is summed over coordinates: none, adaptive
      (MeanFlow's) or learned, a function of (s, t) with 128 parameters.
    sigma_0: standard deviation of the noise; 0: that of the data.
    anneal: share of all steps in which the longest jump grows from 0 to 1.
  """

  loss: Literal[
    "none",
    "lagrangian",
    "frozen_lagrangian",
    "discrete_lagrangian",
    "eulerian",
    "progressive",
    "progressive_uniform",
    "mean_flow",
    "improved_mean_flow",
  ] = "none"
  diagonal: float = 0.75
  times: Literal["triangle", "logit_normal"] = "triangle"
  interpolant: Literal["linear", "trigonometric"] = "linear"
  weight: Literal["none", "adaptive", "learned"] = "none"
  sigma_0: float = 0.0
  anneal: float = 0.0


@dataclasses.dataclass(frozen=True)
class Stage:
  """The second part of a run, with other rows: BERT's longer sequences.

  The rate rises from 0 again; parameters, moments and averages go on.

  Attributes:
    start: updates before it; 0: there is none.
    seq_len: tokens per row from then on.
    batch_size: rows per update from then on.
    learning_rate: its peak (of `optim.adam_learning_rate`: in proportion).
    warmup: steps of linear rise from 0.
  """

  start: int = 0
  seq_len: int = 0
  batch_size: int = 0
  learning_rate: float = 0.0
  warmup: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
  """One run of `train`.

  Attributes:
    task: what is learned: a velocity, masked tokens, the next token or
      unseen views of a scene.
    model: the `Config` of a module of giantsteps.models; its type names the
      network.
    data, optim, flow_map, second: see there.
    block_size: of task masked: blocks of so many tokens are learned, each given
      those before it (research/diffusion_lm/block_diffusion.py); 0: whole rows.
    rate_low, rate_high: of task masked: the share of a block, or row, that is
      masked is drawn between them. Evaluations of blocks draw from 0 to 1.
    seed: of parameters, batches and noise.
    steps: updates in all.
    batch_size: rows per update, all micro-batches and devices together.
    accumulate: micro-batches per update; divides batch_size.
    steps_per_dispatch: updates per call of the compiled program.
    ema_decay: of the averaged parameters; 0: they are the parameters.
    log_every: steps between two lines of metrics.
    eval_every: steps between two evaluations; 0: at the end only.
    checkpoint_every: steps between two checkpoints; 0: at the end only.
    keep: newest checkpoints that stay.
    keep_every: checkpoints of a multiple of this step stay too; 0: none.
    max_skipped: non-finite updates in a row that stop the run.
    balance_weight: of the load-balancing loss of every layer of a model with
      experts, f from the rows of all devices in one micro-batch
      (research/large_batch/load_balance.py); 0: none.
  """

  task: Literal["flow", "masked", "autoregressive", "views"]
  model: Any
  data: Data = Data()
  optim: Optim = Optim()
  flow_map: FlowMap = FlowMap()
  second: Stage = Stage()
  block_size: int = 0
  rate_low: float = 0.0
  rate_high: float = 1.0
  seed: int = 0
  steps: int = 2_000
  batch_size: int = 256
  accumulate: int = 1
  steps_per_dispatch: int = 1
  ema_decay: float = 0.999
  log_every: int = 50
  eval_every: int = 0
  checkpoint_every: int = 500
  keep: int = 2
  keep_every: int = 0
  max_skipped: int = 20
  balance_weight: float = 0.01


def names() -> list[str]:
  """The configs that exist, sorted."""
  return _modules(configs.__path__)


def load(name: str, overrides: Sequence[str] = ()) -> Any:
  """The config `name` with `overrides` applied and checked.

  Args:
    name: a module of experiments/configs.
    overrides: strings "a.b=c"; of two for one field the later one counts.

  Raises:
    InputError: if the config or a field does not exist, a value has the wrong
      type, or the result could not be run.
  """
  if name not in names():
    raise InputError(f"unknown config {_show(name)}: {_choices(name, names())}")
  module = importlib.import_module(f"{configs.__name__}.{name}")
  cfg = override(module.get_config(), overrides)
  validate(cfg)
  return cfg


def override(tree: Tree, overrides: Iterable[str]) -> Tree:
  """Sets the fields of a tree of frozen dataclasses, all of them at once.

  Args:
    tree: a dataclass whose fields are dataclasses, int, float, bool, str,
      Literal, tuple[X, ...] or one of these `| None`.
    overrides: strings "a.b=c".

  Raises:
    InputError: as in `load`; also if the dataclass itself refuses the value.
  """
  changes = {}  # nested: one dictionary per dataclass that changes
  for text in overrides:
    path, equals, value = text.partition("=")
    if not equals:
      raise InputError(f"--set {_show(text)}: no '=', write field.field=value")
    node, inner, keys = tree, changes, path.strip().split(".")
    for depth, key in enumerate(keys):
      here, last = ".".join(keys[: depth + 1]), depth == len(keys) - 1
      _check_field(node, key, here)
      child = getattr(node, key)
      if dataclasses.is_dataclass(child) == last:
        raise InputError(_depth_message(child, here, text))
      if last:
        hint = typing.get_type_hints(type(node))[key]
        inner[key] = _parse(hint, value, here)
      else:
        node, inner = child, inner.setdefault(key, {})
  return _replace(tree, changes, "")


def validate(cfg: Config) -> None:
  """Raises InputError, with the field and its value, if `cfg` cannot run."""
  flat = _flatten(cfg)
  _check_tree(cfg, "")
  for path, (low, high) in _RANGES.items():
    if not low <= flat[path] < high:
      wanted = f"in [{low}, {high})" if high < _LARGE else f"{low} or more"
      wanted += "" if flat[path] < _LARGE else " and below 2**31"
      raise InputError(f"{path}={flat[path]}: must be {wanted}")
  _check_model(flat)
  if not 0 <= cfg.optim.end_factor <= 1:
    raise InputError(
      f"optim.end_factor={cfg.optim.end_factor}: must be in [0, 1]"
    )
  if not 0 < cfg.data.held_out < 1:
    raise InputError(f"data.held_out={cfg.data.held_out}: must be in (0, 1)")
  if cfg.batch_size % cfg.accumulate:
    raise InputError(
      f"batch_size={cfg.batch_size}: not a multiple of "
      f"accumulate={cfg.accumulate}"
    )
  if cfg.second.start:
    _check_second(cfg)
  _check_masking(cfg)
  _check_flow_map(cfg)


def _check_flow_map(cfg: Config) -> None:
  wants = cfg.flow_map
  if wants.loss == "none":
    if wants != FlowMap():
      lines = _changed(wants, FlowMap())
      raise InputError(
        f"{lines}: without flow_map.loss there is no map, leave the default"
      )
    return
  if cfg.task != "flow":
    raise InputError(
      f"flow_map.loss={wants.loss!r}: wants task='flow', not {cfg.task!r}"
    )
  if not getattr(cfg.model, "two_times", False):
    raise InputError(
      f"flow_map.loss={wants.loss!r}: wants a network of two times, set "
      "model.two_times=true"
    )
  if not 0 <= wants.diagonal < 1:
    raise InputError(
      f"flow_map.diagonal={wants.diagonal}: must be in [0, 1); a velocity "
      "alone is flow_map.loss=none"
    )
  if not 0 <= wants.anneal <= 1:
    raise InputError(f"flow_map.anneal={wants.anneal}: must be in [0, 1]")
  if wants.diagonal == 0 and "mean_flow" not in wants.loss:
    raise InputError(
      f"flow_map.diagonal={wants.diagonal}: {wants.loss} sees data on the "
      "diagonal alone, leave it some rows"
    )
  rows = round(wants.diagonal * cfg.batch_size)
  if cfg.batch_size == rows or not rows and wants.diagonal:
    raise InputError(
      f"flow_map.diagonal={wants.diagonal}: of batch_size={cfg.batch_size} "
      f"rows {rows} would be on the diagonal and {cfg.batch_size - rows} jump"
    )


def _changed(node: Any, default: Any) -> str:
  """ "flow_map.a=1, ..." for the fields that are not the default's."""
  values = dataclasses.asdict(node).items()
  changed = [(k, v) for k, v in values if v != getattr(default, k)]
  return ", ".join(f"flow_map.{k}={v}" for k, v in changed)


def _check_masking(cfg: Config) -> None:
  low, high, size = cfg.rate_low, cfg.rate_high, cfg.block_size
  if not 0 <= low < high <= 1:
    raise InputError(
      f"rate_low={low}, rate_high={high}: must rise within [0, 1]"
    )
  if cfg.task != "masked" and (size, low, high) != (0, 0.0, 1.0):
    raise InputError(
      f"block_size={size}, rate_low={low}, rate_high={high}: task "
      f"{cfg.task!r} masks nothing, leave 0, 0, 1"
    )
  lengths = {"data.seq_len": cfg.data.seq_len}
  if cfg.second.start:
    lengths["second.seq_len"] = cfg.second.seq_len
  for name, length in lengths.items():
    if size and length % size:
      raise InputError(
        f"block_size={size}: must divide {name}={length}, or be 0"
      )


def _check_second(cfg: Config) -> None:
  second = cfg.second
  if second.start >= cfg.steps:
    raise InputError(
      f"second.start={second.start}: must be below steps={cfg.steps}, or 0"
    )
  if cfg.task in ("flow", "views"):
    raise InputError(
      f"second.start={second.start}: task {cfg.task!r} has one stage"
    )
  for name in ("seq_len", "batch_size", "learning_rate"):
    if not getattr(second, name) > 0:
      raise InputError(
        f"second.{name}={getattr(second, name)}: must be positive, since "
        f"second.start={second.start}"
      )
  if second.batch_size % cfg.accumulate:
    raise InputError(
      f"second.batch_size={second.batch_size}: not a multiple of "
      f"accumulate={cfg.accumulate}"
    )


def _check_model(flat: dict[str, Any]) -> None:
  """What all networks share; their own `Config` checks the rest."""
  for path, value in flat.items():
    where, _, name = path.rpartition(".")
    if not where.startswith("model"):
      continue
    low = 1 if name in _MODEL_SIZES else 0
    if type(value) is int and not low <= value < _LARGE:
      raise InputError(f"{path}={value}: must be {low} or more, below 2**31")
    choices = _MODEL_CHOICES.get(name, (value,))
    if value not in choices:
      raise InputError(
        f"{path}={_show(value)}: wants one of {', '.join(choices)}"
      )


_LARGE = 2**31  # counters are int32
_MODEL_SIZES = ("width", "depth", "heads", "expand", "patch")
_MODEL_CHOICES = {
  "dtype": ("float32", "bfloat16"),
  "param_dtype": ("float32", "bfloat16"),
  "remat": layers.REMAT_POLICIES,
}
_RANGES = {  # low <= value < high
  "steps": (1, _LARGE),
  "batch_size": (1, _LARGE),
  "accumulate": (1, _LARGE),
  "steps_per_dispatch": (1, _LARGE),
  "log_every": (1, _LARGE),
  "keep": (1, _LARGE),
  "max_skipped": (1, _LARGE),
  "data.seq_len": (1, _LARGE),
  "data.views": (2, _LARGE),
  "data.side": (1, _LARGE),
  "seed": (0, _LARGE),
  "eval_every": (0, _LARGE),
  "checkpoint_every": (0, _LARGE),
  "keep_every": (0, _LARGE),
  "optim.warmup": (0, _LARGE),
  "optim.hold": (1, _LARGE),
  "flow_map.sigma_0": (0, _LARGE),
  "optim.shards": (0, _LARGE),
  "block_size": (0, _LARGE),
  "second.start": (0, _LARGE),
  "second.seq_len": (0, _LARGE),
  "second.batch_size": (0, _LARGE),
  "second.learning_rate": (0, _LARGE),
  "second.warmup": (0, _LARGE),
  "optim.learning_rate": (0, _LARGE),
  "optim.eps": (0, _LARGE),
  "optim.weight_decay": (0, _LARGE),
  "optim.trust_coefficient": (0, _LARGE),
  "optim.clip_norm": (0, _LARGE),
  "balance_weight": (0, _LARGE),
  "optim.b1": (0, 1),
  "optim.b2": (0, 1),
  "ema_decay": (0, 1),
}


def to_json(cfg: Any) -> dict:
  """The tree as plain JSON; the model carries its module's name as "kind"."""
  out = {}
  for field in dataclasses.fields(cfg):
    value = getattr(cfg, field.name)
    if dataclasses.is_dataclass(value):
      kind = type(value).__module__.rpartition(".")[2]
      head = {"kind": kind} if field.name == "model" else {}
      out[field.name] = head | to_json(value)
    else:
      out[field.name] = list(value) if isinstance(value, tuple) else value
  return out


def from_json(data: Any) -> Config:
  """The inverse of `to_json`, checked like a command line.

  Raises:
    InputError: for fields that are unknown, missing or of a wrong type.
  """
  cfg = _build(Config, data, "")
  validate(cfg)
  return cfg


def differences(a: Config, b: Config) -> list[str]:
  """Fields that differ, "path: value here, value in the work folder".

  Args:
    a: the config of the command line ("here").
    b: the config of the work folder.
  """
  here, there = _flatten(a), _flatten(b)
  paths = [*here, *(path for path in there if path not in here)]
  say = lambda flat, path: _show(flat[path]) if path in flat else "absent"
  return [
    f"{path}: {say(here, path)} here, {say(there, path)} in the work folder"
    for path in paths
    if say(here, path) != say(there, path)
  ]


def _flatten(cfg: Any) -> dict[str, Any]:
  """{"optim.learning_rate": 0.01, ...}, in the order of the fields."""

  def walk(node, prefix):
    for key, value in node.items():
      if isinstance(value, dict):
        yield from walk(value, f"{prefix}{key}.")
      else:
        yield prefix + key, value

  return dict(walk(to_json(cfg), ""))


def _modules(path: Iterable[str]) -> list[str]:
  found = (m.name for m in pkgutil.iter_modules(path) if not m.ispkg)
  return sorted(name for name in found if not name.startswith("_"))


def _check_field(node: Any, key: str, path: str) -> None:
  fields = [field.name for field in dataclasses.fields(node)]
  if key not in fields:
    raise InputError(f"unknown field {_show(path)}: {_choices(key, fields)}")


def _depth_message(child: Any, path: str, text: str) -> str:
  if not dataclasses.is_dataclass(child):
    return f"--set {_show(text)}: {path} is a value and has no fields"
  fields = ", ".join(f"{path}.{f.name}" for f in dataclasses.fields(child))
  return f"--set {_show(text)}: {path} is a group, set one of {fields}"


def _check_tree(node: Any, prefix: str) -> None:
  """Checks what `_build` would, for a tree that was made by Python code."""
  for name, hint in typing.get_type_hints(type(node)).items():
    value = getattr(node, name)
    if dataclasses.is_dataclass(value):
      _check_tree(value, f"{prefix}{name}.")
    else:
      _check_type(hint, value, prefix + name)


def _replace(node: Any, changes: dict, prefix: str) -> Any:
  new = {}
  for key, value in changes.items():
    child = getattr(node, key)
    group = dataclasses.is_dataclass(child)
    new[key] = _replace(child, value, f"{prefix}{key}.") if group else value
  old = {
    field.name: getattr(node, field.name) for field in dataclasses.fields(node)
  }
  return _construct(type(node), old | new, prefix)


def _construct(kind: type, values: dict, prefix: str) -> Any:
  """kind(**values); what its own checks refuse becomes an InputError."""
  try:
    return kind(**values)
  except InputError:
    raise
  except (ValueError, TypeError) as error:
    where = prefix.rstrip(".") or "config"
    said = " ".join(str(error).split())
    raise InputError(f"{where}: {said}") from error


def _build(kind: type, data: Any, prefix: str) -> Any:
  where = prefix.rstrip(".") or "config.json"
  if not isinstance(data, dict):
    raise InputError(f"{where}: wants an object, got {_show(data)}")
  hints, values = typing.get_type_hints(kind), {}
  fields = [field.name for field in dataclasses.fields(kind)]
  for key in data:
    if key not in fields:
      path = prefix + str(key)
      raise InputError(f"unknown field {_show(path)}: {_choices(key, fields)}")
  for key in fields:
    path, hint = prefix + key, hints[key]
    if key not in data:
      raise InputError(f"{where}: field {path!r} is missing, was it edited?")
    if hint is Any:
      inner, rest = _model(data[key], path)
      values[key] = _build(inner, rest, f"{path}.")
    elif dataclasses.is_dataclass(hint):
      values[key] = _build(typing.cast(type, hint), data[key], f"{path}.")
    else:
      values[key] = _check_type(hint, data[key], path)
  return _construct(kind, values, prefix)


def _model(data: Any, path: str) -> tuple[type, dict]:
  """The dataclass that `data["kind"]` names, and the rest of `data`."""
  kinds = _modules(models.__path__)
  if not isinstance(data, dict) or "kind" not in data:
    raise InputError(f"{path}: wants an object with the field 'kind'")
  kind = data["kind"]
  config = None
  if kind in kinds:
    module = importlib.import_module(f"{models.__name__}.{kind}")
    config = getattr(module, "Config", None)
  if config is None:
    raise InputError(
      f"{path}.kind={_show(kind)}: no such model, {_choices(kind, kinds)}"
    )
  return config, {k: v for k, v in data.items() if k != "kind"}


def _parse(hint: Any, text: str, path: str) -> Any:
  """Reads the text of an override as a value of type `hint`."""
  plain = text.strip()
  options = _options(hint)
  if type(None) in options and plain.lower() in ("none", "null"):
    return None
  for option in options:
    if option is str or typing.get_origin(option) is Literal:
      return _check_type(hint, plain, path)
    if option is bool and plain.lower() in ("true", "false"):
      return plain.lower() == "true"
    if option in (int, float):
      try:
        return _check_type(hint, option(plain), path)
      except InputError:
        raise
      except ValueError:
        continue
    if typing.get_origin(option) is tuple:
      inside = plain.strip("()[]").strip().rstrip(",")
      item = typing.get_args(option)[0]
      parts = inside.split(",") if inside else []
      return tuple(_parse(item, part, path) for part in parts)
  raise InputError(f"{path}={_show(plain)}: wants {_describe(hint)}")


def _check_type(hint: Any, value: Any, path: str) -> Any:
  """`value` as the type `hint` (int to float, list to tuple) or InputError."""
  for option in _options(hint):
    if typing.get_origin(option) is Literal:
      if value in typing.get_args(option):
        return value
    elif typing.get_origin(option) is tuple:
      if isinstance(value, (list, tuple)):
        item = typing.get_args(option)[0]
        return tuple(_check_type(item, v, path) for v in value)
    elif type(value) is option:
      if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{path}={value}: must be a finite number")
      return value
    elif option is float and type(value) is int:
      return float(value)
  raise InputError(f"{path}={_show(value)}: wants {_describe(hint)}")


def _options(hint: Any) -> tuple:
  union = typing.get_origin(hint) in (typing.Union, types.UnionType)
  return typing.get_args(hint) if union else (hint,)


def _describe(hint: Any) -> str:
  parts = []
  for option in _options(hint):
    if option is type(None):
      parts.append("none")
    elif option is bool:
      parts.append("bool (true or false)")
    elif typing.get_origin(option) is Literal:
      parts.append("one of " + ", ".join(map(str, typing.get_args(option))))
    elif typing.get_origin(option) is tuple:
      item = _describe(typing.get_args(option)[0])
      parts.append(f"{item}s separated by commas")
    else:
      parts.append(getattr(option, "__name__", str(option)))
  return " or ".join(parts)


def _choices(name: Any, existing: Sequence[str]) -> str:
  near = difflib.get_close_matches(str(name), existing, n=1)
  hint = f"did you mean {near[0]!r}? " if near else ""
  return f"{hint}there are {', '.join(existing) or 'none'}"


def _show(value: Any) -> str:
  """The value on one line, as JSON would write it, cut after 100 letters."""
  text = json.dumps(value, default=repr, ensure_ascii=False)
  return text if len(text) <= 100 else text[:97] + "..."
