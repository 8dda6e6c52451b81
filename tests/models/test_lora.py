"""Adapters against the formula, its derivatives by hand, and one network."""

# pytrees have no static type
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from giantsteps.models import lora, pretrained, transformer

RNG = np.random.default_rng(0)
PARAMS = {
  "embed": {"embedding": RNG.normal(size=(5, 6)).astype(np.float32)},
  "layers": {
    "q": {
      "kernel": RNG.normal(size=(2, 6, 8)).astype(np.float32),
      "bias": RNG.normal(size=(2, 8)).astype(np.float32),
    },
    "down": {"kernel": RNG.normal(size=(2, 9, 6)).astype(np.float32)},
  },
}
Q, DOWN = "layers/q/kernel", "layers/down/kernel"
SMALL = transformer.Config(
  vocab_size=11,
  width=8,
  depth=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_width=12,
)


def trained(adapters):
  """Adapters whose B is no longer zero."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), adapters
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_adapters_change_no_bit(dtype):
  params = jax.tree.map(lambda x: jnp.asarray(x, dtype), PARAMS)
  adapters = lora.init(params, rank=3, key=jax.random.key(0))
  assert sorted(adapters) == [DOWN, Q]
  assert adapters[Q].a.shape == (2, 6, 3) and adapters[Q].b.shape == (2, 3, 8)
  assert adapters[Q].a.dtype == jnp.float32
  # a matrix per layer, and none like another
  assert len(np.unique(adapters[Q].a)) == 2 * 6 * 3
  merged = lora.merge(params, adapters)
  same = lambda a, b: a.dtype == b.dtype and bool((a == b).all())
  assert jax.tree.all(jax.tree.map(same, merged, params))


def test_variance_of_the_first_factor():
  params = {"q": {"kernel": np.zeros((4, 400, 50), np.float32)}}
  a = lora.init(params, rank=50, key=jax.random.key(0))["q/kernel"].a
  # 80,000 draws: the variance is known to 0.5 % (one sigma)
  np.testing.assert_allclose(np.var(a) * 400, 1, atol=0.025)


def test_the_formula():
  key = jax.random.key(0)
  adapters = trained(lora.init(PARAMS, rank=3, alpha=6.0, key=key))
  merged = lora.merge(PARAMS, adapters)
  for path, kernel in ((Q, "q"), (DOWN, "down")):
    a, b = np.float64(adapters[path].a), np.float64(adapters[path].b)
    before = PARAMS["layers"][kernel]["kernel"]
    expected = before + 2.0 * np.einsum("lir,lro->lio", a, b)
    after = merged["layers"][kernel]["kernel"]
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(
    merged["embed"]["embedding"], PARAMS["embed"]["embedding"]
  )
  bias = merged["layers"]["q"]["bias"]
  np.testing.assert_array_equal(bias, PARAMS["layers"]["q"]["bias"])


def test_derivatives_by_hand():
  """d <G, W + s A B> = s G B^T dA + s A^T G dB, and of nothing else."""
  key = jax.random.key(0)
  adapters = trained(
    lora.init(PARAMS, rank=2, alpha=1.0, key=key, pattern=".*/q/kernel")
  )
  assert list(adapters) == [Q]
  g = RNG.normal(size=(2, 6, 8)).astype(np.float32)
  with jax.default_matmul_precision("highest"):
    grads = jax.grad(
      lambda x: jnp.sum(g * lora.merge(PARAMS, x)["layers"]["q"]["kernel"])
    )(adapters)
  a, b = np.float64(adapters[Q].a), np.float64(adapters[Q].b)
  by_a = 0.5 * np.einsum("lio,lro->lir", g, b)
  by_b = 0.5 * np.einsum("lir,lio->lro", a, g)
  np.testing.assert_allclose(grads[Q].a, by_a, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(grads[Q].b, by_b, rtol=1e-5, atol=1e-5)
  assert len(jax.tree.leaves(grads)) == 2


def test_a_network_learns_and_is_saved_merged(tmp_path):
  pytest.importorskip("safetensors")
  tokens = RNG.integers(0, 11, (4, 9)).astype(np.int32)
  init = jax.jit(transformer.Transformer(SMALL).init)
  params = init(jax.random.key(0), tokens)["params"]
  adapters = lora.init(params, rank=4, key=jax.random.key(1))

  def loss(params):
    out = transformer.logits(SMALL, params, tokens[:, :-1])
    p = jax.nn.log_softmax(out)
    return -jnp.mean(jnp.take_along_axis(p, tokens[:, 1:, None], -1))

  @jax.jit
  def descend(adapters):
    def step(adapters, _):
      value, grads = jax.value_and_grad(lambda x: loss(lora.merge(params, x)))(
        adapters
      )
      return jax.tree.map(lambda x, g: x - 0.5 * g, adapters, grads), value

    return jax.lax.scan(step, adapters, None, 60)

  adapters, values = descend(adapters)
  assert values[-1] < 0.7 * values[0]
  merged = lora.merge(params, adapters)
  pretrained.save(tmp_path / "out", SMALL, merged)
  config, loaded = pretrained.load(tmp_path / "out")
  assert config == SMALL
  same = jax.tree.map(lambda a, b: bool((a == b).all()), loaded, merged)
  assert jax.tree.all(same)


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"rank": 0}, r"rank=0: must be in 1\.\.6"),
    ({"rank": 7}, r"rank=7: must be in 1\.\.6"),
    ({"rank": 1, "pattern": "nothing"}, "pattern='nothing' fits none of emb"),
    ({"rank": 1, "pattern": "head|scale"}, "fits none"),
  ],
)
def test_what_init_refuses(options, words):
  with pytest.raises(ValueError, match=words):
    lora.init(PARAMS, key=jax.random.key(0), **options)


def test_what_merge_refuses():
  adapters = lora.init(PARAMS, rank=1, key=jax.random.key(0))
  with pytest.raises(ValueError, match=r"layers/down/kernel' of \(2, 9, 6\)"):
    lora.merge({"layers": {"q": PARAMS["layers"]["q"]}}, adapters)
  vector = {"norm": {"kernel": np.zeros(3, np.float32)}}
  with pytest.raises(ValueError, match="no matrix"):
    lora.init(vector, rank=1, key=jax.random.key(0), pattern=".*")
