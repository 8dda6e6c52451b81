"""LAMB against golden trajectories, and what its ratio guarantees."""

# NumPy arrays stand for jax.Array; pytrees have no static type
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOperatorIssue=false

import functools
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from giantsteps.models import mlp
from giantsteps.research import large_batch

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "large_batch"
NAMES = ("w", "b", "ln", "stack", "emb")
STACKED = {"stack": (0,)}

# The dialects of the golden file; its README says what each is.
_MASKED = {
  "layer_axes": STACKED,
  "trust_mask": large_batch.matrices,
  "decay_mask": large_batch.matrices,
}
_APEX = functools.partial(
  large_batch.nvlamb, layer_axes=STACKED, always_adapt=False
)
DIALECTS = {
  "optax_semantics": large_batch.lamb_optax,
  "stacked": functools.partial(large_batch.lamb, layer_axes=STACKED),
  "tfa_exclude": functools.partial(large_batch.lamb_tfa, layer_axes=STACKED),
  "tfa_exclude_wholeleaf": functools.partial(
    large_batch.lamb_tfa, layer_axes={}
  ),
  "paper_nobiascorr": functools.partial(
    large_batch.lamb_paper, layer_axes=STACKED
  ),
  "nvlamb": functools.partial(large_batch.nvlamb, layer_axes=STACKED),
  "apex_default": _APEX,
  "nograd_avg": functools.partial(_APEX, grad_averaging=False),
  "l2mode": functools.partial(_APEX, decay_in_gradient=True),
  "ratio_clip": functools.partial(
    large_batch.lamb, **_MASKED, ratio_clip=(0.01, 10)
  ),
  "phi_clip": functools.partial(
    large_batch.lamb, **_MASKED, phi_clip=(0.01, 10)
  ),
}


def trajectory(tx, params, grads, state=None):
  """Parameters after each step [N, ...], and the last state; one compile."""

  def step(carry, g):
    params, state = carry
    updates, state = tx.update(g, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  @jax.jit
  def run(params, grads, state):
    state = tx.init(params) if state is None else state
    return jax.lax.scan(step, (params, state), grads)

  (_, state), path = run(params, grads, state)
  return path, state


def problem(file, dtype):
  """Initial parameters, 20 gradients and the archive of a golden file."""
  with np.load(GOLDEN / file) as archive:
    data = dict(archive)
  params = {n: jnp.asarray(data[f"init/{n}"], dtype) for n in NAMES}
  grads = {n: jnp.asarray(data[f"grad/{n}"], dtype) for n in NAMES}
  return params, grads, data


def layers_tree(seed=0, num_layers=3):
  """Parameters and 6 gradients of a scanned stack and two plain arrays."""
  rng = np.random.default_rng(seed)
  scale = np.array([0.1, 1, 5], np.float32)[:num_layers, None, None]
  params = {
    "layers": {
      "kernel": rng.normal(size=(num_layers, 5, 4)) * scale,
      "bias": rng.normal(size=(num_layers, 4)),
    },
    "out": {"kernel": rng.normal(size=(4, 2)), "bias": rng.normal(size=(2,))},
  }
  params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
  draw = lambda a: jnp.asarray(rng.normal(size=(6, *a.shape)), jnp.float32)
  return params, jax.tree.map(draw, params)


class GoldenTest(parameterized.TestCase):
  @parameterized.parameters(
    *((name, True) for name in DIALECTS), ("stacked", False), ("nvlamb", False)
  )
  def test_dialects(self, name, x64):
    with jax.enable_x64(x64):
      dtype = jnp.float64 if x64 else jnp.float32
      params, grads, data = problem("lamb_lars_f64_seed0.npz", dtype)
      tx = DIALECTS[name](1e-2)
      path, state = trajectory(tx, params, grads)
      tolerance = 1e-9 if x64 else 1e-5  # as the golden file states
      for n in NAMES:
        for got, key in (
          (path[n], "param"),
          (state.mu[n], "m_final"),
          (state.nu[n], "v_final"),
        ):
          want = data[f"lamb/{name}/{key}/{n}"]
          self.assertEqual(got.dtype, dtype)
          np.testing.assert_allclose(
            got, want, rtol=tolerance, atol=tolerance, err_msg=f"{key} {n}"
          )

  @parameterized.parameters(("lamb", None), ("lamb_clip", 1.0))
  def test_official_optax(self, key, max_grad_norm):
    params, grads, data = problem("optax_f32_seed10.npz", jnp.float32)
    tx = large_batch.lamb_optax(1e-2, max_grad_norm=max_grad_norm)
    path, _ = trajectory(tx, params, grads)
    for n in NAMES:
      np.testing.assert_allclose(
        path[n], data[f"{key}/{n}"], rtol=2e-5, atol=2e-6
      )


class InvariantTest(parameterized.TestCase):
  def test_step_is_rate_times_norm_of_each_layer(self):
    params, grads = layers_tree()
    tx = large_batch.lamb(0.03, weight_decay=0.0)
    path, _ = trajectory(tx, params, grads)
    norm = lambda a, axes: np.sqrt(np.sum(np.asarray(a) ** 2, axes))
    for keys, axes in (
      (("layers", "kernel"), (1, 2)),
      (("layers", "bias"), (1,)),
      (("out", "kernel"), (0, 1)),
      (("out", "bias"), (0,)),
    ):
      before = params[keys[0]][keys[1]]
      after = path[keys[0]][keys[1]][0]
      np.testing.assert_allclose(
        norm(np.asarray(after) - np.asarray(before), axes),
        0.03 * norm(before, axes),
        rtol=2e-5,  # the difference after - before loses 5 bits to 1/0.03
      )

  def test_scale_of_the_loss_does_not_matter(self):
    params, grads = layers_tree()
    tx = large_batch.lamb(0.03, eps=1e-12)
    path, _ = trajectory(tx, params, grads)
    # A power of two: every product is exact but for eps.
    scaled, _ = trajectory(tx, params, jax.tree.map(lambda g: 64 * g, grads))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), path, scaled
    )

  def test_stack_equals_separate_layers(self):
    with jax.enable_x64(True):
      double = lambda a: jnp.asarray(a, jnp.float64)
      params, grads = jax.tree.map(double, layers_tree())
      tx = large_batch.lamb(0.03)
      path, state = trajectory(tx, params, grads)
      self.assertEqual(state.unscaled["layers"]["kernel"].shape, (3, 1, 1))
      layer = lambda tree, *at: jax.tree.map(lambda a: a[at], tree["layers"])
      every = slice(None)
      separate = {f"layer_{i}": layer(params, i) for i in range(3)}
      g = {f"layer_{i}": layer(grads, every, i) for i in range(3)}
      alone, _ = trajectory(tx, separate, g)
      for i in range(3):
        # float64: nothing is free but the order of the norms' sums
        jax.tree.map(
          lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14),
          layer(path, every, i),
          alone[f"layer_{i}"],
        )

  def test_one_ratio_for_the_stack_is_another_algorithm(self):
    params, grads = layers_tree()
    per_layer, _ = trajectory(large_batch.lamb(0.03), params, grads)
    whole, _ = trajectory(large_batch.lamb(0.03, layer_axes={}), params, grads)
    move = lambda path: np.linalg.norm(
      path["layers"]["kernel"][0, 0] - params["layers"]["kernel"][0]
    )
    self.assertGreater(move(whole), 5 * move(per_layer))

  def test_ratio_one_is_adamw(self):
    params, grads = layers_tree()
    tx = large_batch.lamb(0.03, trust_mask=False, weight_decay=0.1)
    path, _ = trajectory(tx, params, grads)
    adamw = optax.adamw(0.03, eps=1e-6, weight_decay=0.1)
    want, _ = trajectory(adamw, params, grads)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      path,
      want,
    )

  def test_accumulation_equals_one_batch(self):
    params, grads = layers_tree()
    pairs = jax.tree.map(
      lambda g: jnp.mean(g.reshape(3, 2, *g.shape[1:]), 1), grads
    )
    tx = large_batch.lamb(0.03)
    want, _ = trajectory(tx, params, pairs)
    path, _ = trajectory(optax.MultiSteps(tx, 2), params, grads)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a[1::2], b, rtol=1e-6, atol=1e-6),
      path,
      want,
    )

  def test_leaves_alike_share_one_function(self):
    params = {f"w{i}": jnp.ones((4, 3)) for i in range(9)}
    params |= {f"b{i}": jnp.ones(3) for i in range(9)}
    tx = large_batch.lamb(
      0.03, trust_mask={**dict.fromkeys(params, True), "w0": False}
    )
    program = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    leaves = [
      eqn.params["jaxpr"]
      for eqn in program.eqns
      if eqn.params.get("name") == "leaf"
    ]
    self.assertLen(leaves, 18)
    self.assertLen(set(map(id, leaves)), 3)  # w, b and the masked w0

  def test_names_and_order_of_leaves_do_not_matter(self):
    params, grads = layers_tree()
    rename = lambda tree: {"z": tree["layers"], "a": tree["out"]}
    tx = large_batch.lamb(0.03)
    moved = large_batch.lamb(0.03, layer_axes={"z": 0})
    path, _ = trajectory(tx, params, grads)
    other, _ = trajectory(moved, rename(params), rename(grads))
    jax.tree.map(np.testing.assert_array_equal, rename(path), other)

  def test_resumes_bit_for_bit(self):
    params, grads = layers_tree()
    tx = large_batch.lamb(optax.linear_schedule(0.03, 0.0, 6))
    whole, _ = trajectory(tx, params, grads)
    first, state = trajectory(tx, params, jax.tree.map(lambda g: g[:3], grads))
    stored = jax.tree.map(
      np.asarray, (jax.tree.map(lambda a: a[-1], first), state)
    )
    second, _ = trajectory(
      tx, stored[0], jax.tree.map(lambda g: g[3:], grads), stored[1]
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(a[3:], b), whole, second
    )

  def test_tiny_directions_keep_their_ratio(self):
    # |u| = 1e-18: the step is still rate |x|, and finite
    params, grads = {"w": jnp.full(4, 1e3)}, {"w": jnp.full(4, 1e-24)}
    tx = large_batch.lamb(0.5, weight_decay=0.0)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.5e3, rtol=1e-5)

  def test_hyperparameters_can_be_arrays(self):
    params, grads = layers_tree()
    keywords = {"weight_decay": 0.1, "max_grad_norm": 1.0}
    tx = optax.inject_hyperparams(large_batch.lamb)(0.03, **keywords)
    path, _ = trajectory(tx, params, grads)
    want, _ = trajectory(large_batch.lamb(0.03, **keywords), params, grads)
    # b1 and b2 are float32 here, so 1 - b2 is off by 2^-24 / 1e-3
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      path,
      want,
    )

  def test_schedule_is_read_before_the_step(self):
    params, grads = layers_tree()
    tx = large_batch.lamb(lambda count: jnp.where(count == 0, 0.0, 0.03))
    path, state = trajectory(tx, params, grads)
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(a[0], b), path, params
    )
    self.assertEqual(int(state.count), 6)

  def test_padding_rows_do_not_change_the_step(self):
    params, grads = layers_tree()
    pad = lambda a, axis: jnp.pad(
      a, [(0, 3 if i == axis else 0) for i in range(a.ndim)]
    )
    tx = large_batch.lamb(0.03)
    table, g = {"t": params["out"]["kernel"]}, {"t": grads["out"]["kernel"]}
    path, _ = trajectory(tx, table, g)
    padded, _ = trajectory(tx, {"t": pad(table["t"], 0)}, {"t": pad(g["t"], 1)})
    np.testing.assert_allclose(padded["t"][:, :4], path["t"], rtol=1e-6)
    np.testing.assert_array_equal(padded["t"][:, 4:], 0)


class PrecisionTest(parameterized.TestCase):
  def test_bfloat16_parameters_keep_float32_state(self):
    params, grads = layers_tree()
    half = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
    tx = large_batch.lamb(0.03)
    path, state = trajectory(tx, half(params), half(grads))
    for leaf in jax.tree.leaves((state.mu, state.nu)):
      self.assertEqual(leaf.dtype, jnp.float32)
    for leaf in jax.tree.leaves(path):
      self.assertEqual(leaf.dtype, jnp.bfloat16)
    # v of 6 equal gradients 1: 1 - b2^6, which bfloat16 moments never reach
    # (b2 rounds to 1 there).
    ones = jax.tree.map(jnp.ones_like, half(grads))
    _, state = trajectory(tx, half(params), ones)
    for leaf in jax.tree.leaves(state.nu):
      np.testing.assert_allclose(leaf, 1 - 0.999**6, rtol=1e-4)

  def test_master_parameters_add_up_small_steps(self):
    # lambda = 0 and constant gradients: x_k = (1 - lr)^k x_0. A step of 1e-3
    # is below the resolution of bfloat16, 2^-8, and lost without masters.
    params = {"w": jnp.ones((8, 8), jnp.bfloat16), "v": jnp.ones((8, 8))}
    grads = jax.tree.map(lambda a: jnp.ones((50, *a.shape), a.dtype), params)
    make = functools.partial(large_batch.lamb, 1e-3, weight_decay=0.0)
    want = (1 - 1e-3) ** np.arange(1, 51)
    path, state = trajectory(make(master_params=True), params, grads)
    self.assertIsNone(state.master["v"])
    self.assertEqual(path["w"].dtype, jnp.bfloat16)
    np.testing.assert_allclose(state.master["w"], want[-1], rtol=1e-5)
    np.testing.assert_allclose(path["v"][:, 0, 0], want, rtol=1e-5)
    rounded = jnp.asarray(want, jnp.bfloat16).astype(jnp.float32)
    got = path["w"][:, 0, 0].astype(jnp.float32)
    np.testing.assert_allclose(got, rounded, rtol=2**-7)  # one ulp
    np.testing.assert_array_equal(
      path["w"][-1], state.master["w"].astype(jnp.bfloat16)
    )
    path, _ = trajectory(make(), params, grads)
    np.testing.assert_array_equal(path["w"], 1)

  def test_bfloat16_moment_is_right_on_average(self):
    # m = .1 after one step, between bfloat16 neighbours 2^-11 apart: the mean
    # of n roundings is off by less than 5 sigma = 5 * 2^-12 / sqrt(n), with
    # one false alarm in 10^6. What bfloat16 holds is kept.
    n = 1 << 16
    params = {"w": jnp.ones(n), "v": jnp.asarray([1.0, 1.0])}
    grads = {"w": jnp.ones(n), "v": jnp.asarray([jnp.inf, 0.0])}
    tx = large_batch.lamb(1e-3, moment_dtype=jnp.bfloat16)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    self.assertEqual(state.mu["w"].dtype, jnp.bfloat16)
    self.assertEqual(state.nu["w"].dtype, jnp.float32)
    m = np.asarray(state.mu["w"], np.float64)
    self.assertLen(np.unique(m), 2)
    self.assertLess(abs(m.mean() - 0.1), 5 * 2**-12 / np.sqrt(n))
    np.testing.assert_array_equal(state.mu["v"], grads["v"])

  def test_strict_promotion_and_debug_nans(self):
    params, grads = layers_tree()
    zero = jax.tree.map(jnp.zeros_like, grads)
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
      tx = large_batch.lamb(
        0.03,
        max_grad_norm=1.0,
        ratio_clip=(0.1, 10),
        phi_clip=(0.1, 10),
        moment_dtype=jnp.bfloat16,
        master_params=True,
      )
      half = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
      first = jax.tree.map(lambda g: g[0], half(grads))
      jax.jit(tx.update)(first, tx.init(half(params)), half(params))
      # |u| = 0 and |x| = 0 somewhere
      tx = large_batch.lamb(0.03, weight_decay=0.0)
      path, _ = trajectory(tx, params, zero)
      trajectory(tx, jax.tree.map(jnp.zeros_like, params), grads)
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(a[-1], b), path, params
    )

  def test_scalars_and_empty_leaves(self):
    params = {"a": jnp.ones(()), "b": jnp.ones((0, 3)), "layers": jnp.ones(())}
    grads = jax.tree.map(lambda a: jnp.ones((2, *a.shape)), params)
    path, _ = trajectory(large_batch.lamb(0.1, weight_decay=0.0), params, grads)
    np.testing.assert_allclose(path["a"], [0.9, 0.81], rtol=1e-5)


class ZeroInitTest(parameterized.TestCase):
  def tree(self):
    """A stack whose middle layer starts at zero, and a zero vector."""
    params, grads = layers_tree()
    kernel = params["layers"]["kernel"].at[1].set(0)
    params["layers"]["kernel"] = kernel
    params["out"]["bias"] = jnp.zeros(2)
    return params, jax.tree.map(jnp.ones_like, grads)

  def test_found_per_layer_and_only_in_matrices(self):
    params, _ = self.tree()
    state = jax.jit(large_batch.lamb(0.03).init)(params)
    found = jax.tree.map(lambda a: a.ravel().tolist(), state.unscaled)
    self.assertEqual(found["layers"]["kernel"], [False, True, False])
    self.assertEqual(found["layers"]["bias"], [False] * 3)
    self.assertEqual(found["out"], {"kernel": [False], "bias": [False]})
    state = large_batch.lamb(0.03, zero_init="paper").init(params)
    self.assertFalse(any(a.any() for a in jax.tree.leaves(state.unscaled)))

  def test_ratio_stays_one(self):
    # Constant gradient 1: u = 1 / (1 + eps), so x falls by the rate each step.
    params, grads = self.tree()
    tx = large_batch.lamb(0.03, weight_decay=0.0)
    path, _ = trajectory(tx, params, grads)
    steps = -0.03 * np.arange(1, 7)[:, None, None] * np.ones((1, 5, 4))
    np.testing.assert_allclose(path["layers"]["kernel"][:, 1], steps, rtol=1e-4)
    # The paper's rule, which the vector follows: x_k = x_1 1.03^(k-1).
    growth = -0.03 * 1.03 ** np.arange(6)[:, None] * np.ones((1, 2))
    np.testing.assert_allclose(path["out"]["bias"], growth, rtol=1e-4)

  def test_min_norm(self):
    params, grads = self.tree()
    tx = large_batch.lamb(
      0.03, weight_decay=0.0, min_norm=0.5, zero_init="paper"
    )
    path, _ = trajectory(tx, params, grads)
    moved = np.linalg.norm(path["layers"]["kernel"][0, 1])
    np.testing.assert_allclose(moved, 0.03 * 0.5, rtol=1e-5)

  def test_zero_initialised_network_trains(self):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(256, 3)), jnp.float32)
    t = jnp.asarray(rng.uniform(size=256), jnp.float32)
    target = jnp.sin(2 * x) + t[:, None]
    net = mlp.Mlp(mlp.Config(width=32, depth=2))
    start = jax.jit(net.init)(jax.random.key(0), x, t)["params"]
    self.assertEqual(float(jnp.abs(start["out"]["kernel"]).max()), 0)

    def final_loss(tx):
      def loss(params):
        return jnp.mean((net.apply({"params": params}, x, t) - target) ** 2)

      def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

      run = lambda p: jax.lax.scan(step, (p, tx.init(p)), None, 100)
      (params, _), values = jax.jit(run)(start)
      return params, float(values[0]), float(values[-1])

    params, first, last = final_loss(large_batch.lamb(0.01))
    self.assertLess(last, 0.1 * first)
    paper, _, frozen = final_loss(large_batch.lamb(0.01, zero_init="paper"))
    self.assertGreater(frozen, 2 * last)
    # By the paper a norm grows by at most the rate: 1.01^99 times the first
    # step, whose norm is the rate times that of u, |u_i| <= 1.
    for path in (("out",), ("layers", "modulation")):
      kernel = lambda tree, path=path: np.linalg.norm(
        functools.reduce(lambda a, key: a[key], path, tree)["kernel"]
      )
      size = functools.reduce(lambda a, key: a[key], path, start)["kernel"].size
      bound = 0.01 * 1.01**99 * np.sqrt(size)
      self.assertLessEqual(kernel(paper), bound)
      self.assertGreater(kernel(params), bound)


class LayerAxesTest(parameterized.TestCase):
  def axes(self, params, layer_axes=None):
    """Shapes of the per-layer record, which are the shapes of the ratios."""
    state = large_batch.lamb(0.1, layer_axes=layer_axes).init(params)
    return jax.tree.map(lambda a: a.shape, state.unscaled)

  def test_scanned_models_are_found(self):
    net = mlp.Mlp(mlp.Config(width=8, depth=3, num_classes=2))
    args = jax.random.key(0), jnp.zeros((1, 4)), jnp.zeros(1)
    params = jax.eval_shape(net.init, *args)["params"]
    state = jax.eval_shape(large_batch.lamb(0.1).init, params)
    shapes = jax.tree.map(lambda a: a.shape, state.unscaled)
    self.assertEqual(
      shapes["layers"]["up"], {"kernel": (3, 1, 1), "bias": (3, 1)}
    )
    self.assertEqual(shapes["in"], {"kernel": (1, 1), "bias": (1,)})

  def test_nested_stacks(self):
    params = {"layers": {"inner": {"layers": {"w": jnp.ones((2, 3, 4, 5))}}}}
    self.assertEqual(
      jax.tree.leaves(
        self.axes(params), is_leaf=lambda a: isinstance(a, tuple)
      ),
      [(2, 3, 1, 1)],
    )

  def test_flax_metadata_is_found(self):
    boxed = nn.Partitioned(jnp.ones((4, 3, 5)), (None, "layers", "model"))
    shapes = self.axes({"stack": boxed, "w": jnp.ones((2, 2))})
    self.assertEqual(shapes["stack"].value, (1, 3, 1))
    self.assertEqual(shapes["w"], (1, 1))

  def test_explicit(self):
    params = {
      "a": {"w": jnp.ones((2, 3, 4)), "b": jnp.ones((2, 3))},
      "c": jnp.ones(3),
    }
    for axes in ({"a": (0,)}, {"a": 0}, lambda p: {"a": {"w": 0, "b": -2}}):
      shapes = self.axes(params, axes)
      self.assertEqual(shapes["a"], {"w": (2, 1, 1), "b": (2, 1)})
      self.assertEqual(shapes["c"], (1,))
    shapes = self.axes(params, {"a": {"w": (0, 1), "b": None}})
    self.assertEqual(shapes["a"], {"w": (2, 3, 1), "b": (1, 1)})

  def test_errors(self):
    params = {"a": jnp.ones((2, 3))}
    with self.assertRaisesRegex(ValueError, "names .*'z'"):
      large_batch.lamb(0.1, layer_axes={"z": (0,)}).init(params)
    with self.assertRaisesRegex(ValueError, r"\(2,\).*'a'.*\(2, 3\)"):
      large_batch.lamb(0.1, layer_axes={"a": (2,)}).init(params)
    with self.assertRaisesRegex(ValueError, "zero_init='none'"):
      large_batch.lamb(0.1, zero_init="none")  # pyright: ignore
    for keyword, value in (
      ("ratio_clip", (10, 0.01)),
      ("phi_clip", (-1, 1)),
      ("max_grad_norm", 0),
      ("moment_dtype", jnp.int8),
    ):
      with self.assertRaisesRegex(ValueError, keyword):
        large_batch.lamb(0.1, **{keyword: value})
    with self.assertRaisesRegex(ValueError, "one ratio"):
      optax.flatten(large_batch.lamb(0.1)).init(params)
    tx = large_batch.lamb(0.1, layer_axes=())
    self.assertIsNotNone(optax.flatten(tx).init(params))
    with self.assertRaisesRegex(ValueError, "needs the parameters"):
      tx.update(params, tx.init(params))

  def test_matrices(self):
    params, _ = layers_tree()
    self.assertEqual(
      large_batch.matrices(params),
      {
        "layers": {"kernel": True, "bias": False},
        "out": {"kernel": True, "bias": False},
      },
    )

  def test_matrices_as_mask_knows_the_layer_axes(self):
    params = {"a": {"w": jnp.ones((2, 3, 4)), "b": jnp.ones((2, 3))}}
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = large_batch.lamb_tfa(0.5, weight_decay=1.0, layer_axes={"a": 0})
    updates, _ = jax.jit(tx.update)(zero, tx.init(params), params)
    # g = 0: u = x, r = 1, so w halves; b does not decay
    np.testing.assert_allclose(updates["a"]["w"], -0.5)
    np.testing.assert_array_equal(updates["a"]["b"], 0)

  def test_masks_as_trees(self):
    params, grads = layers_tree()
    tree = large_batch.matrices(params)
    prefix = {"layers": tree["layers"], "out": True}
    full = {"layers": tree["layers"], "out": {"kernel": True, "bias": True}}
    a, _ = trajectory(large_batch.lamb(0.03, decay_mask=prefix), params, grads)
    b, _ = trajectory(large_batch.lamb(0.03, decay_mask=full), params, grads)
    jax.tree.map(np.testing.assert_array_equal, a, b)


_EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from giantsteps.research import large_batch

assert jax.device_count() == 8
rng = np.random.default_rng(0)
draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
params = {"layers": {"w": draw(8, 16, 8), "b": draw(8, 16)}, "v": draw(16, 8),
          "v2": draw(16, 8)}
grads = jax.tree.map(lambda a: draw(6, *a.shape), params)
tx = large_batch.lamb(0.03, max_grad_norm=1.0)

@jax.jit
def run(params, grads):
  def step(carry, g):
    params, state = carry
    updates, state = tx.update(g, state, params)
    return (optax.apply_updates(params, updates), state), None
  return jax.lax.scan(step, (params, tx.init(params)), grads)[0]

want, _ = run(params, grads)
SPECS = (
  {"layers": {"w": P("data"), "b": P("data", "model")}, "v": P("model"),
   "v2": P()},
  {"layers": {"w": P(None, "model", "data"), "b": P()}, "v": P(None, "data"),
   "v2": P("data", "model")},
  {"layers": {"w": P(("data", "model")), "b": P(None, "model")},
   "v": P(("data", "model")), "v2": P("model")},
)
for shape, chosen in (
  ((1, 2), SPECS[1:2]), ((2, 2), SPECS[2:]), ((2, 4), SPECS)
):
  mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2,
                       devices=jax.devices()[:shape[0] * shape[1]])
  for specs in chosen:
    put = lambda tree, lead=(): jax.tree.map(
      lambda spec, a: jax.device_put(a, NamedSharding(mesh, P(*lead, *spec))),
      specs, tree, is_leaf=lambda a: isinstance(a, P))
    placed = put(params)
    g = put(grads, (None,))
    compiled = run.lower(placed, g).compile()
    hlo = compiled.as_text()
    assert "all-gather" not in hlo and "all-to-all" not in hlo
    got, state = compiled(placed, g)
    for a, b, c, m in zip(*map(jax.tree.leaves, (got, want, placed, state.mu))):
      # 1e-6 relative: only the order of the norms' sums differs
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
      assert a.sharding.is_equivalent_to(c.sharding, a.ndim), (a.sharding, c.sharding)
      assert m.sharding.is_equivalent_to(c.sharding, a.ndim), (m.sharding, c.sharding)

mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
with jax.set_mesh(mesh):
  placed = jax.tree.map(
    lambda spec, a: jax.device_put(a, NamedSharding(mesh, spec)),
    SPECS[1], params, is_leaf=lambda a: isinstance(a, P))
  for tx in (
    large_batch.lamb(0.03, moment_dtype=jnp.bfloat16, master_params=True),
    large_batch.lars(0.03)):
    state = tx.init(placed)
    updates, after = jax.jit(tx.update)(placed, state, placed)
    for a, b in zip(*map(jax.tree.leaves, ((placed, state), (updates, after)))):
      assert jax.typeof(a).sharding == jax.typeof(b).sharding, (a, b)
print("equal")
"""


class ShardingTest(absltest.TestCase):
  def test_2_4_and_8_devices_equal_one(self):
    flag = "--xla_force_host_platform_device_count=8"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
    done = subprocess.run(
      [sys.executable, "-c", _EIGHT_DEVICES],
      env=env,
      cwd=pathlib.Path(__file__).parents[3],
      capture_output=True,
      text=True,
      timeout=300,
    )
    self.assertEqual(done.stdout.strip(), "equal", done.stderr[-2000:])


if __name__ == "__main__":
  absltest.main()
