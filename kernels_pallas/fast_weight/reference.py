"""Reading and writing a SwiGLU memory, in jax.numpy.

f_W(x) = W1 (silu(W0 x) * (W2 x)), "Test-Time Training Done Right"
(arXiv:2505.23884); the paper's W1, W3, W2 are W0, W2, W1 here.
"""

import jax

from giantsteps.kernels_pallas.precision import einsum as _dot

Weights = tuple[jax.Array, jax.Array, jax.Array]  # W0, W1, W2


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
