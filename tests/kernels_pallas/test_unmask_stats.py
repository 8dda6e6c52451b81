"""Statistics of hidden logits: the reference and the kernel against float64
NumPy, noise against its distribution, shards against one device."""

# NumPy arrays stand for jax.Array
# pyright: reportArgumentType=false, reportCallIssue=false

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from giantsteps.experiments.harness import kernel_report
from giantsteps.kernels_pallas.example import Example
from giantsteps.kernels_pallas.unmask_stats import (
  examples,
  noise,
  reference,
  tpu,
  unmask_stats,
)

TILES = {"rows": 32, "columns": 128, "width": 128, "depth": 4096}


def mix(x):
  """Finaliser of MurmurHash3, in Python's integers' stead."""
  x = np.asarray(x, np.uint64)
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(
      0xFFFFFFFF
    )
  return x ^ (x >> np.uint64(16))


def exact_noise(seeds, size):
  """-log(-log(1 - u)), u = (bits + 1/2) / 2^32, in float64: [T, size]."""
  seeds = np.asarray(seeds, np.uint64)
  token = np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B9)
  x = (token[None] + seeds[:, :1]) & np.uint64(0xFFFFFFFF)
  bits = mix(mix(x) ^ seeds[:, 1:])
  return -np.log(-np.log1p(-(bits.astype(np.float64) + 0.5) / 2**32))


def problem(rows, depth, size, dtype, *, sampled, banned, tied=False):
  """Arguments of `unmask_stats`, logits of variance 4."""
  rng = np.random.default_rng(rows + depth + size)
  normal = lambda *shape: rng.standard_normal(shape)
  head = normal(size, depth) if tied else normal(depth, size)
  out = {
    "hidden": jnp.asarray(normal(rows, depth) * 2 / np.sqrt(depth), dtype),
    "head": jnp.asarray(head, dtype),
    "transposed": tied,
  }
  if banned:
    bias = normal(size)
    bias[:: max(size // 3, 2)] = -np.inf
    out["bias"] = jnp.asarray(bias, "float32")
  if sampled:
    out["temperature"] = jnp.linspace(0, 1.5, rows)
    bits = rng.integers(0, 2**32, (rows, 2), np.uint32)
    out["seeds"] = jnp.asarray(bits)
  return out


def check(found, given):
  """float64 NumPy on the same operands; ties within rounding are forgiven."""
  wide = lambda x: np.asarray(x, np.float64)
  head = wide(given["head"]).T if given["transposed"] else wide(given["head"])
  logits = wide(given["hidden"]) @ head
  if "bias" in given:
    logits = logits + wide(given["bias"])
  noised = logits
  if "seeds" in given:
    random = exact_noise(given["seeds"], logits.shape[1])
    noised = logits + wide(given["temperature"])[:, None] * random
  rows = np.arange(len(logits))
  token = np.asarray(found.token)
  # float32: sums of D products, logs to 2^-20 or so
  near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5)
  near(noised[rows, token], noised.max(1))
  near(found.logit, logits[rows, token])
  peak = logits.max(1, keepdims=True)
  mass = np.exp(logits - peak)
  total = mass.sum(1)
  near(found.logsumexp, peak[:, 0] + np.log(total))
  p = mass / total[:, None]
  with np.errstate(divide="ignore", invalid="ignore"):
    entropy = -np.where(p > 0, p * np.log(p), 0).sum(1)
  near(found.entropy, entropy)
  others = logits.copy()
  others[rows, token] = -np.inf
  near(found.second, others.max(1))
  assert found.token.dtype == jnp.int32


@functools.partial(jax.jit, static_argnames=("transposed",))
def by_xla(hidden, head, transposed=False, **rest):
  return unmask_stats(
    hidden, head, transposed=transposed, implementation="xla", **rest
  )


def by_kernel(given, blocks=None, **static):
  """The operation's statistics through the interpreted kernel."""
  given = dict(given)
  transposed = given.pop("transposed", False)
  operands = [
    given.get(name)
    for name in ("hidden", "head", "bias", "temperature", "seeds")
  ]
  call = functools.partial(
    tpu.partial,
    transposed=transposed,
    blocks=blocks or TILES,
    interpret=True,
    **static,
  )
  return jax.jit(lambda *xs: reference.finish(call(*xs)))(*operands)


# (T, D, V), dtype, sampled, banned, tied
CASES = (
  ((1, 64, 100), "float32", True, True, False),
  ((5, 64, 257), "bfloat16", True, False, False),
  ((40, 100, 300), "bfloat16", False, True, True),
  ((33, 40, 513), "float32", True, True, True),
)


@pytest.mark.parametrize(("shape", "dtype", "sampled", "banned", "tied"), CASES)
def test_reference(shape, dtype, sampled, banned, tied):
  given = problem(*shape, dtype, sampled=sampled, banned=banned, tied=tied)
  check(by_xla(**given), given)
  names = ("hidden", "head", "bias", "temperature", "seeds")
  tiled = functools.partial(reference.partial, transposed=tied, tile=64)
  partial = jax.jit(tiled)(*(given.get(name) for name in names))
  check(jax.jit(reference.finish)(partial), given)


@pytest.mark.parametrize(("shape", "dtype", "sampled", "banned", "tied"), CASES)
def test_kernel(shape, dtype, sampled, banned, tied):
  given = problem(*shape, dtype, sampled=sampled, banned=banned, tied=tied)
  check(by_kernel(given), given)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(64, 3_584, 1_000), (300, 256, 2_000)])
def test_kernel_at_its_own_blocks(shape):
  given = problem(*shape, "bfloat16", sampled=True, banned=True)
  check(by_kernel(given, tpu.BLOCKS), given)


def test_a_head_in_another_dtype_is_rounded_on_chip():
  given = problem(3, 64, 200, "float32", sampled=False, banned=False)
  given["hidden"] = given["hidden"].astype("bfloat16")
  rounded = given | {"head": given["head"].astype("bfloat16")}
  check(by_kernel(given), rounded)


def test_the_lowest_of_equals():
  """Column v of the head is column v % 50; small integers, so exact."""
  rng = np.random.default_rng(0)
  some = rng.integers(-3, 4, (64, 50))
  hidden = rng.integers(-3, 4, (20, 64))
  given = {
    "hidden": jnp.asarray(hidden, "bfloat16"),
    "head": jnp.asarray(np.tile(some, 6), "bfloat16"),
  }
  want = np.argmax(hidden @ some, 1)
  for found in (by_xla(**given), by_kernel(given)):
    np.testing.assert_array_equal(found.token, want)
    np.testing.assert_array_equal(found.second, found.logit)


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_nan_is_a_token_of_the_vocabulary(temperature):
  # columns from 200 on are padding
  bias = jnp.where(jnp.arange(300) < 200, 0.0, -jnp.inf)
  hidden = jnp.array([[jnp.nan], [1.0]])
  head = jnp.sin(jnp.arange(300.0))[None]
  warmth = None if temperature is None else jnp.full(2, temperature)
  seeds = jnp.ones((2, 2), jnp.uint32)
  for tile in (8_192, 128):
    found = reference.unmask_stats(hidden, head, bias, warmth, seeds, tile)
    assert found.token[0] == 0
    assert np.isnan(found.logsumexp[0]) and np.isfinite(found.logsumexp[1])
    assert found.token[1] < 200


def test_one_token_left():
  given = problem(4, 64, 260, "float32", sampled=True, banned=False)
  given["bias"] = jnp.full(260, -jnp.inf).at[200].set(0)
  for found in (by_xla(**given), by_kernel(given)):
    np.testing.assert_array_equal(found.token, 200)
    np.testing.assert_array_equal(found.entropy, 0)
    np.testing.assert_array_equal(found.second, -np.inf)
    np.testing.assert_array_equal(found.logit, found.logsumexp)


# Noise


def test_gumbel_noise_has_its_moments_and_its_tail():
  n = 2**20
  seeds = jnp.asarray([[7, 11]], jnp.uint32)
  g = np.asarray(jax.jit(reference.gumbel, static_argnums=1)(seeds, n))
  g = g[0].astype(np.float64)
  want = exact_noise(seeds, n)[0]
  exponential = np.exp(-want)
  # rounding u to float32 moves E by 2^-25 / (1 - u); logs, by some ulp
  moved = 2**-24 * np.exp(exponential) / exponential
  np.testing.assert_array_less(abs(g - want), moved + 1e-6 * (1 + abs(want)))
  # 5 standard errors each: one false alarm in a million
  variance = np.pi**2 / 6
  assert abs(g.mean() - np.euler_gamma) < 5 * np.sqrt(variance / n)
  kurtosis = 12 / 5
  assert abs(g.var() - variance) < 5 * variance * np.sqrt((kurtosis + 2) / n)
  for x in (-2.0, 0.0, 4.0, 8.0, 10.0):
    p = -np.expm1(-np.exp(-x))
    assert abs((g > x).mean() - p) < 5 * np.sqrt(p * (1 - p) / n)


def test_the_smallest_and_the_largest_bits():
  bits = jnp.asarray([0, 2**32 - 1], jnp.uint32)
  found = np.asarray(noise.of_bits(bits))
  # E = u = 2^-33 and E = -log(1 - u) of the largest float32 below 1
  want = [33 * np.log(2), -np.log(24 * np.log(2))]
  np.testing.assert_allclose(found, want, rtol=1e-6)


def test_samples_have_the_distribution_of_the_softmax():
  """Chi-square of 5 degrees; 20.5 is exceeded once in a thousand keys."""
  logits, temperature = np.array([0.0, 1.0, -1.0, 2.0, 0.5, -np.inf]), 0.7
  n = 20_000
  rng = np.random.default_rng(3)
  seeds = jnp.asarray(rng.integers(0, 2**32, (n, 2), np.uint32))
  found = by_xla(
    jnp.zeros((n, 8)),
    jnp.zeros((8, 6)),
    bias=jnp.asarray(logits, "float32"),
    temperature=temperature,
    seeds=seeds,
  )
  p = np.exp(logits / temperature)
  p /= p.sum()
  count = np.bincount(np.asarray(found.token), minlength=6)
  assert count[5] == 0
  chi_square = ((count - n * p)[:5] ** 2 / (n * p[:5])).sum()
  assert chi_square < 18.5  # 4 degrees of freedom, one in a thousand


def test_samples_know_neither_tiles_nor_bodies():
  given = problem(48, 64, 600, "float32", sampled=True, banned=True)
  given["temperature"] = jnp.full(48, 1.3)
  # Zero logits: only noise decides, and its float32 values are the same.
  given["hidden"] = jnp.zeros_like(given["hidden"])
  want = by_xla(**given).token
  assert len(np.unique(want)) > 30
  operands = [
    given[name] for name in ("hidden", "head", "bias", "temperature", "seeds")
  ]
  for tile in (64, 250):
    tiled = functools.partial(reference.partial, tile=tile)
    found = jax.jit(tiled)(*operands).token
    np.testing.assert_array_equal(found, want)
  for columns in (128, 256):
    found = by_kernel(given, TILES | {"columns": columns}).token
    np.testing.assert_array_equal(found, want)


# The vocabulary over devices


def sharded(transposed):
  """Tokens and the largest difference of 8 shards from one device."""
  given = problem(
    6, 32, 8 * 80, "float32", sampled=True, banned=True, tied=transposed
  )
  one = by_xla(**given)
  names = ("hidden", "head", "bias", "temperature", "seeds")
  rows, none = PartitionSpec("model"), PartitionSpec()
  columns = rows if transposed else PartitionSpec(None, "model")

  def call(hidden, head, bias, temperature, seeds):
    return unmask_stats(
      hidden,
      head,
      bias=bias,
      temperature=temperature,
      seeds=seeds,
      transposed=transposed,
      axis_name="model",
    )

  split = jax.shard_map(
    lambda *xs: jax.tree.map(lambda x: x[None], call(*xs)),
    mesh=Mesh(np.array(jax.devices()), ("model",)),
    in_specs=(none, columns, rows, none, none),
    out_specs=rows,
  )
  found = jax.jit(split)(*(given[name] for name in names))
  differs = jax.tree.map(
    lambda x, y: float(jnp.max(jnp.abs(x - y[None]))), found, one
  )
  return [found.token.tolist(), one.token.tolist(), list(differs)]


@pytest.mark.parametrize("transposed", [False, True])
def test_shards_of_the_vocabulary(on_devices, transposed):
  found, want, differs = on_devices(8, __file__, f"sharded({transposed})")
  assert found == [want] * 8  # every device knows
  assert max(differs) < 1e-5  # sums in another order


def test_kernel_inside_a_shard_map_knows_its_tokens():
  given = problem(3, 64, 300, "float32", sampled=True, banned=False)
  want = by_kernel(given)
  halves = []
  for start in (0, 150):
    call = functools.partial(
      tpu.partial, blocks=TILES, interpret=True, offset=jnp.asarray(start)
    )
    head = given["head"][:, start : start + 150]
    rest = None, given["temperature"], given["seeds"]
    halves.append(jax.jit(call)(given["hidden"], head, *rest))
  found = reference.finish(reference.merge(*halves))
  np.testing.assert_array_equal(found.token, want.token)
  np.testing.assert_allclose(found.entropy, want.entropy, atol=1e-5)


# Faults


@pytest.mark.parametrize("sampled", [False, True])
def test_no_race_no_bound_nothing_unset(sampled):
  given = problem(40, 64, 300, "bfloat16", sampled=sampled, banned=False)
  kernel = functools.partial(tpu.partial, blocks=TILES)
  operands = [given.get(x) for x in ("hidden", "head")] + [None]
  operands += [given.get(x) for x in ("temperature", "seeds")]
  found = harness.run_checked(kernel, *operands)
  check(reference.finish(found), given)


# Chips that are not here

SMALL = Example(
  "small",
  examples.with_sampling,
  (
    jax.ShapeDtypeStruct((16, 512), jnp.bfloat16),
    jax.ShapeDtypeStruct((512, 5_000), jnp.bfloat16),
    jax.ShapeDtypeStruct((5_000,), jnp.float32),
    jax.ShapeDtypeStruct((16,), jnp.float32),
    jax.ShapeDtypeStruct((16, 2), jnp.uint32),
  ),
  0.0,
)


@pytest.mark.parametrize("target", list(harness.TPUS))
def test_a_user_gets_the_kernel_on_every_chip(target):
  harness.assert_holds_kernel(harness.compile_for(SMALL, target))


@pytest.mark.slow
@pytest.mark.parametrize("target", list(harness.TPUS))
@pytest.mark.parametrize(
  "shape", [(1, 64, 50_257), (7, 3_584, 152_064), (1_024, 4_096, 50_257)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_any_shape_compiles(target, shape, dtype):
  rows, depth, size = shape
  operands = (
    jax.ShapeDtypeStruct((rows, depth), dtype),
    jax.ShapeDtypeStruct((depth, size), dtype),
    jax.ShapeDtypeStruct((size,), jnp.float32),
    jax.ShapeDtypeStruct((rows,), jnp.float32),
    jax.ShapeDtypeStruct((rows, 2), jnp.uint32),
  )
  case = Example("case", examples.with_sampling, operands, 0.0)
  harness.assert_holds_kernel(harness.compile_for(case, target, "pallas_tpu"))


# Microseconds of the kernel by libtpu 0.0.52, 2 % to spare. Reading the head
# takes 632; XLA's loop is estimated at 31 turns of 56.
@pytest.mark.slow
def test_no_slower_than_recorded():
  harness.device("v6e")  # skips without its compiler
  case = examples.examples()[0].name
  found = kernel_report.estimate("unmask_stats", case, "v6e", "pallas_tpu")
  [kernel] = found["kernels"]
  assert kernel["microseconds"] <= 466
  assert kernel["spills"] <= 174


@pytest.mark.parametrize(
  ("shape", "dtype", "kernel"),
  [
    ((32, 64, 4_096), "bfloat16", True),
    ((32, 64, 4_095), "bfloat16", False),  # not compared with XLA
    ((32, 64, 4_096), "float32", False),  # precision is XLA's to choose
  ],
)
def test_none_takes_the_kernel_where_it_pays(shape, dtype, kernel):
  rows, depth, size = shape
  hidden = jax.ShapeDtypeStruct((rows, depth), dtype)
  head = jax.ShapeDtypeStruct((depth, size), dtype)
  lowered = jax.jit(unmask_stats).trace(hidden, head)
  text = lowered.lower(lowering_platforms=("tpu",)).as_text()
  assert ("tpu_custom_call" in text) == kernel


def test_wrong_calls_are_refused():
  with jax.enable_x64(True):
    x, w = jnp.zeros((2, 8), jnp.float64), jnp.zeros((8, 99), jnp.float64)
    with pytest.raises(ValueError, match="'pallas_tpu': here there is xla"):
      unmask_stats(x, w, implementation="pallas_tpu")
  x, w = jnp.zeros((2, 8)), jnp.zeros((8, 99))
  with pytest.raises(ValueError, match=r"\[T, D\] and \[V, D\]"):
    unmask_stats(x, w, transposed=True)
  with pytest.raises(ValueError, match=r"uint32\[2, 2\]"):
    unmask_stats(x, w, temperature=1.0)
  with pytest.raises(ValueError, match="one per token"):
    unmask_stats(x, w, bias=jnp.zeros(8))
