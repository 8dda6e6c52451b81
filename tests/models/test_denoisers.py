"""The denoisers: MLP, diffusion transformer and U-ViT."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.models import dit, layers, mlp, uvit

MLP = mlp.Config(width=16, depth=3, num_classes=4, two_times=True)
DIT = dit.Config(
  width=16, depth=2, heads=2, num_classes=4, two_times=True, qk_norm=True
)
UVIT = uvit.Config(
  width=16, depth=5, heads=2, num_classes=4, two_times=True, qk_norm=True
)
NETS = {
  "mlp": (mlp.Mlp, MLP),
  "dit": (dit.Dit, DIT),
  "uvit": (uvit.Uvit, UVIT),
}

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(4, 4, 6, 2)), jnp.float32)
T = jnp.asarray([0.0, 0.3, 0.6, 1.0], jnp.float32)
S = jnp.asarray([0.5, 0.3, 0.0, 0.9], jnp.float32)
LABELS = jnp.asarray([0, 1, 2, 4], jnp.int32)


@functools.cache
def build(name, **changes):
  """(init, apply, params drawn so that nothing is zero), both jitted."""
  make, config = NETS[name]
  net = make(dataclasses.replace(config, **changes))
  init = jax.jit(lambda key: net.init(key, X, T)["params"])
  apply = jax.jit(lambda p, *args, **kw: net.apply({"params": p}, *args, **kw))
  rng = np.random.default_rng(1)
  size = 0.5 if name == "uvit" else 0.2  # its conditions are tokens of many
  draw = lambda a: jnp.asarray(size * rng.normal(size=a.shape), a.dtype)
  shapes = jax.eval_shape(init, jax.random.key(0))
  return init, apply, jax.tree.map(draw, shapes)


class DenoiserTest(parameterized.TestCase):
  @parameterized.parameters(*NETS)
  def test_output_is_zero_at_the_start(self, name):
    init, apply, moved = build(name)
    out = apply(init(jax.random.key(0)), X, T, labels=LABELS)
    np.testing.assert_array_equal(out, np.zeros(X.shape, np.float32))
    self.assertEqual(out.dtype, jnp.float32)
    self.assertEqual(apply(moved, X, T, labels=LABELS).shape, X.shape)

  @parameterized.parameters(*NETS)
  def test_diagonal_of_two_times_is_one_time(self, name):
    _, apply, moved = build(name)
    diagonal = apply(moved, X, T, T, labels=LABELS)
    np.testing.assert_array_equal(apply(moved, X, T, labels=LABELS), diagonal)
    # A network of one time with the same parameters is the same function.
    if name == "uvit":
      return  # a token of t - s = 0 is a token more
    _, one, _ = build(name, two_times=False)
    moved = {**moved, "conditioning": dict(moved["conditioning"])}
    for key in ("gap_in", "gap_out"):
      del moved["conditioning"][key]
    np.testing.assert_allclose(
      one(moved, X, T, labels=LABELS), diagonal, rtol=1e-5, atol=1e-5
    )

  @parameterized.parameters(*NETS)
  def test_every_condition_matters(self, name):
    _, apply, moved = build(name)
    out = apply(moved, X, T, S, labels=LABELS)
    differs = lambda other: float(jnp.abs(out - other).max()) > 1e-3
    self.assertTrue(differs(apply(moved, X, T, S + 0.1, labels=LABELS)))
    self.assertTrue(differs(apply(moved, X, T + 0.1, S, labels=LABELS)))
    self.assertTrue(differs(apply(moved, X, T, S, labels=LABELS.at[0].set(3))))
    # No labels are the label "none".
    np.testing.assert_array_equal(
      apply(moved, X, T, S),
      apply(moved, X, T, S, labels=jnp.full(4, 4, jnp.int32)),
    )

  @parameterized.parameters(*NETS)
  def test_rows_are_independent(self, name):
    _, apply, moved = build(name)
    out = apply(moved, X, T, S, labels=LABELS)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(
      apply(moved, X[order], T[order], S[order], labels=LABELS[order]),
      out[order],
      rtol=1e-5,
      atol=1e-5,
    )

  @parameterized.parameters(*NETS)
  def test_stack_is_scanned(self, name):
    init, _, _ = build(name)
    params = init(jax.random.key(0))
    if name == "uvit":
      stacks = {"encoder": 2, "middle": 1, "decoder": 2}
      stacks = [(params[key]["layers"], n) for key, n in stacks.items()]
    else:
      stacks = [(params["layers"], NETS[name][1].depth)]
    for stack, depth in stacks:
      for leaf in jax.tree.leaves(stack):
        self.assertEqual(leaf.shape[0], depth)
    kernel = stacks[0][0]["up"]["kernel"]
    self.assertGreater(float(jnp.abs(kernel[0] - kernel[1]).max()), 0.1)

  @parameterized.parameters(("mlp", "full"), ("dit", "dots"), ("uvit", "full"))
  def test_remat_changes_nothing(self, name, policy):
    _, apply, moved = build(name)
    _, again, _ = build(name, remat=policy)
    square = lambda f: jax.jit(jax.grad(lambda p: (f(p, X, T, S) ** 2).sum()))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3),
      square(apply)(moved),
      square(again)(moved),
    )

  @parameterized.parameters(*NETS)
  def test_bfloat16_computation(self, name):
    _, apply, moved = build(name)
    _, half, other = build(name, dtype="bfloat16")
    for leaf in jax.tree.leaves(other):
      self.assertEqual(leaf.dtype, jnp.float32)
    want, got = apply(moved, X, T, S), half(moved, X, T, S)
    self.assertEqual(got.dtype, jnp.float32)
    # 2^-8 per operation, some dozen operations deep, of the output's scale.
    error = float(jnp.abs(want - got).max() / jnp.abs(want).max())
    self.assertBetween(error, 1e-6, 0.1)
    _, _, small = build(name, dtype="bfloat16", param_dtype="bfloat16")
    for path, leaf in jax.tree_util.tree_leaves_with_path(small):
      keys = jax.tree_util.keystr(path)
      norm = "q_norm" in keys or "k_norm" in keys  # RMSNorm scales: float32
      self.assertEqual(leaf.dtype, jnp.float32 if norm else jnp.bfloat16)

  @parameterized.parameters(*NETS)
  def test_what_the_config_lacks_is_refused(self, name):
    _, apply, moved = build(name, two_times=False, num_classes=0)
    with self.assertRaisesRegex(ValueError, "two_times=True"):
      apply(moved, X, T, S)
    with self.assertRaisesRegex(ValueError, "num_classes"):
      apply(moved, X, T, labels=LABELS)

  def test_embedding_is_slow_in_time(self):
    # sum_k f_k^2, f_k = 1e4^(-k/64): the derivative of the default embedding.
    embed = functools.partial(layers.time_embedding, width=mlp.SINUSOIDS)
    t = jnp.linspace(0, 1, 101)
    slope = jax.jvp(embed, (t,), (jnp.ones_like(t),))[1]
    self.assertLessEqual(float(jnp.abs(slope).max()), 1.0)
    exact = np.sqrt(np.sum(1e4 ** (-2 * np.arange(64) / 64)))
    np.testing.assert_allclose(jnp.linalg.norm(slope, axis=1), exact, rtol=1e-4)
    # Each MLP of the conditioning keeps it of order one: 2 is flow maps' bound.
    net = mlp.Conditioning(32, two_times=True)
    params = jax.jit(net.init)(jax.random.key(0), t, t, None)["params"]
    for argument in (0, 1):
      primals = (jnp.full(101, 0.5), jnp.full(101, 0.5))
      tangents = tuple(
        jnp.ones(101) if i == argument else jnp.zeros(101) for i in (0, 1)
      )
      out = lambda a, b: net.apply({"params": params}, a, b, None)
      slope = jax.jit(lambda p, v, f=out: jax.jvp(f, p, v)[1])(
        primals, tangents
      )
      rms = jnp.sqrt(jnp.mean(slope**2, axis=1))
      self.assertLess(float(rms.max()), 2.0)


class DitTest(parameterized.TestCase):
  def test_patches(self):
    x = jnp.arange(2 * 4 * 6 * 2.0).reshape(2, 4, 6, 2)
    patches = dit.patchify(x, 2)
    self.assertEqual(patches.shape, (2, 6, 8))
    # Patch 4 of 2 rows of 3 is rows 2:4, columns 2:4.
    np.testing.assert_array_equal(patches[1, 4], x[1, 2:4, 2:4].ravel())
    np.testing.assert_array_equal(dit.unpatchify(patches, 2, 3, 2), x)

  @parameterized.parameters("sincos", "learned")
  def test_positions_break_the_symmetry_of_patches(self, positions):
    # Without positions, permuted patches give permuted outputs.
    _, apply, moved = build("dit", positions=positions)
    patches = dit.patchify(X, 2)
    order = np.array([5, 1, 0, 2, 4, 3])
    mixed = dit.unpatchify(patches[:, order], 2, 3, 2)
    a = dit.patchify(apply(moved, X, T), 2)[:, order]
    b = dit.patchify(apply(moved, mixed, T), 2)
    self.assertGreater(float(jnp.abs(a - b).max()), 1e-2)
    if positions == "learned":
      moved = {**moved, "positions": jnp.zeros_like(moved["positions"])}
      a = dit.patchify(apply(moved, X, T), 2)[:, order]
      b = dit.patchify(apply(moved, mixed, T), 2)
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

  def test_sincos_positions(self):
    place = dit.sincos_positions(3, 5, 8)
    self.assertEqual(place.shape, (15, 8))
    # Row 2, column 3: frequencies 1 and 1e-2.
    want = [
      f(a * w) for a in (2, 3) for f in (np.sin, np.cos) for w in (1, 0.01)
    ]
    np.testing.assert_allclose(place[2 * 5 + 3], want, rtol=1e-6)

  @parameterized.parameters(
    ({"heads": 3}, "width=16"),
    ({"heads": 0}, "width=16"),
    ({"width": 6, "heads": 2}, "width=6"),
    ({"patch": 0}, "patch=0"),
    ({"positions": "rotary"}, "positions='rotary'"),
  )
  def test_bad_configs(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      dataclasses.replace(DIT, **changes)

  @parameterized.parameters("dit", "uvit")
  def test_bad_shapes(self, name):
    _, apply, moved = build(name)
    with self.assertRaisesRegex(ValueError, r"\(4, 5, 6, 2\)"):
      apply(moved, jnp.zeros((4, 5, 6, 2)), T)


class UvitTest(parameterized.TestCase):
  def test_published_number_of_parameters(self):
    # 13 (12 D^2 + 10 D) of the blocks, D = 512 (no bias in qkv; two norms),
    # 6 (2 D^2 + D) of the long skips, 257 D positions, 13 D in, 2 D of the
    # last norm, 12 (D + 1) out, 84 of the convolution: the paper's 44M.
    x, t = jnp.zeros((1, 32, 32, 3)), jnp.zeros(1)
    init = uvit.Uvit(uvit.CIFAR10).init
    shapes = jax.eval_shape(init, jax.random.key(0), x, t)
    count = sum(a.size for a in jax.tree.leaves(shapes))
    d = 512
    blocks = 13 * (12 * d**2 + 10 * d) + 6 * (2 * d**2 + d)
    self.assertEqual(count, blocks + (257 + 13 + 2 + 12) * d + 12 + 84)
    self.assertEqual(round(count / 1e6), 44)

  def test_first_skip_goes_to_the_last_block(self):
    # Without its other branches a block returns its part of skip: the last
    # block of five returns what the first did, the one before what the second.
    _, apply, moved = build("uvit", num_classes=0, two_times=False)
    quiet = lambda stack: {
      name: jax.tree.map(jnp.zeros_like, layer)
      if name in ("attention_out", "down")
      else layer
      for name, layer in moved[stack]["layers"].items()
    }
    take = jnp.concatenate([jnp.zeros((16, 16)), jnp.eye(16)])
    skip = {
      "kernel": jnp.stack([jnp.zeros((32, 16)), take]),
      "bias": jnp.zeros((2, 16)),
    }
    params = moved | {"middle": {"layers": quiet("middle")}}
    params["decoder"] = {"layers": quiet("decoder") | {"skip": skip}}
    out = apply(params, X, T)

    def with_another(block):
      change = lambda a: a.at[block].set(0.3)
      return apply(
        params | {"encoder": jax.tree.map(change, params["encoder"])}, X, T
      )

    np.testing.assert_array_equal(with_another(1), out)
    self.assertGreater(float(jnp.abs(with_another(0) - out).max()), 1e-2)

  @parameterized.parameters(
    ({"heads": 3}, "width=16"),
    ({"width": 15, "heads": 3}, "width=15"),
    ({"depth": 4}, "depth=4"),
    ({"patch": 0}, "patch=0"),
  )
  def test_bad_configs(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      dataclasses.replace(UVIT, **changes)


if __name__ == "__main__":
  absltest.main()
