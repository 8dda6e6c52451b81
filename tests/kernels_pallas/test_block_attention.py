"""Attention up to a limit: the reference and the kernel against float64 NumPy,
tiles that are skipped, faults, chips that are not here."""

# NumPy arrays stand for jax.Array
# pyright: reportArgumentType=false, reportCallIssue=false

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from giantsteps.experiments.harness import kernel_report
from giantsteps.kernels_pallas.block_attention import (
  block_attention,
  examples,
  tpu,
)
from giantsteps.kernels_pallas.example import Example

TILES = {"slots": 128, "rows": 64, "height": 32}


def problem(batch, length, slots, heads, groups, width, dtype, limits=None):
  """q, k, v and limits between 1 and the number of slots."""
  rng = np.random.default_rng(length + slots + heads)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
  if limits is None:
    limits = rng.integers(1, slots + 1, (batch, length))
  cache = batch, slots, groups, width
  return (
    normal(batch, length, heads, width),
    normal(*cache),
    normal(*cache),
    jnp.asarray(limits, jnp.int32),
  )


def attended(q, k, v, limits):
  """NumPy float64, one query after the other."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros_like(q)
  batch, length, heads, width = q.shape
  for b, t, h in np.ndindex(batch, length, heads):
    g, n = h // (heads // k.shape[2]), limits[b, t]
    scores = k[b, :n, g] @ q[b, t, h] / np.sqrt(width)
    p = np.exp(scores - scores.max())
    out[b, t, h] = (p / p.sum()) @ v[b, :n, g]
  return out


by_xla = jax.jit(functools.partial(block_attention, implementation="xla"))


def alone(q, k, v, limits, **how):
  """The kernel on a cache of one layer."""
  return tpu.attention(q, k[None], v[None], limits, jnp.int32(0), **how)


by_kernel = jax.jit(functools.partial(alone, blocks=TILES, interpret=True))

# batch, queries, slots, heads, groups, width, dtype
CASES = (
  (2, 5, 200, 4, 2, 64, "bfloat16"),  # slots end inside a tile
  (1, 1, 128, 3, 3, 128, "bfloat16"),  # an odd number of groups, each alone
  (1, 24, 256, 8, 2, 64, "float32"),  # several programs
  (2, 3, 40, 2, 1, 32, "float32"),  # less than a tile of everything
)


@pytest.mark.parametrize("case", CASES)
def test_parity(case):
  operands = problem(*case)
  want = attended(*operands)
  floor = harness.FLOOR[case[-1]]
  [plain] = harness.relative_error(by_xla(*operands), want)
  [found] = harness.relative_error(by_kernel(*operands), want)
  # weights and the result are rounded to the dtype once each
  assert plain <= 2 * floor
  assert found <= max(1.5 * plain, floor)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_one_of_several_layers(implementation):
  q, k, v, limits = problem(1, 5, 200, 6, 3, 64, "bfloat16")
  others = jnp.full_like(k, jnp.nan)
  stacks = [jnp.stack([others, x, others]) for x in (k, v)]
  with pltpu.force_tpu_interpret_mode():
    attend = functools.partial(block_attention, implementation=implementation)
    found = jax.jit(attend)(q, *stacks, limits, jnp.int32(1))
  want = attended(q, k, v, limits)
  assert harness.relative_error(found, want)[0] < 1e-2


def test_block_causal_and_causal_limits():
  """Against one softmax per query of its own slots, which knows no limits."""
  q, k, v, _ = problem(1, 12, 12, 2, 2, 64, "float32")
  position = np.arange(12)[None]
  for limits in (position + 1, (position // 4 + 1) * 4):
    want = attended(q, k, v, limits)
    found = by_kernel(q, k, v, jnp.asarray(limits))
    assert harness.relative_error(found, want)[0] < 1e-5


def test_slots_beyond_the_limit_are_not_read():
  """Tiles of them hold NaN, as a cache may that nobody wrote."""
  limits = np.full((2, 4), 100)
  limits[1] = 250
  q, k, v, limits = problem(2, 4, 512, 4, 2, 64, "bfloat16", limits)
  want = attended(q, k, v, limits)
  k, v = (x.at[0, 128:].set(jnp.nan).at[1, 256:].set(jnp.nan) for x in (k, v))
  found = by_kernel(q, k, v, limits)
  assert harness.relative_error(found, want)[0] < 1e-2


def test_no_slot_seen_is_finite():
  q, k, v, _ = problem(1, 4, 200, 2, 2, 64, "bfloat16")
  limits = jnp.asarray([[0, 200, 0, 3]])
  for found in (by_xla(q, k, v, limits), by_kernel(q, k, v, limits)):
    assert np.isfinite(np.asarray(found, np.float32)).all()
    want = attended(q, k, v, np.maximum(limits, 1))
    near = harness.relative_error(found[:, 1::2], want[:, 1::2])
    assert near[0] < 1e-2


def test_derivatives_are_those_of_the_reference():
  q, k, v, limits = problem(1, 3, 40, 2, 1, 32, "float32")
  cotangent = harness.random_like(q, 1)

  def pulled(implementation):
    attend = lambda *xs: block_attention(
      *xs, limits, implementation=implementation
    )
    with pltpu.force_tpu_interpret_mode():
      return jax.jit(lambda *xs: jax.vjp(attend, *xs)[1](cotangent))(q, k, v)

  found, want = pulled("pallas_tpu"), pulled("xla")
  assert max(harness.relative_error(found, want)) < 1e-6


@pytest.mark.parametrize(
  ("slots", "dtype", "kernel"),
  [
    (1_024, "bfloat16", True),
    (1_023, "bfloat16", False),  # not compared with XLA
    (1_024, "float32", False),  # precision is XLA's to choose
  ],
)
def test_none_takes_the_kernel_where_it_pays(slots, dtype, kernel):
  operands = jax.eval_shape(lambda: problem(1, 8, slots, 4, 2, 64, dtype))
  lowered = jax.jit(block_attention).trace(*operands)
  text = lowered.lower(lowering_platforms=("tpu",)).as_text()
  assert ("tpu_custom_call" in text) == kernel


def test_no_race_no_bound_nothing_unset():
  # Three groups: the strict interpreter knows no 32-bit words of bfloat16.
  operands = problem(2, 6, 200, 12, 3, 64, "bfloat16")
  kernel = functools.partial(alone, blocks=TILES)
  found = harness.run_checked(kernel, *operands)
  assert harness.relative_error(found, attended(*operands))[0] < 1e-2


SMALL = examples.examples()[0]


@pytest.mark.parametrize("target", list(harness.TPUS))
def test_a_user_gets_the_kernel_on_every_chip(target):
  harness.assert_holds_kernel(harness.compile_for(SMALL, target))


@pytest.mark.slow
@pytest.mark.parametrize("target", list(harness.TPUS))
@pytest.mark.parametrize(
  "example", examples.examples()[1:], ids=lambda example: example.name
)
def test_other_sizes_compile(example, target):
  compiled = harness.compile_for(example, target, "pallas_tpu")
  harness.assert_holds_kernel(compiled)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
  "case",
  [
    (1, 1, 8_192, 32, 32, 64),
    (3, 7, 1_000, 6, 3, 128),
    (1, 7, 1_000, 12, 6, 128),
    (1, 40, 1_000, 14, 2, 64),
    (1, 9, 1_000, 8, 1, 128),
  ],
)
def test_any_shape_compiles(case, dtype):
  operands = jax.eval_shape(lambda: problem(*case, dtype))
  example = Example("case", block_attention, operands, 0.0)
  compiled = harness.compile_for(example, "v5e", "pallas_tpu")
  harness.assert_holds_kernel(compiled)


# Microseconds of the kernel by libtpu 0.0.52, 2 % to spare; XLA's estimate of
# the whole call is 783 on a v6e.
@pytest.mark.slow
def test_no_slower_than_recorded():
  harness.device("v6e")  # skips without its compiler
  found = kernel_report.estimate(
    "block_attention", SMALL.name, "v6e", "pallas_tpu"
  )
  [kernel] = found["kernels"]
  assert kernel["microseconds"] <= 130.5
  assert kernel["spills"] <= 475


def test_wrong_calls_are_refused():
  q, k, v, limits = problem(1, 2, 8, 4, 2, 16, "float32")
  with pytest.raises(ValueError, match="G a divisor of H"):
    block_attention(q[:, :, :3], k, v, limits)
  with jax.enable_x64(True):
    q, k, v = (jnp.asarray(x, jnp.float64) for x in (q, k, v))
    with pytest.raises(ValueError, match="'pallas_tpu': here there is xla"):
      block_attention(q, k, v, limits, implementation="pallas_tpu")
