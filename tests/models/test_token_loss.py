"""Streamed cross entropy against NumPy in float64, on meshes, and its size."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from giantsteps.models import token_loss

rng = np.random.default_rng(0)
HIDDEN = rng.standard_normal((4, 13, 6))
HEAD = rng.standard_normal((6, 8))
TOKENS = rng.integers(0, 8, (4, 13))
WEIGHTS = rng.standard_normal((4, 13))


def exact():
  """NumPy: losses, and the gradients of sum(WEIGHTS * losses)."""
  logits = HIDDEN @ HEAD
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  one = np.eye(8)[TOKENS]
  losses = -np.log((p * one).sum(-1))
  d = WEIGHTS[..., None] * (p - one)
  return losses, d @ HEAD.T, np.einsum("btd,btv->dv", HIDDEN, d)


def results(hidden, head, tokens, weights, chunk):
  loss = lambda h, w: token_loss.cross_entropy(h, w, tokens, chunk=chunk)
  losses, pull = jax.vjp(loss, hidden, head)
  return losses, *pull(weights)


@pytest.mark.parametrize("chunk", [None, 1, 4, 12, 13, 50])
def test_equals_numpy(chunk):
  with jax.enable_x64(True):
    arrays = map(jnp.asarray, (HIDDEN, HEAD, TOKENS, WEIGHTS))
    found = jax.jit(functools.partial(results, chunk=chunk))(*arrays)
  for a, b in zip(found, exact(), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_whole_is_what_it_was():
  arrays = [jnp.asarray(x, jnp.float32) for x in (HIDDEN, HEAD)]
  found = jax.jit(token_loss.cross_entropy)(*arrays, jnp.asarray(TOKENS))
  plain = jax.jit(
    lambda h, w: optax.softmax_cross_entropy_with_integer_labels(
      h @ w, jnp.asarray(TOKENS)
    )
  )
  np.testing.assert_array_equal(found, plain(*arrays))


def test_bfloat16_adds_the_heads_gradient_in_float32():
  hidden = jnp.ones((1, 4_096, 1), jnp.bfloat16)
  head = jnp.zeros((1, 2), jnp.float32)
  tokens = jnp.zeros((1, 4_096), jnp.int32)
  loss = lambda w: jnp.sum(token_loss.cross_entropy(hidden, w, tokens, chunk=1))
  # every token adds -1/2 and 1/2; a bfloat16 sum stops at 128
  np.testing.assert_array_equal(jax.grad(loss)(head), [[-2_048, 2_048]])


def largest(jaxpr):
  """Elements of the largest array in a program and those it calls."""
  sizes = [math.prod(v.aval.shape) for e in jaxpr.eqns for v in e.outvars]
  inner = [
    largest(getattr(x, "jaxpr", x))
    for e in jaxpr.eqns
    for x in jax.tree.leaves(
      list(e.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
    )
    if hasattr(getattr(x, "jaxpr", x), "eqns")
  ]
  return max(sizes + inner, default=0)


@pytest.mark.parametrize(
  ("rows", "length", "positions"),
  [
    (1, 8_192, 8_192),  # 1 GiB - 24 MB: whole
    (1, 32_768, 2_048),
    (4, 16_384, 512),
    (1, 32_767, 2_048),  # padded
  ],
)
def test_streams_where_the_logits_are_large(rows, length, positions):
  hidden = jax.ShapeDtypeStruct((rows, length, 64), jnp.bfloat16)
  head = jax.ShapeDtypeStruct((64, 32_000), jnp.float32)
  tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  loss = lambda h, w, t: jnp.sum(token_loss.cross_entropy(h, w, t))
  program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, head, tokens)
  found = largest(program.jaxpr)
  assert found == rows * positions * 32_000


def sharded(sizes):
  """The three results on a mesh of eight devices."""
  mesh = jax.make_mesh(
    sizes, ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3
  )
  rows = NamedSharding(mesh, P(("data", "fsdp")))
  head = NamedSharding(mesh, P("fsdp", "model"))
  hidden = np.tile(HIDDEN, (2, 1, 1)).astype(np.float32)
  arrays = (
    jax.device_put(hidden, rows),
    jax.device_put(HEAD.astype(np.float32), head),
    jax.device_put(np.tile(TOKENS, (2, 1)), rows),
    jax.device_put(np.tile(WEIGHTS, (2, 1)).astype(np.float32), rows),
  )
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    found = jax.jit(functools.partial(results, chunk=4))(*arrays)
  return [np.asarray(x).tolist() for x in found]


@pytest.mark.parametrize("sizes", [(4, 2, 1), (2, 2, 2)])
def test_on_a_mesh(on_devices, sizes):
  found = on_devices(8, __file__, f"sharded({sizes})")
  losses, hidden, head = exact()
  twice = lambda x: np.concatenate([x, x])
  want = twice(losses), twice(hidden), 2 * head
  for a, b in zip(found, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_shapes_are_checked():
  with pytest.raises(ValueError, match=r"tokens \(2, 3\)"):
    token_loss.cross_entropy(
      jnp.zeros((2, 4, 5)), jnp.zeros((5, 7)), jnp.zeros((2, 3), int)
    )
  with pytest.raises(ValueError, match="chunk=0"):
    token_loss.cross_entropy(
      jnp.zeros((2, 3, 5)), jnp.zeros((5, 7)), jnp.zeros((2, 3), int), chunk=0
    )
