"""The harness catches planted faults, and passes a kernel without any."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

X = jnp.asarray(np.random.default_rng(0).standard_normal((32, 128)), "float32")
ROWS = pl.BlockSpec((8, 128), lambda i: (i, 0))
FIRST = pl.BlockSpec((8, 128), lambda i: (0, 0))


def call(body, semantics, out_spec, rows, x, interpret, scratch=()):
  return pl.pallas_call(
    body,
    grid=(x.shape[0] // 8,),
    in_specs=[ROWS],
    out_specs=out_spec,
    out_shape=jax.ShapeDtypeStruct((rows, 128), x.dtype),
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(dimension_semantics=(semantics,)),
    interpret=interpret,
  )(x)


def double(x, *, interpret):
  def body(x_ref, out_ref):
    out_ref[...] = 2 * x_ref[...]

  return call(body, "parallel", ROWS, 32, x, interpret)


def total(semantics, x, *, interpret):
  """Sum of the blocks, in one output block that every program revisits."""

  def body(x_ref, out_ref):
    @pl.when(pl.program_id(0) == 0)
    def _():
      out_ref[...] = jnp.zeros_like(out_ref)

    out_ref[...] += x_ref[...]

  return call(body, semantics, FIRST, 8, x, interpret)


def unset(x, *, interpret):
  def body(x_ref, out_ref, sum_ref):
    sum_ref[...] += x_ref[...]  # never set to zero
    out_ref[...] = sum_ref[...]

  scratch = [pltpu.VMEM((8, 128), jnp.float32)]
  return call(body, "arbitrary", ROWS, 32, x, interpret, scratch)


def beyond(x, *, interpret):
  def body(x_ref, out_ref):
    out_ref[...] = x_ref[pl.ds(4 * pl.program_id(0), 8), :]  # rows 4..11 of 8

  return call(body, "arbitrary", ROWS, 32, x, interpret)


def test_a_clean_kernel_passes():
  np.testing.assert_array_equal(harness.run_checked(double, X), 2 * X)


def test_a_sum_in_sequence_is_no_race():
  sequential = functools.partial(total, "arbitrary")
  found = harness.run_checked(sequential, X)
  want = np.asarray(X, np.float64).reshape(4, 8, 128).sum(0)
  np.testing.assert_allclose(found, want, atol=4e-6)  # ulp of 8, 4 sums


@pytest.mark.parametrize(
  ("kernel", "message"),
  [
    (functools.partial(total, "parallel"), "race"),
    (unset, "not finite"),
    (beyond, "out of bounds"),
  ],
)
def test_a_planted_fault_is_caught(kernel, message):
  with pytest.raises(harness.Fault, match=message):
    harness.run_checked(kernel, X)
  harness.run_checked(double, X)  # and nothing of it stays behind


def test_a_kernel_that_is_not_interpreted_is_noticed():
  with pytest.raises(AssertionError, match="no Pallas TPU kernel ran"):
    harness.run_checked(lambda x, interpret: 2 * x, X)


def square(x):
  return x * x


def test_parity_accepts_the_reference_and_refuses_a_coarse_kernel():
  harness.assert_parity(square, square, square, [X])
  coarse = lambda x: square(x.astype(jnp.bfloat16)).astype(x.dtype)
  with pytest.raises(AssertionError, match="value, result 0: error"):
    harness.assert_parity(coarse, square, square, [X])


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
def test_parity_refuses_a_wrong_derivative(mode):
  @jax.custom_jvp
  def wrong(x):
    return x * x

  wrong.defjvp(lambda xs, ts: (xs[0] ** 2, 1.9 * xs[0] * ts[0]))
  with pytest.raises(AssertionError, match=f"{mode}, result 0: error 0.05"):
    harness.assert_parity(wrong, square, square, [X], modes=[mode])
