"""The transformer against its own invariants; published models are in
test_pretrained.py."""

# NumPy arrays stand for jax.Array; pytrees have no static type
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOperatorIssue=false

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.models import transformer

SMALL = transformer.Config(
  vocab_size=11,
  width=16,
  depth=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  mlp_width=24,
)


@functools.cache
def params_of(config):
  """Random values at every leaf, so that nothing has its neutral value."""
  rng = np.random.default_rng(0)
  tokens = np.zeros((1, 2), np.int32)
  shapes = jax.eval_shape(
    transformer.Transformer(config).init, jax.random.key(0), tokens
  )["params"]
  return jax.tree.map(
    lambda a: jnp.asarray(rng.normal(0.1, 0.4, a.shape), a.dtype), shapes
  )


logits = jax.jit(transformer.logits, static_argnums=0)
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 12)).astype(np.int32)


class VisibilityTest(parameterized.TestCase):
  def changed(self, config, position):
    """Positions whose logits change with the token at `position`."""
    params = params_of(config)
    other = TOKENS.copy()
    other[:, position] = (other[:, position] + 1) % 11
    difference = logits(config, params, TOKENS) - logits(config, params, other)
    return np.flatnonzero(np.abs(difference).max((0, 2)) > 1e-6).tolist()

  @parameterized.parameters(0, 4)
  def test_causal(self, short_conv):
    config = dataclasses.replace(SMALL, short_conv=short_conv)
    self.assertEqual(self.changed(config, 7), [7, 8, 9, 10, 11])

  @parameterized.parameters(0, 3)
  def test_bidirectional(self, short_conv):
    config = dataclasses.replace(SMALL, causal=False, short_conv=short_conv)
    self.assertEqual(self.changed(config, 7), list(range(12)))

  def test_window_reaches_depth_times_window(self):
    config = dataclasses.replace(SMALL, depth=1, window=2)
    self.assertEqual(self.changed(config, 4), [4, 5])
    config = dataclasses.replace(SMALL, depth=2, window=2, causal=False)
    self.assertEqual(self.changed(config, 4), [2, 3, 4, 5, 6])

  def test_bidirectional_without_positions_is_equivariant(self):
    config = dataclasses.replace(SMALL, causal=False)
    order = np.random.default_rng(1).permutation(12)
    apply = jax.jit(transformer.Transformer(config).apply)
    same = np.zeros((2, 12), np.int32)
    params = {"params": params_of(config)}
    np.testing.assert_allclose(
      apply(params, TOKENS[:, order], same),
      apply(params, TOKENS, same)[:, order],
      atol=1e-5,  # sums over keys in another order, hidden of order 1
    )

  def test_only_differences_of_positions_matter(self):
    positions = np.arange(12, dtype=np.int32)[None].repeat(2, 0)
    apply = jax.jit(transformer.Transformer(SMALL).apply)
    params = {"params": params_of(SMALL)}
    default = apply(params, TOKENS)
    np.testing.assert_array_equal(apply(params, TOKENS, positions), default)
    np.testing.assert_allclose(
      apply(params, TOKENS, positions + 50), default, atol=1e-4
    )


class StackTest(parameterized.TestCase):
  def test_scan_equals_a_loop_over_slices(self):
    params = params_of(SMALL)
    embedding = params["embed"]["embedding"]
    angle = np.arange(12)[None, :, None] * 1e4 ** (-np.arange(3) / 3)
    block = jax.jit(transformer.Block(SMALL).apply)
    x = embedding[TOKENS]
    for i in range(SMALL.depth):
      one = jax.tree.map(lambda a: a[i], params["layers"])  # noqa: B023
      turn = jnp.asarray(angle, jnp.float32)
      (x, _), _ = block({"params": one}, (x, None), jnp.int32(i), turn)
    x = np.asarray(x, np.float64)
    x /= np.sqrt((x**2).mean(-1, keepdims=True) + SMALL.eps)
    expected = x * np.asarray(params["norm"]["scale"]) @ params["head"]
    np.testing.assert_allclose(
      logits(SMALL, params, TOKENS), expected, atol=2e-5
    )

  def test_remat_changes_nothing(self):
    def loss(config, params):
      out = transformer.logits(config, params, TOKENS)
      return jnp.mean(jax.nn.logsumexp(out, -1) - out[..., 0])

    grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    config = dataclasses.replace(SMALL, short_conv=2, qk_norm=True)
    value, expected = grad(config, params_of(config))
    self.assertTrue(np.isfinite(value))
    for leaf in jax.tree.leaves(expected):
      self.assertTrue(np.isfinite(leaf).all())
      self.assertGreater(np.abs(leaf).max(), 0)
    for policy in ("dots", "full"):
      other = dataclasses.replace(config, remat=policy)
      again, grads = grad(other, params_of(config))
      np.testing.assert_allclose(again, value, rtol=1e-6)
      jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-4),
        grads,
        expected,
      )

  def test_bfloat16_compute_keeps_float32_parameters(self):
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    params = params_of(SMALL)
    for leaf in jax.tree.leaves(params_of(config)):
      self.assertEqual(leaf.dtype, jnp.float32)
    hidden = transformer.Transformer(config).apply({"params": params}, TOKENS)
    self.assertEqual(hidden.dtype, jnp.bfloat16)
    out = logits(config, params, TOKENS)
    exact = logits(SMALL, params, TOKENS)
    self.assertEqual(out.dtype, jnp.float32)
    # About 10 roundings of 2^-9 on the way through each of 3 blocks.
    error = jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)
    self.assertLess(error, 30 * 2**-9)

  def test_bfloat16_parameters(self):
    config = dataclasses.replace(
      SMALL, param_dtype="bfloat16", qk_norm=True, qkv_bias=True, short_conv=2
    )
    params = params_of(config)
    for leaf in jax.tree.leaves(params):
      self.assertEqual(leaf.dtype, jnp.bfloat16)
    self.assertEqual(logits(config, params, TOKENS).dtype, jnp.float32)

  def test_strict_dtypes_and_float64(self):
    config = dataclasses.replace(
      SMALL, dtype="float64", short_conv=3, qk_norm=True, tie_embeddings=True
    )
    narrow = dataclasses.replace(config, dtype="float32")
    params = params_of(narrow)
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
      out = logits(narrow, params, TOKENS)
    with jax.enable_x64(True):
      exact = logits(config, params, TOKENS)
    self.assertEqual(exact.dtype, jnp.float64)
    np.testing.assert_allclose(out, exact, atol=1e-5)


class InitialisationTest(absltest.TestCase):
  def test_first_loss_is_near_uniform(self):
    config = transformer.Config(vocab_size=256, width=64, depth=2)
    tokens = np.random.default_rng(0).integers(0, 256, (4, 32), np.int32)
    init = jax.jit(transformer.Transformer(config).init)
    params = init(jax.random.key(0), tokens)["params"]
    out = np.asarray(logits(config, params, tokens))
    log_p = out - np.log(np.exp(out).sum(-1, keepdims=True))
    self.assertAlmostEqual(-log_p.mean(), np.log(256), delta=0.3)


class ScaleTest(absltest.TestCase):
  def test_padded_vocabulary_and_scales(self):
    # width 16: both scales are powers of two and change no rounding
    params = params_of(dataclasses.replace(SMALL, vocab_size=13))
    config = dataclasses.replace(
      SMALL, embedding_size=13, scale_embeddings=True, scale_logits=True
    )
    out = logits(config, params, TOKENS)
    louder = params | {"embed": {"embedding": 4 * params["embed"]["embedding"]}}
    plain = logits(dataclasses.replace(SMALL, vocab_size=13), louder, TOKENS)
    np.testing.assert_array_equal(out[..., :11], plain[..., :11] / 4)
    self.assertTrue(np.all(np.asarray(out[..., 11:]) == -np.inf))
    head = transformer.bind(config, params).head
    np.testing.assert_array_equal(head, params["head"][:, :11])


class BoundTest(parameterized.TestCase):
  @parameterized.parameters((True, False), (False, True), (False, False))
  def test_output_predicts_its_own_position(self, causal, shifted):
    config = dataclasses.replace(SMALL, causal=causal, shifted=shifted)
    params = params_of(config)
    model = transformer.bind(config, params)
    hidden, cache = model.forward(TOKENS)
    self.assertIsNone(cache)
    plain = logits(config, params, TOKENS)
    expected = np.asarray(plain)
    if causal or shifted:
      expected = np.concatenate([plain[:, :1], plain[:, :-1]], axis=1)
    np.testing.assert_allclose(hidden @ model.head, expected, atol=2e-5)

  def test_tied_head(self):
    config = dataclasses.replace(SMALL, tie_embeddings=True)
    params = params_of(config)
    self.assertNotIn("head", params)
    np.testing.assert_array_equal(
      transformer.bind(config, params).head, params["embed"]["embedding"].T
    )

  def test_is_an_argument_and_not_a_constant(self):
    traces = []

    @jax.jit
    def run(model, tokens):
      traces.append(None)
      return model.forward(tokens)[0]

    params = params_of(SMALL)
    doubled = jax.tree.map(lambda a: 2 * a, params)
    first = run(transformer.bind(SMALL, params), TOKENS)
    second = run(transformer.bind(SMALL, doubled), TOKENS)
    self.assertLen(traces, 1)
    self.assertGreater(np.abs(first - second).max(), 0.1)

  def test_unknown_cache(self):
    with self.assertRaisesRegex(ValueError, "cache=dict: extend"):
      transformer.bind(SMALL, params_of(SMALL)).forward(TOKENS, None, {})


class ErrorTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(num_kv_heads=3),
    dict(head_dim=7),
    dict(width=0),
    dict(embedding_size=10),
    dict(depth=-1),
    dict(window=0),
    dict(short_conv=-1),
    dict(rope_type="yarn"),
    dict(rope_theta=0.0),
    dict(rope_high=0.5),
    dict(remat="some"),
    dict(dtype="int8"),
    dict(param_dtype="f32"),
  )
  def test_config(self, **change):
    [(name, value)] = change.items()
    with self.assertRaisesRegex(ValueError, f"{name}={value!r}: must be"):
      dataclasses.replace(SMALL, **change)

  def test_shapes(self):
    model = transformer.Transformer(SMALL)
    params = {"params": params_of(SMALL)}
    with self.assertRaisesRegex(ValueError, r"tokens \(12,\)"):
      model.apply(params, TOKENS[0])
    with self.assertRaisesRegex(ValueError, r"positions \(2, 3\)"):
      model.apply(params, TOKENS, np.zeros((2, 3), np.int32))


if __name__ == "__main__":
  absltest.main()
