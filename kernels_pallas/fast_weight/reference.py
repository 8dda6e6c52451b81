"""Reading and writing a SwiGLU memory, in jax.numpy.

f_W(x) = W1 (silu(W0 x) * (W2 x)), "Test-Time Training Done Right"
(arXiv:2505.23884); the paper's W1, W3, W2 are W0, W2, W1 here.
"""

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas import precision
from giantsteps.kernels_pallas.precision import einsum as _dot

Weights = tuple[jax.Array, jax.Array, jax.Array]  # W0, W1, W2
EPSILON = 1e-5  # added to the length of a row


def apply(weights: Weights, q: jax.Array) -> jax.Array:
  """Reads the memory: f_W(q), 6 d h FLOPs per token.

  Args:
    weights: W0 [N, h, d], W1 [N, d, h], W2 [N, h, d].
    q: [N, C, d]; its dtype is that of the matrix products' inputs.

  Returns:
    [N, C, d] in q.dtype.
  """
  w0, w1, w2 = weights
  gate = jax.nn.silu(_dot("ncd,nhd->nch", q, w0, q))
  up = _dot("ncd,nhd->nch", q, w2, q)
  return _dot("nch,ndh->ncd", gate * up, w1, q).astype(q.dtype)


def gradient(
  weights: Weights, k: jax.Array, v: jax.Array, learning_rates: Weights
) -> Weights:
  """Negative gradient of -sum_t <f_W(k_t), v_t>, token t weighted by its rate.

  D1 = sum_t eta1 v (a u)^T, D0 = sum_t eta0 (p u silu'(g)) k^T, D2 = sum_t
  eta2 (p a) k^T with g = W0 k, u = W2 k, a = silu(g), p = W1^T v. All rates
  meet the same W. 12 d h FLOPs per token.

  Args:
    weights: W0 [N, h, d], W1 [N, d, h], W2 [N, h, d].
    k: [N, C, d].
    v: [N, C, d].
    learning_rates: three [N, C, 1], for W0, W1, W2.

  Returns:
    D0 [N, h, d], D1 [N, d, h], D2 [N, h, d], float32 or wider.
  """
  w0, w1, w2 = weights
  g = _dot("ncd,nhd->nch", k, w0, k)
  u = _dot("ncd,nhd->nch", k, w2, k)
  p = _dot("ncd,ndh->nch", v, w1, k)
  eta0, eta1, eta2 = (eta.astype(g.dtype) for eta in learning_rates)
  s = jax.nn.sigmoid(g)
  a = g * s
  d0 = _dot("nch,ncd->nhd", eta0 * (p * u * s * (1 + g * (1 - s))), k, k)
  d1 = _dot("ncd,nch->ndh", v, eta1 * (a * u), k)
  d2 = _dot("nch,ncd->nhd", eta2 * (p * a), k, k)
  return d0, d1, d2


def update(
  total: Weights,
  step: Weights,
  norms: Weights | None = None,
  momentum: tuple[jax.Array, Weights] | None = None,
  *,
  keep_total: bool = False,
) -> tuple[Weights, Weights | None, Weights]:
  """Momentum, step and row lengths: what the memory is after a write.

  M = D + mu M, Z = Z + M, W = Z / (|row of Z| + 1e-5) n.

  Args:
    total: Z, the weights, or with pre-norm the sum of all steps: [N, h, d],
      [N, d, h], [N, h, d], float32 or wider.
    step: D, of the same shapes and dtypes.
    norms: n, three [N, rows, 1]; None leaves the lengths: W = Z.
    momentum: mu [N, 1, 1] and the buffers M; None is mu = 0.
    keep_total: returns Z beside W.

  Returns:
    W, Z (None unless `keep_total`) and M, each in the dtype of `total`.
  """
  if momentum is not None:
    mu, buffer = momentum
    step = jax.tree.map(lambda d, m: d + mu * m, step, buffer)
  total = jax.tree.map(jnp.add, total, step)
  weights = total
  if norms is not None:
    weights = jax.tree.map(
      lambda z, n: z / (precision.length(z, -1) + EPSILON) * n, total, norms
    )
  return weights, total if keep_total else None, step
