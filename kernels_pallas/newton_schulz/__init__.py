"""Orthogonalises matrices: one Newton-Schulz iteration for every platform."""

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas import dispatch
from giantsteps.kernels_pallas.newton_schulz import reference
from giantsteps.kernels_pallas.newton_schulz.reference import FIXED, SCHEDULED

__all__ = ["FIXED", "SCHEDULED", "newton_schulz"]


def newton_schulz(
  g: jax.Array,
  kind: str = "scheduled",
  steps: int = 5,
  dtype: jnp.dtype | str | None = None,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """`reference.newton_schulz`; implementation as in `dispatch.call`."""
  xla = lambda g: reference.newton_schulz(g, kind, steps, dtype)
  return dispatch.call(g, xla=xla, implementation=implementation)
