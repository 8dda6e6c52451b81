"""The memory of LaCT: reads, and gradients of writes, for every platform."""

import jax

from giantsteps.kernels_pallas import dispatch
from giantsteps.kernels_pallas.fast_weight import reference
from giantsteps.kernels_pallas.fast_weight.reference import Weights

__all__ = ["Weights", "apply", "gradient"]


def apply(
  weights: Weights, q: jax.Array, *, implementation: str | None = None
) -> jax.Array:
  """`reference.apply`; implementation as in `dispatch.call`."""
  return dispatch.call(
    weights, q, xla=reference.apply, implementation=implementation
  )


def gradient(
  weights: Weights,
  k: jax.Array,
  v: jax.Array,
  learning_rates: Weights,
  *,
  implementation: str | None = None,
) -> Weights:
  """`reference.gradient`; implementation as in `dispatch.call`."""
  return dispatch.call(
    weights,
    k,
    v,
    learning_rates,
    xla=reference.gradient,
    implementation=implementation,
  )
