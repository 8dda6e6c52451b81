"""Flow maps through the harness: splits, losses, schedules, a run to its
samples, what cannot be run."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from giantsteps.experiments.harness import (
  config,
  data,
  map_losses,
  plots,
  sampling,
  tasks,
  training,
)
from giantsteps.experiments.harness import mesh as mesh_lib
from giantsteps.experiments.harness import placement as placement_lib
from giantsteps.models import dit, mlp, plain_mlp

LOSSES = typing.get_args(typing.get_type_hints(config.FlowMap)["loss"])[1:]
POINTS = {"kind": "points", "shape": [2], "std": 0.5, "num_classes": 0}
BASE = config.load(
  "checkerboard", ["model.width=16", "model.depth=1", "batch_size=32"]
)
EYE = {"point": np.random.default_rng(0).normal(size=(32, 2)) / 2}


def run(*overrides, model=None):
  cfg = BASE if model is None else dataclasses.replace(BASE, model=model)
  cfg = config.override(cfg, overrides)
  config.validate(cfg)
  return cfg


def start(task):
  """Parameters and one batch, by one program."""
  keys = jax.random.key(0), jax.random.key(1)
  make = lambda a, b: (task.init(a), task.corrupt(EYE, b))
  return jax.jit(make)(*keys)


def test_split_takes_every_row_once_and_evenly():
  rows = {"x": np.arange(16), "y": np.arange(32).reshape(16, 2)}
  diagonal, jumps = map_losses.split(rows, 12)
  assert jumps["x"].tolist() == [3, 7, 11, 15]  # one of each four
  assert sorted([*diagonal["x"], *jumps["x"]]) == list(range(16))
  np.testing.assert_array_equal(jumps["y"][:, 0], 2 * jumps["x"])
  diagonal, jumps = map_losses.split(rows, 0)
  assert diagonal["x"].shape == (0,) and jumps["x"].tolist() == [*range(16)]


@pytest.mark.parametrize("weight", ["none", "adaptive", "learned"])
def test_loss_is_the_sum_of_both_parts_over_the_batch(weight):
  # v = 0 for an mlp at its start: the diagonal's loss is |x1 - x0|^2, the
  # jumps' is 0, whatever the times
  cfg = run(f"flow_map.weight={weight}", model=mlp.Config(8, 1, two_times=True))
  task = tasks.build(cfg, POINTS)
  params, arrays = start(task)
  diagonal, jumps = arrays["diagonal"], arrays["jumps"]
  assert (len(diagonal["x0"]), len(jumps["x0"])) == (24, 8)
  each = np.zeros(32)
  each[:24] = ((diagonal["x1"] - diagonal["x0"]) ** 2).sum(1)
  if weight == "adaptive":
    each = each / (each + 1e-2)
  if weight == "learned":
    row = np.asarray(params["log_weight"], np.float64)
    row = row / np.linalg.norm(row)
    angle = lambda t: np.outer(t, np.exp(-np.log(1e4) * np.arange(64) / 64))
    emb = lambda t: np.concatenate([np.cos(angle(t)), np.sin(angle(t))], 1)
    s, t = (
      np.concatenate([diagonal["t"], jumps[k]]).astype(float) for k in "st"
    )
    w = (emb(s) + emb(t)) @ row / np.sqrt(2)
    each = np.exp(-w) * each + w
  got = jax.jit(task.loss)(params, arrays)
  np.testing.assert_allclose(got, each.sum() / 32, rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(loss):
  task = tasks.build(run(f"flow_map.loss={loss}"), POINTS)
  params, arrays = start(task)
  tx = optax.adam(1e-2)

  @jax.jit
  def descend(params):
    def step(carry, _):
      params, state = carry
      value, grads = jax.value_and_grad(task.loss)(params, arrays)
      updates, state = tx.update(grads, state)
      return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, (params, tx.init(params)), length=15)[1]

  values = descend(params)
  assert np.isfinite(values).all() and values[-1] < 0.9 * values[0]


def test_micro_batches_change_nothing():
  cfg = run("flow_map.weight=learned", "flow_map.loss=progressive_uniform")
  task = tasks.build(cfg, POINTS)
  params, arrays = start(task)
  mesh = mesh_lib.make({})
  whole, parts = (
    jax.jit(
      placement_lib.make(
        dataclasses.replace(cfg, accumulate=n), task, mesh
      ).gradient
    )(params, arrays)
    for n in (1, 4)
  )
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, whole, parts)


def test_jumps_grow_from_the_diagonal():
  cfg = run("flow_map.anneal=0.5", "steps=100")
  task = tasks.build(cfg, POINTS)
  assert task.at_step and not tasks.build(run(), POINTS).at_step
  _, arrays = start(task)
  s, t = (np.asarray(arrays["jumps"][k]) for k in "st")
  assert np.all(s <= t) and np.max(t - s) > 0.5
  for step, bound in [(0, 0.02), (24, 0.5), (49, 1.0), (99, 1.0)]:
    got = task.at_step(arrays, jnp.int32(step))["jumps"]
    expected = np.maximum(s, t - np.float32(bound))
    np.testing.assert_allclose(got["s"], expected, atol=1e-6)


def test_learning_rate_holds_and_then_falls_with_the_root():
  rate = tasks.schedule(run("optim.hold=100"), 1e-3)
  got = [float(rate(k)) for k in (0, 100, 400, 10_000)]
  np.testing.assert_allclose(got, [1e-3, 1e-3, 5e-4, 1e-4], rtol=1e-6)


def test_radam_is_that_of_the_paper():
  # arXiv:1908.03265, algorithm 2, in float64; the eps is optax's place for it
  tx = tasks.optimizer(run("optim.b2=0.9"))
  params, state = {"w": jnp.zeros((2, 2))}, None
  state = tx.init(params)
  rng = np.random.default_rng(0)
  m = v = np.zeros((2, 2))
  b1, b2 = 0.9, 0.9
  long = 2 / (1 - b2) - 1
  for k in range(1, 13):
    g = rng.normal(size=(2, 2))
    updates, state = tx.update({"w": jnp.asarray(g, "float32")}, state, params)
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    rho = long - 2 * k * b2**k / (1 - b2**k)
    step = m / (1 - b1**k)
    if rho >= 5:
      r = (rho - 4) * (rho - 2) * long / ((long - 4) * (long - 2) * rho)
      step = np.sqrt(r) * step / (np.sqrt(v / (1 - b2**k)) + 1e-8)
    np.testing.assert_allclose(
      jax.tree.leaves(updates)[0], -1e-3 * step, rtol=2e-4
    )


def test_a_run_to_its_samples(tmp_path):
  cfg = config.load(
    "checkerboard",
    [
      *("model.width=32", "model.depth=2", "batch_size=128", "steps=40"),
      *("steps_per_dispatch=20", "log_every=1", "ema_decay=0.9"),
      *("optim.learning_rate=0.01", "flow_map.anneal=0.2"),
    ],
  )
  mesh = mesh_lib.make({})
  training.train(cfg, tmp_path, mesh)
  again, description = training.load_workdir(tmp_path)
  assert again == cfg
  task = tasks.build(again, description)
  state = training.restore(tmp_path, again, task, mesh)
  sigma_0 = tasks.base_std(again, description)
  assert sigma_0 == pytest.approx(3**-0.5, rel=1e-5)
  draw = sampling.map_sampler(task, sigma_0)
  x_T = jax.random.normal(jax.random.key(0), (64, 2))
  velocity = jax.jit(lambda s, t, x: task.apply(state.ema, s, t, x))
  full = lambda t: np.full(64, t, np.float32)
  for steps in (1, 4):
    got = draw(state.ema, x_T, sampling.uniform_jumps(steps))
    x, grid = sigma_0 * x_T, np.linspace(0, 1, steps + 1)
    for s, t in zip(grid, grid[1:], strict=False):
      x = x + (t - s) * velocity(full(s), full(t), x)
    np.testing.assert_allclose(got, x, atol=1e-5)
    assert np.isfinite(got).all() and 0.2 < np.std(got) < 1.0
  plots.scatter(np.asarray(got), tmp_path / "points.png")
  plots.scatter(np.asarray(got)[:, :1], tmp_path / "line.png")
  for name in ("points", "line"):
    assert (tmp_path / f"{name}.png").stat().st_size > 1000


def loss_on_eight_devices():
  cfg = run("flow_map.loss=lagrangian")
  task = tasks.build(cfg, POINTS)
  batch = {"point": jnp.asarray(EYE["point"], jnp.float32)[None]}
  out = []
  for sizes in ({"data": 1}, {"data": 8}):
    mesh = mesh_lib.make(sizes)
    tx = tasks.optimizer(cfg)
    make = lambda tx=tx: training.init_state(cfg, task, tx)
    state, rows = training.compile_update(cfg, task, tx, mesh)(
      jax.jit(make)(), batch, 1
    )
    norm = optax.tree.norm(jax.device_get(state.params))
    out.append([float(rows["loss"][0]), float(rows["grad_norm"][0]), norm])
  return [[float(x) for x in row] for row in out]


@pytest.mark.slow
def test_eight_devices_compute_what_one_does(on_devices):
  one, eight = on_devices(8, __file__, "loss_on_eight_devices()")
  np.testing.assert_allclose(one, eight, rtol=1e-5)


@pytest.mark.parametrize(
  ("overrides", "part"),
  [
    (["flow_map.loss=none", "flow_map.diagonal=0.5"], "flow_map.diagonal=0.5"),
    (["model.two_times=false"], "model.two_times=true"),
    (["flow_map.diagonal=1"], "flow_map.diagonal=1.0: must be in [0, 1)"),
    (["flow_map.diagonal=0"], "lagrangian sees data on the diagonal alone"),
    (["flow_map.diagonal=0.99"], "32 would be on the diagonal and 0 jump"),
    (["flow_map.anneal=2"], "flow_map.anneal=2.0"),
    (["flow_map.sigma_0=-1"], "flow_map.sigma_0=-1.0"),
    (["task=views"], "flow_map.loss='lagrangian': wants task='flow'"),
    (["optim.hold=0"], "optim.hold=0"),
  ],
)
def test_maps_that_cannot_be_are_refused(overrides, part):
  with pytest.raises(config.InputError) as caught:
    run(*overrides)
  assert part in str(caught.value)


def test_shares_of_the_batch_divide():
  cfg = run("accumulate=16")
  task = tasks.build(cfg, POINTS)
  with pytest.raises(config.InputError, match="share=24 is not a multiple"):
    placement_lib.make(cfg, task, mesh_lib.make({}))


def test_points_go_with_networks_without_a_grid():
  cfg = run(model=dit.Config(two_times=True))
  with pytest.raises(config.InputError, match="holds points rows"):
    tasks.build(cfg, POINTS)
  assert data.load(config.load("mixture_line").data).description["shape"] == [1]
  assert isinstance(config.load("mixture_plane").model, plain_mlp.Config)
