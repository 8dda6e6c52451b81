"""LaCT for video: orders, windows and generation."""

# NumPy arrays stand for jax.Array; pytrees have no static type
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.models import fast_weights, lact_video

GOLDEN = pathlib.Path(__file__).parent.parent / "golden/lact"
quick_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
SMALL = lact_video.Config(
  width=12,
  heads=1,
  fast_heads=2,
  expansion=1.5,
  mlp_width=16,
  block=4,
  cache=6,  # one clean block and a half
  dtype="float64",
  param_dtype="float64",
)
REPEATS, CHUNKS = 2, 3
CLEAN = lact_video.teacher_forcing(REPEATS, CHUNKS)
PLACES = lact_video.positions(2, 1, 2, CLEAN)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, len(CLEAN) * SMALL.block, SMALL.width))


@functools.cache
def init(config, module=lact_video.VideoLayer):
  """Parameters in which nothing is zero or one."""
  with jax.enable_x64(True):
    made = quick_jit(module(config, CLEAN).init)(jax.random.key(0), X, PLACES)
    rng = np.random.default_rng(1)
    return jax.tree.map(
      lambda p: np.asarray(p) + 0.2 * rng.normal(size=p.shape), made["params"]
    )


@functools.cache
def jitted(config, clean, module=lact_video.VideoLayer):
  apply = module(config, clean).apply
  return quick_jit(
    lambda params, x, places, state=None: apply(
      {"params": params}, x, places, state
    )
  )


def run(config, x=X, clean=CLEAN, places=PLACES, state=None, **kwargs):
  params = init(config, **kwargs)
  return jitted(config, clean, **kwargs)(params, x, places, state)


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def silu(x):
  return x / (1 + np.exp(-x))


def rms(x, scale, eps):
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * scale


def visible(clean, block, cache):
  """The mask in words, token by token."""
  owner = np.repeat(np.arange(len(clean)), block)
  written = np.repeat(clean, block)
  mask = owner[:, None] == owner[None]  # a block sees itself
  for i in np.flatnonzero(~written):
    before = np.flatnonzero(written & (owner < owner[i]))
    mask[i, before[len(before) - min(cache, len(before)) :]] = True
  return mask


def numpy_layer(params, x, places, config):
  """The gradient-descent layer in NumPy, one row, x [T, D]; one head of
  attention."""
  project = lambda name: x @ params[name]["kernel"]
  q = rms(project("q"), params["q_norm"]["scale"], config.eps)
  k = rms(project("k"), params["k_norm"]["scale"], config.eps)
  v = project("v")
  half = config.width // 2
  third = half // 3
  angle = np.concatenate(
    [
      places[:, i : i + 1]
      * config.rope_theta ** (-np.arange(0, 2 * n, 2) / (2 * n))
      for i, n in enumerate((half - 2 * third, third, third))
    ],
    -1,
  )
  turn = np.exp(1j * angle)

  def rotate(y):
    z = (y[:, :half] + 1j * y[:, half:]) * turn
    return np.concatenate([z.real, z.imag], -1)

  q, k = rotate(q), rotate(k)
  scores = q @ k.T / np.sqrt(config.width)
  mask = visible(CLEAN, config.block, config.cache)
  near = softmax(np.where(mask, scores, -np.inf)) @ v

  d, far = config.width // config.fast_heads, []
  rate = x @ params["rate"]["kernel"] + params["rate"]["bias"]
  base = np.log(np.expm1(config.rate))
  rate = np.log1p(np.exp(rate + base)).reshape(len(x), config.fast_heads, 3)
  for head in range(config.fast_heads):
    own = slice(head * d, (head + 1) * d)
    unit = lambda y: y / (np.linalg.norm(y, axis=-1, keepdims=True) + 1e-5)
    fq, fk, fv = unit(q[:, own]), unit(k[:, own]), v[:, own]
    w0, w1, w2 = (params[f"w{i}"][head] for i in range(3))
    sizes = [np.linalg.norm(w, axis=-1, keepdims=True) for w in (w0, w1, w2)]
    out = []
    for i, clean in enumerate(CLEAN):
      t = slice(i * config.block, (i + 1) * config.block)
      if clean:
        g, u, p = fk[t] @ w0.T, fk[t] @ w2.T, fv[t] @ w1
        s = 1 / (1 + np.exp(-g))
        eta = rate[t, head]
        steps = (
          (eta[:, :1] * p * u * s * (1 + g * (1 - s))).T @ fk[t],
          (eta[:, 1:2] * fv[t]).T @ (g * s * u),
          (eta[:, 2:] * p * g * s).T @ fk[t],
        )
        w0, w1, w2 = (
          (w + step)
          / (np.linalg.norm(w + step, axis=-1, keepdims=True) + 1e-5)
          * size
          for w, step, size in zip((w0, w1, w2), steps, sizes, strict=True)
        )
      out.append((silu(fq[t] @ w0.T) * (fq[t] @ w2.T)) @ w1.T)
    scale = params["fast_norm"]["scale"]
    far.append(rms(np.concatenate(out), scale, config.eps))
  gate = x @ params["fast_gate"]["kernel"] + params["fast_gate"]["bias"]
  out = near + silu(gate) * np.concatenate(far, -1)
  return out @ params["o"]["kernel"]


class OrderTest(parameterized.TestCase):
  def test_training_sequence(self):
    self.assertEqual(
      lact_video.video_order(3, 2, 3),
      [
        (0, 6, False, True),
        (6, 9, True, True),
        (9, 15, False, True),
        (15, 18, True, True),
        (18, 24, False, True),
      ],
    )

  def test_copies_have_the_place_of_their_block(self):
    # noisy 0, clean 0, noisy 1, clean 1, noisy 2; two frames of 1 x 2 tokens
    clean = lact_video.teacher_forcing(1, 3)
    places = lact_video.positions(2, 1, 2, clean).reshape(5, 4, 3)
    np.testing.assert_array_equal(
      places[:, :, 0],
      [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3], [4, 4, 5, 5]],
    )
    np.testing.assert_array_equal(places[0, :, 2], [0, 1, 0, 1])

  @parameterized.parameters("ar_rep1", "ar_rep1_nonorm", "ar_rep2_muon_mom")
  def test_golden(self, name):
    golden = np.load(GOLDEN / f"{name}.npz")
    x = {
      k: golden[k].astype(np.float64)
      for k in ("q", "k", "v", "lr0", "lr1", "lr2", "w0", "w1", "w2")
    }
    momentum = None
    if golden["use_momentum"]:
      momentum = golden["momentum"].astype(np.float64)
    sizes = ("mini_batch_size", "num_noise_repeats", "num_chunks")
    with jax.enable_x64(True), jax.disable_jit():
      out, _ = fast_weights.fast_weight_scan(
        *(jnp.asarray(x[n]) for n in "qkv"),
        tuple(jnp.asarray(x[f"lr{i}"]) for i in range(3)),
        tuple(jnp.asarray(x[f"w{i}"]) for i in range(3)),
        order=lact_video.video_order(*(int(golden[n]) for n in sizes)),
        newton_schulz="fixed",
        muon=bool(golden["muon"]),
        weight_norm=bool(golden["weight_norm"]),
        momentum=momentum,
      )
    want = golden["out_f64"]
    atol = 1e-10 * np.abs(want).max()
    np.testing.assert_allclose(out, want, rtol=0, atol=atol)


class LayerTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(jax.enable_x64(True))

  def test_numpy_transcription(self):
    # a large rate, so that the writes matter
    config = dataclasses.replace(SMALL, rate=0.5)
    out, _ = run(config)
    for row in range(2):
      want = numpy_layer(init(config), X[row], PLACES, config)
      # float64, sums of at most 100 numbers of order 1
      np.testing.assert_allclose(out[row], want, atol=1e-11, rtol=0)

  @parameterized.parameters(
    {"rate": 0.5},
    {"muon": True, "momentum": True},
    {"weight_norm": False, "momentum": True, "cache": 4},
    {"cache": 0},
    {"cache": 100},
  )
  def test_generation_is_teacher_forcing(self, **change):
    config = dataclasses.replace(SMALL, **change)
    module = lact_video.Block
    want, last = run(config, module=module)
    blocks = X.reshape(2, len(CLEAN), config.block, config.width)
    places = PLACES.reshape(len(CLEAN), config.block, 3)
    state = None
    for i, clean in enumerate(CLEAN):
      out, after = run(
        config, blocks[:, i], (clean,), places[i], state, module=module
      )
      state = after if clean else state
      own = slice(i * config.block, (i + 1) * config.block)
      np.testing.assert_allclose(out, want[:, own], atol=1e-12, rtol=0)
    assert state is not None
    self.assertEqual(state.key.shape[1], min(config.cache, 2 * config.block))
    for a, b in zip(*map(jax.tree.leaves, (state, last)), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-12, rtol=0)

  def test_a_noisy_copy_leaves_no_trace(self):
    want, _ = run(SMALL)
    for i, clean in enumerate(CLEAN):
      own = slice(i * SMALL.block, (i + 1) * SMALL.block)
      changed = X.copy()
      changed[:, own] += 1
      out, _ = run(SMALL, changed)
      same = np.ones(X.shape[1], bool)
      same[own] = False
      if clean:  # the past stays, the future changes
        same[own.start :] = False
        self.assertTrue((out != want)[:, own.stop :].any(-1).all())
      np.testing.assert_array_equal(out[:, same], want[:, same])

  def test_clean_blocks_beyond_the_cache_reach_by_fast_weights_alone(self):
    last = slice(-SMALL.block, None)
    first = slice(REPEATS * SMALL.block, (REPEATS + 1) * SMALL.block)
    changed = X.copy()
    changed[:, first] += 1
    config = dataclasses.replace(SMALL, cache=SMALL.block)
    params = init(config)
    gate = jax.tree.map(np.zeros_like, params["fast_gate"])
    shut = params | {"fast_gate": gate}
    call = jitted(config, CLEAN)
    same = [call(shut, x, PLACES)[0][:, last] for x in (X, changed)]
    np.testing.assert_array_equal(*same)
    moved = [call(params, x, PLACES)[0][:, last] for x in (X, changed)]
    self.assertTrue((moved[0] != moved[1]).any(-1).all())

  def test_starts_as_attention(self):
    layer = lact_video.VideoLayer(SMALL, CLEAN)
    params = quick_jit(layer.init)(jax.random.key(0), X, PLACES)["params"]
    other = {
      k: v for k, v in init(SMALL).items() if k[:2] in ("w0", "w1", "w2")
    }
    call = jitted(SMALL, CLEAN)
    np.testing.assert_array_equal(
      call(params, X, PLACES)[0], call(params | other, X, PLACES)[0]
    )

    def loss(params):
      return jnp.sum(layer.apply({"params": params}, X, PLACES)[0] ** 2)

    grads = quick_jit(jax.grad(loss))(params)
    # the gate must be able to leave zero
    self.assertGreater(np.abs(grads["fast_gate"]["kernel"]).max(), 1e-3)

  def test_bfloat16(self):
    config = dataclasses.replace(
      SMALL, dtype="bfloat16", param_dtype="bfloat16", muon=True
    )
    layer = lact_video.VideoLayer(config, CLEAN)
    x = X.astype(jnp.bfloat16)
    params = quick_jit(layer.init)(jax.random.key(0), x, PLACES)
    out, state = quick_jit(layer.apply)(params, x, PLACES)
    self.assertEqual(out.dtype, jnp.bfloat16)
    self.assertEqual(state.fast.weights[0].dtype, jnp.float32)
    self.assertTrue(np.isfinite(out.astype("float32")).all())

  @parameterized.parameters(
    ({"width": 20, "heads": 3}, "width=20: must be a multiple"),
    ({"block": 0}, "block=0"),
    ({"cache": -1}, "cache=-1"),
    ({"dtype": "int8"}, "dtype='int8'"),
  )
  def test_rejects_config(self, change, message):
    with self.assertRaisesRegex(ValueError, message):
      dataclasses.replace(SMALL, **change)

  def test_rejects_length(self):
    with self.assertRaisesRegex(ValueError, "expected 8 blocks of block=4"):
      lact_video.VideoLayer(SMALL, CLEAN).init(
        jax.random.key(0), X[:, :-1], PLACES
      )


if __name__ == "__main__":
  absltest.main()
