"""The checkerboard's network against its formula and its published size."""

# NumPy arrays stand for jax.Array; parameters and results have no static type
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOperatorIssue=false

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from giantsteps.models import plain_mlp

CONFIG = plain_mlp.Config(width=16, depth=2, num_classes=3)
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)), jnp.float32)
S = jnp.asarray([0.0, 0.2, 0.5, 0.9], jnp.float32)
T = jnp.asarray([0.1, 0.2, 0.8, 1.0], jnp.float32)
LABELS = jnp.asarray([0, 2, 1, 3], jnp.int32)


def build(**changes):
  net = plain_mlp.PlainMlp(dataclasses.replace(CONFIG, **changes))
  params = net.init(jax.random.key(0), X, T)["params"]
  return params, lambda *args, **kw: net.apply({"params": params}, *args, **kw)


def test_published_number_of_parameters():
  net = plain_mlp.PlainMlp(plain_mlp.Config())
  shapes = jax.eval_shape(net.init, jax.random.key(0), X, T)
  count = sum(x.size for x in jax.tree.leaves(shapes))
  assert round(count / 1e6, 2) == 1.05


def test_equals_numpy():
  params, apply = build()
  one_hot = np.eye(4)[np.asarray(LABELS)]
  h = np.concatenate([S[:, None], T[:, None], X, one_hot], -1)
  for name in ("in", "hidden_0", "hidden_1"):
    layer = jax.tree.map(np.float64, params[name])
    h = h @ layer["kernel"] + layer["bias"]
    # the approximation by tanh, as in the authors' code
    h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
  layer = jax.tree.map(np.float64, params["out"])
  want = h @ layer["kernel"] + layer["bias"]
  np.testing.assert_allclose(apply(X, T, S, LABELS), want, atol=2e-6)


def test_missing_conditions_are_the_diagonal_and_no_class():
  _, apply = build()
  none = jnp.full(4, 3, jnp.int32)
  np.testing.assert_array_equal(apply(X, T), apply(X, T, T, none))
  assert float(jnp.abs(apply(X, T) - apply(X, T, S)).max()) > 1e-3


def test_one_time():
  params, apply = build(two_times=False, num_classes=0)
  assert params["in"]["kernel"].shape == (3, 16)
  assert apply(X, T).shape == X.shape
  with pytest.raises(ValueError, match="two_times=True"):
    apply(X, T, S)
  with pytest.raises(ValueError, match="num_classes"):
    apply(X, T, labels=LABELS)


def test_bfloat16_returns_float32():
  _, apply = build(dtype="bfloat16")
  assert apply(X.reshape(4, 1, 2), T, S).shape == (4, 1, 2)
  assert apply(X, T, S).dtype == jnp.float32
