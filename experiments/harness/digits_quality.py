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

from giantsteps.experiments.harness import data, evaluation, sampling

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
