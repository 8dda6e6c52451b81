"""The kernel against the reference in float64, its derivatives, its faults."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from giantsteps.kernels_pallas import example, tuning
from giantsteps.kernels_pallas.newton_schulz import (
  FIXED,
  SCHEDULED,
  examples,
  newton_schulz,
  reference,
  tpu,
)

rng = np.random.default_rng(0)


def matrices(*shape):
  """Float32 with singular values from 1 down to 1/20, as gradients have."""
  g = rng.standard_normal(shape)
  u, s, vt = np.linalg.svd(g, full_matrices=False)
  s = np.linspace(1, 0.05, s.shape[-1])
  return jnp.asarray((u * s) @ vt, jnp.float32)


def by(implementation, kind, steps, dtype):
  def call(g):
    with pltpu.force_tpu_interpret_mode():
      return newton_schulz(g, kind, steps, dtype, implementation=implementation)

  return call


def exact(kind, steps):
  return functools.partial(reference.newton_schulz, kind=kind, steps=steps)


@pytest.mark.parametrize(
  ("shape", "kind", "steps", "dtype"),
  [
    ((2, 24, 40), "scheduled", 3, "bfloat16"),  # one padded block
    ((1, 2, 200, 136), "fixed", 2, "bfloat16"),  # tall, two ragged blocks
    ((96, 128), "scheduled", 5, "bfloat16"),  # no batch
    ((1, 40, 40), "scheduled", 2, "float32"),
  ],
)
def test_parity(shape, kind, steps, dtype):
  with tuning.target("a test", {"block": 128}):
    errors = harness.assert_parity(
      by("pallas_tpu", kind, steps, dtype),
      by("xla", kind, steps, dtype),
      exact(kind, steps),
      [matrices(*shape)],
      floor=1e-5,  # of float32 sums; bfloat16 is bound by the error of XLA
    )
  # or the two would not differ at all
  assert (errors["value"][0][1] > 1e-3) == (dtype == "bfloat16")


def test_faults():
  g = matrices(4, 256, 256)
  kernel = functools.partial(
    tpu.iterate, coefficients=SCHEDULED[:1], dtype=jnp.bfloat16
  )
  with tuning.target("a test", {"block": 128, "matrices": 2}):
    out = harness.run_checked(kernel, g)
    every = harness.run_checked(functools.partial(kernel, keep=True), g)
  np.testing.assert_array_equal(every[-1].astype(jnp.float32), out)


def test_forward_over_reverse_is_that_of_the_reference():
  g = matrices(8, 16)
  direction, cotangent = matrices(8, 16), matrices(8, 16)

  def curvature(call):
    pull = lambda x: jax.vjp(call, x)[1](cotangent)[0]
    return jax.jit(lambda x: jax.jvp(pull, (x,), (direction,))[1])(g)

  found = curvature(by("pallas_tpu", "fixed", 2, "float32"))
  want = curvature(by("xla", "fixed", 2, "float32"))
  # float32: 2^-24 times the condition of two steps and two derivatives
  np.testing.assert_allclose(found, want, atol=2e-5 * np.abs(want).max())


def test_zero_stays_zero():
  out = by("pallas_tpu", "scheduled", 5, "bfloat16")(jnp.zeros((1, 8, 8)))
  np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize(
  ("shape", "dtype", "kernel"),
  [
    ((3, 4, 512, 512), "bfloat16", True),
    ((2, 1536, 768), "bfloat16", True),
    ((3, 4, 512, 512), "float32", False),  # precision is XLA's to choose
    ((3, 4, 256, 512), "bfloat16", False),  # not compared with XLA
    ((3, 2048, 2048), "bfloat16", False),  # does not fit on chip
  ],
)
def test_none_takes_the_kernel_where_it_pays(shape, dtype, kernel):
  call = functools.partial(newton_schulz, dtype=dtype)
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  lowered = jax.jit(call).trace(x).lower(lowering_platforms=("tpu",))
  assert ("tpu_custom_call" in lowered.as_text()) == kernel


def test_a_kernel_that_does_not_exist_is_refused():
  with pytest.raises(ValueError, match="'pallas_tpu': here there is xla"):
    newton_schulz(jnp.zeros((2048, 2048)), implementation="pallas_tpu")
  with pytest.raises(ValueError, match="transpose"):
    tpu.iterate(jnp.zeros((3, 2)), SCHEDULED, jnp.bfloat16)
  with pytest.raises(ValueError, match="float16"):
    tpu.iterate(jnp.zeros((2, 3)), (FIXED,), jnp.float16)


EXAMPLES = examples.examples()


@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e"])
def test_a_user_gets_the_kernel_on_every_chip(target):
  small = functools.partial(newton_schulz, dtype=jnp.bfloat16)
  operands = (jax.ShapeDtypeStruct((2, 384, 384), jnp.float32),)
  case = example.Example("small", small, operands, 0.0)
  harness.assert_holds_kernel(harness.compile_for(case, target))


@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize(
  "case",
  [
    pytest.param(case, id=case.name, marks=pytest.mark.slow)
    if "760M" not in case.name  # seconds, the others up to a minute
    else pytest.param(case, id=case.name)
    for case in EXAMPLES
  ],
)
def test_the_compiler_is_as_content_as_it_was(case, target):
  report = harness.assert_within_record("newton_schulz", case, target)
  assert not sum(kernel["spills"] for kernel in report["kernels"])
