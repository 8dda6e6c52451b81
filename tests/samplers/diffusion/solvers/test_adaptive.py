"""Adaptive steps against the exact Gaussian map; the recorded run of public
code is in test_golden."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.samplers.diffusion import betas, schedules, solvers

C = 0.5  # data ~ N(0, C^2)
VP = schedules.vp_linear()


def eps(x, t):
  log = -(t**2) * (20 - 0.1) / 4 - 0.1 * t / 2
  alpha, variance = jnp.exp(log)[:, None], -jnp.expm1(2 * log)[:, None]
  return jnp.sqrt(variance) * x / (alpha**2 * C**2 + variance)


def run(x, **settings):
  sampler = functools.partial(
    solvers.adaptive, eps, schedule=VP, prediction="eps", **settings
  )
  return jax.jit(sampler)(x)


def std(t):
  alpha, sigma = VP.alpha_sigma(t)
  return np.hypot(alpha * C, sigma)


class AdaptiveTest(parameterized.TestCase):
  @parameterized.product(order=(2, 3), gauge=("data", "noise"))
  def test_error_follows_the_tolerance(self, order, gauge):
    x = jnp.linspace(-3, 3, 7)[:, None]
    exact = x * std(1e-3) / std(1.0)
    errors, calls = [], []
    for rtol in (0.05, 0.002):
      with jax.numpy_dtype_promotion("strict"):
        out, nfe = run(x, order=order, gauge=gauge, rtol=rtol, atol=rtol / 5)
      self.assertEqual(out.dtype, jnp.float32)
      self.assertEqual(int(nfe) % order, 0)
      errors.append(float(jnp.abs(out - exact).max()))
      calls.append(int(nfe))
    self.assertLess(errors[0], 0.2)  # of values up to 1.5, rtol .05 a step
    self.assertLess(errors[1], errors[0] / 3)
    self.assertGreater(calls[1], calls[0])

  def test_order_three_needs_fewer_calls_for_little_error(self):
    x = jnp.linspace(-3, 3, 7)[:, None]
    calls = [run(x, order=k, rtol=1e-3, atol=1e-4)[1] for k in (2, 3)]
    self.assertLess(calls[1], calls[0])

  def test_model_is_in_the_program_once(self):
    weight = jnp.eye(4)

    def network(x, t):
      return x @ weight

    jaxpr = jax.make_jaxpr(
      functools.partial(
        solvers.adaptive, network, schedule=VP, prediction="v", order=3
      )
    )(jnp.ones((2, 4)))
    self.assertEqual(str(jaxpr).count("dot_general"), 1)

  def test_gives_up_with_nan(self):
    out, nfe = run(jnp.ones((1, 1)), max_calls=6)
    self.assertTrue(jnp.isnan(out).all())
    self.assertEqual(nfe, 6)

  def test_clock_of_the_model(self):
    # levels and times of a discrete model inside the program
    schedule = schedules.discrete(betas.linear())
    seen = []

    def predict(x, t):
      jax.debug.callback(lambda t: seen.append(float(t)), t[0], ordered=True)
      return 0.1 * x

    sampler = functools.partial(
      solvers.adaptive, predict, schedule=schedule, prediction="v"
    )
    out, nfe = jax.jit(sampler)(jnp.ones((1, 1)))
    out.block_until_ready()
    jax.effects_barrier()
    self.assertLen(seen, int(nfe))
    np.testing.assert_allclose(seen[0], 999, rtol=1e-5)
    self.assertTrue(all(0 <= t <= 999.01 for t in seen))
    # r = 1/2 of the first step, .05 in lambda; the table is linear in t
    # between levels of 1 / 1000, .02 of lambda
    first = schedule.lam(1.0)
    middle = schedule.model_time(schedule.t_of_lambda(first + 0.025))
    np.testing.assert_allclose(seen[1], middle, atol=2e-2)

  @parameterized.parameters(
    (dict(order=1), "order=1"),
    (dict(gauge="flow"), "gauge='flow'"),
    (dict(t_end=0.0), "t_end=0.0"),
  )
  def test_bad_settings(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      solvers.adaptive(eps, jnp.ones((1, 1)), VP, prediction="eps", **settings)


if __name__ == "__main__":
  absltest.main()
