"""Data: the stream of batches, the splits, and one line per bad file."""

import hashlib
import json
import os
import platform
import sysconfig

import numpy as np
import pytest
import tensorstore

from giantsteps.experiments.harness import config, data

RNG = np.random.default_rng(0)


def load(source, vocab_size=None, **fields):
  return data.load(config.Data(source, **fields), vocab_size)


def everything(split) -> dict[str, np.ndarray]:
  return split.read(np.arange(split.num_rows))


def fails(source, *parts, **fields) -> str:
  """The load must end with one line that holds all of `parts`."""
  with pytest.raises(config.InputError) as caught:
    load(source, **fields)
  message = str(caught.value)
  assert "\n" not in message
  for part in (source, *parts):
    assert str(part) in message, message
  return message


def write_zarr(path, array, driver="zarr3", chunk=None):
  """Writes a zarr array by TensorStore's own defaults."""
  kvstore = {"driver": "file", "path": str(path)}
  store = tensorstore.open(
    {"driver": driver, "kvstore": kvstore},
    create=True,
    dtype=array.dtype,
    shape=array.shape,
    chunk_layout=tensorstore.ChunkLayout(
      chunk_shape=chunk or [max(1, n // 3) for n in array.shape]
    ),
  ).result()
  store.write(array).result()
  return f"zarr:{path}"


# --- the stream


@pytest.mark.parametrize("n", [1, 5, 8])
@pytest.mark.parametrize("size", [1, 3, 8, 21])
def test_row_i_is_a_permutation_per_epoch(n, size):
  split = data.Split(n, lambda indices: {"row": indices})
  steps = -(-4 * n // size)
  stream = np.concatenate(
    [data.batch(split, size, 7, step)["row"] for step in range(steps)]
  )
  epochs = stream[: 4 * n].reshape(4, n)
  np.testing.assert_array_equal(np.sort(epochs, 1), [range(n)] * 4)
  # row by row, in any order of asking, it is what the contract says
  for i in reversed(range(len(stream))):
    assert stream[i] == data.permutation(7, i // n, n)[i % n]


def test_permutations_differ_between_epochs_and_seeds():
  orders = [tuple(data.permutation(*k, 100)) for k in [(0, 0), (0, 1), (1, 0)]]
  assert len(set(orders)) == 3  # false alarm: 3 in 100!


def test_permutation_is_uniform():
  # Which of 4 rows comes first in 4,000 epochs: chi-squared with 3 degrees of
  # freedom exceeds 21.1 with probability 1e-4.
  first = [data.permutation(3, epoch, 4)[0] for epoch in range(4_000)]
  count = np.bincount(first, minlength=4)
  assert ((count - 1_000) ** 2 / 1_000).sum() < 21.1


def test_far_steps_are_cheap_and_exact():
  split = data.Split(1_000, lambda indices: {"row": indices})
  step = 2**40  # not an int32
  got = data.batch(split, 16, 0, step)["row"]
  i = step * 16 + np.arange(16)
  order = [data.permutation(0, int(k) // 1_000, 1_000)[k % 1_000] for k in i]
  np.testing.assert_array_equal(got, order)


def test_batch_of_nothing_is_an_error():
  with pytest.raises(ValueError, match="num_rows=0"):
    data.batch(data.Split(0, lambda indices: {}), 4, 0, 0)


# --- digits


def test_digits_are_those_of_scikit_learn_in_two_halves():
  datasets = pytest.importorskip("sklearn.datasets")
  dataset = load("digits")
  train, held_out = everything(dataset.train), everything(dataset.held_out)
  assert dataset.kind == "image"
  assert train["image"].shape == (898, 8, 8, 1)
  assert held_out["image"].shape == (899, 8, 8, 1)
  assert train["image"].dtype == np.float32
  assert train["label"].dtype == np.int32
  # the same multiset of (pixels, label) as the source: nothing lost or doubled
  pixels, label = datasets.load_digits(return_X_y=True)
  rows = lambda x, y: sorted(
    [*p, int(k)] for p, k in zip(x.reshape(len(x), -1), y, strict=True)
  )
  both = {k: np.concatenate([train[k], held_out[k]]) for k in train}
  assert rows((both["image"] + 1) * 8, both["label"]) == rows(pixels, label)
  counts = [np.bincount(s["label"], minlength=10) for s in (train, held_out)]
  assert np.abs(counts[0] - counts[1]).max() <= 1  # stratified
  assert dataset.description["std"] == pytest.approx(0.752, abs=2e-3)  # spec
  assert dataset.description["shape"] == [8, 8, 1]


# --- text


def test_stdlib_is_the_source_of_this_python():
  dataset = load("stdlib", seq_len=64)
  said = dataset.description
  assert said["python"] == platform.python_version()
  root = sysconfig.get_path("stdlib")
  texts = {"train": [], "held_out": []}
  left_out = "site-packages dist-packages test tests idle_test __pycache__"
  left_out += " pydoc_data"
  paths = []
  for folder, folders, names in os.walk(root):
    folders[:] = [f for f in folders if f not in left_out.split()]
    paths += [os.path.join(folder, n) for n in names if n.endswith(".py")]
  for path in sorted(paths, key=lambda p: os.path.relpath(p, root)):
    digest = hashlib.sha256(os.path.relpath(path, root).encode()).hexdigest()
    split = "held_out" if int(digest, 16) < 0.08 * 16**64 else "train"
    with open(path, "rb") as file:
      texts[split].append(file.read())
  files = len(texts["train"]) + len(texts["held_out"])
  assert 0.05 < len(texts["held_out"]) / files < 0.10
  for name, split in (("train", dataset.train), ("held_out", dataset.held_out)):
    text = b"\0".join(texts[name])
    assert said[name] == {
      "files": len(texts[name]),
      "bytes": len(text),
      "rows": len(text) // 64,
      "sha256": hashlib.sha256(text).hexdigest(),
    }
    j = split.num_rows - 1
    row = split.read(np.array([j]))["tokens"]
    assert row.dtype == np.int32
    assert bytes(row[0].tolist()) == text[j * 64 : (j + 1) * 64]


def test_text_of_one_file_holds_out_its_end(tmp_path):
  text = RNG.integers(0, 256, 1_003).astype(np.uint8).tobytes()
  (tmp_path / "a.bin").write_bytes(text)
  dataset = load(f"text:{tmp_path / 'a.bin'}", seq_len=10, held_out=0.2)
  train = everything(dataset.train)["tokens"]
  held_out = everything(dataset.held_out)["tokens"]
  assert bytes(train.ravel().tolist()) == text[:800]  # 802 less what is over
  assert bytes(held_out.ravel().tolist()) == text[802:1002]


def test_text_of_a_folder_holds_out_whole_files(tmp_path):
  (tmp_path / "deep" / ".git").mkdir(parents=True)
  (tmp_path / "deep" / ".git" / "x").write_text("hidden" * 99)
  (tmp_path / "empty.txt").write_text("")
  for i in range(40):
    (tmp_path / "deep" / f"{i}.txt").write_text(f"{i:02d} " * 50)
  dataset = load(f"text:{tmp_path}", seq_len=50, held_out=0.2)
  rows = {}
  for name, split in (("train", dataset.train), ("held_out", dataset.held_out)):
    flat = everything(split)["tokens"].ravel().tolist()
    rows[name] = set(bytes(flat).replace(b"\0", b" ").decode().split())
    assert dataset.description[name]["files"] > 0
  assert not {w for w in rows["train"] & rows["held_out"] if len(w) == 2}
  files = [dataset.description[k]["files"] for k in ("train", "held_out")]
  assert sum(files) == 40


def test_a_folder_of_two_files_has_both_splits(tmp_path):
  for name in ("a", "b"):
    (tmp_path / name).write_text(name * 100)
  dataset = load(f"text:{tmp_path}", seq_len=50, held_out=0.01)
  assert (dataset.train.num_rows, dataset.held_out.num_rows) == (2, 2)


# --- arrays

IMAGES = RNG.integers(0, 256, (20, 5, 4)).astype(np.uint8)
TOKENS = RNG.integers(0, 300, 1_007)


def assert_partition(dataset, expected):
  """The two splits hold each row of `expected` once."""
  key = "image" if dataset.kind == "image" else "tokens"
  got = [everything(s)[key] for s in (dataset.train, dataset.held_out)]
  rows = lambda x: sorted(r.ravel().tolist() for r in np.asarray(x))
  assert rows(np.concatenate(got)) == rows(expected)


@pytest.mark.parametrize("form", ["npz", "zarr", "zarr3"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_images(tmp_path, form, dtype):
  exact = IMAGES / 127.5 - 1
  stored = IMAGES if dtype == np.uint8 else exact.astype(dtype)
  if form == "npz":
    np.savez(tmp_path / "a.npz", image=stored)
    source = f"npz:{tmp_path / 'a.npz'}"
  else:
    source = write_zarr(tmp_path / "a", stored, form)
  dataset = load(source, held_out=0.25)
  assert dataset.kind == dataset.description["kind"] == "image"
  assert (dataset.train.num_rows, dataset.held_out.num_rows) == (15, 5)
  assert dataset.description["shape"] == [5, 4, 1]
  assert dataset.description["num_classes"] == 0
  json.dumps(dataset.description)
  images = everything(dataset.train)["image"]
  assert images.shape == (15, 5, 4, 1) and images.dtype == np.float32
  both = [everything(s)["image"] for s in (dataset.train, dataset.held_out)]
  flat = np.concatenate(both).reshape(20, -1)
  wanted = exact.reshape(20, -1)
  order = lambda x: x[np.lexsort(np.round(x, 3).T)]
  # one rounding of the division and one of the subtraction, values up to 2
  np.testing.assert_allclose(order(flat), order(wanted), atol=2.5e-7)


def test_labels_stay_with_their_images(tmp_path):
  label = np.arange(20)
  image = np.zeros((20, 2, 2, 3), np.float32)
  image += label[:, None, None, None] / 20
  np.savez(tmp_path / "a.npz", images=image, labels=label)
  dataset = load(f"npz:{tmp_path / 'a.npz'}")
  assert dataset.description["num_classes"] == 20
  batch = data.batch(dataset.train, 7, 0, 3)
  assert batch["image"].shape == (7, 2, 2, 3)
  np.testing.assert_allclose(batch["image"][:, 0, 0, 0] * 20, batch["label"])


@pytest.mark.parametrize("form", ["npz", "zarr", "zarr3"])
def test_token_stream(tmp_path, form):
  if form == "npz":
    np.savez(tmp_path / "a.npz", tokens=TOKENS, other=IMAGES)
    source = f"npz:{tmp_path / 'a.npz'}"
  else:
    source = write_zarr(tmp_path / "a", TOKENS.astype(np.uint16), form)
  dataset = load(source, seq_len=10, held_out=0.1, vocab_size=300)
  assert dataset.kind == "tokens"
  rows = TOKENS[:1_000].reshape(100, 10)
  train, held_out = everything(dataset.train), everything(dataset.held_out)
  assert train["tokens"].dtype == np.int32
  np.testing.assert_array_equal(train["tokens"], rows[:90])
  np.testing.assert_array_equal(held_out["tokens"], rows[90:])
  shuffled = np.array([77, 3, 3, 50])
  np.testing.assert_array_equal(
    dataset.train.read(shuffled)["tokens"], rows[shuffled]
  )


@pytest.mark.parametrize("form", ["npz", "zarr3"])
def test_token_rows_are_cut_to_length(tmp_path, form):
  table = TOKENS[:1_000].reshape(40, 25)
  if form == "npz":
    np.savez(tmp_path / "a.npz", table)  # the only array, unnamed
    source = f"npz:{tmp_path / 'a.npz'}"
  else:
    source = write_zarr(tmp_path / "a", table)
  dataset = load(source, seq_len=10)
  assert_partition(dataset, table[:, :20].reshape(80, 10))


def test_npy_is_taken_as_the_only_array(tmp_path):
  np.save(tmp_path / "a.npy", IMAGES)
  assert load(f"npz:{tmp_path / 'a.npy'}").train.num_rows == 18


def test_zarr_is_never_read_whole(tmp_path):
  # 2^38 tokens, 512 GiB, of which two chunks exist; the rest is fill value 0.
  store = tensorstore.open(
    {
      "driver": "zarr3",
      "kvstore": {"driver": "file", "path": str(tmp_path / "a")},
    },
    create=True,
    dtype=tensorstore.uint16,
    shape=[2**38],
    chunk_layout=tensorstore.ChunkLayout(chunk_shape=[2**12]),
  ).result()
  store[2**30 : 2**30 + 256].write(np.arange(256, dtype=np.uint16)).result()
  dataset = load(f"zarr:{tmp_path / 'a'}", seq_len=256)
  assert dataset.train.num_rows + dataset.held_out.num_rows == 2**30
  rows = dataset.train.read(np.array([2**22, 2**29]))["tokens"]
  np.testing.assert_array_equal(rows, [range(256), [0] * 256])


# --- what is wrong with a file


@pytest.mark.parametrize(
  "source", ["", "digit", "npz", "text", "digits:x", "csv:a.csv", "stdlib:"]
)
def test_unknown_sources(source):
  fails(source, "data.source", "zarr:PATH")


@pytest.mark.parametrize("kind", ["npz", "text", "zarr"])
def test_missing_files(kind, tmp_path):
  fails(f"{kind}:{tmp_path / 'nothing'}", "no such file")
  fails(f"{kind}:", "path")
  (tmp_path / "file").write_text("x")
  fails(f"{kind}:{tmp_path / 'file' / 'below'}", "no such file")
  fails(f"{kind}:{tmp_path / ('n' * 300)}", "name")


def test_bad_text(tmp_path):
  (tmp_path / "empty").write_text("")
  fails(f"text:{tmp_path / 'empty'}", "empty")
  fails(f"text:{tmp_path}", "not empty")  # a folder of empty files
  (tmp_path / "short").write_text("x" * 90)
  fails(f"text:{tmp_path / 'short'}", "too short", "train has 83", "256")
  # long enough to train on, but what is held out is not
  (tmp_path / "short").write_text("x" * 1_000)
  fails(f"text:{tmp_path / 'short'}", "held_out has 80", "256")


def test_bad_npz_files(tmp_path):
  path = tmp_path / "a.npz"
  source = f"npz:{path}"
  path.write_bytes(b"")
  fails(source, "empty")
  path.write_bytes(b"image,label\n1,2\n")
  fails(source, "not an npz")
  np.savez(path, image=IMAGES)
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  fails(source, "cut short")
  flipped = bytearray(whole)
  flipped[len(whole) // 2] ^= 1
  path.write_bytes(flipped)
  fails(source, "CRC")
  np.savez(path, image=np.array([{"a": 1}], object))
  fails(source, "object", "never unpickled")
  path.unlink()
  path.mkdir()
  fails(source, "directory")


@pytest.mark.parametrize(
  ("arrays", "parts"),
  [
    ({"a": IMAGES, "b": IMAGES}, ["a, b", "tokens"]),
    ({}, ["none"]),
    ({"label": np.arange(3)}, ["label"]),
    ({"image": np.zeros((0, 4, 4), np.uint8)}, ["[0, 4, 4]", "empty"]),
    ({"image": np.zeros((1, 4, 4), np.uint8)}, ["one image"]),
    ({"image": np.zeros((9, 4, 4), np.int64)}, ["int64", "uint8"]),
    ({"image": np.zeros((9, 4, 4), np.complex64)}, ["complex64"]),
    ({"image": np.zeros((9, 4), np.float32)}, ["float32 [9, 4]"]),
    ({"image": np.zeros((9, 4, 4, 1, 1), np.uint8)}, ["[9, 4, 4, 1, 1]"]),
    ({"image": np.array(["text"])}, ["<U4"]),
    ({"image": np.zeros((9, 4, 4), np.uint8)}, ["every pixel is -1.0"]),
    ({"image": np.full((9, 4, 4), 255.0)}, ["255.0", "[-1, 1]"]),
    ({"image": np.full((9, 4, 4), np.nan)}, ["nan"]),
    ({"image": IMAGES, "label": np.arange(3)}, ["int64 [3]", "[20]"]),
    ({"image": IMAGES, "label": np.ones(20)}, ["float64 [20]"]),
    ({"image": IMAGES, "label": -np.arange(20)}, ["labels"]),
    ({"tokens": np.arange(99)}, ["too short", "[99]", "256"]),
    ({"tokens": np.arange(400) % 9}, ["too short", "1 sequences"]),
    ({"tokens": np.zeros((9, 8), int)}, ["too short", "[9, 8]"]),
    ({"tokens": np.arange(2_000) - 1}, ["token -1"]),
    ({"tokens": np.arange(2_000)}, ["token 1999", "[0, 257)"]),
    ({"tokens": np.ones(2_000, bool)}, ["bool"]),
    ({"tokens": np.array(7)}, ["int64 []"]),
  ],
)
def test_bad_arrays(tmp_path, arrays, parts):
  np.savez(tmp_path / "a.npz", **arrays)
  fails(f"npz:{tmp_path / 'a.npz'}", *parts, vocab_size=257)


def test_bad_zarr(tmp_path):
  (tmp_path / "file").write_text("x")
  fails(f"zarr:{tmp_path / 'file'}", "not a zarr array", ".zarray")
  (tmp_path / "group").mkdir()
  fails(f"zarr:{tmp_path / 'group'}", "not a zarr array")
  (tmp_path / "group" / "zarr.json").write_text("{ not json")
  fails(f"zarr:{tmp_path / 'group'}", "cannot be read")
  fails(write_zarr(tmp_path / "a", np.zeros((9, 4), np.float32)), "[9, 4]")
  fails(write_zarr(tmp_path / "b", np.arange(99)), "too short", "[99]")
  fails(
    write_zarr(tmp_path / "c", np.full((9, 2, 2), np.inf, np.float32)), "inf"
  )
  source = write_zarr(tmp_path / "d", np.full(999, 300), chunk=[100])
  fails(source, "token 300", "[0, 257)", vocab_size=257)
  chunk = tmp_path / "d" / "c" / "0"
  assert chunk.stat().st_size
  chunk.write_bytes(b"garbage")
  fails(source, "cannot be read", seq_len=100)


def test_a_bad_row_deep_in_a_zarr_is_found_when_it_is_read(tmp_path):
  tokens = np.zeros((1_000, 8), np.int32)
  tokens[123, 4] = 999
  dataset = load(write_zarr(tmp_path / "a", tokens), seq_len=8, vocab_size=256)
  dataset.train.read(np.array([122, 124]))
  with pytest.raises(config.InputError, match="token 999"):
    dataset.train.read(np.array([122, 123]))
