"""Files that lie, are cut short or come from elsewhere: one clear line each."""

import json
import pathlib
import struct
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from giantsteps.models import safetensors_folder

pytest.importorskip("safetensors")

FolderError = safetensors_folder.FolderError
A = np.arange(12, dtype=np.float32).reshape(3, 4)
B = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}


def layout(arrays):
  """header, body of a file, written by hand."""
  header, body = {}, b""
  for name, array in arrays.items():
    start, body = len(body), body + array.tobytes()
    header[name] = {
      "dtype": NAMES[array.dtype.name],
      "shape": list(array.shape),
      "data_offsets": [start, len(body)],
    }
  return header, body


def put(path: pathlib.Path, header, body, length=None):
  raw = header if isinstance(header, bytes) else json.dumps(header).encode()
  size = len(raw) if length is None else length
  path.write_bytes(struct.pack("<Q", size) + raw + body)


def put_index(folder, weight_map):
  (folder / safetensors_folder.INDEX).write_text(
    json.dumps({"weight_map": weight_map})
  )


def test_reads_slices_of_what_was_written_by_hand(tmp_path):
  put(tmp_path / "model.safetensors", *layout({"a": A, "b": B}))
  tensors = safetensors_folder.open_tensors(tmp_path)
  assert {n: t.shape for n, t in tensors.items()} == {"a": (3, 4), "b": (2, 3)}
  assert tensors["b"].dtype == ml_dtypes.bfloat16
  part = (slice(1, 3), slice(2, 3))
  np.testing.assert_array_equal(tensors["a"].read(part), A[part])
  value = tensors["b"].read((slice(0, 1),))
  assert value.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(value, B[:1])


def test_shards_are_written_as_others_read_them(tmp_path):
  arrays = {"a": A, "b": B, "c": A[0]}
  sizes = {name: array.nbytes for name, array in arrays.items()}
  safetensors_folder.write(tmp_path, sizes, arrays.__getitem__, 60)
  index = json.loads((tmp_path / safetensors_folder.INDEX).read_text())
  assert index["metadata"]["total_size"] == 48 + 12 + 16
  first, last = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
  assert index["weight_map"] == {"a": first, "b": first, "c": last}
  raw = (tmp_path / first).read_bytes()
  header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
  assert header["__metadata__"] == {"format": "pt"}
  assert header["b"]["dtype"] == "BF16" and header["b"]["shape"] == [2, 3]
  body = raw[8 + int.from_bytes(raw[:8], "little") :]
  assert body[slice(*header["a"]["data_offsets"])] == A.tobytes()
  for name, tensor in safetensors_folder.open_tensors(tmp_path).items():
    index = (slice(0, tensor.shape[0]),)
    assert tensor.read(index).tobytes() == arrays[name].tobytes()


def entry(dtype: Any = "F32", shape=(3, 4), offsets=(0, 48)):
  return {
    "dtype": dtype,
    "shape": list(shape),
    "data_offsets": list(offsets),
  }


TWO = {"a": entry(shape=(3,), offsets=(0, 12)), "b": entry(shape=(3,))}
BODY = bytes(48)
FILES = {  # case: header, body, announced length, words of the error
  "offsets beyond": ({"a": entry(offsets=(0, 2**60))}, BODY, None, "'a' ends"),
  "cut short": ({"a": entry()}, BODY[:40], None, "'a' ends at byte 48 of 40"),
  "trailing": ({"a": entry()}, bytes(50), None, "2 bytes after the last"),
  "overlap": (
    TWO | {"b": entry(shape=(3,), offsets=(8, 20))},
    bytes(20),
    None,
    "'b' starts at byte 8, inside",
  ),
  "gap": (
    TWO | {"b": entry(shape=(3,), offsets=(16, 28))},
    bytes(28),
    None,
    "'b' starts at byte 16, 4 bytes of no tensor",
  ),
  "shape": ({"a": entry(shape=(3, 5))}, BODY, None, r"'a' has 48 bytes.*3, 5"),
  "overflow": ({"a": entry(shape=(2**40, 2**40))}, BODY, None, "'a' has 48"),
  "negative": ({"a": entry(shape=(3, -4))}, BODY, None, "'a' has a malformed"),
  "minus": ({"a": entry(offsets=(-1, 47))}, BODY, None, "'a' has a malformed"),
  "dtype": ({"a": entry("X9")}, BODY, None, "'a' has the dtype 'X9'.*BF16"),
  "no string": ({"a": entry(["F32"])}, BODY, None, r"'a' has the dtype \['F32"),
  "quantised": ({"a": entry("I8", (48,))}, BODY, None, "'a' has the dtype I8"),
  "no offsets": ({"a": {"dtype": "F32"}}, BODY, None, "header is malformed"),
  "no entry": ({"a": 7}, BODY, None, "header is malformed"),
  "list": (b"[1, 2]", BODY, None, "header is malformed"),
  "nonsense": (b"{nonsense", BODY, None, "header is malformed"),
  "deep": (b'{"a":' + b"[" * 10**5, BODY, None, "header is malformed"),
  "huge header": ({"a": entry()}, BODY, 2**63, f"a header of {2**63}"),
  "long header": ({"a": entry()}, BODY, 200, "a header of 200"),
  "name": ({"a\n" * 500: entry("X9")}, BODY, None, r"'a\\na\\n.*\.\.\. has"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_hostile_file(tmp_path, case):
  header, body, length, words = FILES[case]
  put(tmp_path / "model.safetensors", header, body, length)
  with pytest.raises(
    FolderError, match=f"model.safetensors: .*{words}"
  ) as info:
    safetensors_folder.open_tensors(tmp_path)
  assert "\n" not in str(info.value) and len(str(info.value)) < 500


@pytest.mark.parametrize(
  ("raw", "words"),
  [
    (b"", "has 0 bytes"),
    (b"abc", "has 3 bytes"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
  ],
)
def test_no_safetensors_file(tmp_path, raw, words):
  (tmp_path / "model.safetensors").write_bytes(raw)
  with pytest.raises(FolderError, match=words):
    safetensors_folder.open_tensors(tmp_path)


def test_a_header_above_the_limit_is_not_read(tmp_path):
  path = tmp_path / "model.safetensors"
  path.write_bytes(struct.pack("<Q", 200_000_000))
  with path.open("r+b") as file:  # sparse: takes no room on the disk
    file.truncate(300_000_000)
  with pytest.raises(FolderError, match="a header of 200000000"):
    safetensors_folder.open_tensors(tmp_path)


@pytest.mark.parametrize(
  "file",
  [
    "../x.safetensors",
    "/x.safetensors",
    "sub/x.safetensors",
    "..\\x.safetensors",
    "C:x.safetensors",
    "x.bin",
    7,
    None,
  ],
)
def test_an_index_that_leads_elsewhere(tmp_path, file):
  folder = tmp_path / "folder"
  folder.mkdir()
  put(tmp_path / "x.safetensors", *layout({"a": A}))
  put_index(folder, {"a": file})
  with pytest.raises(FolderError, match="tensor 'a' in the file"):
    safetensors_folder.open_tensors(folder)


def test_an_index_that_does_not_fit(tmp_path):
  put(tmp_path / "1.safetensors", *layout({"a": A, "b": B}))
  put(tmp_path / "2.safetensors", *layout({"b": B}))
  one, two = "1.safetensors", "2.safetensors"
  for places, words in (
    ({"a": one, "b": "3.safetensors"}, "3.safetensors: is missing.*'b'"),
    ({"a": one, "c": one}, "1.safetensors: has no tensor 'c'"),
    ({"a": one}, "1.safetensors: tensor 'b' is in the file.*None"),
    ({"a": one, "b": two}, "1.safetensors: tensor 'b' is in.*'2.safetensors'"),
    ({}, "weight_map is {}"),
    ([one], "weight_map is"),
  ):
    put_index(tmp_path, places)
    with pytest.raises(FolderError, match=words):
      safetensors_folder.open_tensors(tmp_path)


def test_folders_without_safetensors(tmp_path):
  with pytest.raises(FolderError, match="nowhere: no such folder"):
    safetensors_folder.open_tensors(tmp_path / "nowhere")
  with pytest.raises(FolderError, match="has no model.safetensors"):
    safetensors_folder.open_tensors(tmp_path)
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
  with pytest.raises(FolderError, match="pytorch_model.bin: a pickle"):
    safetensors_folder.open_tensors(tmp_path)


@pytest.mark.parametrize(
  ("raw", "words"),
  [
    (b"{", "no JSON"),
    (b"\xff\xfe", "no JSON"),
    (b"[" * 10**5, "no JSON"),
    (b"[1]", r"holds \[1\], must be an object"),
  ],
)
def test_no_json(tmp_path, raw, words):
  path = tmp_path / "config.json"
  path.write_bytes(raw)
  with pytest.raises(FolderError, match=f"config.json: {words}"):
    safetensors_folder.read_json(path)
  with pytest.raises(FolderError, match="none.json: No such file"):
    safetensors_folder.read_json(tmp_path / "none.json")


def test_without_the_library(tmp_path, monkeypatch):
  put(tmp_path / "model.safetensors", *layout({"a": A}))
  monkeypatch.setitem(sys.modules, "safetensors", None)
  with pytest.raises(ImportError, match=r"giantsteps\[checkpoints\]"):
    safetensors_folder.open_tensors(tmp_path)
