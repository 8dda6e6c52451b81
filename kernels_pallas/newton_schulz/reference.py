"""Newton-Schulz orthogonalisation (Muon's step) in jax.numpy."""

import jax

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

Coefficients = tuple[float, float, float]


def coefficients(kind: str, steps: int) -> tuple[Coefficients, ...]:
  """(a, b, c) of every step.

  Raises:
    ValueError: for another kind, or more steps than scheduled coefficients.
  """
  if kind not in ("scheduled", "fixed"):
    raise ValueError(f"newton_schulz={kind!r}: choose scheduled or fixed")
  if kind == "scheduled" and steps > len(SCHEDULED):
    raise ValueError(f"{steps} steps: only {len(SCHEDULED)} are scheduled")
  return SCHEDULED[:steps] if kind == "scheduled" else (FIXED,) * steps


def scaled(g: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """g / (|g|_F + 1e-7), in float32 or wider, then in `dtype`."""
  x = g.astype(precision.wide(g))
  return (x / (precision.length(x, (-2, -1)) + 1e-7)).astype(dtype)


def step(x: jax.Array, abc: Coefficients) -> jax.Array:
  """X <- a X + (b A + c A A) X, A = X X^T, in the dtype of X."""
  a, b, c = abc
  gram = x @ x.mT
  return a * x + (b * gram + c * (gram @ gram)) @ x


def newton_schulz(
  g: jax.Array,
  kind: str = "scheduled",
  steps: int = 5,
  dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
  """`orthogonalise.newton_schulz`, by XLA; any float dtype."""
  abc = coefficients(kind, steps)
  tall = g.shape[-2] > g.shape[-1]
  x = scaled(g.mT if tall else g, dtype or g.dtype)
  for each in abc:
    x = step(x, each)
  return (x.mT if tall else x).astype(g.dtype)
