"""The training step against hand-computed sequences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from giantsteps.experiments.harness import config, tasks, training
from giantsteps.experiments.harness import mesh as mesh_lib
from giantsteps.models import mlp

BASE = config.Config(
  task="flow",
  model=mlp.Config(),
  optim=config.Optim(clip_norm=0.0),
  batch_size=4,
  ema_decay=0.0,
)


def linear_task():
  """loss = mean(<g, w>): the gradient is the mean of the rows of g."""
  loss = lambda params, arrays: jnp.mean(arrays["g"] @ params["w"])
  return tasks.Task(
    init=lambda key: {"w": jnp.arange(3.0)},
    corrupt=lambda batch, key: batch,
    loss=loss,
    evaluate=lambda params, batch, key: {},
    apply=lambda params: params,
  )


def init(cfg, task, tx):
  return jax.jit(lambda: training.init_state(cfg, task, tx))()


def run(cfg, g, task=None, tx=None, n=None):
  """Runs g [K, B, 3] in one dispatch."""
  task, tx = task or linear_task(), tx or optax.sgd(1.0)
  update = training.compile_update(cfg, task, tx, mesh_lib.make({}))
  state = init(cfg, task, tx)
  return update(state, {"g": jnp.asarray(g, jnp.float32)}, n or len(g))


class StepTest(parameterized.TestCase):
  def test_sgd_on_a_linear_loss_subtracts_the_gradients(self):
    g = np.random.default_rng(0).normal(size=(5, 4, 3))
    state, rows = run(BASE, g)
    expected = np.arange(3.0) - g.mean(1).sum(0)
    # five float32 additions of numbers below 3: 5 * 3 * 2^-24 = 9e-7
    np.testing.assert_allclose(state.params["w"], expected, atol=2e-6)
    np.testing.assert_array_equal(state.step, 5)
    norms = np.linalg.norm(g.mean(1), axis=-1)
    np.testing.assert_allclose(rows["grad_norm"], norms, rtol=1e-6)

  def test_only_the_first_n_steps_of_a_dispatch_run(self):
    g = np.random.default_rng(1).normal(size=(5, 4, 3))
    state, rows = run(BASE, g, n=2)
    expected = np.arange(3.0) - g[:2].mean(1).sum(0)
    np.testing.assert_allclose(state.params["w"], expected, atol=2e-6)
    np.testing.assert_array_equal(rows["loss"][2:], 0)

  def test_clipping_by_the_global_norm(self):
    cfg = dataclasses.replace(
      BASE, optim=dataclasses.replace(BASE.optim, clip_norm=0.5)
    )
    g = np.tile([3.0, 4.0, 0.0], (1, 4, 1))  # norm 5
    state, _ = run(cfg, g)
    expected = np.arange(3.0) - 0.5 * np.array([0.6, 0.8, 0.0])
    np.testing.assert_allclose(state.params["w"], expected, rtol=1e-6)
    state, _ = run(cfg, g / 100)  # norm .05 is left alone
    np.testing.assert_allclose(
      state.params["w"], np.arange(3.0) - [0.03, 0.04, 0.0], rtol=1e-6
    )

  def test_moving_average_with_rising_decay(self):
    cfg = dataclasses.replace(BASE, ema_decay=0.3)
    g = np.random.default_rng(2).normal(size=(6, 4, 3))
    state, _ = run(cfg, g)
    w = average = np.arange(3.0)
    for t in range(6):
      w = w - g[t].mean(0)
      d = min(0.3, (1 + t) / (10 + t))
      average = d * average + (1 - d) * w
    np.testing.assert_allclose(state.ema["w"], average, atol=3e-6)

  def test_non_finite_updates_change_nothing_but_the_counters(self):
    g = np.random.default_rng(3).normal(size=(4, 4, 3))
    g[1, 2, 0], g[2, 0, 1] = np.nan, np.inf
    state, rows = run(BASE, g, tx=optax.adam(0.1))
    twin, _ = run(BASE, g[[0, 3]], tx=optax.adam(0.1))
    np.testing.assert_array_equal(state.params["w"], twin.params["w"])
    for a, b in zip(
      jax.tree.leaves(state.opt_state),
      jax.tree.leaves(twin.opt_state),
      strict=True,
    ):
      np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(rows["skipped"], [0, 1, 2, 0])
    np.testing.assert_array_equal(state.step, 4)

  def test_finite_gradients_whose_update_overflows_are_skipped(self):
    huge = optax.scale(3e38)
    state, rows = run(BASE, np.full((1, 4, 3), 100.0), tx=huge)
    np.testing.assert_array_equal(state.params["w"], np.arange(3.0))
    np.testing.assert_array_equal(rows["skipped"], [1])

  @parameterized.parameters(2, 4)
  def test_accumulation_equals_one_batch(self, parts):
    # the real denoiser: noise is drawn for the whole batch before the split
    description = {"kind": "image", "shape": [4, 4, 1], "std": 0.7}
    cfg = dataclasses.replace(
      BASE, model=mlp.Config(width=16, depth=1), batch_size=8
    )
    task = tasks.build(cfg, description)
    images = jax.random.normal(jax.random.key(0), (2, 8, 4, 4, 1))
    states = []
    for accumulate in (1, parts):
      cfg = dataclasses.replace(cfg, accumulate=accumulate)
      tx = optax.sgd(0.1)
      update = training.compile_update(cfg, task, tx, mesh_lib.make({}))
      state = init(cfg, task, tx)
      states.append(update(state, {"image": images}, 2)[0])
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
      # two orders of one float32 sum of 8 rows: a few ulp
      np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)

  def test_one_dispatch_of_four_steps_is_two_of_two_to_the_bit(self):
    g = np.random.default_rng(4).normal(size=(4, 4, 3)).astype(np.float32)
    tx, task = optax.adam(0.1), linear_task()
    update = training.compile_update(BASE, task, tx, mesh_lib.make({}))
    state = init(BASE, task, tx)
    once, _ = update(state, {"g": g}, 4)
    state = init(BASE, task, tx)
    state, _ = update(state, {"g": g}, 2)
    twice, _ = update(state, {"g": np.roll(g, -2, 0)}, 2)
    for a, b in zip(*map(jax.tree.leaves, (once, twice)), strict=True):
      np.testing.assert_array_equal(a, b)


def test_a_run_that_only_skips_stops_with_finite_parameters(tmp_path):
  cfg = dataclasses.replace(
    BASE,
    model=mlp.Config(width=8, depth=1),
    optim=config.Optim(name="adamw", learning_rate=2e9, warmup=0),
    steps=40,
    batch_size=16,
    steps_per_dispatch=4,
    max_skipped=5,
    checkpoint_every=4,
  )
  with pytest.raises(training.Diverged, match="learning_rate"):
    training.train(cfg, tmp_path, mesh_lib.make({}))
  task = tasks.build(cfg, training.load_workdir(tmp_path)[1])
  state = training.restore(tmp_path, cfg, task, mesh_lib.make({}))
  for leaf in jax.tree.leaves(state.params):
    assert np.isfinite(leaf).all()


def two_steps(name, x, g):
  """x and its two steps with weight decay .1, rate .5, momentum .8."""
  cfg = dataclasses.replace(
    BASE,
    optim=config.Optim(
      name,
      learning_rate=0.5,
      schedule="constant",
      b1=0.8,
      weight_decay=0.1,
      trust_coefficient=0.01,
    ),
  )
  tx = tasks.optimizer(cfg)
  state, found = tx.init(x), [x]
  for _ in range(2):
    updates, state = tx.update(g, state, found[-1])
    found.append(optax.apply_updates(found[-1], updates))
  return [jax.tree.map(np.asarray, tree) for tree in found]


def test_nesterov_is_sutskevers_form_without_decay_of_vectors():
  x = {"w": np.full((2, 3), 2.0, np.float32), "b": np.ones(3, np.float32)}
  g = jax.tree.map(lambda a: 0.3 * a, x)
  found = two_steps("nesterov", jax.tree.map(jnp.asarray, x), g)
  for name, decay in (("w", 0.1), ("b", 0.0)):
    want, buffer = x[name], 0.0
    for step in found[1:]:
      u = g[name] + decay * want
      buffer = 0.8 * buffer + u
      want = want - 0.5 * (u + 0.8 * buffer)
      np.testing.assert_allclose(step[name], want, rtol=1e-6)


def test_lars_moves_a_matrix_by_rate_times_coefficient_times_its_length():
  x = {"w": jnp.full((2, 3), 2.0)}
  before, after, _ = two_steps("lars", x, {"w": jnp.ones((2, 3))})
  moved = np.linalg.norm(after["w"] - before["w"])
  np.testing.assert_allclose(moved, 0.5 * 0.01 * np.sqrt(24), rtol=1e-5)
