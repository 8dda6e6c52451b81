"""Rows of real data, and batches as a pure function of (seed, step).

There is no iterator state: row i of the endless stream is
permutation(seed, i div n)[i mod n], so a resumed run sees what the unbroken one
would have seen, and a batch may cross into the next epoch.

Which rows are held out depends on the data alone, never on the seed: runs with
different seeds are judged on the same rows.
"""

import dataclasses
import functools
import hashlib
import pathlib
import platform
import sysconfig
import zipfile
import zlib
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import tensorstore

from giantsteps.experiments.harness import (
  checkerboard,
  mixtures,
  points,
  shapes,
)
from giantsteps.experiments.harness import config as config_lib
from giantsteps.research.test_time_training import (
  associative_recall,
  novel_views,
)

InputError = config_lib.InputError

SEPARATOR = b"\0"  # between two files of text; no text file holds it
SOURCES = (
  *("digits", "shapes32", "stdlib", "scenes", "recall:KEYS"),
  *("checkerboard", "mixture:D"),
  *("npz:PATH", "text:PATH", "zarr:PATH"),
)
_ENDLESS = 2**60  # rows of points, both splits together
_PER_SEED = 2**36  # endless rows between the first ones of two seeds
NUM_SCENES = 2**16  # of the source "scenes", both splits together
NUM_SHAPES = 2**20  # of the source "shapes32", likewise
_SKIPPED_FOLDERS = {
  "site-packages",
  "dist-packages",
  "pydoc_data",  # one generated text of 0.8 MB, no source
  "test",
  "tests",
  "idle_test",
  "__pycache__",
}
_IMAGE_KEYS = ("image", "images", "x")
_LABEL_KEYS = ("label", "labels")
_CACHE_BYTES = 2**28  # decoded chunks of a zarr array that are kept


@dataclasses.dataclass(frozen=True)
class Split:
  """Rows with random access.

  Attributes:
    num_rows: n.
    read: indices [B] int64 in [0, n) -> {"image": [B, H, W, C] float32 in
      [-1, 1], "label": [B] int32 if known} or {"tokens": [B, T] int32,
      "weights": [B, T] float32 where not all tokens count} or {"image": [B, V,
      S, S, 3] float32 in [0, 1], "rays": [B, V, S, S, 6] float32} or {"point":
      [B, D] float32}; pure.
    endless: rows are independent draws, made from their index: their order
      means nothing, and a seed starts at a place of its own.
  """

  num_rows: int
  read: Callable[[np.ndarray], dict[str, np.ndarray]]
  endless: bool = False


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Two splits that share no row.

  Attributes:
    kind: what the rows are.
    description: plain JSON, the same for the same data: kind, source, rows of
      each split; images: shape [H, W, C], std of the training pixels,
      num_classes (0: no labels); text: files, bytes and digest per split;
      views: shape [V, S, S, 3]; points: shape [D], std of a coordinate.
  """

  train: Split
  held_out: Split
  kind: Literal["image", "tokens", "views", "points"]
  description: dict[str, Any]


def load(cfg: config_lib.Data, vocab_size: int | None = None) -> Dataset:
  """Opens `cfg.source`; the splits depend on nothing else, no seed.

  digits: the 1,797 images [8, 8, 1] of scikit-learn, pixel / 8 - 1, in two
  stratified halves, 898 for training. shapes32: pictures [32, 32, 3] of four
  classes, made when they are read (shapes.py). stdlib: the Python source of the
  running interpreter's standard library as bytes; files are held out by a hash
  of their path. recall:KEYS and scenes: made when they are read (research/
  test_time_training). checkerboard, mixture:1, mixture:2: points without end,
  made too (harness/points.py). text:PATH: bytes of one file (its end is held
  out) or of all files of a folder (by the hash). npz:PATH, zarr:PATH: images
  [N, H, W] or [N, H, W, C], uint8 or float in [-1, 1], or integer tokens [N, T]
  or [N]; zarr is read by random access and never whole.

  Args:
    cfg: source, sequence length, held-out fraction.
    vocab_size: tokens outside [0, vocab_size) are refused; None: any int32.

  Raises:
    InputError: if the source cannot be used, with its path and the reason.
  """
  kind, colon, path = cfg.source.partition(":")
  if kind == "digits" and not colon:
    return _digits(cfg)
  if kind == "shapes32" and not colon:
    return _shapes(cfg)
  if kind == "stdlib" and not colon:
    return _stdlib(cfg)
  if kind == "recall":
    return _recall(cfg, path, vocab_size)
  if kind == "scenes" and not colon:
    return _scenes(cfg)
  if kind == "mixture" or cfg.source == "checkerboard":
    return _points(cfg, path)
  readers = {"text": _text, "npz": _npz, "zarr": _zarr}
  if kind not in readers or not colon:
    raise InputError(
      f"data.source={cfg.source!r}: must be {', '.join(SOURCES[:-1])} or "
      f"{SOURCES[-1]}"
    )
  where = pathlib.Path(path).expanduser()
  if not path:
    raise InputError(f"data.source={cfg.source!r}: a path must follow the ':'")
  try:
    found = where.exists()
  except OSError as error:  # a name that is too long, say
    raise InputError(f"{cfg.source}: {error.strerror}") from error
  if not found:
    raise InputError(f"{cfg.source}: no such file or folder")
  if kind == "text":
    return _text(cfg, where)
  return readers[kind](cfg, where, vocab_size)


def batch(
  split: Split,
  batch_size: int,
  seed: int,
  step: int,
  own: np.ndarray | slice = slice(None),
) -> dict[str, np.ndarray]:
  """Rows step * B to (step + 1) * B of the endless stream of `split`.

  Costs O(B), and O(n) once per epoch.

  Args:
    split: the rows.
    batch_size: B; may be larger than the number of rows.
    seed: of the permutations.
    step: 0 is the first batch.
    own: indices of the rows of the batch that are wanted, rising; only they
      are read.

  Raises:
    ValueError: if the split is empty.
  """
  if split.num_rows < 1:
    raise ValueError(f"no batch of a split with num_rows={split.num_rows}")
  start = int(step) * batch_size
  row = np.arange(start, start + batch_size)[own]
  if split.endless:
    first = seed * _PER_SEED % split.num_rows
    return split.read((first + row) % split.num_rows)
  epoch, position = row // split.num_rows, row % split.num_rows
  parts = [
    permutation(seed, e, split.num_rows)[position[epoch == e]]
    for e in range(int(epoch[0]), int(epoch[-1]) + 1)
  ]
  return split.read(np.concatenate(parts))


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
  """The order of the rows in one epoch, [n] int64.

  A sort of raw random bits: numpy keeps those the same from version to version,
  which it does not promise of `Generator.permutation`.
  """
  bits = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n)
  order = np.argsort(bits, kind="stable")
  order.flags.writeable = False
  return order


def _digits(cfg: config_lib.Data) -> Dataset:
  try:
    from sklearn import datasets
  except ImportError as error:
    raise InputError(
      "data.source='digits': needs scikit-learn, pip install scikit-learn"
    ) from error
  pixels, label = datasets.load_digits(return_X_y=True)
  image = (pixels / 8 - 1).astype(np.float32).reshape(-1, 8, 8, 1)
  label = label.astype(np.int32)
  shuffled = permutation(0, 0, len(label))
  by_class = shuffled[np.argsort(label[shuffled], kind="stable")]
  return _image_dataset(
    cfg.source,
    lambda rows: {"image": image[rows], "label": label[rows]},
    (by_class[1::2], by_class[::2]),  # in turns: every class is halved
    num_classes=10,
  )


def _shapes(cfg: config_lib.Data) -> Dataset:
  rows = np.arange(NUM_SHAPES)
  held_out = _held_out_rows(cfg, NUM_SHAPES)
  return _image_dataset(
    cfg.source,
    lambda indices: shapes.sample(0, indices),
    (rows[:-held_out], rows[-held_out:]),
    num_classes=len(shapes.CLASSES),
  )


def _image_dataset(
  source: str,
  read_rows: Callable[[np.ndarray], dict[str, np.ndarray]],
  halves: tuple[np.ndarray, np.ndarray],
  num_classes: int,
) -> Dataset:
  """Splits over (training rows, held-out rows), and their description."""

  def split(rows: np.ndarray) -> Split:
    rows = np.sort(rows)
    return Split(len(rows), lambda indices: read_rows(rows[indices]))

  train, held_out = split(halves[0]), split(halves[1])
  sample = np.linspace(0, train.num_rows - 1, min(train.num_rows, 4096))
  image = train.read(sample.astype(np.int64))["image"]
  std = float(image.std(dtype=np.float64))
  if not std:
    raise InputError(f"{source}: every pixel is {image.flat[0]}, no image")
  description = {
    "kind": "image",
    "source": source,
    "shape": list(image.shape[1:]),
    "std": float(f"{std:.6g}"),  # the same on another machine
    "num_classes": num_classes,
    "train": {"rows": train.num_rows},
    "held_out": {"rows": held_out.num_rows},
  }
  return Dataset(train, held_out, "image", description)


def _stdlib(cfg: config_lib.Data) -> Dataset:
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  files = [
    file
    for file in root.rglob("*.py")
    if not _SKIPPED_FOLDERS & set(file.relative_to(root).parts[:-1])
  ]
  if not files:
    raise InputError(f"data.source='stdlib': no .py files in {root}")
  extra = {"python": platform.python_version()}
  return _text_splits(cfg, *_by_hash(cfg, root, files), extra)


def _recall(cfg: config_lib.Data, keys: str, vocab_size: int | None) -> Dataset:
  if not keys.isdecimal() or not int(keys):
    raise InputError(f"data.source={cfg.source!r}: wants a number of keys")
  num_keys, length = int(keys), cfg.seq_len
  if length % 2:
    raise InputError(f"data.seq_len={length}: {cfg.source} wants an even one")
  if vocab_size is not None and 2 * num_keys > vocab_size:
    raise InputError(
      f"{cfg.source}: {num_keys} keys and their values need "
      f"model.vocab_size={2 * num_keys}, it is {vocab_size}"
    )
  split = lambda count, held_out: Split(
    count,
    lambda rows: associative_recall.rows(rows, length, num_keys, held_out),
  )
  train, held_out = split(2**20, False), split(2**12, True)
  description = {
    "kind": "tokens",
    "source": cfg.source,
    "train": {"rows": train.num_rows},
    "held_out": {"rows": held_out.num_rows},
  }
  return Dataset(train, held_out, "tokens", description)


def _scenes(cfg: config_lib.Data) -> Dataset:
  held_out = _held_out_rows(cfg, NUM_SCENES)

  def rows_from(first: int, count: int) -> Split:
    def read(indices):
      drawn = [
        novel_views.views(0, first + int(i), cfg.views, cfg.side)
        for i in indices
      ]
      image, rays = zip(*drawn, strict=True)
      return {"image": np.stack(image), "rays": np.stack(rays)}

    return Split(count, read)

  train = NUM_SCENES - held_out
  description = {
    "kind": "views",
    "source": cfg.source,
    "shape": [cfg.views, cfg.side, cfg.side, 3],
    "train": {"rows": train},
    "held_out": {"rows": held_out},
  }
  return Dataset(
    rows_from(0, train), rows_from(train, held_out), "views", description
  )


def _points(cfg: config_lib.Data, dim: str) -> Dataset:
  if cfg.source == "checkerboard":
    std, size, draw = (
      checkerboard.STD,
      2,
      functools.partial(checkerboard.sample, 0),
    )
  elif dim in ("1", "2"):
    mixture = mixtures.two_modes() if dim == "1" else mixtures.gmm2()
    std, size = mixture.std, int(dim)
    draw = functools.partial(points.mixture, mixture, 0)
  else:
    raise InputError(f"data.source={cfg.source!r}: wants mixture:1 or 2")

  def rows_from(first: int) -> Split:
    read = lambda rows: {"point": draw(first + rows)}
    return Split(_ENDLESS // 2, read, endless=True)

  train, held_out = rows_from(0), rows_from(_ENDLESS // 2)
  description = {
    "kind": "points",
    "source": cfg.source,
    "shape": [size],
    "std": float(f"{std:.6g}"),
    "num_classes": 0,
    "train": {"rows": train.num_rows},
    "held_out": {"rows": held_out.num_rows},
  }
  return Dataset(train, held_out, "points", description)


def _text(cfg: config_lib.Data, path: pathlib.Path) -> Dataset:
  if path.is_dir():
    inside = [file.relative_to(path) for file in path.rglob("*")]
    visible = [n for n in inside if not any(p[0] == "." for p in n.parts)]
    files = [path / name for name in visible if (path / name).is_file()]
    files = [file for file in files if file.stat().st_size]
    if not files:
      raise InputError(f"{cfg.source}: holds no file that is not empty")
    if len(files) > 1:
      return _text_splits(cfg, *_by_hash(cfg, path, files), {})
    path = files[0]
  text = _read_bytes(path, cfg.source)
  if not text:
    raise InputError(f"{cfg.source}: is empty, 0 bytes")
  cut = round(len(text) * (1 - cfg.held_out))
  return _text_splits(cfg, [text[:cut]], [text[cut:]], {})


def _by_hash(
  cfg: config_lib.Data, root: pathlib.Path, files: Iterable[pathlib.Path]
) -> tuple[list[bytes], list[bytes]]:
  """Contents of the training files and of the held-out ones, sorted by path.

  Held out is a file whose sha256(path relative to root) / 2^256 is below
  `held_out`, and at least the one with the lowest.
  """
  named = sorted((file.relative_to(root).as_posix(), file) for file in files)
  score = {
    name: int.from_bytes(hashlib.sha256(name.encode()).digest(), "big") / 2**256
    for name, _ in named
  }
  lowest = min(score.values())
  train, held_out = [], []
  for name, file in named:
    away = score[name] < cfg.held_out or score[name] == lowest
    (held_out if away else train).append(_read_bytes(file, cfg.source))
  return train, held_out


def _read_bytes(path: pathlib.Path, source: str) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise InputError(f"{source}: cannot read {path}: {error.strerror}") from (
      error
    )


def _text_splits(
  cfg: config_lib.Data, train: list[bytes], held_out: list[bytes], extra: dict
) -> Dataset:
  """Joins the files of each split and cuts rows of seq_len bytes; what is left
  over at the end is dropped."""
  description = {
    "kind": "tokens",
    "source": cfg.source,
    "separator": SEPARATOR[0],
    **extra,
  }
  splits = []
  for name, files in (("train", train), ("held_out", held_out)):
    text = SEPARATOR.join(files)
    num_rows = len(text) // cfg.seq_len
    if not num_rows:
      raise InputError(
        f"{cfg.source}: too short for one sequence, {name} has {len(text)} "
        f"bytes and needs data.seq_len={cfg.seq_len}: lower it, or change "
        f"data.held_out={cfg.held_out}"
      )
    used = np.frombuffer(text, np.uint8, num_rows * cfg.seq_len)
    used = used.reshape(num_rows, cfg.seq_len)

    def read(indices, used=used):
      return {"tokens": used[indices].astype(np.int32)}

    splits.append(Split(num_rows, read))
    description[name] = {
      "files": len(files),
      "bytes": len(text),
      "rows": num_rows,
      "sha256": hashlib.sha256(text).hexdigest(),
    }
  return Dataset(splits[0], splits[1], "tokens", description)


@dataclasses.dataclass(frozen=True)
class _Array:
  """A numpy array or a zarr store: fetch(indices) -> numpy array."""

  shape: tuple[int, ...]
  dtype: np.dtype
  fetch: Callable[[Any], np.ndarray]


def _npz(
  cfg: config_lib.Data, path: pathlib.Path, vocab_size: int | None
) -> Dataset:
  value, label = _read_npz(cfg.source, path)
  array = _Array(value.shape, value.dtype, value.__getitem__)
  if _kind(cfg, array) == "tokens":
    _check_tokens(value, cfg.source, vocab_size)
    return _token_splits(cfg, array, vocab_size)
  for start in range(0, len(value), 1024):
    _to_image(value[start : start + 1024], cfg.source)
  if label is not None:
    integers = label.dtype.kind in "iu" and label.shape == value.shape[:1]
    if not integers or label.min() < 0 or label.max() >= 2**31:
      raise InputError(
        f"{cfg.source}: labels are {label.dtype} {list(label.shape)}, must be "
        f"[{len(value)}] integers from 0"
      )
  return _image_splits(cfg, array, label)


def _read_npz(
  source: str, path: pathlib.Path
) -> tuple[np.ndarray, np.ndarray | None]:
  """The array of an npz or npy file and its labels, if any."""
  try:
    with path.open("rb") as file:
      start = file.read(6)
      if not start:
        raise InputError(f"{source}: is empty, 0 bytes")
      if start != b"\x93NUMPY" and not zipfile.is_zipfile(file):
        raise InputError(f"{source}: not an npz file, or cut short")
      file.seek(0)
      arrays = np.load(file, allow_pickle=False)
      if isinstance(arrays, np.ndarray):
        return arrays, None
      named = [k for k in ("tokens", *_IMAGE_KEYS) if k in arrays]
      others = [k for k in arrays.files if k not in _LABEL_KEYS]
      if not named and len(others) != 1:
        raise InputError(
          f"{source}: holds the arrays {', '.join(arrays.files) or '(none)'}; "
          f"one must be named tokens, {', '.join(_IMAGE_KEYS)}"
        )
      label = next((arrays[k] for k in _LABEL_KEYS if k in arrays), None)
      return arrays[(named or others)[0]], label
  except InputError:
    raise
  except (
    *(OSError, EOFError, ValueError, KeyError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
  ) as error:
    if "allow_pickle" in str(error):
      raise InputError(
        f"{source}: holds an array of dtype object, which is never unpickled: "
        f"save numbers"
      ) from error
    raise InputError(f"{source}: cannot be read, {_line(error)}") from error


def _zarr(
  cfg: config_lib.Data, path: pathlib.Path, vocab_size: int | None
) -> Dataset:
  drivers = {".zarray": "zarr", "zarr.json": "zarr3"}
  driver = next((d for f, d in drivers.items() if (path / f).is_file()), None)
  if driver is None:
    raise InputError(
      f"{cfg.source}: not a zarr array, has no {' or '.join(drivers)}"
    )
  spec = {
    "driver": driver,
    "kvstore": {"driver": "file", "path": str(path.resolve())},
  }
  cache = tensorstore.Context(
    {"cache_pool": {"total_bytes_limit": _CACHE_BYTES}}
  )

  def read(handle):
    try:
      return handle.result()
    except Exception as error:  # TensorStore raises several, by cause
      raise InputError(f"{cfg.source}: cannot be read, {_line(error)}") from (
        error
      )

  opened = tensorstore.open(spec, open=True, read=True, context=cache)
  store: Any = read(opened)
  dtype = np.dtype(store.dtype.numpy_dtype)
  fetch = lambda indices: read(store[indices].read())
  array = _Array(tuple(store.shape), dtype, fetch)
  if _kind(cfg, array) == "tokens":
    data = _token_splits(cfg, array, vocab_size)
  else:
    data = _image_splits(cfg, array, None)
  for split in (data.train, data.held_out):  # a sample; all when they are read
    split.read(np.unique([0, split.num_rows // 2, split.num_rows - 1]))
  return data


def _kind(cfg: config_lib.Data, array: _Array) -> Literal["image", "tokens"]:
  """What an array is by its shape and dtype, or InputError."""
  shape, dtype = array.shape, array.dtype
  seen = f"{cfg.source}: {dtype} {list(shape)}"
  if 0 in shape:
    raise InputError(f"{seen} is empty")
  if len(shape) in (1, 2) and dtype.kind in "iu":
    return "tokens"
  if len(shape) in (3, 4):
    if dtype != np.uint8 and not _is_float(dtype):
      raise InputError(f"{seen}: images must be uint8 or float")
    if shape[0] < 2:
      raise InputError(f"{seen}: one image cannot be split, needs 2 or more")
    return "image"
  raise InputError(
    f"{seen}: must be images [N, H, W] or [N, H, W, C], uint8 or float, or "
    f"integer tokens [N] or [N, T]"
  )


def _is_float(dtype: np.dtype) -> bool:
  return dtype.kind == "f" or dtype.name == "bfloat16"


def _image_splits(
  cfg: config_lib.Data, array: _Array, label: np.ndarray | None
) -> Dataset:
  """Held-out images are drawn once, whatever the seed: files are often sorted
  by class."""
  order = permutation(0, 0, array.shape[0])
  count = _held_out_rows(cfg, len(order))

  def read_rows(rows: np.ndarray) -> dict[str, np.ndarray]:
    out = {"image": _to_image(array.fetch(rows), cfg.source)}
    if label is not None:
      out["label"] = label[rows].astype(np.int32)
    return out

  return _image_dataset(
    cfg.source,
    read_rows,
    (order[count:], order[:count]),
    num_classes=0 if label is None else int(label.max()) + 1,
  )


def _to_image(values: np.ndarray, source: str) -> np.ndarray:
  """[B, H, W] or [B, H, W, C] as read -> [B, H, W, C] float32 in [-1, 1]."""
  image = values.astype(np.float32)
  if values.dtype == np.uint8:
    image = image / 127.5 - 1
  elif not (np.abs(image) <= 1 + 1e-6).all():  # written so that nan is caught
    bad = image[~(np.abs(image) <= 1 + 1e-6)][0]
    raise InputError(
      f"{source}: an image holds {bad}, floats must be in [-1, 1]: scale them, "
      f"or store uint8"
    )
  return image[..., None] if image.ndim == 3 else image


def _token_splits(
  cfg: config_lib.Data, array: _Array, vocab_size: int | None
) -> Dataset:
  """Rows of seq_len tokens, the last ones held out: neighbours may belong to
  one text. [N, T] gives T div seq_len rows per line, a stream [N] N div
  seq_len."""
  length = cfg.seq_len
  per_line = array.shape[-1] // length
  num_rows = per_line * (array.shape[0] if len(array.shape) == 2 else 1)
  if num_rows < 2:
    raise InputError(
      f"{cfg.source}: too short, {list(array.shape)} tokens hold {num_rows} "
      f"sequences of data.seq_len={length} and a split needs 2"
    )
  held_out = _held_out_rows(cfg, num_rows)

  def rows_from(first: int, count: int) -> Split:
    def read(indices):
      line, part = np.divmod(first + indices, per_line)
      column = part[:, None] * length + np.arange(length)
      lines = (line[:, None],) if len(array.shape) == 2 else ()
      values = array.fetch((*lines, column))
      return {"tokens": _check_tokens(values, cfg.source, vocab_size)}

    return Split(count, read)

  train = num_rows - held_out
  description = {
    "kind": "tokens",
    "source": cfg.source,
    "train": {"rows": train, "tokens": train * length},
    "held_out": {"rows": held_out, "tokens": held_out * length},
  }
  return Dataset(
    rows_from(0, train), rows_from(train, held_out), "tokens", description
  )


def _check_tokens(
  values: np.ndarray, source: str, vocab_size: int | None
) -> np.ndarray:
  limit = 2**31 if vocab_size is None else vocab_size
  low, high = int(values.min()), int(values.max())
  if low < 0 or high >= limit:
    raise InputError(
      f"{source}: holds the token {low if low < 0 else high}, must be in "
      f"[0, {limit})"
    )
  return values.astype(np.int32)


def _held_out_rows(cfg: config_lib.Data, n: int) -> int:
  return min(max(round(n * cfg.held_out), 1), n - 1)


def _line(error: BaseException) -> str:
  """The first words of an error on one line."""
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= 160 else text[:157] + "..."
