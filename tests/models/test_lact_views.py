"""LaCT for novel views against the authors' layer and its own invariants."""

# NumPy arrays stand for jax.Array; pytrees have no static type
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.models import lact_views

GOLDEN = pathlib.Path(__file__).parent.parent / "golden/lact"
quick_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
SMALL = lact_views.Config(
  patch=2,
  width=8,
  depth=2,
  heads=2,
  fast_heads=2,
  expansion=1.5,
  expand=2,
  dtype="float64",
  param_dtype="float64",
)
RNG = np.random.default_rng(0)
RAYS = RNG.normal(size=(2, 5, 4, 6, 6))
IMAGE = RNG.uniform(size=(2, 3, 4, 6, 3))


def assert_close(got, want, rtol):
  """Largest difference against the largest value."""
  scale = np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=0, atol=rtol * scale)


def layer_params(golden, prefix):
  """The torch layout as our tree: there the fast weights stand transposed."""
  torch = {
    k[len(prefix) :]: golden[k].astype(np.float64)
    for k in golden
    if k.startswith(prefix)
  }
  fast = {f"w{i}": np.swapaxes(torch[f"w{i}"], 1, 2) for i in range(3)}
  return fast | {
    "qkv": {"kernel": torch["to_qkv.weight"].T},
    "o": {"kernel": torch["c_proj.weight"].T},
    "rate": {"kernel": torch["lr_fc.weight"].T, "bias": torch["lr_fc.bias"]},
    "fast_norm": {"scale": torch["o_norm.weight"]},
  }


@functools.cache
def init(config):
  """Parameters in which nothing is zero or one."""
  with jax.enable_x64(True):
    init = quick_jit(lact_views.LactViews(config).init)
    params = init(jax.random.key(0), RAYS, IMAGE)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(
      lambda p: np.asarray(p) + 0.2 * rng.normal(size=p.shape), params
    )


@functools.cache
def jitted(function):
  return quick_jit(functools.partial(function, SMALL))


class LayerTest(absltest.TestCase):
  def test_golden(self):
    golden = np.load(GOLDEN / "layer_nvs_2heads.npz")
    config = lact_views.Config(
      width=int(golden["cfg.dim"]),
      heads=1,
      fast_heads=int(golden["cfg.dim"] // golden["cfg.head_dim"]),
      expansion=float(golden["cfg.inter_multi"]),
      rate=float(golden["cfg.base_lr"]),
      dtype="float64",
      param_dtype="float64",
    )
    layer = lact_views.FastLayer(config, int(golden["cfg.n_input_tokens"]))
    params = layer_params(golden, "param.")
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
      x = golden["x"].astype(np.float64)
      shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
      made = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
      self.assertEqual(shapes(made), shapes(params))

      def inner(params, x):
        out, state = layer.apply({"params": params}, x)
        cotangent = golden["cotangent"].astype(np.float64)
        return jnp.sum(out * cotangent), (out, state)

      grads, (out, state) = quick_jit(jax.grad(inner, (0, 1), has_aux=True))(
        params, x
      )
    assert_close(out, golden["out_f64"], 1e-10)
    for i, w in enumerate(state):
      want = np.swapaxes(golden[f"state_f64_w{i}"], 1, 2)
      assert_close(w, want, 1e-10)
    assert_close(grads[1], golden["grad_f64_x"], 1e-10)
    wanted = layer_params(golden, "grad_f64_param.")
    jax.tree.map(lambda g, w: assert_close(g, w, 1e-10), grads[0], wanted)

  def test_initial_weights_and_rates(self):
    config = lact_views.Config(width=512, fast_heads=2, heads=1)
    layer = lact_views.FastLayer(config, 0)
    make = quick_jit(layer.init)
    params = make(jax.random.key(0), jnp.zeros((1, 4, 512)))["params"]
    self.assertEqual(params["w0"].shape, (2, 512, 256))
    self.assertEqual(params["w1"].shape, (2, 256, 512))
    for name, fan_in in (("w0", 256), ("w1", 512), ("w2", 256)):
      # sqrt 2 / sqrt(fan-in); 262,144 values: standard error .0014 of it
      self.assertAlmostEqual(
        float(jnp.std(params[name])) * fan_in**0.5, 2**0.5, delta=0.01
      )


class ModelTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(jax.enable_x64(True))

  def call(self, function, *args):
    return jitted(function)(init(SMALL), *args)

  def test_rendering_view_by_view_is_all_at_once(self):
    want = self.call(lact_views.predict, RAYS, IMAGE)
    self.assertEqual((want.shape, want.dtype), ((2, 5, 4, 6, 3), jnp.float32))
    state = self.call(lact_views.reconstruct, RAYS[:, :3], IMAGE)
    self.assertEqual(state[0].shape, (2, 2 * 2, 6, 4))
    one = [
      self.call(lact_views.render, state, RAYS[:, i : i + 1]) for i in (3, 4)
    ]
    # float64 inside, one rounding to float32 at the end
    np.testing.assert_allclose(
      np.concatenate(one, 1), want[:, 3:], atol=2e-7, rtol=0
    )

  def test_unknown_views_are_targets(self):
    known = np.array([[True, True, False], [True, False, False]])
    got = self.call(lact_views.predict, RAYS, IMAGE, known)
    for row, num in ((0, 2), (1, 1)):
      want = self.call(lact_views.predict, RAYS, IMAGE[:, :num])
      np.testing.assert_allclose(got[row], want[row], atol=2e-7, rtol=0)
    noisy = np.where(known[..., None, None, None], IMAGE, 7.0)
    again = self.call(lact_views.predict, RAYS, noisy, known)
    np.testing.assert_array_equal(again, got)

  def test_inputs_are_a_set(self):
    want = self.call(lact_views.predict, RAYS, IMAGE)
    order = [2, 0, 1, 3, 4]
    got = self.call(lact_views.predict, RAYS[:, order], IMAGE[:, order[:3]])
    np.testing.assert_allclose(got, want[:, order], atol=2e-7, rtol=0)

  def test_every_input_reaches_every_target(self):
    want = self.call(lact_views.predict, RAYS, IMAGE)
    for view in range(3):
      image = IMAGE.copy()
      image[0, view] = 1 - image[0, view]
      got = self.call(lact_views.predict, RAYS, image)
      self.assertTrue((np.abs(got - want)[0, 3:] > 1e-5).any((1, 2, 3)).all())
      np.testing.assert_array_equal(got[1], want[1])

  def test_stack_equals_separate_blocks(self):
    params = init(SMALL)
    want = self.call(lact_views.reconstruct, RAYS[:, :3], IMAGE)
    # patches of 2x2 pixels by rows, 12 channels each
    rays = RAYS[:, :3]
    moment = np.cross(rays[..., :3], rays[..., 3:])
    pixels = np.concatenate([rays, moment, 2 * IMAGE - 1], -1)
    patches = [
      pixels[:, :, r : r + 2, c : c + 2].reshape(2, 3, 48)
      for r in (0, 2)
      for c in (0, 2, 4)
    ]
    x = np.stack(patches, 2) @ params["in"]["kernel"]
    block = quick_jit(
      lambda params, x: lact_views.Block(SMALL, 3).apply(
        {"params": params}, x, None, None
      )
    )
    for i in range(SMALL.depth):
      one = jax.tree.map(lambda p, i=i: p[i], params["layers"])
      x, state = block(one, x)
      for got, w in zip(state, want, strict=True):
        assert_close(got, w[i], 1e-11)

  def test_float32_parameters_bfloat16_products(self):
    config = dataclasses.replace(SMALL, dtype="bfloat16", param_dtype="float32")
    rays, image = RAYS.astype(np.float32), IMAGE.astype(np.float32)
    model = lact_views.LactViews(config)
    params = quick_jit(model.init)(jax.random.key(0), rays, image)["params"]
    out = quick_jit(functools.partial(lact_views.predict, config))(
      params, rays, image
    )
    state = jax.eval_shape(
      functools.partial(lact_views.reconstruct, config),
      params,
      rays[:, :3],
      image,
    )
    self.assertEqual(out.dtype, jnp.float32)
    self.assertEqual({w.dtype for w in state}, {jnp.dtype("float32")})
    self.assertTrue(np.isfinite(out).all())

  @parameterized.parameters(
    ({"width": 10}, "width=10: must be a multiple of heads=12"),
    ({"patch": 0}, "patch=0"),
    ({"expansion": 1e-4}, "expansion=0.0001"),
    ({"remat": "some"}, "remat='some'"),
  )
  def test_rejects_config(self, change, message):
    with self.assertRaisesRegex(ValueError, message):
      lact_views.Config(**change)

  @parameterized.parameters(
    (RAYS[0], IMAGE, None, "rays .*: expected"),
    (RAYS[:, :, :3], IMAGE, None, "patches of 2"),
    (RAYS, IMAGE[:, :, :2], None, "image .* does not fit"),
    (RAYS[:, :2], IMAGE, None, "1 to 2"),
    (RAYS, IMAGE, np.ones((2, 2), bool), "known .2, 2.: expected .2, 3."),
    (RAYS, None, np.ones((2, 2), bool), "image is None"),
  )
  def test_rejects_shapes(self, rays, image, known, message):
    with self.assertRaisesRegex(ValueError, message):
      lact_views.predict(SMALL, init(SMALL), rays, image, known)


if __name__ == "__main__":
  absltest.main()
