"""One config on one device and on eight, placed in every way: same losses."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from giantsteps.experiments.harness import config, tasks, training
from giantsteps.experiments.harness import mesh as mesh_lib
from giantsteps.experiments.harness import placement as placement_lib
from giantsteps.models import transformer

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import conftest
sys.path.insert(0, {root!r} + "/tests/experiments")
import test_placements
test_placements.on_eight_devices()
"""
STEPS = 3
MESHES = {  # name -> mesh, optim.shards, accumulate
  "one": ({}, 0, 1),
  "data": ({"data": 8}, 0, 1),
  "zero": ({"data": 8}, 8, 2),
  "fsdp": ({"data": 2, "fsdp": 4}, 0, 1),
  "tensor": ({"data": 4, "model": 2}, 0, 1),
  "all": ({"data": 2, "fsdp": 2, "model": 2}, 0, 2),
}


def make_config(shards: int = 0, accumulate: int = 1) -> config.Config:
  return config.Config(
    task="masked",
    model=transformer.Config(
      vocab_size=264,
      width=64,
      depth=2,
      num_heads=4,
      num_kv_heads=4,
      head_dim=16,
      mlp_width=128,
      causal=False,
      remat="full",
      tie_embeddings=True,
    ),
    data=config.Data(source="stdlib", seq_len=16),
    optim=config.Optim(shards=shards),
    batch_size=16,
    accumulate=accumulate,
  )


def losses(sizes: dict, shards: int, accumulate: int) -> list[float]:
  cfg, mesh = make_config(shards, accumulate), mesh_lib.make(sizes)
  task, tx = (
    tasks.build(cfg, {"kind": "tokens"}),
    tasks.optimizer(make_config(shards, accumulate)),
  )
  placement = placement_lib.make(cfg, task, mesh)
  shapes = training.state_shapes(cfg, task, tx, placement)
  state = jax.jit(
    lambda: training.init_state(cfg, task, tx, placement.pack),
    out_shardings=jax.tree.map(lambda x: x.sharding, shapes),
  )()
  tokens = np.random.default_rng(0).integers(0, 256, (STEPS, 16, 16))
  batches = jax.device_put(
    {"tokens": tokens.astype(np.int32)}, mesh_lib.batch_sharding(mesh, axis=1)
  )
  update = training.compile_update(cfg, task, tx, mesh)
  _, rows = update(state, batches, STEPS)
  return [float(loss) for loss in rows["loss"]]


def on_eight_devices():
  """In the child process: the losses of every mesh, as JSON."""
  print(json.dumps({name: losses(*how) for name, how in MESHES.items()}))


@pytest.fixture(scope="module")
def found():
  flags = "--xla_force_host_platform_device_count=8"
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT.format(root=str(ROOT))],
    capture_output=True,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one"])
def test_the_losses_of_one_device(found, mesh):
  # sums of 64 numbers in another order: 64 * 2^-24 = 4e-6 at worst
  np.testing.assert_allclose(found[mesh], found["one"], rtol=2e-6)
  assert len(set(found["one"])) == STEPS  # the parameters did move


def build(cfg):
  return tasks.build(cfg, {"kind": "tokens"})


def test_a_batch_that_does_not_divide_is_refused():
  cfg = make_config(accumulate=3)
  with pytest.raises(config.InputError, match="batch_size=16.*accumulate=3"):
    placement_lib.make(cfg, build(cfg), mesh_lib.make({}))


def test_an_optimizer_of_whole_matrices_is_not_shared():
  cfg = make_config(shards=1)
  cfg = dataclasses.replace(cfg, optim=config.Optim(name="muon", shards=1))
  with pytest.raises(config.InputError, match="muon"):
    placement_lib.make(cfg, build(cfg), mesh_lib.make({}))


def test_shards_must_fit_the_mesh():
  cfg = make_config(shards=3)
  mesh: Any = jax.sharding.AbstractMesh((2, 1, 1), ("data", "fsdp", "model"))
  with pytest.raises(config.InputError, match="optim.shards=3"):
    placement_lib.make(cfg, build(cfg), mesh)
