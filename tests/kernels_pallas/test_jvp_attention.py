"""Attention and its derivatives against NumPy in float64 by the formulas; the
TPU kernels, interpreted, against the same; where they are taken."""

# NumPy arrays stand for jax.Array
# pyright: reportArgumentType=false, reportCallIssue=false

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from giantsteps.kernels_pallas.jvp_attention import (
  examples,
  jvp_attention,
  reference,
  tpu,
)
from giantsteps.models import dit

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


TILES = {"queries": 32, "keys": 128}
SIZES = [  # queries, keys, heads, width, dtype
  (40, 200, 2, 64, "bfloat16"),  # ragged both ways
  (64, 256, 1, 72, "float32"),  # several programs, a width off the lanes
  (5, 30, 1, 8, "float32"),  # less than a tile of everything
]


def of_kernel(function, interpret):
  """One of the two kernels on (operands, tangents) of NumPy's `exact`."""
  if function is tpu.attention:
    return lambda q, k, v, *_: tpu.attention(
      q, k, v, blocks=TILES, interpret=interpret
    )

  def tangent(q, k, v, dq, dk, dv):
    out = reference.attention(q, k, v)
    return tpu.tangent(
      q, k, v, out, dq, dk, dv, blocks=TILES, interpret=interpret
    )

  return tangent


@pytest.mark.parametrize("size", SIZES)
def test_kernels_equal_numpy(size):
  length, keys, heads, width, dtype = size
  draw = functools.partial(operands, length, keys, "float32", 2, heads, width)
  given = [jnp.asarray(x, dtype) for x in (*draw()[:3], *draw(seed=1)[:3])]
  wide = [np.asarray(x.astype(jnp.float32), np.float64) for x in given]
  push = lambda *x: jax.jvp(reference.attention, x[:3], x[3:])
  plain = jax.jit(push)(*given)
  for i, kernel in enumerate((tpu.attention, tpu.tangent)):
    found = jax.jit(of_kernel(kernel, True))(*given)
    assert found.dtype == dtype
    want = exact(*wide)[i]
    [error] = harness.relative_error(found, want)
    [theirs] = harness.relative_error(plain[i], want)
    assert error <= max(1.5 * theirs, harness.FLOOR[dtype])


@pytest.mark.parametrize("kernel", [tpu.attention, tpu.tangent])
def test_no_race_no_bound_nothing_unset(kernel):
  draw = functools.partial(operands, 40, 200, "float32", 1, 2, 64)
  given = [*draw()[:3], *draw(seed=1)[:3]]
  run = lambda *x, interpret: of_kernel(kernel, interpret)(*x)
  found = harness.run_checked(run, *given)
  want = exact(*[np.float64(x) for x in given])[kernel is tpu.tangent]
  assert harness.relative_error(found, want)[0] < 1e-5


def by_numpy(function):
  """A stand-in for a kernel: like one, it cannot be differentiated itself."""

  def call(q, *others):
    host = lambda *xs: np.float32(function(*[np.float64(x) for x in xs]))
    shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return jax.pure_callback(host, shape, q, *others)

  return call


def test_derivatives_where_kernels_are_taken(monkeypatch):
  """Every mode by the rules around the kernels, as by XLA."""
  value = lambda q, k, v: exact(q, k, v, 0 * q, 0 * k, 0 * v)[0]
  tangent = lambda q, k, v, out, *along: exact(q, k, v, *along)[1]
  monkeypatch.setattr(tpu, "attention", by_numpy(value))
  monkeypatch.setattr(tpu, "tangent", by_numpy(tangent))
  *arrays, g = operands(9, 7, "float32")
  *tangents, _ = operands(9, 7, "float32", seed=1)

  def results(implementation):
    attend = functools.partial(jvp_attention, implementation=implementation)
    # a scanned, rematerialised layer before it, as in a network
    layer = jax.checkpoint(lambda x, _: (jnp.sin(x), None), prevent_cse=False)

    def network(q, k, v):
      return attend(jax.lax.scan(layer, q, None, length=2)[0], k, v)

    push = lambda xs, ts: jax.jvp(network, tuple(xs), tuple(ts))
    loss = lambda xs, ts, g: jnp.vdot(push(xs, ts)[1], g)
    modes = {
      "jvp": lambda xs, ts, g: push(xs, ts),
      "vjp": lambda xs, ts, g: jax.vjp(network, *xs)[1](g),
      "grad of jvp": jax.grad(loss, (0, 1)),
      "checkpoint": jax.grad(jax.checkpoint(loss)),
    }
    given = arrays, tangents, g
    return {mode: jax.jit(f)(*given) for mode, f in modes.items()}

  found, want = results("pallas_tpu"), results("xla")
  for mode in want:
    errors = harness.relative_error(found[mode], want[mode])
    assert max(errors) < 3e-6, mode  # float32, some dozens of operations


@pytest.mark.parametrize(
  ("tokens", "dtype", "taken"),
  [(1_024, "bfloat16", True), (1_023, "bfloat16", False)]
  + [(1_024, "float32", False)],
)
def test_none_takes_the_kernels_where_they_pay(tokens, dtype, taken):
  x = jax.ShapeDtypeStruct((1, tokens, 2, 64), dtype)
  call = jax.jit(examples.value_and_tangent).trace(*[x] * 6)
  text = call.lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("tpu_custom_call") == 2 * taken


def test_a_flow_map_of_many_tokens_is_lowered_with_kernels():
  net = dit.Dit(
    dit.Config(
      width=128,
      depth=2,
      heads=2,
      two_times=True,
      dtype="bfloat16",
      remat="full",
    )
  )
  x, t = jnp.zeros((1, 64, 64, 1)), jnp.zeros(1)
  params = jax.eval_shape(net.init, jax.random.key(0), x, t)

  def loss(params, x, s, t):
    run = lambda t: net.apply(params, x, t, s)
    return jnp.sum(jax.jvp(run, (t,), (jnp.ones_like(t),))[1] ** 2)

  traced = jax.jit(jax.grad(loss)).trace(params, x, t, t)
  assert (
    "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
  )
  text = traced.lower(lowering_platforms=("cpu",)).as_text()
  assert "tpu_custom_call" not in text


@pytest.mark.parametrize("target", list(harness.TPUS))
def test_a_user_gets_the_kernels_on_every_chip(target):
  compiled = harness.compile_for(examples.examples()[0], target)
  harness.assert_holds_kernel(compiled, "attention_tangent")


@pytest.mark.slow
@pytest.mark.parametrize("target", list(harness.TPUS))
@pytest.mark.parametrize(
  "example", examples.examples()[1:], ids=lambda example: example.name
)
def test_other_sizes_compile(example, target):
  compiled = harness.compile_for(example, target, "pallas_tpu")
  harness.assert_holds_kernel(compiled, "attention_tangent")


def test_bad_calls():
  q, k, v, _ = operands(4, 5, "float32")
  with pytest.raises(ValueError, match=r"\(2, 4, 3, 4\), v \(2, 5, 3, 4\)"):
    jvp_attention(q, q, v)
  with pytest.raises(ValueError, match="twice"):
    jvp_attention(q[:1], k, v)
  with pytest.raises(ValueError, match="'pallas_gpu': here there is"):
    jvp_attention(q, k, v, implementation="pallas_gpu")
