"""Streamed scores against NumPy in float64; JAX's kernel, interpreted, against
both; where it is taken."""

# pyright: reportArgumentType=false

import functools
from typing import NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from giantsteps.kernels_pallas import example
from giantsteps.kernels_pallas.window_attention import (
  examples,
  has_kernel,
  reference,
  splash,
  streams,
  window_attention,
)


def seen(length, causal, window):
  """[T, T] bool, pair by pair."""
  far = window or length
  return np.array(
    [
      [abs(i - j) < far and not (causal and j > i) for j in range(length)]
      for i in range(length)
    ]
  )


def exact(q, k, v, cotangent, visible):
  """NumPy float64: the output and the gradients of q, k and v."""
  out, dq = np.zeros(q.shape), np.zeros(q.shape)
  dk, dv = np.zeros(k.shape), np.zeros(v.shape)
  scale, share = q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
  for b in range(q.shape[0]):
    for h in range(q.shape[2]):
      g = h // share
      scores = q[b, :, h] @ k[b, :, g].T * scale
      p = np.where(visible, np.exp(scores - scores.max()), 0)
      p /= p.sum(-1, keepdims=True)
      out[b, :, h] = p @ v[b, :, g]
      dp = cotangent[b, :, h] @ v[b, :, g].T
      ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
      dq[b, :, h] = ds @ k[b, :, g]
      dk[b, :, g] += ds.T @ q[b, :, h]
      dv[b, :, g] += p.T @ cotangent[b, :, h]
  return out, dq, dk, dv


def operands(rows, length, heads, groups, width, dtype="float64"):
  rng = np.random.default_rng(0)
  shapes = [(rows, length, n, width) for n in (heads, groups, groups, heads)]
  return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
  ("length", "window", "groups", "limit"),
  [
    (21, 5, 4, 1),  # one piece at a time
    (20, 5, 2, 3_000),  # some
    (16, 15, 4, 3_000),
    (7, 3, 1, 1),
    (9, 1, 4, 1),
  ],
)
def test_streamed_equals_numpy(length, window, groups, limit, causal):
  q, k, v, cotangent = operands(2, length, 4, groups, 8)
  attend = functools.partial(
    reference.attention, causal=causal, window=window, limit=limit
  )

  @jax.jit
  def run(cotangent, *arrays):
    assert reference.streams(
      *arrays[:2], causal=causal, window=window, limit=limit
    )
    out, pull = jax.vjp(attend, *arrays)
    return out, *pull(cotangent)

  with jax.enable_x64(True):
    found = run(*map(jnp.asarray, (cotangent, q, k, v)))
  want = exact(q, k, v, cotangent, seen(length, causal, window))
  for a, b in zip(found, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * length)


class Staircase(NamedTuple):
  """Blocks of 6 that see all but every third position before them."""

  size: int = 6

  def __call__(self, query, key):
    block = lambda x: jax.lax.div(x, self.size)
    own = block(query) == block(key)
    return own | ((key < query) & (jax.lax.rem(key, 3) > 0))


def stairs(length):
  """[T, T] bool, pair by pair."""
  rows = range(length)
  return np.array(
    [[i // 6 == j // 6 or (j < i and j % 3 > 0) for j in rows] for i in rows]
  )


@pytest.mark.parametrize(
  ("length", "groups", "limit"), [(21, 4, 1), (20, 2, 8_000), (20, 1, 2**28)]
)
def test_masked_equals_numpy(length, groups, limit):
  q, k, v, cotangent = operands(2, length, 4, groups, 8)
  attend = functools.partial(
    reference.attention, causal=False, mask=Staircase(), limit=limit
  )

  @jax.jit
  def run(cotangent, *arrays):
    out, pull = jax.vjp(attend, *arrays)
    return out, *pull(cotangent)

  with jax.enable_x64(True):
    found = run(*map(jnp.asarray, (cotangent, q, k, v)))
  want = exact(q, k, v, cotangent, stairs(length))
  for a, b in zip(found, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * length)


def test_streamed_has_forward_mode():
  *arrays, cotangent = operands(1, 13, 2, 1, 4)
  rng = np.random.default_rng(1)
  tangents = [rng.standard_normal(x.shape) for x in arrays]
  with jax.enable_x64(True):
    attend = functools.partial(
      reference.attention, causal=True, window=4, limit=1
    )
    push = jax.jit(lambda xs, ts: jax.jvp(attend, xs, ts)[1])
    pull = jax.jit(lambda xs, c: jax.vjp(attend, *xs)[1](c))
    move, pulled = push(arrays, tangents), pull(arrays, cotangent)
  # the two modes are one linear map, and the reverse one is NumPy's above
  forwards = np.vdot(cotangent, move)
  backwards = sum(np.vdot(a, b) for a, b in zip(pulled, tangents, strict=True))
  np.testing.assert_allclose(forwards, backwards, rtol=1e-12)


def test_streamed_holds_a_part_of_the_scores():
  x = jax.ShapeDtypeStruct((1, 4_096, 4, 16), jnp.float32)

  def temporaries(limit):
    attend = functools.partial(
      reference.attention, causal=True, window=256, limit=limit
    )
    grads = jax.grad(lambda *a: jnp.sum(attend(*a) ** 2), argnums=(0, 1, 2))
    memory = jax.jit(grads).lower(x, x, x).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes

  scores = 4 * 4_096 * 512 * 4
  array = 4 * 4_096 * 4 * 16
  assert temporaries(2**40) > 2 * scores
  # a few arrays of 2^20 bytes of scores, and copies of q, k, v by pieces
  assert temporaries(2**20) < 6 * 2**20 + 30 * array < 2 * scores


def kernel(causal, window):
  return functools.partial(
    splash.attention, causal=causal, window=window, interpret=True
  )


@pytest.mark.parametrize(
  ("length", "groups", "width", "causal", "window", "dtype"),
  [
    (300, 1, 64, True, 130, "bfloat16"),  # padded, grouped
    (256, 2, 128, True, None, "bfloat16"),
    (256, 2, 64, False, 60, "float32"),
  ],
)
def test_kernel_parity(length, groups, width, causal, window, dtype):
  options = {"causal": causal, "window": window}
  xla = functools.partial(reference.attention, **options)
  q, k, v, _ = operands(1, length, 2, groups, width)
  harness.assert_parity(
    kernel(causal, window),
    xla,
    xla,
    [jnp.asarray(x, dtype) for x in (q, k, v)],
    modes=("value", "vjp"),
  )


def test_kernel_computes_a_mask():
  q, k, v, cotangent = operands(1, 384, 2, 1, 64, "float32")
  attend = functools.partial(
    splash.attention, causal=False, window=None, mask=Staircase()
  )
  run = jax.jit(functools.partial(attend, interpret=True))
  out, pull = jax.vjp(run, q, k, v)
  found = out, *pull(jnp.asarray(cotangent))
  want = exact(q, k, v, cotangent, stairs(384))
  for a, b in zip(found, want, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 127, 128, 129, 511, 512, 10_000])
def test_kernel_at_the_edges_of_its_blocks(window):
  q, k, v, cotangent = operands(1, 700, 2, 2, 64, "float32")
  out, pull = jax.vjp(jax.jit(kernel(True, window)), q, k, v)
  found = out, *pull(jnp.asarray(cotangent))
  want = exact(q, k, v, cotangent, seen(700, True, window))
  for a, b in zip(found, want, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


CASES = [  # q, heads of k, causal, window, whether
  ((1, 4_096, 4, 64), 4, True, 512, True),
  ((1, 4_096, 4, 64), 2, False, 512, True),
  ((2, 2_500, 4, 128), 1, True, None, True),
  ((1, 4_096, 4, 96), 4, True, 512, False),  # width of a head
  ((1, 2_500, 4, 64), 4, False, 512, False),  # would see the padding
  ((1, 4_096, 4, 64), 4, False, None, False),  # XLA keeps its forward mode
  ((1, 1_024, 4, 64), 4, True, 512, False),  # short
  ((1, 4_096, 4, 64), 4, True, 64, False),  # narrow
]


@pytest.mark.parametrize(
  ("shape", "groups", "causal", "window", "takes"), CASES
)
def test_none_takes_the_kernel_where_it_pays(
  shape, groups, causal, window, takes
):
  q = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  k = jax.ShapeDtypeStruct((*shape[:2], groups, shape[3]), jnp.bfloat16)
  options = {"causal": causal, "window": window}
  attend = functools.partial(window_attention, **options)
  lowered = jax.jit(attend).trace(q, k, k).lower(lowering_platforms=("tpu",))
  assert ("tpu_custom_call" in lowered.as_text()) == takes
  assert has_kernel(q, k, **options) == takes
  assert streams(q, k, **options) or not takes


@pytest.mark.parametrize(("length", "takes"), [(4_096, True), (2_500, False)])
def test_a_mask_takes_the_kernel_and_is_no_array(length, takes):
  x = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16)
  options = {"causal": False, "window": None, "mask": Staircase()}
  attend = functools.partial(window_attention, **options)
  lowered = jax.jit(attend).trace(x, x, x).lower(lowering_platforms=("tpu",))
  text = lowered.as_text()
  assert ("tpu_custom_call" in text) == takes
  assert (f"{length}x{length}x" in text) != takes
  assert has_kernel(x, x, **options) == takes


def test_a_mask_stands_alone():
  x = jnp.zeros((1, 8, 1, 8))
  for options in ({"causal": True}, {"causal": False, "window": 4}):
    with pytest.raises(ValueError, match="a mask stands alone"):
      window_attention(x, x, x, mask=Staircase(), **options)


def test_not_inside_a_shard_map_that_checks():
  mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
  x = jax.ShapeDtypeStruct((1, 2_048, 2, 64), jnp.bfloat16)
  attend = functools.partial(window_attention, causal=True, window=256)

  def holds(check):
    mapped = jax.shard_map(
      attend,
      mesh=mesh,
      in_specs=P("data"),
      out_specs=P("data"),
      check_vma=check,
    )
    lowered = jax.jit(mapped).trace(x, x, x).lower(lowering_platforms=("tpu",))
    return "tpu_custom_call" in lowered.as_text()

  assert [holds(True), holds(False)] == [False, True]


def test_a_kernel_that_does_not_exist_is_refused():
  x = jnp.zeros((1, 64, 1, 64))
  with pytest.raises(ValueError, match="'pallas_tpu': here there is xla"):
    window_attention(x, x, x, causal=True, implementation="pallas_tpu")


@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_a_user_gets_three_kernels_on_every_chip(target):
  shape = jax.ShapeDtypeStruct((1, 2_048, 1, 64), jnp.bfloat16)
  function = functools.partial(examples.value_and_gradients, window=256)
  case = example.Example("small", function, (shape,) * 4, 0.0)
  compiled = harness.compile_for(case, target)
  for part in ("fwd", "dq", "dkv"):
    harness.assert_holds_kernel(compiled, f"splash_mha_{part}")
