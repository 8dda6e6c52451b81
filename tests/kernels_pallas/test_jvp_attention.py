"""Attention and its derivatives against NumPy in float64 by the formulas, and
the modes of differentiation against each other."""

# NumPy arrays stand for jax.Array
# pyright: reportArgumentType=false, reportCallIssue=false

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from giantsteps.kernels_pallas.jvp_attention import jvp_attention, reference

# queries, keys, queries of a block
CASES = [(7, 5, 7), (8, 6, 4), (7, 9, 3), (5, 5, 1)]


def operands(length, keys, dtype="float64", rows=2, heads=3, width=4, seed=0):
  """q, k, v and a cotangent."""
  rng = np.random.default_rng(seed)
  sizes = (length, keys, keys, length)
  return [rng.normal(size=(rows, n, heads, width)).astype(dtype) for n in sizes]


def softmax(q, k):
  scores = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
  p = np.exp(scores - scores.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True)


def exact(q, k, v, dq, dk, dv):
  """The output and its tangent (P dS) V - rowsum(P dS) O + P dV
  (arXiv:2410.11081, appendix)."""
  p, scale = softmax(q, k), q.shape[-1] ** -0.5
  ds = np.einsum("bthk,bshk->bhts", dq, k) + np.einsum("bthk,bshk->bhts", q, dk)
  moved = p * ds * scale
  read = lambda p, v: np.einsum("bhts,bshk->bthk", p, v)
  out = read(p, v)
  total = np.moveaxis(moved.sum(-1), 1, 2)[..., None]  # [B, T, H, 1]
  return out, read(moved, v) - total * out + read(p, dv)


def exact_gradients(q, k, v, g):
  """dq, dk, dv of <g, output>."""
  p, scale = softmax(q, k), q.shape[-1] ** -0.5
  dp = np.einsum("bthk,bshk->bhts", g, v)
  ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
  return (
    np.einsum("bhts,bshk->bthk", ds, k),
    np.einsum("bhts,bthk->bshk", ds, q),
    np.einsum("bhts,bthk->bshk", p, g),
  )


def streamed(size):
  return functools.partial(reference.attention, limit=1, fewest=size)


@pytest.mark.parametrize(("length", "keys", "size"), CASES)
def test_value_tangent_and_gradients(length, keys, size):
  *arrays, g = operands(length, keys)
  *tangents, _ = operands(length, keys, seed=1)
  with jax.enable_x64(True):
    out, move = jax.jit(functools.partial(jax.jvp, streamed(size)))(
      arrays, tangents
    )
    pulled = jax.jit(lambda *a: jax.vjp(streamed(size), *a)[1](g))(*arrays)
  want = *exact(*arrays, *tangents), *exact_gradients(*arrays, g)
  for a, b in zip((out, move, *pulled), want, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("length", "keys", "size"), CASES[1:])
def test_gradient_of_a_tangent(length, keys, size):
  """Central differences of the NumPy tangent, in random directions."""
  *arrays, g = operands(length, keys)
  *tangents, _ = operands(length, keys, seed=1)
  given = [*arrays, *tangents]
  with jax.enable_x64(True):
    loss = lambda xs: jnp.vdot(
      jax.jvp(streamed(size), tuple(xs[:3]), tuple(xs[3:]))[1], g
    )
    grads = jax.jit(jax.grad(loss))(given)
  rng = np.random.default_rng(2)
  for i, grad in enumerate(grads):
    step = 1e-5 * rng.normal(size=grad.shape)
    ends = [
      np.vdot(exact(*given[:i], given[i] + s * step, *given[i + 1 :])[1], g)
      for s in (1, -1)
    ]
    # the third derivative times step^2 and rounding / step: both 1e-10
    np.testing.assert_allclose(
      np.vdot(grad, step), (ends[0] - ends[1]) / 2, rtol=1e-6, atol=1e-13
    )


def test_no_derivative_holds_the_scores():
  x = jax.ShapeDtypeStruct((1, 2_048, 2, 16), jnp.float32)
  scores = 2 * 2_048**2 * 4

  def temporaries(limit):
    attend = functools.partial(reference.attention, limit=limit, fewest=1)
    loss = lambda xs, ts: jnp.sum(jax.jvp(attend, xs, ts)[1] ** 2)
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower((x,) * 3, (x,) * 3)
    memory = compiled.compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes

  array = 2 * 2_048 * 16 * 4
  assert temporaries(2**40) > 4 * scores
  # some arrays of 2^20 bytes of scores, and some like q
  assert temporaries(2**20) < 12 * 2**20 + 40 * array < scores


@pytest.mark.parametrize(
  ("heads", "length", "keys", "dtype", "size"),
  [
    # 2^28 / (24 4096 4) = 682 queries, so seven parts, and equal ones
    (24, 4_096, 4_096, "bfloat16", 586),
    (24, 256, 256, "bfloat16", 256),
    (2_048, 4_096, 4_096, "float32", 128),
    (1, 8_192, 8_192, "float64", 4_096),
    (1, 4, 0, "float32", 4),
  ],
)
def test_queries_of_a_block(heads, length, keys, dtype, size):
  assert reference.block_size(heads, length, keys, dtype) == size


def test_bfloat16():
  arrays = [jnp.asarray(x, jnp.bfloat16) for x in operands(40, 30)[:3]]
  out = jax.jit(streamed(16))(*arrays)
  assert out.dtype == jnp.bfloat16
  want, _ = exact(*[np.float64(x) for x in arrays] * 2)
  # weights, products' sums and the result are rounded to 2^-9
  assert np.abs(np.asarray(out, np.float64) - want).max() < 4 * 2**-9 * 2


def test_extreme_scores_stay_finite():
  q, k, v, _ = operands(4, 4, "float32")
  attend = lambda scale: jvp_attention(scale * q, scale * k, v)
  out, slope = jax.jvp(attend, (1e3,), (1.0,))
  assert np.isfinite(out).all() and np.isfinite(slope).all()


def test_bad_calls():
  q, k, v, _ = operands(4, 5, "float32")
  with pytest.raises(ValueError, match=r"\(2, 4, 3, 4\), v \(2, 5, 3, 4\)"):
    jvp_attention(q, q, v)
  with pytest.raises(ValueError, match="twice"):
    jvp_attention(q[:1], k, v)
  with pytest.raises(ValueError, match="'pallas_gpu': here there is xla"):
    jvp_attention(q, k, v, implementation="pallas_gpu")
