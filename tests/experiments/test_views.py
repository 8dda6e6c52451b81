"""The task of novel views: who is given, what is asked, what is measured."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from giantsteps.experiments.harness import (
  config,
  data,
  tasks,
  training,
  views_quality,
)
from giantsteps.experiments.harness import mesh as mesh_lib
from giantsteps.models import lact_views
from giantsteps.research.test_time_training import novel_views

CFG = config.Config(
  task="views",
  model=lact_views.Config(
    patch=4, width=8, depth=1, heads=1, fast_heads=1, expand=1
  ),
  data=config.Data(source="scenes", views=6, side=8),
  optim=config.Optim(name="adamw"),
  batch_size=6,
  steps=4,
  ema_decay=0.0,
)
RNG = np.random.default_rng(0)


def random_batch(rows):
  shape = (rows, CFG.data.views, 8, 8)
  return {
    "image": RNG.uniform(size=(*shape, 3)).astype(np.float32),
    "rays": RNG.normal(size=(*shape, 6)).astype(np.float32),
  }


def build():
  dataset = tasks.load_data(CFG)
  return dataset, tasks.build(CFG, dataset.description)


@pytest.mark.parametrize(
  ("views", "counts"),
  [(2, (1,)), (3, (1, 2)), (4, (1, 2)), (5, (1, 2, 4)), (20, (1, 2, 4, 8, 16))],
)
def test_input_counts_are_the_powers_of_two_below(views, counts):
  assert tasks.view_counts(views) == counts


def test_every_batch_holds_every_count_equally_often():
  _, task = build()
  first = set()
  for step in range(12):
    arrays = task.corrupt(random_batch(6), jax.random.key(step))
    known = np.asarray(arrays["known"])
    assert known.shape == (6, 4)
    count = known.sum(1)
    assert sorted(count) == [1, 1, 2, 2, 4, 4]
    np.testing.assert_array_equal(known, np.arange(4) < count[:, None])
    first.add(int(count[0]))
  assert first == {1, 2, 4}  # missed by chance: 3 (2/3)^12 = 2 %, key fixed


def test_the_loss_is_over_the_views_that_were_not_given():
  _, task = build()
  params = jax.jit(task.init)(jax.random.key(0))
  batch = random_batch(3)
  count = np.array([4, 1, 2])
  arrays = {**batch, "known": np.arange(4) < count[:, None]}
  loss = jax.jit(task.loss)(params, arrays)
  total = 0.0
  for row, n in enumerate(count):
    image, rays = batch["image"][row : row + 1], batch["rays"][row : row + 1]
    out = jax.jit(task.apply)(params, rays, image[:, :n])
    total += np.mean((np.asarray(out, np.float64) - image)[:, n:] ** 2)
  np.testing.assert_allclose(loss, total / 3, rtol=1e-5)


def test_scenes_are_drawn_by_index_and_split():
  dataset = data.load(CFG.data)
  rows = dataset.train.num_rows
  assert dataset.kind == "views"
  assert rows + dataset.held_out.num_rows == data.NUM_SCENES
  assert dataset.description["shape"] == [6, 8, 8, 3]
  json.dumps(dataset.description)
  for split, first in ((dataset.train, 0), (dataset.held_out, rows)):
    batch = split.read(np.array([3, 1]))
    for i, index in enumerate((3, 1)):
      image, rays = novel_views.views(0, first + index, 6, 8)
      np.testing.assert_array_equal(batch["image"][i], image)
      np.testing.assert_array_equal(batch["rays"][i], rays)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"task": "flow"}, "task='flow' does not fit the model 'lact_views'"),
    ({"data": config.Data(source="digits")}, "wants views rows"),
    ({"data": config.Data("scenes", side=6)}, "data.side=6: not a multiple"),
  ],
)
def test_what_does_not_fit_is_refused(change, message):
  cfg = dataclasses.replace(CFG, **change)
  kind = {"kind": "image" if cfg.data.source == "digits" else "views"}
  with pytest.raises(config.InputError, match=message):
    tasks.build(cfg, kind)


def test_one_view_is_no_scene():
  with pytest.raises(config.InputError, match="data.views=1"):
    config.load("novel_views_smoke", ["data.views=1"])


def test_psnr():
  true = RNG.uniform(size=(2, 3, 4, 4, 3))
  off = np.array([0.1, 0.01])[:, None, None, None, None]
  np.testing.assert_allclose(views_quality.psnr(true + off, true), [20, 40])
  # the mean over views of decibels, not of errors
  off = np.array([0.1, 0.01, 0.001])[None, :, None, None, None]
  np.testing.assert_allclose(views_quality.psnr(true + off, true), [40, 40])


def test_nearest_view():
  place = np.array([[[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]])  # [1, 3, 3]
  asked = np.array([[[0.1, 0.9, 0], [0, 0.2, 0.7]]])
  rays = lambda p: np.broadcast_to(
    np.concatenate([p, 0 * p], -1)[:, :, None, None], (*p.shape[:2], 2, 2, 6)
  )
  image = np.arange(3.0).reshape(1, 3, 1, 1, 1) * np.ones((1, 3, 2, 2, 3))
  found = views_quality.nearest(image, rays(place), rays(asked))
  np.testing.assert_array_equal(found[0, :, 0, 0, 0], [2, 0])


def test_train_and_measure(tmp_path):
  dataset, task = build()
  few = data.Split(12, dataset.held_out.read)
  dataset = dataclasses.replace(dataset, held_out=few)
  mesh = mesh_lib.make({})
  training.train(CFG, tmp_path, mesh, dataset=dataset)
  rows = [json.loads(r) for r in (tmp_path / "metrics.jsonl").open()]
  assert 0 < rows[-1]["held_out_psnr"] < 40
  params = training.restore(tmp_path, CFG, task, mesh).ema
  result = views_quality.measure(CFG, params, dataset, 3)
  assert [row["input_views"] for row in result["rows"]] == [1, 2, 4]
  assert result["pictures"].shape == (3, 4, 8, 8, 3)
  # Rendering from kept weights is what the training form predicts.
  indices = np.linspace(0, dataset.held_out.num_rows - 1, 3).astype(int)
  batch = dataset.held_out.read(indices)
  for row in result["rows"]:
    n = row["input_views"]
    out = jax.jit(task.apply)(params, batch["rays"], batch["image"][:, :n])
    error = np.mean((np.asarray(out) - batch["image"])[:, 4:] ** 2, (2, 3, 4))
    want = -10 * np.log10(error).mean()
    np.testing.assert_allclose(row["psnr"], want, rtol=1e-4)
    # a constant picture cannot beat the spread of the true one
    mean = batch["image"][:, :n].mean((1, 2, 3))[:, None, None, None]
    error = np.mean((batch["image"][:, 4:] - mean) ** 2, (2, 3, 4))
    np.testing.assert_allclose(
      row["mean_colour"], -10 * np.log10(error).mean(), rtol=1e-5
    )


def test_micro_batches_change_nothing():
  _, task = build()
  params = jax.jit(task.init)(jax.random.key(0))
  arrays = task.corrupt(random_batch(6), jax.random.key(1))
  whole = jax.jit(task.loss)(params, arrays)
  parts = [
    jax.jit(task.loss)(
      params, jax.tree.map(lambda x, i=i: x[i : i + 3], arrays)
    )
    for i in (0, 3)
  ]
  np.testing.assert_allclose(jnp.mean(jnp.stack(parts)), whole, rtol=1e-5)
