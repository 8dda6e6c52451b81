"""What a network returns, and the affine maps from one form to another.

With x = alpha x0 + sigma eps every prediction is a fixed combination
c0 x0 + c1 eps, and so is the state: two equations for (x0, eps). The one
formula below is their solution; on the paths where papers write shorter forms
(alpha^2 + sigma^2 = 1, alpha + sigma = 1) it reduces to those.

| kind | c0, c1 | from |
|---|---|---|
| eps | 0, 1 | arXiv:2006.11239 |
| x0 | 1, 0 | |
| v | -sigma, alpha | arXiv:2202.00512 |
| flow | -1, 1 | arXiv:2209.03003 |
| velocity | alpha', sigma' (derivatives in the schedule's t) | |
| score | 0, -1/sigma | arXiv:2011.13456 |
| angle | v / hypot(alpha, sigma) | d(x / hypot) / d phi, phi the angle |
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

KINDS = ("eps", "x0", "v", "flow", "velocity", "score", "angle")


def combination(
  kind: str, alpha: Any, sigma: Any, rate: tuple[Any, Any] | None = None
) -> tuple[Any, Any]:
  """(c0, c1) with prediction = c0 x0 + c1 eps.

  Args:
    kind: one of `KINDS`.
    alpha: any shape, NumPy or JAX.
    sigma: like alpha.
    rate: (alpha', sigma'), for "velocity" only.

  Raises:
    ValueError: unknown kind, or "velocity" without rate.
  """
  zero, one = 0 * alpha, 0 * alpha + 1
  match kind:
    case "eps":
      return zero, one
    case "x0":
      return one, zero
    case "v":
      return -sigma, alpha
    case "flow":
      return -one, one
    case "score":
      return zero, -1 / sigma
    case "angle":
      radius = (alpha**2 + sigma**2) ** 0.5
      return -sigma / radius, alpha / radius
    case "velocity":
      if rate is None:
        raise ValueError("'velocity' needs rate=(alpha', sigma')")
      return rate
  raise ValueError(f"unknown prediction {kind!r}; choose from {list(KINDS)}")


def affine(
  source: str,
  target: str,
  alpha: Any,
  sigma: Any,
  rate: tuple[Any, Any] | None = None,
  data_std: float = 1.0,
) -> tuple[Any, Any]:
  """(z, out) with target = z * x + out * source.

  Finite for "v", "flow" and "angle" at both ends, alpha = 0 and sigma = 0;
  infinite or NaN where the source does not determine the target ("eps" to
  "x0" at alpha = 0). The identity is exact.

  Args:
    source: what the network returns, one of `KINDS`.
    target: what is wanted, one of `KINDS`.
    alpha: any shape; NumPy float64 on the host, or JAX.
    sigma: like alpha.
    rate: (alpha', sigma') if source or target is "velocity".
    data_std: the target is that of x0 / data_std on the path
      (data_std alpha, sigma), through the same x.
  """
  c0, c1 = combination(source, alpha, sigma, rate)
  if source == target and data_std == 1:
    return 0 * alpha, 0 * alpha + 1
  c0, alpha = c0 * data_std, alpha * data_std
  if rate is not None:
    rate = rate[0] * data_std, rate[1]
  d0, d1 = combination(target, alpha, sigma, rate)
  determinant = alpha * c1 - sigma * c0
  z = (d0 * c1 - d1 * c0) / determinant
  return z, (alpha * d1 - sigma * d0) / determinant


def convert(
  output: Any,
  x: Any,
  source: str,
  target: str,
  alpha: Any,
  sigma: Any,
  rate: tuple[Any, Any] | None = None,
) -> Any:
  """The network's `output` at state x, from `source` to `target` form.

  Args:
    output: [B, ...] what the network returned for x.
    x: [B, ...] the state it was given.
    source: form of output, one of `KINDS`.
    target: form wanted.
    alpha: scalar, or broadcastable against x (e.g. [B, 1, 1, 1]).
    sigma: like alpha.
    rate: (alpha', sigma') if source or target is "velocity".

  Returns:
    [B, ...].
  """
  z, out = affine(source, target, alpha, sigma, rate)
  return z * x + out * output


def edm_denoiser(
  network: Callable[[jax.Array, jax.Array], jax.Array],
  *,
  sigma_data: float = 0.5,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """The preconditioning of EDM (arXiv:2206.00364, eq. 7 and table 1).

      x0 = c_skip x + c_out F(c_in x, log(sigma) / 4)

  with r^2 = sigma^2 + sigma_data^2: c_skip = sigma_data^2 / r^2, c_out =
  sigma sigma_data / r, c_in = 1 / r.

  Args:
    network: F(x [B, ...], time [B]) -> [B, ...].
    sigma_data: standard deviation of the data the network was trained on.

  Returns:
    predict(x, sigma [B]) -> x0, for `schedules.edm` and prediction "x0".
  """

  def predict(x, sigma):
    level = sigma.reshape(-1, *(1,) * (x.ndim - 1))
    square = level**2 + sigma_data**2
    out = network(x / jnp.sqrt(square), jnp.log(sigma) / 4)
    skip = sigma_data**2 / square
    return skip * x + level * sigma_data / jnp.sqrt(square) * out

  return predict
