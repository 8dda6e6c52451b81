"""Checkpoints: bit for bit there and back, and no damage goes unnoticed."""

import os
import pathlib
import random
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from giantsteps.experiments.harness import checkpointing, config

ROOT = pathlib.Path(__file__).parents[2]


class State(NamedTuple):
  step: Any
  params: Any
  opt_state: Any


def state(seed: int) -> State:
  """Leaves of many dtypes, from random bits: NaNs, -0 and denormals too."""
  rng = np.random.default_rng(seed)

  def bits(shape, dtype):
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return rng.bytes(count), shape, dtype

  leaves = State(
    step=bits((), np.int32),
    params={
      "layers": {
        "w": bits((3, 16, 8), np.float32),
        "b": bits((3, 8), ml_dtypes.bfloat16),
      },
      "head": bits((8, 5), np.float16),
    },
    opt_state=(
      None,
      [bits((7,), np.uint32), bits((16,), np.int8)],
      {"empty": bits((0, 3), np.float32), "one": bits((1,), np.uint8)},
    ),
  )
  is_spec = lambda x: isinstance(x, tuple) and isinstance(x[0], bytes)
  make = lambda x: jnp.asarray(np.frombuffer(x[0], x[2]).reshape(x[1]))
  return jax.tree.map(make, leaves, is_leaf=is_spec)


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


TEMPLATE = abstract(state(0))


def assert_same_bits(a, b) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def write(directory, steps, **options) -> None:
  checkpoints = checkpointing.Checkpoints(directory, **options)
  for step in steps:
    checkpoints.save(step, state(step), {"note": f"of {step}"})
  checkpoints.close()


def read(directory, template: Any = TEMPLATE) -> tuple[int, Any, dict]:
  found = checkpointing.Checkpoints(directory).restore(template)
  assert found is not None
  return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  """A folder with the steps 10 and 20; tests copy it."""
  directory = tmp_path_factory.mktemp("checkpoints") / "run"
  write(directory, [10, 20])
  return directory


@pytest.fixture
def copy(two, tmp_path):
  return shutil.copytree(two, tmp_path / "copy")


def files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in folder.rglob("*") if p.is_file())


def assert_falls_back(directory, caplog, word="c") -> None:
  """Step 20 is refused with a message, step 10 restored exactly."""
  caplog.clear()
  step, restored, metadata = read(directory)
  assert step == 10
  assert_same_bits(restored, state(10))
  assert metadata == {"note": "of 10"}
  (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
  message = record.getMessage()
  assert "corrupt" in message and str(directory / "20") in message
  assert word in message and "\n" not in message


def test_round_trip_is_bit_exact(two):
  step, restored, metadata = read(two)
  assert step == 20
  assert_same_bits(restored, state(20))
  assert metadata == {"note": "of 20"}


def test_orbax_alone_can_read_it(two):
  tree = ocp.PyTreeCheckpointer().restore(two / "20")
  expected = state(20).params["layers"]["b"]
  got = np.asarray(tree["params"]["layers"]["b"])
  assert got.tobytes() == np.asarray(expected).tobytes()
  assert set(tree) == {"step", "params", "opt_state"}


def test_nothing_is_there_before_the_first_save(tmp_path):
  checkpoints = checkpointing.Checkpoints(tmp_path / "run")
  assert checkpoints.restore(TEMPLATE) is None
  assert checkpoints.steps() == []
  checkpoints.close()
  assert not (tmp_path / "run").exists()


def test_arrays_may_be_donated_right_after_save(tmp_path):
  advance = jax.jit(
    lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0
  )
  # as large as buffers that the CPU backend hands out without copying
  tree = {"w": jnp.zeros((512, 512)), "step": jnp.int32(0)}
  checkpoints = checkpointing.Checkpoints(tmp_path, keep=4)
  for step in range(4):
    checkpoints.save(step, tree, {})
    tree = advance(tree)
  checkpoints.close()
  for step in range(4):
    shutil.copytree(tmp_path / str(step), tmp_path / f"only{step}" / str(step))
    _, restored, _ = read(tmp_path / f"only{step}", abstract(tree))
    np.testing.assert_array_equal(restored["w"], np.full((512, 512), step))


def test_a_restored_state_may_be_donated(two):
  _, restored, _ = read(two)
  jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(
    restored
  )
  assert_same_bits(read(two)[1], state(20))


@pytest.mark.parametrize(
  ("keep", "keep_every", "left"),
  [
    (1, 0, [7]),
    (3, 0, [5, 6, 7]),
    (2, 3, [0, 3, 6, 7]),
    (1, 2, [0, 2, 4, 6, 7]),
    (9, 0, list(range(8))),
  ],
)
def test_newest_and_every_nth_stay(tmp_path, keep, keep_every, left):
  checkpoints = checkpointing.Checkpoints(tmp_path, keep, keep_every)
  for step in range(8):
    checkpoints.save(step, {"x": jnp.int32(step)}, {})
  checkpoints.wait()
  assert checkpoints.steps() == left
  checkpoints.close()
  assert sorted(p.name for p in tmp_path.iterdir()) == [str(s) for s in left]


def test_a_step_that_is_safe_is_not_written_again(copy):
  checkpoints = checkpointing.Checkpoints(copy)
  checkpoints.restore(TEMPLATE)
  before = (copy / "20" / checkpointing.MANIFEST).stat()
  checkpoints.save(20, state(20), {})
  checkpoints.close()
  assert (copy / "20" / checkpointing.MANIFEST).stat() == before


def test_one_flipped_bit_in_each_of_50_copies_is_noticed(two, tmp_path, caplog):
  rng = random.Random(0)
  sizes = {f: f.stat().st_size for f in files(two / "20")}
  hit = set()
  for i in range(50):
    directory = shutil.copytree(two, tmp_path / str(i))
    (file,) = rng.choices(list(sizes), list(sizes.values()))  # uniform by byte
    path = directory / file.relative_to(two)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    hit.add(path.name)
    assert_falls_back(directory, caplog, "checksum")
  assert checkpointing.MANIFEST in hit and len(hit) > 3


def test_one_flipped_bit_in_every_file_is_refused(two, tmp_path):
  for i, file in enumerate(files(two / "20")):
    directory = tmp_path / str(i)
    shutil.copytree(two / "20", directory / "20")
    path = directory / file.relative_to(two)
    content = bytearray(path.read_bytes())
    if not content:
      continue
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    with pytest.raises(checkpointing.CorruptCheckpoint, match="checksum") as e:
      read(directory)
    assert str(directory) in str(e.value) and "\n" not in str(e.value)


def test_no_byte_of_the_manifest_is_free(copy):
  # its own digest, white space and letter case included; every 7th byte
  path = copy / "20" / checkpointing.MANIFEST
  content = path.read_bytes()
  for at in range(0, len(content), 7):
    damaged = bytearray(content)
    damaged[at] ^= 1 << at % 8
    path.write_bytes(damaged)
    with pytest.raises(checkpointing.CorruptCheckpoint):
      checkpointing._verify_files(copy / "20", 20)


def test_files_that_are_cut_gone_or_new_are_noticed(two, tmp_path, caplog):
  def cut(file):
    file.write_bytes(file.read_bytes()[:-1])

  def grow(file):
    file.write_bytes(file.read_bytes() + b"\0")

  def empty(file):
    file.write_bytes(b"")

  def gone(file):
    file.unlink()

  def new(file):
    file.with_name(file.name + "x").write_bytes(b"")

  for i, damage in enumerate((cut, grow, empty, gone, new)):
    for j, file in enumerate(files(two / "20")):
      directory = shutil.copytree(two, tmp_path / f"{i}_{j}")
      damage(directory / file.relative_to(two))
      assert_falls_back(directory, caplog)


def test_a_whole_folder_that_is_wrong_is_noticed(copy, caplog):
  shutil.rmtree(copy / "20")
  shutil.copytree(copy / "10", copy / "20")  # intact, but of another step
  assert_falls_back(copy, caplog, "checksum")
  shutil.rmtree(copy / "20")
  (copy / "20").mkdir()  # killed by hand between two commands, say
  assert_falls_back(copy, caplog, checkpointing.MANIFEST)


def test_a_leaf_that_orbax_returns_otherwise_is_noticed(
  copy, caplog, monkeypatch
):
  # files agree, the reader does not: the second line of defence
  whole = ocp.Checkpointer.restore

  def one_bit_less(self, folder, **settings):
    tree = whole(self, folder, **settings)
    if folder.name == "20":
      tree["params"]["layers"]["w"].view(np.uint32)[0, 0, 0] ^= 1
    return tree

  monkeypatch.setattr(ocp.Checkpointer, "restore", one_bit_less)
  assert_falls_back(copy, caplog, "checksum of leaf params/layers/w")


def test_if_all_are_damaged_it_does_not_start_from_scratch(copy):
  for step in (10, 20):
    (copy / str(step) / checkpointing.MANIFEST).unlink()
  with pytest.raises(checkpointing.CorruptCheckpoint, match="no intact") as e:
    read(copy)
  assert isinstance(e.value, config.InputError)


def test_a_run_goes_on_past_a_damaged_step(copy, caplog):
  (copy / "20" / "_METADATA").write_text("{}")
  checkpoints = checkpointing.Checkpoints(copy, keep=1)
  checkpoints.restore(TEMPLATE)
  checkpoints.save(15, state(15), {"note": "of 15"})
  checkpoints.wait()
  assert checkpoints.steps() == [15, 20]  # 20 does not count as the newest
  assert_same_bits(read(copy)[1], state(15))
  checkpoints.save(20, state(20), {"note": "of 20"})
  checkpoints.close()
  assert checkpoints.steps() == [20]
  assert_same_bits(read(copy)[1], state(20))


def test_what_a_killed_save_left_is_ignored_and_cleared(copy):
  left = copy / ".partial" / "30.orbax-checkpoint-tmp"
  left.mkdir(parents=True)
  (copy / ".partial" / "30").mkdir()  # committed by Orbax, no manifest yet
  assert read(copy)[0] == 20
  assert left.exists()  # a reader writes nothing
  checkpoints = checkpointing.Checkpoints(copy)
  checkpoints.save(30, state(30), {})
  checkpoints.close()
  assert not (copy / ".partial").exists()
  assert read(copy)[0] == 30


def test_a_step_that_vanishes_while_it_is_read_is_no_damage(copy, monkeypatch):
  verify = checkpointing._verify_files

  def pruned_meanwhile(folder, step):
    if step == 10:  # the writer has gone on
      write(copy, [30], keep=1)
      shutil.rmtree(folder, ignore_errors=True)
    return verify(folder, step)

  shutil.rmtree(copy / "20")
  monkeypatch.setattr(checkpointing, "_verify_files", pruned_meanwhile)
  assert read(copy)[0] == 30


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda s: s._replace(step=jnp.float32(0)), "step is int32.*float32"),
    (lambda s: s._replace(params={}), "params/head is .*absent"),
    (
      lambda s: s._replace(opt_state=[jnp.zeros((2, 2))]),
      "opt_state/0 is absent.*\\[2, 2\\]",
    ),
  ],
)
def test_a_checkpoint_of_another_model_is_no_damage(two, change, message):
  with pytest.raises(config.InputError, match=message) as caught:
    read(two, abstract(change(state(0))))
  assert not isinstance(caught.value, checkpointing.CorruptCheckpoint)
  assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
  (tmp_path / "file").write_text("x")
  checkpoints = checkpointing.Checkpoints(tmp_path / "file" / "below")
  with pytest.raises(config.InputError, match="cannot be written.*file/below"):
    checkpoints.save(1, {"x": jnp.ones(3)}, {})
  checkpoints.close()
  checkpoints = checkpointing.Checkpoints(tmp_path / "file")
  with pytest.raises(config.InputError, match="file cannot be read"):
    checkpoints.restore({"x": jnp.ones(3)})


def test_an_error_behind_is_raised_by_the_next_call(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")

  checkpoints = checkpointing.Checkpoints(tmp_path)
  monkeypatch.setattr(checkpointing, "_encode", full)
  checkpoints.save(1, {"x": jnp.ones(3)}, {})
  with pytest.raises(config.InputError, match="No space left"):
    checkpoints.wait()
  assert checkpoints.steps() == []
  checkpoints.close()


SHARDED = """
import sys
sys.path.insert(0, sys.argv[1]); import conftest
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from giantsteps.experiments.harness import checkpointing

assert jax.device_count() == 8
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
spec = {"w": P("data", "model"), "b": P(), "h": P(None, "model")}
one = checkpointing.Checkpoints(sys.argv[2])
template = {
  "w": jax.ShapeDtypeStruct((8, 6), jnp.float32),
  "b": jax.ShapeDtypeStruct((5,), jnp.uint32),
  "h": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16),
}
template = {
  k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec[k]))
  for k, x in template.items()
}
step, tree, _ = one.restore(template)
for k, x in tree.items():
  assert x.sharding == template[k].sharding, (k, x.sharding)
assert tree["w"].addressable_shards[0].data.shape == (2, 3)
eight = checkpointing.Checkpoints(sys.argv[3])
advance = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
eight.save(step, tree, {})
advance(tree)
eight.close()
"""


def test_from_one_device_to_eight_and_back(tmp_path):
  tree = {
    "w": jax.random.normal(jax.random.key(0), (8, 6)),
    "b": jax.random.bits(jax.random.key(1), (5,)),
    "h": jax.random.normal(jax.random.key(2), (3, 4), jnp.bfloat16),
  }
  one, eight = tmp_path / "one", tmp_path / "eight"
  checkpoints = checkpointing.Checkpoints(one)
  checkpoints.save(3, tree, {})
  checkpoints.close()
  flag = "--xla_force_host_platform_device_count=8"
  done = subprocess.run(
    [sys.executable, "-c", SHARDED, str(ROOT), str(one), str(eight)],
    env=os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  step, restored, _ = read(eight, abstract(tree))
  assert step == 3
  assert_same_bits(restored, tree)
