"""Quality of generated digits, judged against digits the model never saw.

Rules of honest evaluation without Inception: the distance is named for its
feature network (`fd_digitsnet64`, not FID), the floor (real training half
against real held-out half) and a control (a fitted Gaussian) stand beside it,
sample counts are equal, and the distance to the nearest training image shows
memorising.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from giantsteps.experiments.harness import (
  data,
  evaluation,
  samplers_quality,
  sampling,
)
from giantsteps.research import flow_maps
from giantsteps.samplers.diffusion import solvers

NFES = (3, 5, 8, 12, 20, 50)
REFERENCE_STEPS = 500


def measure(
  draw: Callable,
  params: Any,
  dataset: data.Dataset,
  *,
  seed: int = 0,
  nfes: Sequence[int] = NFES,
  conditional: bool = False,
) -> tuple[dict, dict[tuple[str, int], np.ndarray]]:
  """Samples with every solver at every budget and measures.

  Args:
    draw: `sampling.sampler(task, sigma_0)`.
    params: of the flow.
    dataset: the digits; as many images as its training half are drawn.
    seed: of the starting noise, the same for all solvers and budgets.
    nfes: calls of the model.
    conditional: ask for the classes of the training half, in its order.

  Returns:
    Numbers: the floor, the controls, one row per solver and NFE (fd and the
    median per-sample rms distance to the 500-step second-order reference from
    the same noise), nearest-neighbour distances. And the images drawn, by
    (solver, nfe).
  """
  sigma_0 = dataset.description["std"]
  both = [
    s.read(np.arange(s.num_rows)) for s in (dataset.train, dataset.held_out)
  ]
  features, record = evaluation.digits_features(both[0], both[1])
  train, held_out = (rows["image"] for rows in both)
  known = features(held_out)
  fd = lambda images: evaluation.frechet_distance(features(images), known)
  count = len(train)
  labels = both[0]["label"] if conditional else None
  noise = jax.random.normal(jax.random.key(seed), train.shape)
  sample = lambda solver, nfe: np.asarray(
    draw(params, noise, sampling.table(solver, nfe, sigma_0), labels)
  )
  reference = sample("dpm_solver_pp", REFERENCE_STEPS)
  rows, images = [], {("dpm_solver_pp", REFERENCE_STEPS): reference}
  for solver in sampling.SOLVERS:
    for nfe in nfes:
      drawn = images[solver, nfe] = sample(solver, nfe)
      error = np.sqrt(np.mean((drawn - reference) ** 2, axis=(1, 2, 3)))
      rows.append(
        {
          "solver": solver,
          "nfe": nfe,
          "fd_digitsnet64": fd(drawn),
          "distance_to_reference": float(np.median(error)),
        }
      )
  generated = images["dpm_solver_pp", 20 if 20 in nfes else nfes[-1]]
  flat = lambda x: x.reshape(len(x), -1)
  nearest = lambda x: float(
    np.mean(evaluation.nearest_distance(flat(x), flat(train)))
  )
  control = evaluation.fitted_gaussian(flat(train), count, seed)
  numbers = {
    "rows": rows,
    "fd_reference": fd(reference),
    "fd_floor": fd(train),
    "fd_fitted_gaussian": fd(control.reshape(train.shape)),
    "nearest_train_generated": nearest(generated),
    "nearest_train_held_out": nearest(held_out),
    "nearest_ratio": nearest(generated) / nearest(held_out),
    "count_generated": count,
    "count_held_out": len(held_out),
    "feature_net": record,
    "seed": seed,
  }
  return numbers, images


def rank(
  draw: Callable,
  params: Any,
  dataset: data.Dataset,
  *,
  count: int = 256,
  seed: int = 0,
  conditional: bool = False,
) -> list[dict]:
  """Solvers by their distance to the exact samples of the trained flow.

  The reference is classical Runge-Kutta with 125 steps on the velocity; the
  public solvers are those of `samplers_quality.straight`.

  Args:
    draw: `sampling.sampler(task, sigma_0)`.
    params: of the flow.
    dataset: the digits.
    count: images per solver.
    seed: of the starting noise.
    conditional: ask for the classes in turn.

  Returns:
    Rows {name, source, nfe, calls, median}: the median over images of the rms
    distance from the same noise.
  """
  sigma_0 = dataset.description["std"]
  say: dict[str, Any] = dict(prediction="velocity")
  schedule, _ = flow_maps.to_sampler(
    flow_maps.linear(), lambda s, t, x: x, sigma_0
  )
  labels = np.arange(count) % 10 if conditional else None
  shape = count, *dataset.description["shape"]
  noise = jax.random.normal(jax.random.key(seed), shape)
  sample = lambda table: np.asarray(draw(params, noise, table, labels))
  references = {
    start: sample(
      solvers.runge_kutta(
        schedule,
        np.linspace(start, 0, 126),
        gauge="flow",
        tableau="rk4",
        **say,
      )
    )
    for start in (1.0, 0.999)
  }
  rows = []
  for nfe in samplers_quality.NFES:
    made = {
      ("default", "giantsteps"): solvers.default(schedule, nfe, sigma_0, **say)
    }
    public = samplers_quality.straight(schedule, nfe, "velocity")
    made |= {(name, "as diffusers"): table for name, table in public.items()}
    for (name, source), table in made.items():
      start = 0.999 if "DEIS" in name else 1.0
      error = sample(table) - references[start]
      row = {"name": name, "source": source, "nfe": nfe, "calls": table.nfe}
      row["median"] = float(
        np.median(np.sqrt(np.mean(error**2, axis=(1, 2, 3))))
      )
      rows.append(row)
  return rows
