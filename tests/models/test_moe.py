"""The mixture of experts against a loop over tokens in float64, against the
dense block, and against a dense sum over all experts."""

# NumPy arrays stand for jax.Array; pytrees have no static type
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from giantsteps.experiments.harness import flops
from giantsteps.models import moe, partitioning, transformer

B, T, D, F, E = 2, 6, 8, 12, 5
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
SMALL = transformer.Config(
  vocab_size=11,
  width=16,
  depth=2,
  num_heads=2,
  num_kv_heads=2,
  head_dim=8,
  mlp_width=24,
  num_experts=4,
)
TOKENS = np.random.default_rng(1).integers(0, 11, (2, 12)).astype(np.int32)


def layer(k, **change):
  return moe.MixtureOfExperts(E, k, F, **change)


@functools.cache
def params_of(module, *shape):
  x = jnp.zeros(shape, jnp.int32 if len(shape) == 2 else jnp.float32)
  return jax.jit(module.init)(jax.random.key(0), x)["params"]


def silu(a):
  return a / (1 + np.exp(-a))


def numpy_experts(params, x, k):
  """Token by token in float64: outputs, softmaxes and chosen experts."""
  router = np.asarray(params["router"]["kernel"], np.float64)
  gate, up, down = (
    np.asarray(params["experts"][n], np.float64) for n in ("gate", "up", "down")
  )
  out = np.zeros(x.shape)
  probabilities = np.zeros((*x.shape[:2], E))
  chosen = np.zeros((*x.shape[:2], k), int)
  for b, t in np.ndindex(x.shape[:2]):
    token = x[b, t].astype(np.float64)
    scores = np.exp(token @ router)
    scores /= scores.sum()
    best = sorted(range(E), key=lambda i: -scores[i])[:k]
    total = sum(scores[i] for i in best) if k > 1 else 1.0
    for i in best:
      hidden = silu(token @ gate[i]) * (token @ up[i])
      out[b, t] += scores[i] / total * (hidden @ down[i])
    probabilities[b, t], chosen[b, t] = scores, best
  return out, probabilities, chosen


@pytest.mark.parametrize("k", [1, 2, E])
def test_equals_a_loop_over_tokens(k):
  params = params_of(layer(k), B, T, D)
  out, load = jax.jit(layer(k).apply)({"params": params}, X)
  exact, probabilities, chosen = numpy_experts(params, X, k)
  # sums of 8 and 12 numbers of order 1: 20 * 2^-24 = 1.2e-6
  np.testing.assert_allclose(out, exact, atol=3e-6)
  counts = [np.bincount(row.reshape(-1), minlength=E) for row in chosen]
  np.testing.assert_array_equal(load.counts, counts)
  np.testing.assert_allclose(
    load.probabilities, probabilities.sum(1), rtol=1e-5
  )


def test_gradients_equal_those_of_a_sum_over_all_experts():
  k = 2
  params = params_of(layer(k), B, T, D)
  target = np.random.default_rng(2).normal(size=X.shape).astype(np.float32)

  def grouped(params, x):
    return jnp.sum(layer(k).apply({"params": params}, x)[0] * target)

  def dense(params, x):  # every expert sees every token, gates of zero
    w = params["experts"]
    logits = x @ params["router"]["kernel"]
    worst_chosen = jnp.sort(logits, -1)[..., -k, None]
    gates = jax.nn.softmax(jnp.where(logits >= worst_chosen, logits, -jnp.inf))
    hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, w["gate"]))
    hidden = hidden * jnp.einsum("btd,edf->btef", x, w["up"])
    out = jnp.einsum("bte,btef,efd->btd", gates, hidden, w["down"])
    return jnp.sum(out * target)

  found = jax.jit(jax.grad(grouped, (0, 1)))(params, X)
  wanted = jax.jit(jax.grad(dense, (0, 1)))(params, X)
  # sums of up to 12 * 12 numbers of order 1
  close = functools.partial(np.testing.assert_allclose, atol=2e-5)
  jax.tree.map(close, found, wanted)
  assert np.abs(found[0]["router"]["kernel"]).max() > 1e-2


def test_no_token_is_dropped_when_all_choose_the_same_experts():
  params = dict(params_of(layer(2), B, T, D))
  params["router"] = {"kernel": jnp.zeros((D, E))}  # ties: experts 0 and 1
  out, load = jax.jit(layer(2).apply)({"params": params}, X)
  np.testing.assert_array_equal(load.counts, [[T, T, 0, 0, 0]] * B)
  exact, *_ = numpy_experts(params, X, 2)
  np.testing.assert_allclose(out, exact, atol=3e-6)


@pytest.mark.parametrize("k", [2])
def test_equal_experts_make_the_router_irrelevant(k):
  params = dict(params_of(layer(k), B, T, D))
  params["experts"] = jax.tree.map(
    lambda w: jnp.broadcast_to(w[:1], w.shape), params["experts"]
  )
  other = params | {"router": {"kernel": -3 * params["router"]["kernel"]}}
  apply = jax.jit(layer(k).apply)
  a, load_a = apply({"params": params}, X)
  b, load_b = apply({"params": other}, X)
  assert np.any(load_a.counts != load_b.counts)
  np.testing.assert_allclose(a, b, atol=1e-6)  # k gates that sum to 1 +- 2^-23


def test_one_expert_is_the_dense_block():
  config = dataclasses.replace(SMALL, num_experts=1, experts_per_token=1)
  params = params_of(transformer.Transformer(config), *TOKENS.shape)
  dense = params | {"layers": dict(params["layers"])}
  experts = dense["layers"].pop("moe")["experts"]
  for name, w in experts.items():
    dense["layers"][name] = {"kernel": w[:, 0]}
  plain = dataclasses.replace(SMALL, num_experts=0)
  forward = jax.jit(transformer.logits, static_argnums=0)
  np.testing.assert_array_equal(
    forward(config, params, TOKENS), forward(plain, dense, TOKENS)
  )


def test_the_load_has_a_row_per_layer_and_leaves_padding_out():
  params = params_of(transformer.Transformer(SMALL), *TOKENS.shape)
  forward = jax.jit(transformer.logits_and_load, static_argnums=0)
  _, load = forward(SMALL, params, TOKENS, np.ones(TOKENS.shape, bool))
  assert load.counts.shape == load.probabilities.shape == (2, 2, 4)
  np.testing.assert_array_equal(np.sum(load.counts, -1), 2 * TOKENS.shape[1])
  valid = np.arange(12)[None] < np.array([[5], [12]])
  _, some = forward(SMALL, params, TOKENS, valid)
  np.testing.assert_array_equal(np.sum(some.counts, -1), [[10, 24]] * 2)
  np.testing.assert_allclose(
    np.sum(some.probabilities, -1), [[5, 12]] * 2, rtol=1e-6
  )
  # causal: what comes after the five tokens of a row changes nothing
  other = np.where(valid, TOKENS, 0)
  _, same = forward(SMALL, params, other, valid)
  np.testing.assert_array_equal(some.counts, same.counts)


def test_bfloat16_routes_in_float32():
  module = layer(2, dtype="bfloat16")
  params = params_of(module, B, T, D)
  x = jnp.asarray(X, jnp.bfloat16)
  out, load = jax.jit(module.apply)({"params": params}, x)
  assert out.dtype == jnp.bfloat16
  assert load.probabilities.dtype == jnp.float32
  exact, probabilities, _ = numpy_experts(params, np.asarray(x, np.float32), 2)
  np.testing.assert_allclose(
    load.probabilities, probabilities.sum(1), rtol=1e-5
  )
  # four roundings of 2^-9 on the way
  error = np.linalg.norm(out.astype(jnp.float32) - exact)
  assert error < 4 * 2**-9 * np.linalg.norm(exact)


def test_strict_dtypes_and_nans():
  module = layer(2)
  params = params_of(module, B, T, D)
  loss = lambda p, x: jnp.sum(module.apply({"params": p}, x)[0])
  with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
    jax.jit(jax.grad(loss))(params, X)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform):
  module = layer(2, dtype="bfloat16")
  params = params_of(module, B, T, D)
  loss = lambda p, x: jnp.sum(module.apply({"params": p}, x)[0])
  traced = jax.jit(jax.grad(loss)).trace(params, X)
  traced.lower(lowering_platforms=(platform,))


def test_operations_are_those_of_the_chosen_experts():
  module = layer(2)
  params = params_of(module, B, T, D)
  jaxpr = jax.make_jaxpr(module.apply)({"params": params}, X)
  router = 2 * B * T * D * E
  assert flops.count(jaxpr) == router + 6 * B * T * 2 * D * F


def test_experts_lie_along_the_model_axis():
  mesh = AbstractMesh((2, 4, 2), ("data", "fsdp", "model"))
  spec = partitioning.spec("layers/moe/experts/up", (3, 4, 16, 24), mesh)
  assert spec == P(None, "model", "fsdp", None)


@pytest.mark.parametrize(
  ("change", "wanted"),
  [
    (dict(num_experts=-1), "num_experts=-1: must be 0 or more"),
    (dict(experts_per_token=5), "experts_per_token=5: must be 1 to num_exp"),
    (dict(experts_per_token=0), "experts_per_token=0: must be 1 to num_exp"),
  ],
)
def test_config_errors(change, wanted):
  with pytest.raises(ValueError, match=wanted):
    dataclasses.replace(SMALL, **change)


def test_call_errors():
  params = params_of(transformer.Transformer(SMALL), *TOKENS.shape)
  with pytest.raises(ValueError, match=r"valid \(2, 3\) does not fit tokens"):
    transformer.logits_and_load(SMALL, params, TOKENS, np.ones((2, 3), bool))
  dense = dataclasses.replace(SMALL, num_experts=0)
  with pytest.raises(ValueError, match="num_experts=0"):
    transformer.logits_and_load(dense, params, TOKENS)
