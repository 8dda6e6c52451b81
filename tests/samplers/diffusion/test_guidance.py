"""Guidance: mixtures in closed form, program size, recompiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.samplers.diffusion import (
  grids,
  guidance,
  schedules,
  solvers,
  tables,
)

VP = schedules.vp_linear()
WEIGHT = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32) / 3
X = jax.random.normal(jax.random.key(0), (4, 6))
T = jnp.linspace(0.9, 0.1, 4)
CONDITION = jax.random.normal(jax.random.key(1), (4, 6))
NULL = jnp.zeros(6)


def network(x, t, condition):
  return jnp.tanh(x @ WEIGHT + t[:, None] + condition)


def guided(scale, **settings):
  return guidance.classifier_free(network, CONDITION, NULL, scale, **settings)


class ClassifierFreeTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 1.0, 3.0, -1.0)
  def test_definition(self, scale):
    c = network(X, T, CONDITION)
    u = network(X, T, jnp.zeros((4, 6)))
    for value in (scale, jnp.float32(scale), jnp.full(4, scale)):
      got = guided(value)(X, T)
      # a matmul of another batch size rounds otherwise
      np.testing.assert_allclose(got, u + scale * (c - u), atol=4e-6)

  def test_scale_per_sample(self):
    scales = jnp.array([0.0, 1.0, 2.0, 5.0])
    got = guided(scales)(X, T)
    for i, scale in enumerate(scales):
      np.testing.assert_allclose(got[i], guided(scale)(X, T)[i], atol=1e-6)

  def test_interval(self):
    # times .9, .633, .367, .1: guidance in the middle two only
    got = guided(4.0, interval=(0.3, 0.7))(X, T)
    on, off = guided(4.0)(X, T), guided(jnp.float32(1.0))(X, T)
    np.testing.assert_allclose(got[1:3], on[1:3], rtol=1e-6)
    np.testing.assert_allclose(got[::3], off[::3], rtol=1e-6)
    with self.assertRaisesRegex(ValueError, r"\(0.7, 0.3\)"):
      guided(4.0, interval=(0.7, 0.3))

  def test_scale_as_a_function_of_time(self):
    got = guided(lambda t: 1 + 2 * t)(X, T)
    np.testing.assert_allclose(got, guided(1 + 2 * T)(X, T), rtol=1e-6)

  def test_batch_is_doubled_once_and_only_if_needed(self):
    shapes = []

    def model(x, t, condition):
      shapes.append((x.shape, t.shape, condition["a"].shape))
      return x

    condition, null = {"a": CONDITION}, {"a": NULL}
    make = functools.partial(guidance.classifier_free, model, condition, null)
    make(1)(X, T)
    make(1.0)(X, T)
    make(2.0)(X, T)
    make(jnp.float32(1.0))(X, T)
    one, two = ((4, 6), (4,), (4, 6)), ((8, 6), (8,), (8, 6))
    self.assertEqual(shapes, [one, one, two, two])

  def test_integer_labels(self):
    table = jax.random.normal(jax.random.key(2), (11, 6))
    model = lambda x, t, label: x + table[label]
    labels = jnp.array([3, 1, 4, 1])
    predict = guidance.classifier_free(model, labels, 10, 2.0)
    expected = X + 2 * table[labels] - table[10:]
    np.testing.assert_allclose(predict(X, T), expected, atol=1e-5)

  def test_one_compile_for_everything(self):
    traces = []

    @jax.jit
    def run(x, table, scale, condition):
      def model(x, t, condition):
        traces.append(x.shape)
        return network(x, t, condition)

      predict = guidance.classifier_free(model, condition, NULL, scale)
      return tables.sample(predict, x, table)

    flow = schedules.rectified_flow(3.0)
    outs = set()
    for schedule in (VP, schedules.vp_cosine(), flow):
      times = grids.uniform_time(schedule, num_steps=6)
      for make in (
        solvers.ddim,
        solvers.dpm_solver_pp,
        functools.partial(solvers.dpm_solver_pp, order=3, published=True),
        functools.partial(solvers.dpm_solver_pp, order=3, method="singlestep"),
        functools.partial(solvers.unipc, variant="bh1"),
        functools.partial(solvers.adams, gauge="angle", variable="phi"),
        solvers.sa_solver,
      ):
        for prediction, scale in (("v", 1.0), ("flow", 2.0), ("velocity", 7.5)):
          table = make(schedule, times, prediction=prediction)
          table = table._replace(noise=0 * table.noise)
          out = run(X, table, scale, CONDITION)
          outs.add(float(out[0, 0]))
    self.assertLen(traces, 1)
    self.assertLen(outs, 63)


class ClassifierTest(parameterized.TestCase):
  """Gaussian classes with means +- M: Bayes gives the conditional model."""

  M, C = 1.5, 0.6

  def model(self, x, t, label=None):
    """E[eps | x] of one class, or of the equal mixture of both."""
    alpha, sigma = self.clock(t)
    variance = alpha**2 * self.C**2 + sigma**2
    if label is not None:
      sign = label
    else:
      sign = jnp.tanh(alpha * self.M * x / variance)
    return sigma * (x - sign * alpha * self.M) / variance

  def clock(self, t):
    log = -(t**2) * (20 - 0.1) / 4 - 0.1 * t / 2
    return jnp.exp(log)[:, None], jnp.sqrt(-jnp.expm1(2 * log))[:, None]

  def log_prob(self, x, t):
    alpha, sigma = self.clock(t)
    variance = alpha**2 * self.C**2 + sigma**2
    return jax.nn.log_sigmoid(2 * alpha * self.M * x / variance)[:, 0]

  @parameterized.parameters("eps", "x0", "v")
  def test_bayes(self, prediction):
    def form(eps, x, t):
      alpha, sigma = self.clock(t)
      x0 = (x - sigma * eps) / alpha
      return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[prediction]

    unconditional = lambda x, t: form(self.model(x, t), x, t)
    predict = guidance.classifier(
      unconditional,
      self.log_prob,
      1.0,
      schedule=VP,
      prediction=prediction,
    )
    with jax.enable_x64(True):
      x, t = jnp.linspace(-2, 2, 9)[:, None], jnp.linspace(0.05, 0.95, 9)
      exact = form(self.model(x, t, 1.0), x, t)
      # linear interpolation of the gain over 4096 times: h^2 f'' / 8, and
      # alpha(.95) = .01 divides the x0 form
      np.testing.assert_allclose(predict(x, t), exact, rtol=1e-5, atol=1e-5)

  def test_interval_and_scale(self):
    make = functools.partial(
      guidance.classifier,
      self.model,
      self.log_prob,
      schedule=VP,
      prediction="eps",
    )
    x, t = jnp.ones((2, 1)), jnp.array([0.2, 0.8])
    off = self.model(x, t)
    part = make(2.0, interval=(0.5, 1.0))(x, t)
    np.testing.assert_allclose(part[0], off[0], rtol=1e-6)
    step = make(1.0)(x, t) - off
    np.testing.assert_allclose(part[1], (off + 2 * step)[1], rtol=1e-5)


if __name__ == "__main__":
  absltest.main()
