"""Newton-Schulz orthogonalisation (Muon's step) in jax.numpy."""

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas import precision

# Coefficients (a, b, c) of one Newton-Schulz step, X <- a X + (b A + c A A) X.
SCHEDULED = (
  (4.0848, -6.8946, 2.9270),
  (3.9505, -6.3029, 2.6377),
  (3.7418, -5.5913, 2.3037),
  (2.8769, -3.1427, 1.2046),
  (2.8366, -3.0525, 1.2012),
)
FIXED = (3.4445, -4.7750, 2.0315)


def newton_schulz(
  g: jax.Array,
  kind: str = "scheduled",
  steps: int = 5,
  dtype: jnp.dtype | str | None = None,
) -> jax.Array:
  """Moves the singular values of each matrix towards 1 (Muon's step).

  X = g / (|g|_F + 1e-7), then `steps` times A = X X^T, X = a X + (b A + c A A)
  X on the short side. Costs steps (4 m^2 n + 2 m^3) FLOPs, m = min, n = max.

  Args:
    g: [..., rows, columns] float.
    kind: "scheduled" (language model: other coefficients in every step, at
      most 5) or "fixed" (view synthesis and video).
    steps: number of iterations.
    dtype: of the iteration; None keeps that of g. bfloat16, as in the
      authors' code, changes results by some per cent.

  Returns:
    [..., rows, columns] in g.dtype; zero where g is zero.

  Raises:
    ValueError: for another kind, or more steps than scheduled coefficients.
  """
  if kind not in ("scheduled", "fixed"):
    raise ValueError(f"newton_schulz={kind!r}: choose scheduled or fixed")
  if kind == "scheduled" and steps > len(SCHEDULED):
    raise ValueError(f"{steps} steps: only {len(SCHEDULED)} are scheduled")
  coefficients = SCHEDULED[:steps] if kind == "scheduled" else (FIXED,) * steps
  tall = g.shape[-2] > g.shape[-1]
  x = g.astype(precision.wide(g))
  x = (x / (precision.length(x, (-2, -1)) + 1e-7)).astype(dtype or g.dtype)
  x = x.mT if tall else x
  for a, b, c in coefficients:
    gram = x @ x.mT
    x = a * x + (b * gram + c * (gram @ gram)) @ x
  return (x.mT if tall else x).astype(g.dtype)
