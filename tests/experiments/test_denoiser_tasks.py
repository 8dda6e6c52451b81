"""The networks of the flow task: configs, projection after every step, what
cannot be run."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
import pytest

from giantsteps.experiments.harness import config, tasks
from giantsteps.experiments.harness import mesh as mesh_lib
from giantsteps.experiments.harness import placement as placement_lib
from giantsteps.models import plain_mlp, unet, uvit

DIGITS = {"kind": "image", "shape": [8, 8, 1], "std": 0.75, "num_classes": 10}
MODELS: dict[str, Any] = {
  "plain_mlp": plain_mlp.Config(width=8, num_classes=10),
  "uvit": uvit.Config(width=8, heads=2, num_classes=10),
  "unet": unet.Config(channels=8, num_classes=10, head_dim=16),
}


def run(model: str) -> config.Config:
  return config.Config(task="flow", model=MODELS[model])


@pytest.mark.parametrize("model", MODELS)
def test_networks_fit_the_task(model):
  cfg = run(model)
  config.validate(cfg)
  assert config.from_json(config.to_json(cfg)) == cfg
  task = tasks.build(cfg, DIGITS)
  params = jax.eval_shape(task.init, jax.random.key(0))
  batch = {
    "image": np.zeros((4, 8, 8, 1), "float32"),
    "label": np.zeros(4, int),
  }
  loss = lambda p, k: task.loss(p, task.corrupt(batch, k))
  out = jax.eval_shape(loss, params, jax.random.key(1))
  assert (out.shape, out.dtype) == ((), np.float32)


def test_levels_are_set_from_the_command_line():
  cfg = config.override(
    run("unet"), ["model.multipliers=1,2,2", "model.attention=4,2"]
  )
  assert cfg.model.multipliers == (1, 2, 2)
  assert cfg.model.attention == (4, 2)
  with pytest.raises(config.InputError, match="head_dim=5"):
    config.override(cfg, ["model.head_dim=5"])


def test_steps_of_a_unet_end_on_the_sphere():
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  params = {"layers": {"weight": normal(2, 4, 6)}, "gain": normal(3)}
  params = unet.project(params)
  grads = jax.tree.map(lambda x: normal(*x.shape), params)
  optim = config.Optim("adamw", learning_rate=0.1, weight_decay=0.0)
  moved = {}
  for model in ("unet", "uvit"):
    tx = tasks.optimizer(dataclasses.replace(run(model), optim=optim))
    updates, _ = tx.update(grads, tx.init(params), params)
    moved[model] = optax.apply_updates(params, updates)
  size = np.sqrt(np.mean(moved["unet"]["layers"]["weight"] ** 2, 1))
  np.testing.assert_allclose(size, 1, rtol=1e-6)
  # in the direction that the plain step leads to
  free = moved["uvit"]["layers"]["weight"]
  free = free / np.sqrt(np.mean(free**2, 1, keepdims=True))
  np.testing.assert_allclose(
    moved["unet"]["layers"]["weight"], free, rtol=1e-5, atol=1e-6
  )
  np.testing.assert_array_equal(moved["unet"]["gain"], moved["uvit"]["gain"])


def test_dropout_is_for_training_alone():
  model = unet.Config(
    channels=4, multipliers=(1,), head_dim=4, attention=(), dropout=0.5
  )
  task = tasks.build(config.Config(task="flow", model=model), DIGITS)
  rng = np.random.default_rng(0)
  normal = lambda a: rng.normal(size=a.shape).astype(a.dtype)
  params = jax.tree.map(normal, jax.eval_shape(task.init, jax.random.key(0)))
  batch = {"image": normal(np.zeros((4, 8, 8, 1), "float32"))}
  arrays = task.corrupt(batch, jax.random.key(1))
  assert arrays["dropout"].shape == (4, 2)
  other = arrays | {"dropout": arrays["dropout"][::-1]}
  without = {k: v for k, v in arrays.items() if k != "dropout"}
  loss = jax.jit(task.loss)
  first, second, still = (loss(params, a) for a in (arrays, other, without))
  assert abs(first - second) > 1e-4 and abs(first - still) > 1e-4
  held_out = jax.jit(task.evaluate)(params, batch, jax.random.key(1))
  np.testing.assert_allclose(held_out["held_out_loss"], still, rtol=1e-5)


def test_a_unet_is_not_shared():
  optim = config.Optim(shards=1)
  cfg = dataclasses.replace(run("unet"), optim=optim)
  with pytest.raises(config.InputError, match="optim.shards=1 with a unet"):
    task = tasks.build(cfg, DIGITS)
    placement_lib.make(cfg, task, mesh_lib.make({}))
