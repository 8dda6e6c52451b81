"""Map errors where the model is the closed form, and where it is known wrong."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

from giantsteps.experiments.harness import map_error
from giantsteps.research import flow_maps
from giantsteps.research.flow_maps import closed_forms

SHIFT = np.array([[0.3, -0.4]])
S1 = np.array([[0.5, 0.2], [0.2, 0.9]])
PROBLEM = closed_forms.gaussian(
  flow_maps.linear(), np.zeros(2), np.eye(2), np.array([1.0, -0.5]), S1
)
PERFECT = PROBLEM.average_velocity
BOTH = (
  lambda x: PROBLEM.log_density(0.0, x),
  lambda x: PROBLEM.log_density(1.0, x),
)


def shifted(s, t, x):  # X_{s,t} + (t - s) SHIFT
  return PERFECT(s, t, x) + SHIFT.astype(x.dtype)


def draws(n=200):
  with jax.enable_x64(True):
    x0 = jnp.asarray(np.random.default_rng(0).standard_normal((n, 2)))
    return x0, PROBLEM.flow_map(0.0, 1.0, x0)


@pytest.mark.parametrize("times", [[0, 1], [0, 0.2, 0.7, 1]])
def test_gaussian_map(times):
  x0, x1 = draws()
  exact = lambda x: PROBLEM.flow_map(0.0, 1.0, x)
  with jax.enable_x64(True):
    right = map_error.transport_error(PERFECT, exact, x0, times)
    nothing = map_error.transport_error(lambda s, t, x: 0 * x, exact, x0, times)
  assert right["error"] < 1e-24
  want = np.mean(np.sum(np.asarray(x1 - x0) ** 2, -1))
  np.testing.assert_allclose(nothing["error"], want, rtol=1e-12)
  np.testing.assert_allclose(right["no_model"], want, rtol=1e-12)


def test_a_shift_costs_its_square():
  x0, _ = draws()
  exact = lambda x: PROBLEM.flow_map(0.0, 1.0, x)
  with jax.enable_x64(True):
    got = map_error.transport_error(shifted, exact, x0, [0, 1])
  np.testing.assert_allclose(got["error"], 0.25, rtol=1e-10)
  assert got["standard_error"] < 1e-12


def test_divergences_of_the_true_map_are_nil():
  x0, x1 = draws()
  with jax.enable_x64(True):
    got = map_error.one_step_divergences(PERFECT, *BOTH, x0, x1)
    truth = float(BOTH[1](x1).mean())
  np.testing.assert_allclose(got["reverse_kl"], 0, atol=1e-11)
  np.testing.assert_allclose(got["forward_kl"], 0, atol=1e-11)
  np.testing.assert_allclose(got["log_likelihood"], truth, rtol=1e-11)
  assert got["inverted"] == 1


def test_divergences_of_a_shift():
  # Gaussians with one covariance: KL = c' S^-1 c / 2 either way, and per draw
  # the ratio is that plus or minus a term linear in x1 - m1.
  x0, x1 = draws()
  with jax.enable_x64(True):
    got = map_error.one_step_divergences(shifted, *BOTH, x0, x1)
  c = SHIFT[0]
  half = c @ np.linalg.solve(S1, c) / 2
  off = (np.asarray(x1) - [1.0, -0.5]).mean(0)
  tilt = off @ np.linalg.solve(S1, c)
  # the model at x1 has the mean m1 + c; the data at x1 + c is off by c
  np.testing.assert_allclose(got["forward_kl"], half - tilt, rtol=1e-9)
  np.testing.assert_allclose(got["reverse_kl"], half + tilt, rtol=1e-9)
  assert got["inverted"] == 1


def test_the_right_distribution_by_the_wrong_map():
  # A symmetric mixture in one dimension: x -> X(-x) has the same law. X is
  # quantile transport, solved by SciPy.
  law = lambda y: sum(stats.norm.cdf(y, m, 0.4) for m in (-2, 2)) / 2
  half = np.linspace(0.05, 3, 16)
  ends: Any = [
    optimize.brentq(lambda y, x=x: law(y) - stats.norm.cdf(x), -9, 9)
    for x in half
  ]
  x0 = jnp.asarray(np.concatenate([half, -half])[:, None], jnp.float32)
  X = jnp.asarray(np.concatenate([ends, np.negative(ends)])[:, None])
  exact = lambda x: X
  right = lambda s, t, x: X.astype(x.dtype) - x
  mirrored = lambda s, t, x: -X.astype(x.dtype) - x
  good = map_error.transport_error(right, exact, x0, [0, 1])
  bad = map_error.transport_error(mirrored, exact, x0, [0, 1])
  assert good["error"] < 1e-9
  want = 4 * np.mean(np.square(ends))  # X is odd
  np.testing.assert_allclose(bad["error"], want, rtol=1e-3)
  assert bad["error"] > 10


def test_data_that_is_not_reached():
  # tanh is no map onto the line: data beyond 1 has no preimage
  bounded = lambda s, t, x: jnp.tanh(x) - x
  x0, _ = draws(32)
  x1 = jnp.full((4, 2), 3.0).at[0].set(0.1)
  got = map_error.one_step_divergences(
    bounded, *BOTH, x0.astype(jnp.float32), x1
  )
  assert got["inverted"] == 0.25 and np.isfinite(got["log_likelihood"])
