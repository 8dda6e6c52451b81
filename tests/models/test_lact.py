"""LaCT against the authors' PyTorch functions and its own invariants."""

# NumPy arrays stand for jax.Array; pytrees have no static type
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOperatorIssue=false

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.kernels_pallas import fast_weight
from giantsteps.models import lact

GOLDEN = pathlib.Path(__file__).parent.parent / "golden/lact"
TIGHT = 1e-11  # float64 against float64; Muon amplifies rounding to 1e-13
INPUTS = ("q", "k", "v", "lr0", "lr1", "lr2", "w0", "w1", "w2", "momentum")
# Half the time here is LLVM's: these programs run once.
quick_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def golden_names(prefix):
  return sorted(path.stem for path in GOLDEN.glob(f"{prefix}_*.npz"))


def assert_close(got, want, rtol=TIGHT):
  """Largest difference against the largest value."""
  want = np.asarray(want)
  scale = np.abs(want).max() if want.size else 1.0
  np.testing.assert_allclose(got, want, rtol=0, atol=rtol * max(scale, 1e-30))


def float64(golden, names):
  return {n: golden[n].astype(np.float64) for n in names if n in golden}


def random_problem(seed, rows=2, length=24, d=6, h=5, dtype="float64"):
  """Keyword arguments of `fast_weight_scan`, momentum included."""
  rng = np.random.default_rng(seed)
  token = lambda: jnp.asarray(rng.normal(size=(rows, length, d)), dtype)
  rate = lambda: jnp.asarray(rng.uniform(size=(rows, length, 1)), dtype)
  weight = lambda *s: jnp.asarray(rng.normal(size=(rows, *s)) / 2, dtype)
  return {
    "q": token(),
    "k": token(),
    "v": token(),
    "learning_rates": (rate(), rate(), rate()),
    "weights": (weight(h, d), weight(d, h), weight(h, d)),
    "momentum": rate(),
  }


def swiglu(w0, w1, w2, x):
  """NumPy, one row: weights as in the module, x [T, d] -> [T, d]."""
  gate, up = x @ w0.T, x @ w2.T
  return (gate / (1 + np.exp(-gate)) * up) @ w1.T


def video_order(block, repeats, num_chunks):
  """First noise blocks; then per chunk a clean block, written and read, and
  its noise blocks, read."""
  order = [(0, repeats * block, False, True)]
  for i in range(num_chunks - 1):
    start = repeats * block + i * (repeats + 1) * block
    clean, end = start + block, start + (repeats + 1) * block
    order += [(start, clean, True, True), (clean, end, False, True)]
  return order


def golden_arguments(name, golden):
  """Static keyword arguments for one operator file."""
  family = name.split("_")[0]
  if family == "lm":
    return {
      "chunk_size": int(golden["chunk_size"]),
      "muon": bool(golden["muon"]),
      "prenorm": bool(golden["prenorm"]),
    }
  if family == "nvs":
    return {
      "order": [tuple(int(x) for x in row) for row in golden["order"]],
      "newton_schulz": "fixed",
      "newton_schulz_steps": int(golden["muon_steps"]),
      "detach_norm": True,
    }
  sizes = ("mini_batch_size", "num_noise_repeats", "num_chunks")
  return {
    "order": video_order(*(int(golden[n]) for n in sizes)),
    "newton_schulz": "fixed",
    "muon": bool(golden["muon"]),
    "weight_norm": bool(golden["weight_norm"]),
  }


class GoldenTest(parameterized.TestCase):
  @parameterized.parameters(
    *golden_names("lm"), *golden_names("nvs"), *golden_names("ar")
  )
  def test_operator(self, name):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
      golden = np.load(GOLDEN / f"{name}.npz")
      static = golden_arguments(name, golden)
      # The view-synthesis code multiplies from the other side.
      turn = jnp.matrix_transpose if name.startswith("nvs") else lambda w: w
      inputs = float64(golden, INPUTS)
      if not golden.get("use_momentum", False):
        inputs.pop("momentum", None)

      def run(x):
        return lact.fast_weight_scan(
          x["q"],
          x["k"],
          x["v"],
          (x["lr0"], x["lr1"], x["lr2"]),
          (turn(x["w0"]), turn(x["w1"]), turn(x["w2"])),
          momentum=x.get("momentum"),
          **static,
        )

      def inner(x):
        out, state = run(x)
        cotangent = golden["cotangent"].astype(np.float64)
        return jnp.sum(out * cotangent), (out, state)

      chunk_size = static.get("chunk_size", 0)
      if "cotangent" in golden:
        grads, (out, state) = quick_jit(jax.grad(inner, has_aux=True))(inputs)
        for key, grad in grads.items():
          want = golden.get(f"grad_f64_{key}", np.zeros(grad.shape))
          assert_close(grad, want)
      elif inputs["q"].shape[1] > chunk_size:  # op by op: compiles much less
        with jax.disable_jit():
          out, state = run(jax.tree.map(jnp.asarray, inputs))
      else:
        out, state = quick_jit(run)(inputs)  # a scan of length 0 must be traced
      assert_close(out, golden["out_f64"])
      for i, w in enumerate(state.weights):
        if f"w{i}_final_f64" in golden:
          assert_close(turn(w), golden[f"w{i}_final_f64"])

  @parameterized.parameters(*golden_names("newton_schulz"))
  def test_newton_schulz(self, name):
    golden = np.load(GOLDEN / f"{name}.npz")
    with jax.enable_x64(True):
      g = golden["g"].astype(np.float64)
      for key, kind, steps in (
        ("schedule5", "scheduled", 5),
        ("fixed5", "fixed", 5),
        ("fixed3", "fixed", 3),
      ):
        function = functools.partial(lact.newton_schulz, kind=kind, steps=steps)
        out, pullback = jax.vjp(function, g)
        assert_close(out, golden[f"{key}_f64"])
        (grad,) = pullback(jnp.asarray(golden["cotangent"], jnp.float64))
        self.assertTrue(np.isfinite(grad).all())
        if f"{key}_grad_f64" in golden:
          assert_close(grad, golden[f"{key}_grad_f64"])

  @parameterized.parameters(*golden_names("layer_lm"))
  def test_layer(self, name):
    golden = np.load(GOLDEN / f"{name}.npz")
    config = layer_config(golden)
    params = layer_params(golden, "param.")
    with jax.enable_x64(True):
      layer = lact.LactLayer(config)
      x = golden["x"].astype(np.float64)
      positions = jnp.arange(x.shape[1])[None]
      init = jax.eval_shape(layer.init, jax.random.key(0), x, positions)
      shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
      self.assertEqual(shapes(init["params"]), shapes(params))

      def inner(params, x):
        out = layer.apply({"params": params}, x, positions)
        return jnp.sum(out * golden["cotangent"].astype(np.float64)), out

      (grads, grad_x), out = quick_jit(jax.grad(inner, (0, 1), has_aux=True))(
        params, x
      )
      assert_close(out, golden["out_f64"], 1e-10)
      assert_close(grad_x, golden["grad_f64_x"], 1e-10)
      wanted = jax.tree.leaves_with_path(
        layer_params(golden, "grad_f64_param.")
      )
      got = dict(jax.tree.leaves_with_path(grads))
      for path, want in wanted:
        assert_close(got[path], want, 1e-10)


def layer_config(golden):
  cfg = {k[4:]: golden[k][()] for k in golden if k.startswith("cfg.")}
  return lact.Config(
    width=int(cfg["hidden_size"]),
    num_heads=int(cfg["num_attn_heads"]),
    fast_heads=int(cfg["num_lact_heads"]),
    expansion=float(cfg["inter_multi"]),
    window=int(cfg["window_size"]),
    chunk_size=int(cfg["lact_chunk_size"]),
    causal=True,
    muon=bool(cfg.get("use_muon", False)),
    momentum=bool(cfg["use_momentum"]),
    prenorm=bool(cfg.get("ttt_prenorm", False)),
    low_rank=int(cfg.get("w0_w2_low_rank", 0)),
    fast_rope=not cfg.get("ttt_nope", False),
    fast_silu_v=not cfg.get("no_v_silu", False),
    fast_gate=bool(cfg["learnable_ttt_scale"]),
    rope_theta=float(cfg["rope_theta"]),
    qkv_bias=bool(cfg.get("qkv_bias", False)),
    qk_norm=bool(cfg["attn_qk_norm"]),
    dtype="float64",
    param_dtype="float64",
  )


def layer_params(golden, prefix):
  """The torch layout as our tree, what the file lacks left out."""
  cut = len(prefix)
  torch = {
    k[cut:]: golden[k].astype(np.float64)
    for k in golden
    if k.startswith(prefix)
  }
  tree = {}
  for i, name in enumerate("qkv"):
    part = lambda w, i=i: np.split(w, 3)[i].T
    dense = {
      ours: part(torch[f"qkv.{theirs}"])
      for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
      if f"qkv.{theirs}" in torch
    }
    tree |= {name: dense} if dense else {}
  for i, name in enumerate("qk"):
    if "qk_scale" in torch:
      tree[f"{name}_scale"] = torch["qk_scale"][:, i]
      tree[f"{name}_offset"] = torch["qk_offset"][:, i]
  for theirs, ours in (
    ("o_proj", "o"),
    ("lr_proj", "rate"),
    ("ttt_scale_proj", "fast_gate"),
    ("momentum_proj.0", "momentum"),
  ):
    if f"{theirs}.weight" in torch:
      tree[ours] = {"kernel": torch[f"{theirs}.weight"].T}
    if f"{theirs}.bias" in torch:
      tree[ours]["bias"] = torch[f"{theirs}.bias"]
  for theirs, ours in (
    ("ttt_norm", "fast_norm"),
    ("q_norm", "q_norm"),
    ("k_norm", "k_norm"),
  ):
    if f"{theirs}.weight" in torch:
      tree[ours] = {"scale": torch[f"{theirs}.weight"]}
  for name in ("w0", "w1", "w2"):
    for theirs, ours in (
      (name, name),
      (f"{name}.w_left", f"{name}_left"),
      (f"{name}.w_right", f"{name}_right"),
    ):
      if theirs in torch:
        tree[ours] = torch[theirs]
  return tree


class NewtonSchulzTest(parameterized.TestCase):
  @parameterized.parameters("scheduled", "fixed")
  def test_equivariance(self, kind):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
      g = rng.normal(size=(3, 4, 7))
      q = np.linalg.qr(rng.normal(size=(4, 4))).Q
      p = np.linalg.qr(rng.normal(size=(7, 7))).Q
      ns = quick_jit(functools.partial(lact.newton_schulz, kind=kind))
      out = ns(g)
      assert_close(ns(np.swapaxes(g, 1, 2)), np.swapaxes(out, 1, 2))
      assert_close(ns(q @ g @ p), q @ out @ p)
      # |g| enters as |g| + 1e-7: 1e3 g differs by 1e-7 / |g| before 5 steps.
      assert_close(ns(1e3 * g), out, 1e-6)

  @parameterized.parameters("scheduled", "fixed")
  def test_singular_values_follow_the_polynomial(self, kind):
    g = np.random.default_rng(1).normal(size=(5, 9))
    coefficients = {
      "scheduled": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
      ),
      "fixed": ((3.4445, -4.7750, 2.0315),) * 5,
    }[kind]
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    s = s / (np.linalg.norm(g) + 1e-7)
    for a, b, c in coefficients:
      s = a * s + b * s**3 + c * s**5
    with jax.enable_x64(True):
      assert_close(lact.newton_schulz(g, kind), u @ np.diag(s) @ vt)

  def test_dtype_of_the_iteration(self):
    g = jax.random.normal(jax.random.key(0), (4, 32, 32))
    exact = lact.newton_schulz(g)
    coarse = lact.newton_schulz(g, dtype="bfloat16")
    self.assertEqual(coarse.dtype, jnp.float32)
    error = jnp.linalg.norm(coarse - exact) / jnp.linalg.norm(exact)
    # bfloat16 keeps 8 bits; 15 products with coefficients near 4.
    self.assertBetween(error, 1e-4, 0.1)

  def test_rejects(self):
    g = jnp.ones((3, 3))
    with self.assertRaisesRegex(ValueError, "'muon': choose scheduled"):
      lact.newton_schulz(g, "muon")
    with self.assertRaisesRegex(ValueError, "6 steps"):
      lact.newton_schulz(g, steps=6)


class GradientTest(absltest.TestCase):
  def test_is_the_weighted_gradient_of_the_loss(self):
    with jax.enable_x64(True):
      x = random_problem(0)
      k, v, rates = x["k"], x["v"], x["learning_rates"]

      def loss(weights, eta):
        w0, w1, w2 = weights
        gate = jnp.einsum("nhd,ncd->nch", w0, k)
        up = jnp.einsum("nhd,ncd->nch", w2, k)
        out = jnp.einsum("ndh,nch->ncd", w1, jax.nn.silu(gate) * up)
        return -jnp.sum(eta * out * v)

      got = quick_jit(fast_weight.gradient)(x["weights"], k, v, rates)
      for i in range(3):
        want = quick_jit(jax.grad(loss))(x["weights"], rates[i])[i]
        assert_close(got[i], -want)

  def test_zero_values_write_nothing(self):
    x = random_problem(1, dtype="float32")
    zero = jnp.zeros_like(x["v"])
    for d in fast_weight.gradient(
      x["weights"], x["k"], zero, x["learning_rates"]
    ):
      np.testing.assert_array_equal(d, 0)


def run(problem, **kwargs):
  """Op by op, so that the tests share what is compiled."""
  with jax.disable_jit():
    return lact.fast_weight_scan(**problem, **{"chunk_size": 8} | kwargs)


def run_jitted(problem, **kwargs):
  scan = functools.partial(lact.fast_weight_scan, **kwargs)
  return quick_jit(lambda x: scan(**x))(problem)


class ScanTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(jax.enable_x64(True))

  def test_no_rate_reads_the_initial_weights(self):
    x = random_problem(2)
    x["learning_rates"] = (jnp.zeros((2, 24, 1)),) * 3
    out, _ = run(x, muon=False)
    for row in range(2):
      w = [np.asarray(w[row]) for w in x["weights"]]
      q = np.asarray(x["q"][row])
      want = [swiglu(*w, q[:8])]
      for start in (8, 16):  # each write divides by |w| + 1e-5, not by |w|
        length = [np.linalg.norm(m, axis=-1, keepdims=True) for m in w]
        initial = [
          np.linalg.norm(m[row], axis=-1, keepdims=True) for m in x["weights"]
        ]
        w = [
          m / (s + 1e-5) * n for m, s, n in zip(w, length, initial, strict=True)
        ]
        want.append(swiglu(*w, q[start : start + 8]))
      assert_close(out[row], np.concatenate(want))

  @parameterized.parameters(False, True)
  def test_row_lengths(self, muon):
    x = random_problem(3)
    del x["momentum"]
    order = [(0, 24, True, False)]
    _, state = run(x, muon=muon, order=order)
    _, raw = run(x, muon=muon, order=order, weight_norm=False)
    for w, z, initial in zip(
      state.weights, raw.weights, x["weights"], strict=True
    ):
      s = np.linalg.norm(z, axis=-1)
      want = np.linalg.norm(initial, axis=-1) * s / (s + 1e-5)
      assert_close(np.linalg.norm(w, axis=-1), want)

  def test_causality(self):
    x = random_problem(4)
    out, _ = run(x)
    for name in ("k", "v", "momentum"):
      changed, _ = run(x | {name: x[name].at[:, 9].multiply(1.5)})
      np.testing.assert_array_equal(changed[:, :16], out[:, :16])
      self.assertTrue((changed[:, 16:] != out[:, 16:]).all())
    changed, _ = run(x | {"q": x["q"].at[:, 9].add(1)})
    others = np.arange(24) != 9
    np.testing.assert_array_equal(changed[:, others], out[:, others])

  def test_a_chunk_is_a_set(self):
    x = random_problem(5)
    out, _ = run(x)
    shuffle = np.concatenate([np.arange(8), 8 + np.arange(8)[::-1]])
    shuffle = np.concatenate([shuffle, np.arange(16, 24)])
    permute = lambda a: jnp.asarray(np.asarray(a)[:, shuffle])
    moved = jax.tree.map(permute, x | {"weights": ()})
    changed, _ = run(moved | {"q": x["q"], "weights": x["weights"]})
    assert_close(changed, out)

  @parameterized.parameters((7, False), (8, True), (16, False), (21, True))
  def test_scan_equals_the_list(self, length, prenorm):
    x = random_problem(6, length=length)
    order = []
    for start in range(0, length - 8, 8):
      order += [
        (start, start + 8, False, True),
        (start, start + 8, True, False),
      ]
    order.append((len(order) * 4, length, False, True))
    out, state = run_jitted(x, chunk_size=8, prenorm=prenorm)
    want, want_state = run(x, prenorm=prenorm, order=order)
    self.assertLen(order, 2 * max(0, -(-length // 8) - 1) + 1)
    assert_close(out, want)
    jax.tree.map(assert_close, state, want_state)

  def test_rows_are_independent(self):
    x, other = random_problem(7), random_problem(70)
    out, _ = run(x)
    mixed = jax.tree.map(lambda a, b: jnp.stack([a[0], b[1]]), x, other)
    np.testing.assert_array_equal(run(mixed)[0][0], out[0])

  def test_the_last_chunk_is_only_read(self):
    x = random_problem(8, length=21)
    grads = quick_jit(
      jax.grad(
        lambda x: jnp.sum(lact.fast_weight_scan(**x, chunk_size=8)[0] ** 2)
      )
    )(x)
    for name in ("k", "v", "learning_rates", "momentum"):
      for grad in jax.tree.leaves(grads[name]):
        np.testing.assert_array_equal(grad[:, 16:], 0)
        self.assertTrue((grad[:, 8:16] != 0).all())

  def test_remat_changes_nothing(self):
    x = random_problem(9)

    def grads(remat):
      loss = lambda x: jnp.sum(
        lact.fast_weight_scan(**x, chunk_size=8, remat=remat)[0] ** 2
      )
      return quick_jit(jax.grad(loss))(x)

    jax.tree.map(assert_close, grads(True), grads(False))

  @parameterized.parameters(False, True)
  def test_state_continues(self, prenorm):
    x = random_problem(10)
    out, _ = run(x, prenorm=prenorm, order=[(0, 8, 1, 1), (8, 24, 1, 1)])
    first, state = run(x, prenorm=prenorm, order=[(0, 8, 1, 1)])
    second, _ = run(
      x | {"state": state}, prenorm=prenorm, order=[(8, 24, 1, 1)]
    )
    assert_close(jnp.concatenate([first, second], 1), out)

  def test_bidirectional_is_one_write(self):
    x = random_problem(11)
    out, _ = run(x, order="bidirectional")
    want, _ = run(x, order=[(0, 24, True, False), (0, 24, False, True)])
    assert_close(out, want)

  def test_momentum_of_one_write_is_irrelevant(self):
    x = random_problem(12)
    out, _ = run(x, order="bidirectional")
    del x["momentum"]
    assert_close(run(x, order="bidirectional")[0], out)

  def test_muon_sees_only_relative_rates(self):
    x = random_problem(13)
    del x["momentum"]
    rates = x["learning_rates"]
    scaled = (rates[0] * 7, rates[1] * 0.3, rates[2] * 50)
    # |D| enters as |D| + 1e-7.
    assert_close(run(x | {"learning_rates": scaled})[0], run(x)[0], 1e-5)

  def test_weights_without_batch_axis(self):
    x = random_problem(14)
    shared = tuple(w[0] for w in x["weights"])
    repeated = tuple(jnp.stack([w, w]) for w in shared)
    out, _ = run(x | {"weights": shared})
    np.testing.assert_array_equal(out, run(x | {"weights": repeated})[0])

  def test_detached_lengths(self):
    x = random_problem(15)

    def grad(**kwargs):
      def loss(w0):
        weights = (w0, *x["weights"][1:])
        args = x | {"weights": weights}
        return jnp.sum(lact.fast_weight_scan(**args, **kwargs)[0])

      return quick_jit(jax.grad(loss))(x["weights"][0])

    kwargs = {"order": "bidirectional"}
    full, detached = grad(**kwargs), grad(detach_norm=True, **kwargs)
    self.assertGreater(np.abs(full - detached).max(), 1e-3)

  def test_float32_is_close(self):
    exact, _ = run(random_problem(16))
    single = jax.tree.map(lambda a: a.astype("float32"), random_problem(16))
    out, state = run_jitted(single, chunk_size=8)
    self.assertEqual(out.dtype, jnp.float32)
    self.assertEqual(state.weights[0].dtype, jnp.float32)
    assert_close(out, exact, 1e-4)  # Muon; measured 2e-6 by the source

  def test_bfloat16_inputs_float32_state(self):
    x = random_problem(17, d=32, h=32, length=128, dtype="float32")
    coarse = x | {n: x[n].astype("bfloat16") for n in ("q", "k", "v")}
    want, _ = run_jitted(x, chunk_size=64, muon=False)
    out, state = run_jitted(coarse, chunk_size=64, muon=False)
    self.assertEqual(out.dtype, jnp.bfloat16)
    for leaf in jax.tree.leaves(state):
      self.assertEqual(leaf.dtype, jnp.float32)
    error = jnp.linalg.norm(out.astype("float32") - want)
    self.assertLess(error / jnp.linalg.norm(want), 0.05)

  def test_zeros_have_finite_gradients(self):
    x = jax.tree.map(jnp.zeros_like, random_problem(18))
    with jax.debug_nans(True):
      grads = quick_jit(
        jax.grad(lambda x: jnp.sum(lact.fast_weight_scan(**x, chunk_size=8)[0]))
      )(x)
    for leaf in jax.tree.leaves(grads):
      self.assertTrue(np.isfinite(leaf).all())

  @parameterized.parameters(
    ({"q": (2, 24, 7)}, "want .N, L, d."),
    ({"momentum": (2, 24)}, r"\(2, 24\): want \(2, 24, 1\)"),
    ({"weights": ((5, 6), (5, 6), (5, 6))}, "weights .* want"),
  )
  def test_rejects_shapes(self, change, message):
    zeros = lambda s: jax.tree.map(
      jnp.zeros, s, is_leaf=lambda t: isinstance(t[0], int)
    )
    x = random_problem(0) | {n: zeros(s) for n, s in change.items()}
    with self.assertRaisesRegex(ValueError, message):
      lact.fast_weight_scan(**x)

  def test_rejects_order(self):
    with self.assertRaisesRegex(ValueError, "order='acausal'"):
      lact.fast_weight_scan(**random_problem(0), order="acausal")


SMALL = lact.Config(
  vocab_size=11,
  width=16,
  depth=2,
  num_heads=2,
  fast_heads=2,
  mlp_width=24,
  chunk_size=4,
  window=4,
  causal=True,
)


@functools.cache
def init(config, length=8):
  tokens = jnp.zeros((1, length), jnp.int32)
  return quick_jit(lact.Lact(config).init)(jax.random.key(0), tokens)["params"]


def random_tokens(rows, length):
  key = jax.random.key(1)
  return jax.random.randint(key, (rows, length), 0, SMALL.vocab_size)


class ModelTest(parameterized.TestCase):
  def replace(self, **kwargs):
    return dataclasses.replace(SMALL, **kwargs)

  @parameterized.parameters(
    {"momentum": True, "prenorm": True, "short_conv": 3},
    {"muon": False, "low_rank": 2, "qk_norm": True, "remat": "full"},
  )
  def test_causal(self, **kwargs):
    config = self.replace(**kwargs)
    params, tokens = init(config), random_tokens(2, 13)
    # Initial short convolutions do nothing.
    params = jax.tree.map(lambda x: x + 0.1, params)
    logits = quick_jit(functools.partial(lact.logits, config))
    out = logits(params, tokens)
    self.assertEqual((out.shape, out.dtype), ((2, 13, 11), jnp.float32))
    changed = logits(params, tokens.at[:, 5].set((tokens[:, 5] + 1) % 11))
    np.testing.assert_array_equal(changed[:, :5], out[:, :5])
    self.assertTrue((changed[:, 5:] != out[:, 5:]).any((0, 2)).all())

  def test_fast_weights_reach_beyond_the_window(self):
    config = self.replace(depth=1)
    tokens = random_tokens(1, 16)
    logits = quick_jit(functools.partial(lact.logits, config))
    params = init(config)
    out = logits(params, tokens)
    changed = logits(params, tokens.at[:, 0].set((tokens[:, 0] + 1) % 11))
    self.assertTrue((changed[:, 8:] != out[:, 8:]).any((0, 2)).all())

  def test_bidirectional_sees_all(self):
    config = self.replace(causal=False)
    params, tokens = init(SMALL), random_tokens(2, 9)
    logits = quick_jit(functools.partial(lact.logits, config))
    out = logits(params, tokens)
    changed = logits(params, tokens.at[0, 8].set((tokens[0, 8] + 1) % 11))
    self.assertTrue((changed[0] != out[0]).any(-1).all())
    np.testing.assert_array_equal(changed[1], out[1])

  def test_bind_aligns_hidden_with_tokens(self):
    params, tokens = init(SMALL), random_tokens(2, 8)
    forward = quick_jit(lambda bound, x: bound.forward(x)[0] @ bound.head)
    shifted = forward(lact.bind(SMALL, params), tokens)
    logits = lambda config: quick_jit(functools.partial(lact.logits, config))
    plain = logits(SMALL)(params, tokens)
    np.testing.assert_allclose(shifted[:, 1:], plain[:, :-1], atol=1e-5)
    np.testing.assert_array_equal(shifted[:, 0], shifted[:, 1])
    both = self.replace(causal=False)
    straight = forward(lact.bind(both, params), tokens)
    np.testing.assert_allclose(
      straight, logits(both)(params, tokens), atol=1e-5
    )

  @parameterized.parameters(
    {"momentum": True, "prenorm": True, "short_conv": 3, "window": 6},
    {"muon": False, "low_rank": 2, "qk_norm": True, "window": None},
  )
  def test_decoding_is_the_forward_pass_at_every_length(self, **kwargs):
    with jax.enable_x64(True):
      wide = {"dtype": "float64", "param_dtype": "float64"}
      config = self.replace(**wide, **kwargs)
      length = 3 * config.chunk_size + 2
      rng = np.random.default_rng(0)
      noise = lambda x: x + 0.1 * rng.normal(size=x.shape)
      params = jax.tree.map(noise, init(config))
      tokens = random_tokens(2, length)
      # Causal: one pass has the outputs of all shorter sequences.
      want = quick_jit(lact.Lact(config).apply)({"params": params}, tokens)
      traces = []

      def decode(params, tokens, cache):
        traces.append(0)
        return lact.decode(config, params, tokens, cache)

      decode = quick_jit(decode)
      start = lambda params: lact.init_cache(config, params, 2, length)
      cache = quick_jit(start)(params)
      for t in range(length):
        hidden, cache = decode(params, tokens[:, t : t + 1], cache)
        assert_close(hidden[:, 0], want[:, t])
      self.assertLen(traces, 1)
      if config.window is None:  # there is no place for one more
        hidden, _ = decode(params, tokens[:, :1], cache)
        self.assertTrue(np.isnan(hidden).all())

      # Prompts of two lengths at once, then their next tokens.
      lengths = np.array([config.chunk_size, 2 * config.chunk_size + 1])
      prompts = np.where(
        np.arange(10)[None] < lengths[:, None], tokens[:, :10], 0
      )
      hidden, cache = quick_jit(
        lambda p, x, n: lact.prefill(config, p, x, n, length)
      )(params, prompts, lengths)
      for row, count in enumerate(lengths):
        assert_close(hidden[row, :count], want[row, :count])
      rows = np.arange(2)
      for i in range(length - max(lengths)):
        hidden, cache = decode(
          params, tokens[rows, lengths + i][:, None], cache
        )
        assert_close(hidden[:, 0], want[rows, lengths + i])

  def test_many_tokens_decode_in_one_call(self):
    params, tokens = init(SMALL), random_tokens(2, 11)
    want = quick_jit(lact.Lact(SMALL).apply)({"params": params}, tokens)
    prefill = quick_jit(functools.partial(lact.prefill, SMALL))
    _, cache = prefill(params, tokens[:, :6])
    hidden, cache = quick_jit(functools.partial(lact.decode, SMALL))(
      params, tokens[:, 6:], cache
    )
    # Sums in another order; 1e-6 after Newton-Schulz.
    np.testing.assert_allclose(hidden, want[:, 6:], atol=1e-4)
    np.testing.assert_array_equal(cache.lengths, [11, 11])

  def test_a_cache_shorter_than_the_window_ends(self):
    config = self.replace(window=8)
    params = init(config)
    cache = lact.init_cache(config, params, 1, 5)
    tokens = random_tokens(1, 7)
    hidden, _ = lact.decode(config, params, tokens, cache)
    self.assertTrue(np.isfinite(hidden[:, :5]).all())
    self.assertTrue(np.isnan(hidden[:, 5:]).all())

  def test_decoding_rejects(self):
    params, tokens = init(SMALL), random_tokens(2, 4)
    with self.assertRaisesRegex(ValueError, "causal=False"):
      lact.prefill(self.replace(causal=False), params, tokens)
    with self.assertRaisesRegex(ValueError, "window=None: give max_length"):
      lact.prefill(self.replace(window=None), params, tokens)
    with self.assertRaisesRegex(ValueError, "more than max_length=3"):
      lact.prefill(SMALL, params, tokens, max_length=3)
    start = functools.partial(lact.init_cache, SMALL, rows=3)
    cache = jax.eval_shape(start, params)
    with self.assertRaisesRegex(ValueError, r"this cache is for \[3, T\]"):
      lact.decode(SMALL, params, tokens, cache)

  def test_stack_is_scanned_under_its_name(self):
    params = init(SMALL)
    for leaf in jax.tree.leaves(params["layers"]):
      self.assertEqual(leaf.shape[0], SMALL.depth)
    kernels = params["layers"]["mixer"]["q"]["kernel"]
    self.assertTrue((kernels[0] != kernels[1]).any())

  def test_stack_equals_separate_blocks(self):
    params, tokens = init(SMALL), random_tokens(2, 8)
    x = params["embed"]["embedding"][tokens]
    block = quick_jit(lact.Block(SMALL).apply)
    for i in range(SMALL.depth):
      one = jax.tree.map(lambda a, i=i: a[i], params["layers"])
      x, _ = block({"params": one}, x, jnp.arange(8)[None])
    square = jnp.mean(x**2, -1, keepdims=True)
    x = x / jnp.sqrt(square + SMALL.eps) @ params["head"]
    # Different fusions; 1e-6 after Newton-Schulz.
    np.testing.assert_allclose(x, lact.logits(SMALL, params, tokens), atol=1e-4)

  def test_bfloat16_parameters(self):
    config = self.replace(dtype="bfloat16", param_dtype="bfloat16")
    params = init(config)
    for leaf in jax.tree.leaves(params):
      self.assertEqual(leaf.dtype, jnp.bfloat16)
    tokens = random_tokens(1, 8)
    hidden = jax.eval_shape(lact.Lact(config).apply, {"params": params}, tokens)
    self.assertEqual(hidden.dtype, jnp.bfloat16)
    out = quick_jit(functools.partial(lact.logits, config))(params, tokens)
    self.assertEqual(out.dtype, jnp.float32)
    self.assertTrue(np.isfinite(out).all())

  def test_low_rank_starts_near_half_the_identity(self):
    config = self.replace(low_rank=1, width=512, fast_heads=2)
    layer = lact.LactLayer(config)
    x, positions = jnp.zeros((1, 4, 512)), jnp.arange(4)[None]
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x, positions)
    self.assertEqual(shapes["params"]["w0_left"].shape, (2, 256, 1))
    self.assertEqual(shapes["params"]["w2_right"].shape, (2, 1, 256))
    self.assertEqual(shapes["params"]["w1"].shape, (2, 256, 256))

  @parameterized.parameters(
    ({"depth": 0}, "depth=0"),
    ({"width": 18}, "width=18: must be a multiple"),
    ({"expansion": 0.01}, "expansion=0.01"),
    ({"remat": "some"}, "remat='some'"),
    ({"newton_schulz": "cubic"}, "newton_schulz='cubic'"),
  )
  def test_rejects_config(self, change, message):
    with self.assertRaisesRegex(ValueError, message):
      self.replace(**change)

  def test_rejects_tokens(self):
    with self.assertRaisesRegex(ValueError, r"tokens \(3,\)"):
      lact.Lact(SMALL).init(jax.random.key(0), jnp.zeros(3, jnp.int32))


if __name__ == "__main__":
  absltest.main()
