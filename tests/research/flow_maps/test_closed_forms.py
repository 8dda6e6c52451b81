"""Closed forms against golden files and against each other."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import stats

from giantsteps.research import flow_maps
from giantsteps.research.flow_maps import closed_forms

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "flow_maps"
KINDS = {"linear": flow_maps.linear(), "trig": flow_maps.trigonometric()}
GAUSSIANS = (
  "gauss_1d_linear",
  "gauss_1d_trig",
  "gauss_2d_full_linear",
  "gauss_2d_noncommuting_linear",
  "gauss_5d_full_trig",
)
MIXTURES = (
  "mix_1d_sym_linear",
  "mix_1d_asym_trig",
  "mix_2d_linear",
  "mix_2d_asym_linear",
)


def load(name):
  golden = np.load(GOLDEN / f"{name}.npz")
  return golden, [golden[k] for k in ("s", "t", "x")]


def gaussian(golden):
  moments = (golden[k] for k in ("m0", "S0", "m1", "S1"))
  return closed_forms.gaussian(KINDS[str(golden["kind"])], *moments)


def mixture(golden):
  parts = (golden[k] for k in ("w", "mu", "sk"))
  I = KINDS[str(golden["kind"])]
  return closed_forms.mixture(I, float(golden["sig0"]), *parts)


class GaussianTest(parameterized.TestCase):
  @parameterized.parameters(*GAUSSIANS)
  def test_golden(self, name):
    golden, rows = load(name)
    flow = gaussian(golden)

    @jax.jit
    def run(s, t, x):
      slope_s = jax.jvp(lambda s: flow.flow_map(s, t, x), (s,), (s * 0 + 1,))
      slope_t = jax.jvp(lambda t: flow.flow_map(s, t, x), (t,), (t * 0 + 1,))
      return {
        "X_st": flow.flow_map(s, t, x),
        "v_st": flow.average_velocity(s, t, x),
        "b_s": flow.velocity(s, x),
        "J_st": flow.jacobian(s, t),
        "logp_s": flow.log_density(s, x),
        "dsX_st": slope_s[1],
        "dtX_st": slope_t[1],
      }

    with jax.enable_x64(True):
      got = run(*(jnp.asarray(v) for v in rows))
    for key, value in got.items():
      # v_st of the file is a quotient: 1e-16 over the smallest |t - s|
      np.testing.assert_allclose(
        value, golden[key], rtol=1e-9, atol=1e-12, err_msg=key
      )
    # float32, as the golden file has it
    got = run(*(jnp.asarray(v, jnp.float32) for v in rows))
    for key, value in got.items():
      self.assertEqual(value.dtype, jnp.float32)
      np.testing.assert_allclose(
        value, golden[key], rtol=2e-4, atol=2e-5, err_msg=key
      )

  def test_one_time_for_the_batch(self):
    golden, (_, _, x) = load("gauss_2d_full_linear")
    flow, x = gaussian(golden), jnp.asarray(x, jnp.float32)
    many = jnp.full(len(x), 0.25)
    np.testing.assert_array_equal(
      flow.velocity(0.25, x), flow.velocity(many, x)
    )
    np.testing.assert_array_equal(
      flow.flow_map(0.25, 1.0, x), flow.flow_map(many, 4 * many, x)
    )

  def test_golden_reflow(self):
    # the monotone map N(0, 1) -> N(m1, s1^2) makes the pairs
    golden = np.load(GOLDEN / "reflow_1d.npz")
    flow = closed_forms.gaussian(
      KINDS["linear"], [0], [[1]], [golden["m1"]], [[golden["s1"] ** 2]]
    )
    with jax.enable_x64(True):
      x0 = jnp.asarray(golden["x0"])[:, None]
      x1 = flow.flow_map(0.0, 1.0, x0)
      x_t, slope = KINDS["linear"](jnp.asarray(golden["t"]), x0, x1)
    np.testing.assert_allclose(x1[:, 0], golden["x1"], rtol=1e-9)
    np.testing.assert_allclose(x_t[:, 0], golden["x_t"], rtol=1e-9)
    np.testing.assert_allclose(slope[:, 0], golden["velocity"], rtol=1e-9)

  def test_errors(self):
    one = np.eye(2)
    make = lambda *moments: closed_forms.gaussian(KINDS["linear"], *moments)
    with self.assertRaisesRegex(ValueError, r"m1 \(3,\)"):
      make(np.zeros(2), one, np.zeros(3), one)
    with self.assertRaisesRegex(ValueError, "S1 must be symmetric"):
      make(np.zeros(2), one, np.zeros(2), np.array([[1, 1], [0, 1]]))
    with self.assertRaisesRegex(ValueError, "S0 must be positive"):
      make(np.zeros(2), 0 * one, np.zeros(2), one)
    with self.assertRaisesRegex(ValueError, "S1 must be positive"):
      make(np.zeros(2), one, np.zeros(2), -one)


class MixtureTest(parameterized.TestCase):
  @parameterized.parameters(*MIXTURES)
  def test_golden(self, name):
    golden, rows = load(name)
    flow = mixture(golden)
    with jax.enable_x64(True):
      s, _, x = (jnp.asarray(v) for v in rows)
      velocity, log = jax.jit(
        lambda s, x: (flow.velocity(s, x), flow.log_density(s, x))
      )(s, x)
    np.testing.assert_allclose(velocity, golden["b_s"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(log, golden["logp_s"], rtol=1e-9, atol=1e-9)

  @parameterized.parameters("mix_1d_sym_linear", "mix_1d_asym_trig")
  def test_quantile_transport(self, name):
    golden, rows = load(name)
    flow = mixture(golden)

    @jax.jit
    def run(s, t, x):
      y, push = jax.linearize(flow.flow_map, s, t, x)
      zero, one = jnp.zeros_like(s), jnp.ones_like(s)
      return {
        "X_st": y,
        "dsX_st": push(one, zero, 0 * x),
        "dtX_st": push(zero, one, 0 * x),
        "J_st": push(zero, zero, 0 * x + 1)[..., None],
        "logp_t_at_X": flow.log_density(t, y),
      }

    with jax.enable_x64(True):
      got = run(*(jnp.asarray(v) for v in rows))
    for key, value in got.items():
      np.testing.assert_allclose(
        value, golden[key], rtol=1e-9, atol=1e-9, err_msg=key
      )
    got = run(*(jnp.asarray(v, jnp.float32) for v in rows))
    for key in ("X_st", "dsX_st", "dtX_st", "J_st"):
      np.testing.assert_allclose(
        got[key], golden[key], rtol=2e-4, atol=2e-4, err_msg=key
      )

  def test_tails(self):
    # 12 standard deviations out F is 1 in float64. There the wider component
    # (weight 1/2) has all the mass: (1 - Phi(z)) / 2 = 1 - Phi(12)
    with jax.enable_x64(True):
      flow = closed_forms.mixture(
        KINDS["linear"], 1.0, [0.5, 0.5], [[-1.0], [2.0]], [0.1, 0.5]
      )
      x = jnp.array([[12.0]])
      y = jax.jit(lambda x: flow.flow_map(0.0, 1.0, x))(x)
    z = stats.norm.isf(2 * stats.norm.sf(12.0))
    np.testing.assert_allclose(y, [[2 + 0.5 * z]], rtol=1e-10)

  def test_errors(self):
    make = lambda *rest: closed_forms.mixture(KINDS["linear"], *rest)
    with self.assertRaisesRegex(ValueError, "sum 1"):
      make(1.0, [0.5, 0.6], [[0.0], [1.0]], [1.0, 1.0])
    with self.assertRaisesRegex(ValueError, r"\(2,\), \(2,\), \(2,\)"):
      make(1.0, [0.5, 0.5], [0.0, 1.0], [1.0, 1.0])
    with self.assertRaisesRegex(ValueError, "sigma0=0.0"):
      make(0.0, [0.5, 0.5], [[0.0], [1.0]], [1.0, 1.0])
    flow = make(1.0, [1.0], [[0.0, 0.0]], [1.0])
    with self.assertRaisesRegex(ValueError, "integrate"):
      flow.flow_map(0.0, 1.0, jnp.ones((3, 2)))


if __name__ == "__main__":
  absltest.main()
