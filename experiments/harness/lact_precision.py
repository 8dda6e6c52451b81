"""What bfloat16 costs LaCT: errors of outputs and gradients against float32."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from giantsteps.models import lact

VARIANTS = {  # name -> dtype of q, k, v and of Newton-Schulz
  "Newton-Schulz": ("float32", "bfloat16"),
  "products": ("bfloat16", "float32"),
  "both": ("bfloat16", "bfloat16"),
}


def measure(d: int, seeds: int = 3, kind: str = "scheduled") -> list[dict]:
  """Relative L2 errors with Muon and rescaled rows, three chunks of 4 d tokens.

  Tokens are normal with |q| = |k| = 1 as the layers make them, rates near
  1e-3, weights as at the start of training, hidden size d, 4 heads.

  Args:
    d: size of a head.
    seeds: problems, of which the mean is taken.
    kind: of Newton-Schulz.

  Returns:
    One row per variant: d, variant, errors of "output", "gradient_q" and
    "gradient_others" (k, v, rates and weights, each by its own length, their
    mean), and "cosine" of all but q's gradients, together.
  """
  runs = {name: [] for name in VARIANTS}
  for seed in range(seeds):
    inputs, cotangent = _problem(d, seed)
    exact = _run(inputs, cotangent, "float32", "float32", kind)
    for name, dtypes in VARIANTS.items():
      runs[name].append(_compare(_run(inputs, cotangent, *dtypes, kind), exact))
  return [
    {"d": d, "variant": name}
    | {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    for name, rows in runs.items()
  ]


def _problem(d: int, seed: int) -> tuple[dict, np.ndarray]:
  rng = np.random.default_rng(seed)
  heads, length = 4, 12 * d
  draw = lambda *shape: rng.standard_normal((heads, *shape), np.float32)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  rate = lambda: 1e-3 * np.exp(0.3 * draw(length, 1))
  inputs = {
    "q": unit(draw(length, d)),
    "k": unit(draw(length, d)),
    "v": draw(length, d),
    "rates": (rate(), rate(), rate()),
    "weights": tuple(draw(d, d) / np.sqrt(d) for _ in range(3)),
  }
  return inputs, draw(length, d)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _run(inputs: dict, cotangent: Any, dtype: str, ns_dtype: str, kind: str):
  def loss(x):
    out, _ = lact.fast_weight_scan(
      x["q"].astype(dtype),
      x["k"].astype(dtype),
      x["v"].astype(dtype),
      x["rates"],
      x["weights"],
      chunk_size=x["q"].shape[1] // 3,
      newton_schulz=kind,
      ns_dtype=ns_dtype,
    )
    out = out.astype(jnp.float32)
    return jnp.sum(out * cotangent), out

  grads, out = jax.grad(loss, has_aux=True)(inputs)
  return out, grads


def _compare(got: tuple, exact: tuple) -> dict[str, float]:
  flat = lambda x: np.asarray(x, np.float64).ravel()

  def error(a, b) -> float:
    return float(np.linalg.norm(flat(a) - flat(b)) / np.linalg.norm(flat(b)))

  (out, grads), (exact_out, exact_grads) = got, exact
  names = ("k", "v", "rates", "weights")
  pairs = [
    (a, b)
    for name in names
    for a, b in zip(
      *map(jax.tree.leaves, (grads[name], exact_grads[name])), strict=True
    )
  ]
  # each by its own length, so that no input outweighs the others
  unit = lambda i: np.concatenate(
    [flat(p[i]) / np.linalg.norm(flat(p[1])) for p in pairs]
  )
  a, b = unit(0), unit(1)
  return {
    "output": error(out, exact_out),
    "gradient_q": error(grads["q"], exact_grads["q"]),
    "gradient_others": float(np.mean([error(a, b) for a, b in pairs])),
    "cosine": float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))),
  }
