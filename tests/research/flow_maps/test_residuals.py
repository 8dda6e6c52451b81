"""Residuals at perfect and at arbitrary networks."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.research import flow_maps
from giantsteps.research.flow_maps import closed_forms, residuals

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "flow_maps"
KINDS = {"linear": flow_maps.linear(), "trig": flow_maps.trigonometric()}
GAUSSIANS = (
  "gauss_1d_trig",
  "gauss_2d_noncommuting_linear",
  "gauss_5d_full_trig",
)
EQUATIONS = ("lagrangian", "eulerian", "semigroup")
WEIGHT = np.random.default_rng(0).normal(size=(2, 2))


def load(name) -> Any:
  golden = np.load(GOLDEN / f"{name}.npz")
  I = KINDS[str(golden["kind"])]
  if "m0" in golden:
    moments = (golden[k] for k in ("m0", "S0", "m1", "S1"))
    return golden, closed_forms.gaussian(I, *moments)
  parts = (golden[k] for k in ("w", "mu", "sk"))
  return golden, closed_forms.mixture(I, float(golden["sig0"]), *parts)


def rows(golden, dtype):
  return (jnp.asarray(golden[k], dtype) for k in ("s", "t", "x"))


def crooked(s, t, x):
  """A network that solves nothing."""
  weight = jnp.asarray(WEIGHT, x.dtype)
  return jnp.tanh(x @ weight + s[:, None]) * (1 + t[:, None] ** 2)


class PerfectNetworkTest(parameterized.TestCase):
  @parameterized.product(
    name=GAUSSIANS, equation=EQUATIONS, precise=(True, False)
  )
  def test_gaussian(self, name, equation, precise):
    # forward and backward rows, t = 1 and s = t among them
    golden, exact = load(name)
    with jax.enable_x64(precise):
      s, t, x = rows(golden, jnp.float64 if precise else jnp.float32)
      value = jax.jit(
        lambda s, t, x: residuals.residual(
          equation, exact.average_velocity, s, t, x, residuals.Moving()
        )
      )(s, t, x)
    # float32: v and its derivatives are of order 10 at most
    np.testing.assert_allclose(value, 0, atol=1e-10 if precise else 1e-5)

  def test_mixture(self):
    golden, exact = load("mix_1d_asym_trig")

    def network(s, t, x):
      h = (t - s)[:, None]
      jump = (exact.flow_map(s, t, x) - x) / jnp.where(h == 0, 1, h)
      return jnp.where(h == 0, exact.velocity(t, x), jump)

    with jax.enable_x64(True):
      s, t, x = rows(golden, jnp.float64)
      apart = jnp.abs(t - s) > 0.02  # where the quotient has its digits
      s, t, x = s[apart], t[apart], x[apart]
      run = lambda equation, s, t, x: residuals.residual(
        equation, network, s, t, x, residuals.Moving()
      )
      values = jax.jit(lambda *rest: [run(e, *rest) for e in EQUATIONS])(
        s, t, x
      )
    self.assertGreater(len(s), 15)
    np.testing.assert_allclose(values, 0, atol=1e-9)

  @parameterized.parameters(*EQUATIONS)
  def test_another_velocity_is_not_perfect(self, equation):
    golden, exact = load("gauss_2d_noncommuting_linear")
    s, t, x = rows(golden, jnp.float32)
    value = residuals.residual(
      equation,
      lambda s, t, x: exact.average_velocity(s, t, x) * (1 + (t - s)[:, None]),
      s,
      t,
      x,
      residuals.Moving(),
    )
    self.assertGreater(float(jnp.abs(value).max()), 0.1)


class IdentitiesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    s, t, *x = jax.random.uniform(jax.random.key(0), (4, 32))
    self.s, self.t, self.x = s, t, jnp.stack(x, 1)

  @parameterized.parameters("lagrangian", "eulerian")
  def test_zero_on_the_diagonal(self, equation):
    for moving in (residuals.Moving(), residuals.Moving(time=True)):
      value = residuals.residual(
        equation, crooked, self.s, self.s, self.x, moving
      )
      np.testing.assert_array_equal(value, 0)

  @parameterized.parameters("s", "t")
  def test_semigroup_of_an_empty_step(self, end):
    # g = 0 or 1; with s = t in the batch, too
    t = self.t.at[:4].set(self.s[:4])
    u = self.s if end == "s" else t
    value = residuals.residual(
      "semigroup", crooked, self.s, t, self.x, residuals.Moving(), u=u
    )
    np.testing.assert_array_equal(value, 0)

  def test_mean_flow_is_the_eulerian_equation_rearranged(self):
    # R_E = d_s X + J X b, by the Jacobian of X itself
    with jax.enable_x64(True):
      s, t, x = (v.astype(jnp.float64) for v in (self.s, self.t, self.x))

      def move(s, x, t):  # one sample
        return x + (t - s) * crooked(s[None], t[None], x[None])[0]

      b = crooked(s, s, x)
      in_time = jax.vmap(jax.jacfwd(move))(s, x, t)
      in_space = jax.vmap(jax.jacfwd(move, 1))(s, x, t)
      wanted = in_time + jnp.einsum("bij,bj->bi", in_space, b)
      for moving in (
        residuals.Moving(),
        residuals.Moving(time=True),
        residuals.Moving(True, True, True),
      ):
        value = residuals.residual("eulerian", crooked, s, t, x, moving)
        np.testing.assert_allclose(value, -wanted, rtol=1e-12, atol=1e-12)

  def test_at_the_start_a_step_is_the_teachers(self):
    # a student whose second time does nothing yet is the velocity itself
    field = lambda s, t, x: crooked(s, s, x)
    run = functools.partial(
      residuals.residual,
      "eulerian",
      field,
      self.s,
      self.t,
      self.x,
      residuals.Moving(),
    )
    one = run(teacher=field)
    two = run(drift=field(self.s, self.s, self.x))
    np.testing.assert_array_equal(one, two)
    zero = lambda s, t, x: 0 * x  # X = id at initialisation
    value = residuals.residual(
      "semigroup", zero, self.s, self.t, self.x, residuals.Moving()
    )
    np.testing.assert_array_equal(value, 0)

  def test_unknown_equation(self):
    with self.assertRaisesRegex(ValueError, "'euler'"):
      residuals.residual(
        "euler", crooked, self.s, self.t, self.x, residuals.Moving()
      )


if __name__ == "__main__":
  absltest.main()
