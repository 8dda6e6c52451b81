"""LaCT's Hopper kernels: numerics in the Mosaic GPU interpreter, resources by
the compiler for the H200, and parity on a GPU where there is one.

The interpreter plays TMA copies, barriers and three warpgroups, and matrix
products that finish at once: a missing wait for one, or a copy over the tiles
that it reads, would pass. Layouts and swizzles exist for the compiler only.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import SingleDeviceSharding

from giantsteps.experiments.harness import config as config_lib
from giantsteps.experiments.harness import h200
from giantsteps.kernels_pallas.fast_weight import gpu, reference
from giantsteps.models import fast_weights

try:
  from jax.experimental.pallas.mosaic_gpu import (
    InterpretGPUParams,  # type: ignore[reportAttributeAccessIssue]
  )
except ImportError:  # before jax 0.11
  from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

STRICT = InterpretGPUParams(
  detect_races=True,
  uninitialized_memory="nan",
  # a clock per copy, or a wait for one would count as a wait for all
  num_tma_threads_per_device=64,
)
# (N, C, d, h): language models of 760M and 3B, view synthesis, video chunks
PRODUCTION = [
  (4, 2048, 384, 384),
  (4, 2048, 512, 512),
  (4, 2048, 768, 768),
  (1, 2048, 768, 1536),
  (2, 4680, 768, 1536),
]


def operands(n, c, d, h, dtype=jnp.bfloat16) -> tuple[Any, ...]:
  """Weights of the authors' initial scale, tokens of unit variance."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape)
  weights = (
    normal(n, h, d) / np.sqrt(d),
    normal(n, d, h) / np.sqrt(h),
    normal(n, h, d) / np.sqrt(d),
  )
  rates = [jnp.asarray(rng.random((n, c, 1)), jnp.float32) for _ in range(3)]
  return (
    tuple(jnp.asarray(w, jnp.float32) for w in weights),
    jnp.asarray(normal(n, c, d), dtype),
    jnp.asarray(normal(n, c, d), dtype),
    tuple(rates),
  )


def exact_gradient(weights, k, v, learning_rates):
  """The sums of the paper's appendix, NumPy float64, token by token outer."""
  wide = lambda tree: [np.asarray(x, np.float64) for x in tree]
  (w0, w1, w2), (k, v) = wide(weights), wide((k, v))
  eta0, eta1, eta2 = wide(learning_rates)
  g, u, p = k @ w0.mT, k @ w2.mT, v @ w1
  s = 1 / (1 + np.exp(-g))
  d0 = (eta0 * p * u * (s + g * s * (1 - s))).mT @ k
  d1 = (eta1 * v).mT @ (g * s * u)
  return d0, d1, (eta2 * p * g * s).mT @ k


def exact_apply(weights, q):
  w0, w1, w2, q = (np.asarray(x, np.float64) for x in (*weights, q))
  g = q @ w0.mT
  return (g / (1 + np.exp(-g)) * (q @ w2.mT)) @ w1.mT


def error(found, exact):
  found = np.asarray(found, np.float64)
  assert found.shape == exact.shape
  return np.linalg.norm(found - exact) / np.linalg.norm(exact)


def assert_as_good_as_xla(found, plain, exact):
  """Twice the rounding of a bfloat16 result is 2^-8; XLA's own error counts
  where it is larger (products of rounded factors)."""
  for a, b, want in zip(found, plain, exact, strict=True):
    assert a.dtype == b.dtype
    assert error(a, want) <= max(1.5 * error(b, want), 2**-8), error(a, want)


def interpreted(function, *arguments):
  try:
    out = jax.jit(functools.partial(function, interpret=STRICT))(*arguments)
    out = jax.block_until_ready(out)
    assert not interpret_pallas_call.get_races().races_found
  finally:
    interpret_pallas_call.reset_gpu_interpret_mode_state()
  return out


def check_gradient(shape, dtype=jnp.bfloat16, **tiles):
  given = operands(*shape, dtype=dtype)
  found = interpreted(functools.partial(gpu.gradient, **tiles), *given)
  plain = jax.jit(reference.gradient)(*given)
  assert_as_good_as_xla(found, plain, exact_gradient(*given))


def check_apply(shape, dtype=jnp.bfloat16, **tiles):
  weights, q, _, _ = operands(*shape, dtype=dtype)
  found = interpreted(functools.partial(gpu.apply, **tiles), weights, q)
  plain = jax.jit(reference.apply)(weights, q)
  assert_as_good_as_xla([found], [plain], [exact_apply(weights, q)])


def test_gradient_of_a_ragged_chunk():
  check_gradient((1, 200, 192, 128))  # three steps of d through two stages


def test_apply_to_less_than_a_block():
  check_apply((1, 37, 64, 128))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 128, 64, 256), (1, 300, 384, 128)])
@pytest.mark.parametrize("check", [check_gradient, check_apply])
def test_matrices_blocks_and_columns(check, shape):
  check(shape)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_gradient, check_apply])
def test_other_tiles_and_dtype(check):
  check((1, 128, 160, 128), jnp.float16, depth=32, stages=4)


def test_the_interpreter_sees_a_missing_wait():
  """A planted fault: shared memory is read before its copy arrived."""

  def body(x, out, tile, barrier):
    plgpu.copy_gmem_to_smem(x, tile, barrier)
    out[...] = tile[...]
    plgpu.barrier_wait(barrier)

  kernel = plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
    scratch_types=[plgpu.SMEM((128,), jnp.float32), plgpu.Barrier()],
    num_threads=1,
    thread_name="warpgroup",
    interpret=STRICT,
  )
  try:
    jax.block_until_ready(jax.jit(kernel)(jnp.ones(128)))
    assert interpret_pallas_call.get_races().races_found
  finally:
    interpret_pallas_call.reset_gpu_interpret_mode_state()


@pytest.mark.parametrize(
  ("shape", "dtype", "tiles", "what"),
  [
    ((1, 8, 64, 128), jnp.float32, {}, "bfloat16 or float16, not float32"),
    ((1, 8, 96, 128), jnp.bfloat16, {}, "d=96"),
    ((1, 8, 64, 64), jnp.bfloat16, {}, "h=64"),
    ((1, 0, 64, 128), jnp.bfloat16, {}, "C=0"),
    ((1, 8, 64, 128), jnp.bfloat16, {"depth": 16}, "depth=16"),
  ],
)
def test_refuses_what_the_tensor_cores_do_not_take(shape, dtype, tiles, what):
  given = operands(*shape, dtype=dtype)
  with pytest.raises(ValueError, match=what):
    gpu.gradient(*given, **tiles)
  with pytest.raises(ValueError, match=what):
    gpu.apply(given[0], given[1], **tiles)


@pytest.mark.parametrize("batched", [False, True])
def test_lowers_for_cuda_on_any_machine(batched):
  given = jax.eval_shape(lambda: operands(2, 200, 384, 384))
  functions = gpu.gradient, lambda w, k, v, e: gpu.apply(w, k)
  for f in functions:
    if batched:
      f = jax.vmap(f)
      many = lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
      inputs = jax.tree.map(many, given)
    else:
      inputs = given
    traced = jax.jit(f).trace(*inputs)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1


# Compiled for an H200 that is not here.


@pytest.fixture(scope="module")
def chip():
  try:
    return SingleDeviceSharding(h200.device())
  except config_lib.InputError as missing:
    pytest.skip(str(missing))


def placed(tree, chip):
  put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip)
  return jax.tree.map(put, tree)


def shapes(shape, chip):
  return placed(jax.eval_shape(lambda: operands(*shape)), chip)


@pytest.mark.parametrize(
  "shape",
  [
    PRODUCTION[0],
    *(pytest.param(x, marks=pytest.mark.slow) for x in PRODUCTION[1:4]),
    PRODUCTION[4],
  ],
)
def test_resources_on_h200(chip, shape):
  weights, k, v, rates = shapes(shape, chip)
  cases = {
    "gradient": (weights, k, v, rates),
    "apply": (weights, k),
  }
  for name, given in cases.items():
    lowered = jax.jit(getattr(gpu, name)).lower(*given)
    compiled, (kernel,) = h200.compile_kernels(lowered)
    assert kernel.name == f"lact_{name}"
    assert kernel.spills == 0
    assert not kernel.serialized
    assert kernel.shared <= h200.SHARED_MEMORY
    plain, none = h200.compile_kernels(
      jax.jit(getattr(reference, name)).lower(*given)
    )
    assert none == []
    assert h200.launches(compiled) <= h200.launches(plain)
    # g, u and p in float32 stay out of the device's memory
    temporary = lambda x: x.memory_analysis().temp_size_in_bytes
    assert temporary(compiled) < 0.7 * temporary(plain)


def test_a_spill_is_seen(chip, monkeypatch):
  """A planted fault: the exact division, for which no registers are left."""
  monkeypatch.setattr(gpu, "_sigmoid", lambda x: 1 / (1 + jnp.exp(-x)))
  again = lambda *given: gpu.gradient(*given)  # jit knows the other by name
  lowered = jax.jit(again).lower(*shapes((4, 2048, 384, 384), chip))
  _, (kernel,) = h200.compile_kernels(lowered)
  assert kernel.spills > 0


def test_too_much_shared_memory_is_refused(chip):
  three = functools.partial(gpu.gradient, stages=3)
  with pytest.raises(ValueError, match="max_smem_bytes=232448"):
    lowered = jax.jit(three).lower(*shapes((4, 2048, 384, 384), chip))
    h200.compile_kernels(lowered)


def test_the_smallest_kernel_compiles(chip):
  def body(x, out, tile):
    tile[...] = 2 * x[...]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, out)
    plgpu.wait_smem_to_gmem(0)

  double = plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
    scratch_types=[plgpu.SMEM((128,), jnp.float32)],
  )
  x = jax.ShapeDtypeStruct((128,), jnp.float32, sharding=chip)
  compiled, (kernel,) = h200.compile_kernels(jax.jit(double).lower(x))
  assert h200.launches(compiled) == 1
  assert kernel.spills == 0 and 512 <= kernel.shared <= 16 * 1024


@pytest.mark.slow
def test_xla_compiles_the_training_step_of_the_memory(chip):
  weights, k, v, rates = shapes((4, 4096, 384, 384), chip)

  def loss(weights, k, v, rates):
    read, _ = fast_weights.fast_weight_scan(
      k, k, v, rates, weights, chunk_size=2048, order="causal", muon=True
    )
    return jnp.sum(jnp.square(read.astype(jnp.float32)))

  compiled, kernels = h200.compile_kernels(
    jax.jit(jax.grad(loss)).lower(weights, k, v, rates)
  )
  assert kernels == []
  memory = compiled.memory_analysis()
  assert memory is not None and memory.temp_size_in_bytes > 0


# On a GPU: JAX_PLATFORMS=cuda,cpu pytest -m gpu tests/kernels_pallas


@pytest.fixture(scope="module")
def hopper():
  try:
    device = jax.devices("cuda")[0]
  except RuntimeError:
    pytest.skip("no CUDA device: run with JAX_PLATFORMS=cuda,cpu where one is")
  if getattr(device, "compute_capability", None) != "9.0":
    pytest.skip(f"{device.device_kind} has no wgmma: needs a Hopper GPU")
  return device


ON_A_GPU = [*PRODUCTION, (3, 200, 384, 384), (1, 37, 64, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ON_A_GPU)
@pytest.mark.parametrize("tiles", [{}, {"depth": 32, "stages": 4}])
def test_gradient_on_the_device(hopper, shape, tiles):
  given = jax.device_put(operands(*shape), hopper)
  kernel = jax.jit(functools.partial(gpu.gradient, **tiles))
  found = jax.block_until_ready(kernel(*given))
  plain = jax.jit(reference.gradient)(*given)
  assert_as_good_as_xla(found, plain, exact_gradient(*given))
  for _ in range(5):  # the same bits every time, or something raced
    for a, b in zip(kernel(*given), found, strict=True):
      np.testing.assert_array_equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ON_A_GPU)
@pytest.mark.parametrize("tiles", [{}, {"depth": 32, "stages": 4}])
def test_apply_on_the_device(hopper, shape, tiles):
  weights, q, _, _ = jax.device_put(operands(*shape), hopper)
  kernel = jax.jit(functools.partial(gpu.apply, **tiles))
  found = jax.block_until_ready(kernel(weights, q))
  plain = jax.jit(reference.apply)(weights, q)
  assert_as_good_as_xla([found], [plain], [exact_apply(weights, q)])
  for _ in range(5):
    np.testing.assert_array_equal(kernel(weights, q), found)
