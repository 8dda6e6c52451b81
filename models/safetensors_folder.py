"""Folders of safetensors files, the form of published checkpoints.

Numbers lie in model.safetensors, or in several files that
model.safetensors.index.json names. A file is 8 bytes, the length of a JSON
header, that header (name -> dtype, shape, offsets) and the numbers. It is
mapped into memory and read by slices; nothing in it is ever run.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
_MAX_JSON = 100_000_000  # bytes, of a header too
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class FolderError(ValueError):
  """A checkpoint that cannot be used: one line with the file and the value."""


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor in a file, not read yet.

  Attributes:
    file: that holds it.
    shape, dtype: as the header says.
    read: (a slice per axis, bounded, step 1) -> those numbers, a copy.
  """

  file: pathlib.Path
  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[tuple[slice, ...]], np.ndarray]


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The JSON object in a file.

  Raises:
    FolderError: if there is none, with the reason.
  """
  try:
    if path.stat().st_size > _MAX_JSON:
      raise FolderError(f"{path}: more than {_MAX_JSON} bytes of JSON")
    value = json.loads(path.read_bytes())
  except OSError as error:
    raise FolderError(f"{path}: {error.strerror}") from error
  except (ValueError, RecursionError) as error:
    if isinstance(error, FolderError):
      raise
    raise FolderError(f"{path}: no JSON, {show(str(error))}") from error
  if not isinstance(value, dict):
    raise FolderError(f"{path}: holds {show(value)}, must be an object")
  return value


def open_tensors(directory: pathlib.Path) -> dict[str, Tensor]:
  """Maps every tensor of a folder by its name; reads headers only.

  Raises:
    FolderError: if the folder or a file in it cannot be used, an index does
      not fit its files, or a tensor holds no floats.
    ImportError: if the library safetensors is missing.
  """
  if (directory / SINGLE).exists():
    return _open_file(directory / SINGLE)
  if not (directory / INDEX).exists():
    raise FolderError(_nothing_there(directory))
  index = read_json(directory / INDEX)
  places = index.get("weight_map")
  if not isinstance(places, dict) or not places:
    raise FolderError(
      f"{directory / INDEX}: weight_map is {show(places)}, must be an object "
      "of tensor names and files"
    )
  opened = {}
  for name, file in places.items():
    if not _is_plain_name(file):
      raise FolderError(
        f"{directory / INDEX}: tensor {show(name)} in the file {show(file)}, "
        "must be the name of a .safetensors file in the same folder"
      )
    if file not in opened:
      if not (directory / file).exists():
        raise FolderError(
          f"{directory / file}: is missing, {INDEX} names it for tensor "
          f"{show(name)}; the download was not complete"
        )
      opened[file] = _open_file(directory / file)
    if name not in opened[file]:
      raise FolderError(
        f"{directory / file}: has no tensor {show(name)}, which {INDEX} "
        "places there"
      )
  for file, tensors in opened.items():
    stray = next((n for n in tensors if places.get(n) != file), None)
    if stray is not None:
      raise FolderError(
        f"{directory / file}: tensor {show(stray)} is in the file, {INDEX} "
        f"places it in {show(places.get(stray))}"
      )
  return {name: opened[file][name] for name, file in places.items()}


def write(
  directory: pathlib.Path,
  sizes: Mapping[str, int],
  read: Callable[[str], np.ndarray],
  max_shard_bytes: int,
) -> None:
  """Writes tensors, one file at a time in memory.

  Args:
    directory: exists, and holds no .safetensors file.
    sizes: name -> bytes, in the order of the files.
    read: name -> numbers, called once per name.
    max_shard_bytes: of a file, unless one tensor alone is larger.

  Raises:
    FolderError: if a file cannot be written.
    ImportError: if the library safetensors is missing.
  """
  safetensors = _library()
  shards, room = [], 0
  for name, size in sizes.items():
    if not shards or size > room:
      shards.append([])
      room = max_shard_bytes
    shards[-1].append(name)
    room -= size
  count = len(shards)
  files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
  files = [SINGLE] if count == 1 else files
  for file, names in zip(files, shards, strict=True):
    arrays = {name: np.ascontiguousarray(read(name)) for name in names}
    try:
      # Readers of PyTorch refuse files without this format.
      safetensors.numpy.save_file(arrays, directory / file, {"format": "pt"})
    except (OSError, safetensors.SafetensorError) as error:
      raise FolderError(f"{directory / file}: not written, {error}") from error
  if count > 1:
    pairs = zip(files, shards, strict=True)
    index = {
      "metadata": {"total_size": sum(sizes.values())},
      "weight_map": {name: file for file, names in pairs for name in names},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def show(value: Any) -> str:
  """The value on one line, cut after 80 letters: files may hold anything."""
  text = repr(value)
  return text if len(text) <= 80 else text[:77] + "..."


def _library() -> Any:
  try:
    import safetensors
    import safetensors.numpy
  except ImportError as error:
    raise ImportError(
      "published checkpoints need the library safetensors: "
      "pip install 'giantsteps[checkpoints]'"
    ) from error
  return safetensors


def _open_file(path: pathlib.Path) -> dict[str, Tensor]:
  safetensors = _library()
  try:
    file = safetensors.safe_open(path, framework="np")
    names = list(file.keys())
    slices = {name: file.get_slice(name) for name in names}
  except OSError as error:
    raise FolderError(f"{path}: {error}") from error
  except safetensors.SafetensorError as error:
    raise FolderError(f"{path}: {_fault(path, error)}") from error
  tensors = {}
  for name, view in slices.items():
    kind = view.get_dtype()
    if kind not in DTYPES:
      raise FolderError(
        f"{path}: tensor {show(name)} has the dtype {kind}; known are "
        f"{', '.join(DTYPES)}, no quantised ones"
      )
    tensors[name] = Tensor(
      path, tuple(view.get_shape()), DTYPES[kind], view.__getitem__
    )
  return tensors


def _fault(path: pathlib.Path, error: Exception) -> str:
  """What is wrong with a file that the library refuses.

  The library is the judge; it rarely names the tensor, so this looks again.
  """
  size = path.stat().st_size
  with path.open("rb") as file:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if start == b"version ":
      return "a Git LFS pointer and no data, run git lfs pull"
    if size < 8 or length > min(size - 8, _MAX_JSON):
      return (
        f"has {size} bytes and announces a header of {length}: cut short, or "
        "no safetensors file"
      )
    raw = file.read(length)
  try:
    header = json.loads(raw)
    header.pop("__metadata__", None)
    entries = sorted(header.items(), key=lambda x: x[1]["data_offsets"])
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
    return f"the header is malformed, {show(str(error))}"
  end = 0
  for name, entry in entries:
    fault = _tensor_fault(entry, end, size - 8 - length)
    if fault:
      return f"tensor {show(name)} {fault}"
    end = entry["data_offsets"][1]
  if end != size - 8 - length:
    return f"has {size - 8 - length - end} bytes after the last tensor"
  return show(str(error))


def _tensor_fault(entry: dict, end: int, size: int) -> str | None:
  """What is wrong with one entry of a header; the one before stops at end."""
  kind, shape = entry.get("dtype"), entry.get("shape", [None])
  if not isinstance(kind, str) or kind not in DTYPES:
    return f"has the dtype {show(kind)}; known are {', '.join(DTYPES)}"
  if not _are_counts(shape) or not _are_counts(entry["data_offsets"], 2):
    return f"has a malformed shape or offsets, {show(entry)}"
  first, last = entry["data_offsets"]
  if first < end:
    return f"starts at byte {first}, inside the one before it"
  if first > end:
    return f"starts at byte {first}, {first - end} bytes of no tensor before it"
  if last > size:
    return f"ends at byte {last} of {size}: the file is cut short"
  if last - first != math.prod(shape) * DTYPES[kind].itemsize:
    return f"has {last - first} bytes, its shape {show(shape)} says otherwise"
  return None


def _are_counts(value: Any, length: int | None = None) -> bool:
  return (
    isinstance(value, list)
    and all(type(n) is int and n >= 0 for n in value)
    and length in (None, len(value))
  )


def _is_plain_name(file: Any) -> bool:
  """A .safetensors file of the folder itself, so that no path leads out."""
  return (
    isinstance(file, str)
    and file.endswith(".safetensors")
    and not set(file) & set("/\\:\0")
  )


def _nothing_there(directory: pathlib.Path) -> str:
  if not directory.is_dir():
    return f"{directory}: no such folder"
  found = sorted(p.name for glob in _PICKLES for p in directory.glob(glob))
  if found:
    return (
      f"{directory / found[0]}: a pickle, which runs code on load and is "
      f"never read; convert it to {SINGLE} with transformers' save_pretrained"
    )
  return f"{directory}: has no {SINGLE} and no {INDEX}"
