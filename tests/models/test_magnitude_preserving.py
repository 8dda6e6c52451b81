"""Magnitude-preserving layers: sizes, the sphere, invariance to scale."""

# NumPy arrays stand for jax.Array; parameters and results have no static type
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOperatorIssue=false

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from giantsteps.models import magnitude_preserving as mp


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


def rms(x):
  return float(jnp.sqrt(jnp.mean(jnp.square(x))))


X, Y = normal(64, 8, 8, 32), normal(64, 8, 8, 96, seed=1)


def linear(side):
  net = mp.Linear(48, side=side)
  params = net.init(jax.random.key(0), X[:1])["params"]
  return lambda x: net.apply({"params": params}, x)


@pytest.mark.parametrize(
  "layer",
  [
    mp.silu,
    functools.partial(mp.unit, axes=-1),
    lambda x: mp.add(x, Y[..., :32], 0.3),
    lambda x: mp.add(x, Y[..., :32]),
    lambda x: mp.concatenate(x, Y),
    lambda x: mp.concatenate(x, Y, 0.3),
    linear(1),
    lambda x: linear(3)(x)[:, 1:-1, 1:-1],  # the border sees zeros
    lambda x: mp.time_embedding(x.ravel(), 256),
  ],
)
def test_unit_magnitude_stays(layer):
  assert 0.9 < rms(layer(X)) < 1.1


def test_shares_of_a_concatenation():
  out = mp.concatenate(X, Y, 0.3)
  parts = [float(jnp.sum(x**2)) for x in (out[..., :32], out[..., 32:])]
  # energies in proportion (1 - share)^2 : share^2, whatever the widths
  np.testing.assert_allclose(parts[1] / parts[0], (0.3 / 0.7) ** 2, rtol=0.02)


def test_convolution_equals_shifted_products():
  x, net = normal(2, 5, 4, 3), mp.Linear(7, side=3)
  params = net.init(jax.random.key(0), x)["params"]
  w = np.asarray(params["weight"], np.float64)
  w = w / np.sqrt(np.sum(w**2, (0, 1, 2)))  # rms 1 and / sqrt(fan-in): norm 1
  padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
  want = sum(
    padded[:, i : i + 5, j : j + 4] @ w[i, j]
    for i in range(3)
    for j in range(3)
  )
  np.testing.assert_allclose(
    net.apply({"params": params}, x, 2.0), 2 * want, atol=1e-5
  )


@pytest.mark.parametrize("side", [1, 3])
def test_result_does_not_depend_on_the_scale_of_the_weights(side):
  net = mp.Linear(48, side=side)
  params = net.init(jax.random.key(0), X)["params"]
  scale = jnp.exp2(jnp.arange(48.0) / 8 - 2)  # 1/4 .. 15, each output its own
  scaled = {"weight": params["weight"] * scale[(None,) * (side // 2 * 2 + 1)]}
  np.testing.assert_allclose(
    net.apply({"params": scaled}, X),
    net.apply({"params": params}, X),
    atol=1e-5,
  )


def test_projection():
  trees = {
    "layers": {"conv": {"weight": 3 + normal(5, 3, 3, 4, 6)}},
    "stack": {"layers": {"weight": 0.1 * normal(5, 4, 6)}},
    "conv": {"weight": normal(3, 3, 4, 6)},
    "dense": {"weight": normal(4, 6)},
    "gain": normal(),
  }
  once = mp.project(trees)
  assert once["gain"] == trees["gain"]
  found = [
    (once["stack"]["layers"], 1),
    (once["conv"], (0, 1, 2)),
    (once["dense"], 0),
  ]
  for layer, axes in found:
    size = jnp.sqrt(jnp.mean(layer["weight"] ** 2, axes))
    # EPS^2 / 2 / (mean square): the smallest of these is 6e-4
    np.testing.assert_allclose(size, 1, rtol=1e-5)
  # layer by layer, as if they were not stacked
  alone = mp.project({"weight": trees["layers"]["conv"]["weight"][2]})
  np.testing.assert_allclose(
    once["layers"]["conv"]["weight"][2], alone["weight"], rtol=1e-6
  )
  twice = mp.project(once)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), twice, once
  )


def test_stored_weights_start_on_the_sphere():
  net = mp.Linear(48, side=3, param_dtype="bfloat16")
  params = net.init(jax.random.key(0), X)["params"]
  assert params["weight"].dtype == jnp.bfloat16
  size = jnp.sqrt(jnp.mean(jnp.float32(params["weight"]) ** 2, (0, 1, 2)))
  # rounding 288 numbers to 2^-9 moves their root mean square far less
  np.testing.assert_allclose(size, 1, rtol=2e-3)


def test_zeros_are_differentiable_twice():
  f = lambda x: jnp.sum(mp.unit(x, -1) * X[0, 0, 0])
  zero = jnp.zeros(32)
  assert np.isfinite(jax.hessian(f)(zero)).all()
  np.testing.assert_array_equal(mp.unit(zero, -1), zero)


def test_bfloat16_squares_do_not_overflow():
  x = jnp.full((2, 8), 1e18, jnp.bfloat16)
  out = mp.unit(x, -1)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(jnp.float32(out), 1.0, rtol=2**-8)
