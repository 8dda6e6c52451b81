"""Counted operations against formulas."""

import jax
import jax.numpy as jnp

from giantsteps.experiments.harness import flops


def count(f, *shapes, devices=1):
  arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  return flops.count(jax.make_jaxpr(f)(*arrays), devices)


def test_products_convolutions_and_batches():
  assert count(jnp.matmul, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
  assert count(jnp.matmul, (4, 3, 5), (4, 5, 7)) == 2 * 4 * 3 * 5 * 7
  convolve = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME")
  # every one of 2 * 8 * 6 * 6 results sums 3 inputs times 9 taps
  image, kernel = (2, 3, 6, 6), (8, 3, 3, 3)
  assert count(convolve, image, kernel) == 2 * 2 * 8 * 36 * 27


def test_a_scan_and_its_gradient_are_multiplied():
  def f(w, x):
    step = lambda y, _: (jnp.tanh(y @ w), None)
    return jnp.sum(jax.lax.scan(step, x, None, length=6)[0])

  product = 2 * 3 * 5 * 5
  assert count(f, (5, 5), (3, 5)) == 6 * product
  # backward: one product for the weight and one for the input
  assert count(jax.grad(f), (5, 5), (3, 5)) == 6 * 3 * product


def test_the_body_of_a_shard_map_runs_on_every_device():
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((1,), ("data",), axis_types=auto)
  p = jax.sharding.PartitionSpec
  f = jax.shard_map(
    jnp.matmul, mesh=mesh, in_specs=(p("data"), p()), out_specs=p("data")
  )
  assert count(f, (3, 5), (5, 7), devices=4) == 4 * 2 * 3 * 5 * 7


def test_the_largest_branch_counts():
  f = lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y, lambda y: y, x)
  assert count(f, (4, 4)) == 2 * 4 * 4 * 4
