"""Published checkpoints as parameters of transformer.py, and back.

  config, params = pretrained.load("LLaDA-8B-Instruct")
  logits = transformer.logits(config, params, tokens)

A folder in the form of Hugging Face: config.json beside model.safetensors or
its shards. What families call things is in families.py, how the files are read
in safetensors_folder.py. Nothing is downloaded and nothing is unpickled.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding

from giantsteps.models import (
  families,
  partitioning,
  safetensors_folder,
  transformer,
)

FolderError = safetensors_folder.FolderError
_show = safetensors_folder.show
_CONFIG = "config.json"
_DTYPES = ("float32", "bfloat16", "float16")


class _Leaf(NamedTuple):
  """Where a parameter comes from.

  Attributes:
    shape: of the parameter.
    names: of its tensors, one per layer if the parameter is stacked.
    stacked: has the leading axis L.
    transposed: published matrices are [out, in], ours [in, out].
  """

  shape: tuple[int, ...]
  names: list[str]
  stacked: bool
  transposed: bool

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    shape = self.shape[1:] if self.stacked else self.shape
    return shape[::-1] if self.transposed else shape


def load(
  directory: str | os.PathLike,
  *,
  dtype: str | None = None,
  mesh: Mesh | None = None,
) -> tuple[transformer.Config, dict]:
  """Reads a published checkpoint: Llama, Qwen2, Qwen3, LLaDA or Dream.

  Every tensor of the files must be used and every parameter must be found,
  each in its shape. The host holds one parameter (of all layers) at a time,
  in `dtype`, and no more of it than its devices need.

  Args:
    directory: holds config.json and model.safetensors, or shards and their
      index.
    dtype: of the parameters and of computing with them; None: as in the files
      (computing: as the embedding).
    mesh: places each parameter as partitioning.py says; None: all of them on
      the default device.

  Returns:
    The shape, and parameters of `transformer.Transformer`.

  Raises:
    FolderError: a ValueError, one line, for anything in the folder that
      cannot be used.
    ValueError: for a dtype that does not exist.
    ImportError: if the library safetensors is missing.
  """
  folder = pathlib.Path(directory)
  if dtype not in (None, *_DTYPES):
    raise ValueError(f"dtype={dtype!r}: one of {', '.join(_DTYPES)}, or None")
  family, config = families.read(safetensors_folder.read_json(folder / _CONFIG))
  tensors = safetensors_folder.open_tensors(folder)
  _check_sizes(folder, config, tensors)
  leaves = _leaves(family, config)
  _check(folder, config, family, leaves, tensors)
  kinds = {path: _dtype(leaf, tensors, dtype) for path, leaf in leaves.items()}
  kind = kinds["embed/embedding"].name
  config = dataclasses.replace(config, dtype=kind, param_dtype=kind)
  params = {}
  for path, leaf in leaves.items():
    params[path] = _place(path, leaf, tensors, kinds[path], mesh)
  return config, traverse_util.unflatten_dict(params, sep="/")


def shapes(
  directory: str | os.PathLike, *, dtype: str = "bfloat16", mesh: Mesh | None
) -> tuple[transformer.Config, dict]:
  """What `load` returns, for programs that are compiled and not run.

  Args:
    directory: holds config.json; nothing else is read.
    dtype, mesh: as of `load`; the mesh may be of devices that are not here.

  Returns:
    The shape, and `jax.ShapeDtypeStruct` in place of parameters.

  Raises:
    FolderError, ValueError: as `load`, for config.json and dtype.
  """
  if dtype not in _DTYPES:
    raise ValueError(f"dtype={dtype!r}: one of {', '.join(_DTYPES)}")
  raw = safetensors_folder.read_json(pathlib.Path(directory) / _CONFIG)
  config = families.read(raw)[1]
  config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
  params = {}
  for path, shape in _shapes(config).items():
    place = None
    if mesh is not None:
      place = NamedSharding(mesh, partitioning.spec(path, shape, mesh))
    params[path] = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
  return config, traverse_util.unflatten_dict(params, sep="/")


def save(
  directory: str | os.PathLike,
  config: transformer.Config,
  params: dict,
  *,
  family: str | None = None,
  extra: Mapping[str, Any] | None = None,
  max_shard_bytes: int = 4 * 10**9,
) -> None:
  """Writes a folder that `load` reads to the bit, and transformers, too.

  Args:
    directory: made if it is not there; must hold no checkpoint.
    config: of the parameters.
    params: of `transformer.Transformer`, float32, bfloat16 or float16; each
      is written in the dtype it has.
    family: llama, qwen2, qwen3, Dream or llada; None: the one that `config`
      fits.
    extra: further fields of config.json, such as eos_token_id, mask_token_id
      and max_position_embeddings.
    max_shard_bytes: of one file, and of the host's memory.

  Raises:
    FolderError: if the folder holds a checkpoint or cannot be written.
    ValueError: for parameters that are not the config's, or a config that
      the family cannot say.
    ImportError: if the library safetensors is missing.
  """
  raw = families.write(config, family)
  for key, value in (extra or {}).items():
    if raw.setdefault(key, value) != value:
      raise ValueError(
        f"extra {key}={value!r}: the config says {raw[key]!r} already"
      )
  leaves = _leaves(families.FAMILIES[raw["model_type"]], config)
  flat = _flatten(params)
  _check_params(leaves, flat)
  where = {}
  for path, leaf in leaves.items():
    places = [
      (path, i if leaf.stacked else ...) for i in range(len(leaf.names))
    ]
    where |= dict(zip(leaf.names, places, strict=True))

  def size(name):
    path, _ = where[name]
    return flat[path].nbytes // len(leaves[path].names)

  def read(name):
    path, index = where[name]
    value = np.asarray(flat[path][index])
    return value.T if leaves[path].transposed else value

  folder = pathlib.Path(directory)
  _make(folder)
  sizes = {name: size(name) for name in where}
  safetensors_folder.write(folder, sizes, read, max_shard_bytes)
  # Last, so that a folder that was not finished has none.
  (folder / _CONFIG).write_text(json.dumps(raw, indent=2) + "\n")


def _leaves(
  family: families.Family, config: transformer.Config
) -> dict[str, _Leaf]:
  """Every parameter by its path.

  Raises:
    ValueError: for a parameter that the family has no name for.
  """
  leaves = {}
  for path, shape in _shapes(config).items():
    if path not in family.names:
      raise ValueError(f"parameter {path!r}: {family.architecture} has none")
    name, stacked = family.names[path], path.startswith("layers/")
    names = [name.format(i) for i in range(config.depth if stacked else 1)]
    transposed = path == "head" or path.endswith("/kernel")
    leaves[path] = _Leaf(shape, names, stacked, transposed)
  return leaves


@functools.cache
def _shapes(config: transformer.Config) -> dict[str, tuple[int, ...]]:
  init = transformer.Transformer(config).init
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  params = jax.eval_shape(init, jax.random.key(0), tokens)["params"]
  return {path: x.shape for path, x in _flatten(params).items()}


def _flatten(tree: Any) -> dict[str, Any]:
  """{"layers/q/kernel": leaf}."""
  return cast(dict, traverse_util.flatten_dict(tree, sep="/"))


def _check_sizes(
  folder: pathlib.Path,
  config: transformer.Config,
  tensors: dict[str, safetensors_folder.Tensor],
) -> None:
  """Refuses absurd sizes before anything of such a size is made."""
  if config.depth > len(tensors):
    raise FolderError(
      f"{folder}: {_CONFIG} asks for {config.depth} layers, the files hold "
      f"{len(tensors)} tensors"
    )
  heads = config.num_heads * config.head_dim
  rows = config.embedding_size or config.vocab_size
  asked = max(config.width, config.mlp_width, heads, rows)
  there = max((n for t in tensors.values() for n in t.shape), default=0)
  if asked > there:
    raise FolderError(
      f"{folder}: {_CONFIG} asks for a side of {asked}, the longest of any "
      f"tensor is {there}"
    )


def _check(
  folder: pathlib.Path,
  config: transformer.Config,
  family: families.Family,
  leaves: dict[str, _Leaf],
  tensors: dict[str, safetensors_folder.Tensor],
) -> None:
  """Every tensor is used, every parameter is there and has its shape."""
  wanted = {name: leaf for leaf in leaves.values() for name in leaf.names}
  missing = [name for name in wanted if name not in tensors]
  if missing:
    raise FolderError(
      f"{folder}: tensor {missing[0]!r} is missing ({len(missing)} of "
      f"{len(wanted)} are); do {_CONFIG} and the files belong together?"
    )
  unused = [name for name in tensors if name not in wanted]
  if config.tie_embeddings and family.names["head"] in unused:
    head = family.names["head"]
    _check_tied(tensors[family.names["embed/embedding"]], tensors[head], head)
    unused.remove(head)
  if unused:
    raise FolderError(
      f"{tensors[unused[0]].file}: tensor {_show(unused[0])} is used by "
      f"nothing ({len(unused)} are not); does {_CONFIG} describe this model?"
    )
  for name, leaf in wanted.items():
    if tensors[name].shape != leaf.tensor_shape:
      raise FolderError(
        f"{tensors[name].file}: tensor {name!r} is "
        f"{list(tensors[name].shape)}, {_CONFIG} asks for "
        f"{list(leaf.tensor_shape)}"
      )


def _check_tied(
  embedding: safetensors_folder.Tensor,
  head: safetensors_folder.Tensor,
  name: str,
) -> None:
  """Some files hold the tied matrix twice; then it has to be one matrix."""
  same = embedding.shape == head.shape and embedding.dtype == head.dtype
  for start in range(0, head.shape[0], 4096) if same else ():
    rows = (slice(start, min(start + 4096, head.shape[0])),)
    same &= embedding.read(rows).tobytes() == head.read(rows).tobytes()
  if not same:
    raise FolderError(
      f"{head.file}: tensor {name!r} is not the embedding, though {_CONFIG} "
      "says that they are tied"
    )


def _dtype(
  leaf: _Leaf,
  tensors: dict[str, safetensors_folder.Tensor],
  dtype: str | None,
) -> np.dtype:
  if dtype is not None:
    return jnp.dtype(dtype)
  first = tensors[leaf.names[0]].dtype
  if first.name not in _DTYPES:
    raise FolderError(
      f"{tensors[leaf.names[0]].file}: tensor {leaf.names[0]!r} is "
      f"{first.name}; choose dtype='float32'"
    )
  for name in leaf.names:
    if tensors[name].dtype != first:
      raise FolderError(
        f"{tensors[name].file}: tensor {name!r} is {tensors[name].dtype.name} "
        f"and {leaf.names[0]!r} {first.name}: choose one dtype for all"
      )
  return first


def _place(
  path: str,
  leaf: _Leaf,
  tensors: dict[str, safetensors_folder.Tensor],
  dtype: np.dtype,
  mesh: Mesh | None,
) -> jax.Array:
  if mesh is None:
    everything = tuple(slice(None) for _ in leaf.shape)
    return jax.device_put(_read(leaf, tensors, dtype, everything))
  place = NamedSharding(mesh, partitioning.spec(path, leaf.shape, mesh))
  parts = {}  # devices along other axes hold the same slice

  def part(index):
    key = tuple((s.start, s.stop) for s in index)
    if key not in parts:
      parts[key] = _read(leaf, tensors, dtype, index)
    return parts[key]

  return jax.make_array_from_callback(leaf.shape, place, part)


def _read(
  leaf: _Leaf,
  tensors: dict[str, safetensors_folder.Tensor],
  dtype: np.dtype,
  index: tuple[slice, ...],
) -> np.ndarray:
  """A slice of a parameter, from those slices of its tensors alone."""
  bounds = [
    slice(*s.indices(n)[:2]) for s, n in zip(index, leaf.shape, strict=True)
  ]
  layers = bounds.pop(0) if leaf.stacked else slice(0, 1)
  shape = tuple(s.stop - s.start for s in bounds)
  out = np.empty((layers.stop - layers.start, *shape), dtype)
  inside = tuple(bounds[::-1] if leaf.transposed else bounds)
  for row, name in zip(out, leaf.names[layers], strict=True):
    value = tensors[name].read(inside)
    row[...] = value.T if leaf.transposed else value
  return out if leaf.stacked else out[0]


def _check_params(leaves: dict[str, _Leaf], flat: dict[str, Any]) -> None:
  odd = sorted(leaves.keys() ^ flat.keys())
  if odd:
    side = "are missing from" if odd[0] in leaves else "have no place among"
    raise ValueError(f"params {odd[0]!r} {side} the config's parameters")
  for path, leaf in leaves.items():
    value = flat[path]
    if value.shape != leaf.shape:
      raise ValueError(
        f"params {path!r} is {list(value.shape)}, the config asks for "
        f"{list(leaf.shape)}"
      )
    if value.dtype.name not in _DTYPES:
      raise ValueError(
        f"params {path!r} is {value.dtype.name}, must be one of "
        f"{', '.join(_DTYPES)}"
      )
    if not getattr(value, "is_fully_addressable", True):
      raise ValueError(
        f"params {path!r} lies on other hosts, too: save from one process"
      )


def _make(folder: pathlib.Path) -> None:
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise FolderError(f"{folder}: {error.strerror}") from error
  found = [*folder.glob("*.safetensors*"), *folder.glob(_CONFIG)]
  if found:
    raise FolderError(
      f"{found[0]}: is there already; choose another folder or remove it"
    )
