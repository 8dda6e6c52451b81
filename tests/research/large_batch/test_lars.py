"""LARS against golden trajectories of both forms, and what its ratio means."""

# NumPy arrays stand for jax.Array; pytrees have no static type
# pyright: reportArgumentType=false

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from giantsteps.research import large_batch

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "large_batch"
NAMES = ("w", "b", "ln", "stack", "emb")

_MASKED = {
  "trust_mask": large_batch.matrices,
  "decay_mask": large_batch.matrices,
}
FORMS = {
  "optax": {},
  "optax_nesterov": {"nesterov": True},
  "optax_mask": _MASKED,
  "tpu": {"form": "tpu", **_MASKED},
  "tpu_nesterov": {"form": "tpu", "nesterov": True, **_MASKED},
}


def trajectory(tx, params, grads):
  """Parameters after each step [N, ...]; one compile."""

  def step(carry, g):
    params, state = carry
    updates, state = tx.update(g, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  run = lambda p, g: jax.lax.scan(step, (p, tx.init(p)), g)[1]
  return jax.jit(run)(params, grads)


def problem(file, dtype):
  """Initial parameters, 20 gradients and the archive of a golden file."""
  with np.load(GOLDEN / file) as archive:
    data = dict(archive)
  params = {n: jnp.asarray(data[f"init/{n}"], dtype) for n in NAMES}
  grads = {n: jnp.asarray(data[f"grad/{n}"], dtype) for n in NAMES}
  return params, grads, data


class LarsTest(parameterized.TestCase):
  @parameterized.parameters(*FORMS)
  def test_golden(self, name):
    with jax.enable_x64(True):
      params, grads, data = problem("lamb_lars_f64_seed0.npz", jnp.float64)
      tx = large_batch.lars(0.1, layer_axes={}, **FORMS[name])
      path = trajectory(tx, params, grads)
    for n in NAMES:
      np.testing.assert_allclose(
        path[n], data[f"lars/{name}/{n}"], rtol=1e-9, atol=1e-9, err_msg=n
      )

  def test_official_optax(self):
    params, grads, data = problem("optax_f32_seed10.npz", jnp.float32)
    path = trajectory(large_batch.lars(0.1, layer_axes={}), params, grads)
    for n in NAMES:
      np.testing.assert_allclose(
        path[n], data[f"lars/{n}"], rtol=2e-5, atol=2e-6
      )

  def test_first_step_is_rate_times_coefficient_times_norm_of_each_layer(self):
    params, grads, _ = problem("lamb_lars_f64_seed0.npz", jnp.float32)
    grads = jax.tree.map(jnp.ones_like, grads)
    for form in ("optax", "tpu"):
      tx = large_batch.lars(
        10.0, form=form, weight_decay=0.0, layer_axes={"stack": 0}
      )
      path = trajectory(tx, params, grads)
      for n, axes in (("stack", (1, 2)), ("w", (0, 1)), ("ln", (0,))):
        norm = lambda a, axes=axes: np.sqrt(np.sum(np.asarray(a) ** 2, axes))
        np.testing.assert_allclose(
          norm(path[n][0] - params[n]),
          10.0 * 1e-3 * norm(params[n]),
          rtol=2e-4,  # the difference of float32 loses 7 bits to 1 / 0.01
        )

  def test_stack_equals_separate_layers(self):
    with jax.enable_x64(True):
      params, grads, _ = problem("lamb_lars_f64_seed0.npz", jnp.float64)
      tx = large_batch.lars(0.1, form="tpu", layer_axes={"stack": 0})
      path = trajectory(tx, params, grads)
      separate = {str(i): params["stack"][i] for i in range(3)}
      g = {str(i): grads["stack"][:, i] for i in range(3)}
      alone = trajectory(large_batch.lars(0.1, form="tpu"), separate, g)
    for i in range(3):
      np.testing.assert_allclose(path["stack"][:, i], alone[str(i)], rtol=1e-13)

  def test_bfloat16_strict_promotion_and_debug_nans(self):
    params = {"w": jnp.ones((3, 2), jnp.bfloat16), "z": jnp.zeros((3, 2))}
    zero = jax.tree.map(jnp.zeros_like, params)
    rate = optax.linear_schedule(1.0, 0.0, 10)
    for form in ("optax", "tpu"):
      tx = large_batch.lars(rate, form=form, weight_decay=0.0)
      state = tx.init(params)
      with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        updates, state = jax.jit(tx.update)(zero, state, params)
      for leaf in jax.tree.leaves((updates, state.trace)):
        self.assertEqual(leaf.dtype, jnp.float32)
        np.testing.assert_array_equal(leaf, 0)

  def test_errors(self):
    params = {"a": jnp.ones((2, 3))}
    with self.assertRaisesRegex(ValueError, "form='tf'"):
      large_batch.lars(0.1, form="tf")
    with self.assertRaisesRegex(ValueError, "names .*'z'"):
      large_batch.lars(0.1, layer_axes={"z": 0}).init(params)
    with self.assertRaisesRegex(ValueError, "one ratio"):
      optax.flatten(large_batch.lars(0.1)).init(params)
    tx = large_batch.lars(0.1)
    with self.assertRaisesRegex(ValueError, "needs the parameters"):
      tx.update(params, tx.init(params))


if __name__ == "__main__":
  absltest.main()
