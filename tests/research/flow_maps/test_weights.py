"""Weights of losses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest

from giantsteps.research.flow_maps import weights


class WeightsTest(absltest.TestCase):
  def test_learned(self):
    # its gradient in w is 1 - e^{-w} L: zero at w = log L
    loss, w = jnp.array([0.5, 2.0, 800.0]), jnp.array([0.3, -1.0, 5.0])
    slope = jax.grad(lambda w: weights.learned(loss, w).sum())(w)
    np.testing.assert_allclose(slope, 1 - np.exp(-w) * loss, rtol=1e-5)
    best = jax.grad(lambda w: weights.learned(loss, w).sum())(jnp.log(loss))
    np.testing.assert_allclose(best, 0, atol=1e-5)
    value = weights.learned(loss, jnp.log(loss))
    np.testing.assert_allclose(value, 1 + np.log(loss), rtol=1e-5)

  def test_log_weight(self):
    params = weights.init(jax.random.key(0))
    self.assertEqual((params.shape, params.dtype), ((128,), jnp.float32))
    s, t = jax.random.uniform(jax.random.key(1), (2, 50))
    w = weights.log_weight(params, s, t)
    # by hand, float64; symmetric in (s, t), blind to the scale of the row
    frequency = 1e4 ** (-np.arange(64) / 64)
    emb = [
      np.concatenate([np.cos(v * frequency), np.sin(v * frequency)])
      for v in (float(s[0]), float(t[0]))
    ]
    row = np.asarray(params, float) / np.linalg.norm(params)
    np.testing.assert_allclose(w[0], row @ sum(emb) / 2**0.5, rtol=1e-4)
    np.testing.assert_allclose(weights.log_weight(params, t, s), w, rtol=1e-4)
    np.testing.assert_allclose(
      weights.log_weight(9 * params, s, t), w, rtol=1e-4, atol=1e-5
    )

  def test_bound(self):
    # |w| <= sqrt(128), reached on the diagonal by the row along emb(t)
    t = jnp.array([0.3])
    frequency = 1e4 ** (-np.arange(64) / 64)
    row = np.concatenate([np.cos(0.3 * frequency), np.sin(0.3 * frequency)])
    w = weights.log_weight(jnp.float32(row), t, t)
    np.testing.assert_allclose(w, 128**0.5, rtol=1e-5)
    with self.assertRaisesRegex(ValueError, "width=3"):
      weights.init(jax.random.key(0), 3)

  def test_learns_the_log_of_the_loss(self):
    # two losses at two pairs of times
    s, t = jnp.array([0.1, 0.9]), jnp.array([0.1, 1.0])
    loss = jnp.array([4.0, 12.0])

    adam = optax.adam(0.02)

    @jax.jit
    def descend(params):
      def total(params):
        return weights.learned(loss, weights.log_weight(params, s, t)).sum()

      def step(carry, _):
        params, state = carry
        updates, state = adam.update(jax.grad(total)(params), state)
        return (optax.apply_updates(params, updates), state), None

      start = params, adam.init(params)
      return jax.lax.scan(step, start, None, length=3000)[0][0]

    params = descend(weights.init(jax.random.key(0)))
    w = weights.log_weight(params, s, t)
    np.testing.assert_allclose(w, jnp.log(loss), rtol=0.02)

  def test_adaptive(self):
    loss = jnp.array([0.5, 2.0, 0.0])
    np.testing.assert_allclose(
      weights.adaptive(loss, 1.0, 0.5), loss / (loss + 0.5), rtol=1e-6
    )
    np.testing.assert_array_equal(weights.adaptive(loss, 0.0), loss)
    # the divisor is frozen
    slope = jax.grad(lambda x: weights.adaptive(x, 0.5, 0.5).sum())(loss)
    np.testing.assert_allclose(slope, (loss + 0.5) ** -0.5, rtol=1e-6)

  def test_pseudo_huber(self):
    gap = jnp.array([0.0, 1e-3, 30.0])
    got = weights.pseudo_huber(gap**2, 0.1)
    np.testing.assert_allclose(got[0], 0, atol=1e-8)
    np.testing.assert_allclose(got[1], 1e-6 / 0.2, rtol=2e-2)  # quadratic
    np.testing.assert_allclose(got[2], 30 - 0.1, rtol=1e-4)  # linear


if __name__ == "__main__":
  absltest.main()
