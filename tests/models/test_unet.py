"""The U-Net: a plain transcription in float64, published sizes, invariants."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from giantsteps.models import unet

# equal blocks in stacks of two, levels of unequal width, attention inside a
# level and at the bottom
CONFIG = unet.Config(
  channels=4,
  multipliers=(1, 2),
  blocks=2,
  attention=(4,),
  head_dim=4,
  dropout=0.2,
  num_classes=2,
  two_times=True,
)
SMALL = {"multipliers": (1,), "blocks": 1}  # quick to compile
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 8, 4, 2)).astype(np.float32)
S = np.array([0.0, 0.5, 0.9], np.float32)
T = np.array([0.4, 0.1, 1.0], np.float32)
LABELS = np.array([0, 1, 2], np.int32)


@functools.cache
def build(**changes):
  """(params of which nothing is zero, jitted apply)."""
  net = unet.Unet(dataclasses.replace(CONFIG, **changes))
  shapes = jax.eval_shape(net.init, jax.random.key(0), X, T)["params"]
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda a: rng.normal(size=a.shape), shapes)

  @jax.jit
  def apply(params, x, t, s=None, labels=None, key=None):
    rngs = {} if key is None else {"dropout": key}
    return net.apply({"params": params}, x, t, s, labels, rngs=rngs)

  return params, apply


def root(x, axis):
  return np.sqrt(np.mean(x**2, axis, keepdims=True))


def silu(x):
  return x / (1 + np.exp(-x)) / 0.596


def mix(a, b, t):
  return ((1 - t) * a + t * b) / np.sqrt((1 - t) ** 2 + t**2)


def product(p, x, gain=1.0):
  """A layer on [B, D] or channels first, [B, D, H, W]."""
  w = p["weight"]
  w = w / np.sqrt(np.sum(w**2, tuple(range(w.ndim - 1)))) * gain
  if w.ndim == 2:
    return np.einsum("bd...,de->be...", x, w)
  height, width = x.shape[2:]
  x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
  out = 0.0 * np.einsum("bdhw,de->behw", x[:, :, 2:, 2:], w[0, 0])
  for i, j in np.ndindex(3, 3):
    part = x[:, :, i : i + height, j : j + width]
    out += np.einsum("bdhw,de->behw", part, w[i, j])
  return out


def embedding(p, s, t, labels):
  def waves(t, width=4):
    angle = t[:, None] * 1e4 ** (-np.arange(width // 2) / (width // 2))
    return np.sqrt(2) * np.concatenate([np.cos(angle), np.sin(angle)], 1)

  emb = mix(product(p["time"], waves(s)), product(p["gap"], waves(t - s)), 0.5)
  one_hot = np.sqrt(3) * np.eye(3)[labels]
  return silu(mix(emb, product(p["label"], one_hot), 0.5))


def attention(p, x, head=4):
  rows, size, height, width = x.shape
  qkv = product(p["qkv"], x).reshape(rows, 3, size // head, head, -1)
  q, k, v = np.moveaxis(qkv / root(qkv, 3), 1, 0)
  p_ = np.exp(np.einsum("bhdq,bhdk->bhqk", q, k) / np.sqrt(head))
  p_ /= p_.sum(-1, keepdims=True)
  out = np.einsum("bhqk,bhdk->bhdq", p_, v).reshape(x.shape)
  return mix(x, product(p["attention_out"], out), 0.3)


def block(p, x, emb, *, encoder, attend=False):
  if encoder:
    x = product(p["shortcut"], x) if "shortcut" in p else x
    x = x / root(x, 1)
  y = product(p["conv_0"], silu(x))
  scale = 1 + product(p["emb"], emb, p["emb_gain"])
  y = product(p["conv_1"], silu(y * scale[:, :, None, None]))
  if "shortcut" in p and not encoder:
    x = product(p["shortcut"], x)
  x = mix(x, y, 0.3)
  x = attention(p, x) if attend else x
  return np.clip(x, -256, 256)


def joined(a, b):
  na, nb = a.shape[1], b.shape[1]
  c = np.sqrt((na + nb) / 0.5) / 2
  return np.concatenate([c / np.sqrt(na) * a, c / np.sqrt(nb) * b], 1)


def transcription(params, x, s, t, labels):
  """Figure 21 of the paper for `CONFIG`: channels first, a list of blocks."""
  of = lambda name, i: jax.tree.map(lambda a: a[i], params[name]["layers"])
  emb = embedding(params["embedding"], s, t, labels)
  enc = functools.partial(block, emb=emb, encoder=True)
  dec = functools.partial(block, emb=emb, encoder=False)
  x = np.moveaxis(x, -1, 1)
  x = np.concatenate([x, np.ones_like(x[:, :1])], 1)
  skips = [x := product(params["in"], x)]
  for i in range(2):
    skips.append(x := enc(of("encoder_0_0", i), x))
  x = x.reshape(*x.shape[:2], 4, 2, 2, 2).mean((3, 5))
  skips.append(x := enc(params["down_1"], x))
  for i in range(2):
    skips.append(x := enc(params[f"encoder_1_{i}"], x, attend=True))
  x = dec(params["bottom_0"], x, attend=True)
  x = dec(params["bottom_1"], x)
  for i in range(2):
    x = dec(of("decoder_1_0", i), joined(x, skips.pop()), attend=True)
  x = dec(params["decoder_1_2"], joined(x, skips.pop()), attend=True)
  x = dec(params["up_0"], x.repeat(2, 2).repeat(2, 3))
  x = dec(params["decoder_0_0"], joined(x, skips.pop()))
  for i in range(2):
    x = dec(of("decoder_0_1", i), joined(x, skips.pop()))
  assert not skips
  return np.moveaxis(product(params["out"], x, params["out_gain"]), 1, -1)


def test_equals_a_transcription():
  x, s, t = (a.astype(np.float64) for a in (X, S, T))
  with jax.enable_x64(True):
    params, apply = build(dtype="float64", param_dtype="float64")
    out = np.asarray(apply(params, x, t, s, LABELS))
    assert out.dtype == np.float64
  want = transcription(params, x, s, t, LABELS)
  assert np.abs(want).max() > 0.1
  # eps^2 = 1e-8 under the roots of weights and of small activations
  np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  ("config", "side", "millions"),
  [(unet.CIFAR10, 32, 54.7), (unet.CELEBA64, 64, 124.3)],
)
def test_published_numbers_of_parameters(config, side, millions):
  x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  t = jax.ShapeDtypeStruct((1,), jnp.float32)
  shapes = jax.eval_shape(unet.Unet(config).init, jax.random.key(0), x, t)
  count = sum(x.size for x in jax.tree.leaves(shapes))
  assert round(count / 1e6, 1) == millions


def test_zero_at_the_start_on_the_sphere():
  net = unet.Unet(dataclasses.replace(CONFIG, **SMALL))
  key = jax.random.key(0, impl="rbg")  # compiles faster
  params = jax.jit(net.init)(key, X, T)["params"]
  _, apply = build(**SMALL)
  out = apply(params, X, T, S, LABELS)
  np.testing.assert_array_equal(out, np.zeros_like(X))
  assert out.dtype == jnp.float32
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
    unet.project(params),
    params,
  )
  # with a gain the output of a fresh network has the size of its input
  size = np.std(apply(params | {"out_gain": jnp.ones(())}, X, T, S, LABELS))
  assert 0.5 < size < 1.5


def test_conditions():
  params, apply = build()
  out = apply(params, X, T, S, LABELS)
  # the diagonal and the label "none" are what is meant by None
  np.testing.assert_array_equal(
    apply(params, X, T), apply(params, X, T, T, np.full(3, 2, np.int32))
  )
  differs = lambda *args: float(jnp.abs(out - apply(params, X, *args)).max())
  assert differs(T, S + np.float32(0.1), LABELS) > 1e-3
  assert differs(T + np.float32(0.1), S, LABELS) > 1e-3
  assert differs(T, S, LABELS[::-1].copy()) > 1e-3
  order = np.array([2, 0, 1])
  again = apply(params, X[order], T[order], S[order], LABELS[order])
  np.testing.assert_allclose(again, out[order], rtol=1e-4, atol=1e-5)


def test_scales_of_stored_weights_do_not_matter():
  params, apply = build()
  params = jax.tree.map(jnp.float32, params)
  out = apply(params, X, T, S, LABELS)
  np.testing.assert_allclose(
    apply(unet.project(params), X, T, S, LABELS), out, rtol=1e-3, atol=1e-4
  )


def test_embedding_is_slow_in_time():
  net = unet._Embedding(unet.CIFAR10)
  t = jnp.linspace(0, 1, 51)
  params = jax.jit(net.init)(jax.random.key(0), t, t, None)
  ones, zeros, half = jnp.ones(51), jnp.zeros(51), jnp.full(51, 0.5)
  for tangents in ((ones, zeros), (zeros, ones)):
    slope = jax.jvp(
      lambda t, s: net.apply(params, t, s, None), (t, half), tangents
    )[1]
    assert float(jnp.abs(slope).max()) < 2.0
    assert float(jnp.abs(slope).max()) > 0.0


def test_dropout_is_on_where_a_key_is_given():
  params, apply = build(**SMALL)
  still = apply(params, X, T, S, LABELS)
  _, without = build(**SMALL, dropout=0.0)
  np.testing.assert_array_equal(still, without(params, X, T, S, LABELS))
  a, b = (
    apply(params, X, T, S, LABELS, jax.random.key(seed)) for seed in (0, 1)
  )
  assert float(jnp.abs(a - still).max()) > 1e-3
  assert float(jnp.abs(a - b).max()) > 1e-3


def test_remat_changes_nothing():
  small = SMALL | {"num_classes": 0}
  params, _ = build(**small)
  grads = []
  for policy in ("none", "full"):
    _, apply = build(**small, remat=policy)
    loss = lambda p, f=apply: jnp.sum(f(p, X, T, S) ** 2)
    grads.append(jax.jit(jax.grad(loss))(jax.tree.map(jnp.float32, params)))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), *grads
  )


def test_bfloat16_computation():
  params, apply = build(**SMALL)
  want = apply(params, X, T, S)
  got = build(**SMALL, dtype="bfloat16")[1](params, X, T, S)
  assert got.dtype == jnp.float32
  # 2^-8 per operation, some dozens deep, of the output's size
  error = float(jnp.abs(want - got).max() / jnp.abs(want).max())
  assert 1e-6 < error < 0.2


def test_large_inputs_give_finite_outputs_and_derivatives():
  params, apply = build(**SMALL)
  params = jax.tree.map(jnp.float32, params)
  loss = lambda p, t, x: jnp.sum(apply(p, x, t, S))
  derive = jax.jit(jax.value_and_grad(loss, (0, 1)))
  for x in (0 * X, np.float32(1e6) * X):
    out = derive(params, T, x)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(out))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"multipliers": ()}, "multipliers="),
    ({"blocks": 0}, "blocks=0"),
    ({"dropout": 1.0}, "dropout=1.0"),
    ({"channels": 3, "head_dim": 2}, "channels=3"),
    ({"head_dim": 3}, "head_dim=3"),
  ],
)
def test_bad_configs(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **changes)


def test_bad_calls():
  params, apply = build()
  with pytest.raises(ValueError, match=r"\(3, 7, 4, 2\).*multiples of 2"):
    apply(params, X[:, :7], T)
  plain = build(two_times=False, num_classes=0)
  with pytest.raises(ValueError, match="two_times=True"):
    plain[1](plain[0], X, T, S)
  with pytest.raises(ValueError, match="num_classes"):
    plain[1](plain[0], X, T, None, LABELS)
  net = unet.Unet(dataclasses.replace(CONFIG, attention=(8,), head_dim=8))
  with pytest.raises(ValueError, match="4 channels .* head_dim=8"):
    jax.eval_shape(net.init, jax.random.key(0), X, T)
