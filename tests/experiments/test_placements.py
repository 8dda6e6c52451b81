"""One config on one device and on eight, placed in every way: same losses."""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np
import pytest

from giantsteps.experiments.harness import config, tasks, training
from giantsteps.experiments.harness import mesh as mesh_lib
from giantsteps.experiments.harness import placement as placement_lib
from giantsteps.models import dit, lact, transformer, unet, uvit

STEPS = 3
FSDP, TENSOR = {"data": 2, "fsdp": 4}, {"data": 4, "model": 2}
ALL = {"data": 2, "fsdp": 2, "model": 2}
RUNS = {  # name -> model, mesh, optim.shards, accumulate (, optim.name)
  "transformer one": ("transformer", {}, 0, 1),
  "transformer zero": ("transformer", {"data": 8}, 8, 2),
  "transformer fsdp": ("transformer", FSDP, 0, 1),
  "transformer tensor": ("transformer", TENSOR, 0, 1),
  "experts one": ("experts", {}, 0, 1),
  "experts all": ("experts", ALL, 0, 1),
  "lars one": ("transformer", {}, 0, 1, "lars"),
  "lars zero": ("transformer", {"data": 8}, 8, 1, "lars"),
}
SLOW_RUNS = {
  "transformer one": ("transformer", {}, 0, 1),
  "transformer data": ("transformer", {"data": 8}, 0, 1),
  "transformer all": ("transformer", ALL, 0, 2),
  "lact one": ("lact", {}, 0, 1),
  "lact zero": ("lact", {"data": 8}, 8, 1),
  "lact all": ("lact", ALL, 0, 1),
  "dit one": ("dit", {}, 0, 1),
  "dit zero": ("dit", {"data": 8}, 8, 1),
  "dit all": ("dit", ALL, 0, 1),
  "uvit one": ("uvit", {}, 0, 1),
  "uvit zero": ("uvit", {"data": 8}, 8, 1),
  "uvit all": ("uvit", ALL, 0, 1),
  "unet one": ("unet", {}, 0, 1),
  "unet data": ("unet", {"data": 8}, 0, 1),
  "unet fsdp": ("unet", FSDP, 0, 2),
  "experts one": ("experts", {}, 0, 1),
  "experts data": ("experts", {"data": 8}, 0, 1),
  "experts zero": ("experts", {"data": 8}, 8, 1),
}
DIGITS = {"kind": "image", "shape": [8, 8, 1], "std": 0.75, "num_classes": 10}
MODELS = {
  "transformer": transformer.Config(
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
  "lact": lact.Config(
    vocab_size=264,
    width=64,
    depth=2,
    num_heads=2,
    fast_heads=2,
    mlp_width=128,
    chunk_size=8,
    causal=False,
    muon=False,
  ),
  "dit": dit.Config(patch=2, width=64, depth=2, heads=2, num_classes=10),
  "uvit": uvit.Config(patch=2, width=64, depth=3, heads=2, num_classes=10),
  "unet": unet.Config(
    channels=16,
    multipliers=(1,),
    blocks=2,
    attention=(8,),
    head_dim=16,
    num_classes=10,
  ),
}
IMAGES = ("dit", "uvit", "unet")

MODELS["experts"] = dataclasses.replace(MODELS["transformer"], num_experts=4)


def make_config(
  model: str = "transformer",
  shards: int = 0,
  accumulate: int = 1,
  optimizer: Literal["lamb", "lars"] = "lamb",
) -> config.Config:
  return config.Config(
    task="flow" if model in IMAGES else "masked",
    model=MODELS[model],
    data=config.Data(source="stdlib", seq_len=16),
    optim=config.Optim(optimizer, trust_coefficient=0.1, shards=shards),
    batch_size=16,
    accumulate=accumulate,
  )


def losses(model, sizes, shards, accumulate, *optimizer) -> list[float]:
  cfg = make_config(model, shards, accumulate, *optimizer)
  mesh, tx = mesh_lib.make(sizes), tasks.optimizer(cfg)
  task = build(cfg)
  placement = placement_lib.make(cfg, task, mesh)
  shapes = training.state_shapes(cfg, task, tx, placement)
  state = jax.jit(
    lambda: training.init_state(cfg, task, tx, placement.pack),
    out_shardings=jax.tree.map(lambda x: x.sharding, shapes),
  )()
  rng = np.random.default_rng(0)
  lead = (STEPS, cfg.batch_size)
  if model in IMAGES:
    rows = {
      "image": rng.normal(size=(*lead, 8, 8, 1)).astype(np.float32),
      "label": rng.integers(0, 10, lead).astype(np.int32),
    }
  else:
    rows = {"tokens": rng.integers(0, 256, (*lead, 16)).astype(np.int32)}
  batches = jax.device_put(rows, mesh_lib.batch_sharding(mesh, axis=1))
  update = training.compile_update(cfg, task, tx, mesh)
  _, rows = update(state, batches, STEPS)
  return [float(loss) for loss in rows["loss"]]


def build(cfg):
  return tasks.build(cfg, DIGITS if cfg.task == "flow" else {"kind": "tokens"})


def all_losses(runs):
  return {name: losses(*how) for name, how in runs.items()}


def check(found: dict[str, list[float]]) -> None:
  for run, values in found.items():
    one = found[run.partition(" ")[0] + " one"]
    # sums of 64 numbers in another order: 64 * 2^-24 = 4e-6 at worst
    np.testing.assert_allclose(values, one, rtol=4e-6, err_msg=run)
    assert len(set(one)) == STEPS  # the parameters did move


def test_eight_devices_have_the_losses_of_one(on_devices):
  check(on_devices(8, __file__, "all_losses(test.RUNS)"))


@pytest.mark.slow
def test_every_stack_has_the_losses_of_one_device(on_devices):
  check(on_devices(8, __file__, "all_losses(test.SLOW_RUNS)"))


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
