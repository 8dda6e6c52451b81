"""PSNR of unseen views against the number of views that were given.

Every figure is of the same held-out scenes and the same views, the last ones
of each scene; only the number of input views changes.
"""

from typing import Any

import jax
import numpy as np

from giantsteps.experiments.harness import config as config_lib
from giantsteps.experiments.harness import data
from giantsteps.experiments.harness import tasks as tasks_lib
from giantsteps.models import lact_views

BATCH = 16  # scenes per call


def measure(
  cfg: config_lib.Config, params: Any, dataset: data.Dataset, num_scenes: int
) -> dict[str, Any]:
  """Reconstructs and renders held-out scenes; baselines beside it.

  Args:
    cfg: a run of task "views".
    params: the averaged parameters.
    dataset: of the config.
    num_scenes: held-out scenes, spread evenly over the split.

  Returns:
    "scenes", "target_views", "rows": one per number of input views, each with
    mean and standard error over the scenes of the model's PSNR and of the
    baselines' (`mean_colour` of the inputs; `nearest_view`, a copy of the
    input whose camera is nearest to the target's), and "pictures": true
    targets and rendered ones [scenes, counts + 1, S, S, 3] of the first
    eight scenes, the first target.
  """
  counts = tasks_lib.view_counts(cfg.data.views)
  reconstruct = jax.jit(
    lambda rays, image: lact_views.reconstruct(cfg.model, params, rays, image)
  )
  render = jax.jit(
    lambda state, rays: lact_views.render(cfg.model, params, state, rays)
  )
  split = dataset.held_out
  indices = np.linspace(0, split.num_rows - 1, num_scenes).astype(np.int64)
  names = ("psnr", "mean_colour", "nearest_view")
  found = {(name, n): [] for name in names for n in counts}
  pictures = []
  for start in range(0, num_scenes, BATCH):
    batch = split.read(indices[start : start + BATCH])
    image, rays = batch["image"], batch["rays"]
    true, asked = image[:, counts[-1] :], rays[:, counts[-1] :]
    drawn = []
    for n in counts:
      given, seen = image[:, :n], rays[:, :n]
      out = np.asarray(render(reconstruct(seen, given), asked))
      drawn.append(out[:, 0])
      mean = given.mean((1, 2, 3))[:, None, None, None]
      found["psnr", n] += [psnr(out, true)]
      found["mean_colour", n] += [psnr(mean, true)]
      found["nearest_view", n] += [psnr(nearest(given, seen, asked), true)]
    pictures.append(np.stack([true[:, 0], *drawn], 1))
  rows = []
  for n in counts:
    row: dict[str, Any] = {"input_views": n}
    for name in names:
      values = np.concatenate(found[name, n])
      row[name] = float(values.mean())
      row[f"{name}_standard_error"] = float(
        values.std(ddof=1) / np.sqrt(len(values))
      )
    rows.append(row)
  gain = np.concatenate(found["psnr", counts[-1]]) - np.concatenate(
    found["psnr", counts[0]]
  )
  return {
    "scenes": num_scenes,
    "target_views": cfg.data.views - counts[-1],
    "rows": rows,
    "gain": float(gain.mean()),
    "gain_standard_error": float(gain.std(ddof=1) / np.sqrt(len(gain))),
    "pictures": np.concatenate(pictures)[:8],
  }


def psnr(image: np.ndarray, true: np.ndarray) -> np.ndarray:
  """-10 log10 of the mean squared error of each view, mean over the views.

  Args:
    image: [B, V, S, S, 3] in [0, 1], or what broadcasts to it.
    true: [B, V, S, S, 3] in [0, 1].

  Returns:
    [B] float64, decibels.
  """
  difference = np.asarray(image, np.float64) - true
  return (-10 * np.log10(np.mean(difference**2, (2, 3, 4)))).mean(1)


def nearest(
  image: np.ndarray, rays: np.ndarray, asked: np.ndarray
) -> np.ndarray:
  """For each asked view the given one with the nearest camera.

  Args:
    image: [B, N, S, S, 3].
    rays: [B, N, S, S, 6], of those.
    asked: [B, V, S, S, 6].

  Returns:
    [B, V, S, S, 3].
  """
  place = lambda rays: rays[:, :, 0, 0, :3]
  away = place(asked)[:, :, None] - place(rays)[:, None]  # [B, V, N, 3]
  choice = np.argmin(np.sum(away**2, -1), -1)
  return np.take_along_axis(image, choice[..., None, None, None], 1)
