"""The head's statistics on Hopper GPUs: numerics in the Mosaic GPU interpreter,
resources by the compiler for the H200."""

# pyright: reportArgumentType=false, reportCallIssue=false

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_gpu_kernels
import test_unmask_stats
from jax.sharding import SingleDeviceSharding

from giantsteps.experiments.harness import config as config_lib
from giantsteps.experiments.harness import h200
from giantsteps.kernels_pallas.unmask_stats import (
  gpu,
  noise,
  reference,
  unmask_stats,
)

NAMES = ("hidden", "head", "bias", "temperature", "seeds")


def by_kernel(given):
  """Of arguments made by `test_unmask_stats.problem`, races looked for."""
  operands = [given.get(name) for name in NAMES]
  return reference.finish(test_gpu_kernels.interpreted(gpu.partial, *operands))


# (T, D, V), sampled, banned: V ends inside a tile, T inside a block
CASES = (
  ((3, 64, 264), False, False),
  ((130, 128, 200), True, True),
)


@pytest.mark.parametrize(("shape", "sampled", "banned"), CASES)
def test_parity(shape, sampled, banned):
  given = test_unmask_stats.problem(
    *shape, "bfloat16", sampled=sampled, banned=banned
  )
  test_unmask_stats.check(by_kernel(given), given)


def test_a_shard_of_the_vocabulary():
  given = test_unmask_stats.problem(
    4, 64, 384, "bfloat16", sampled=True, banned=True
  )
  whole = by_kernel(given)
  parts = []
  for start in (0, 128):
    size = 128 if start == 0 else 256
    cut = slice(start, start + size)
    call = functools.partial(gpu.partial, offset=jnp.int32(start))
    parts.append(
      test_gpu_kernels.interpreted(
        call,
        given["hidden"],
        given["head"][:, cut],
        given["bias"][cut],
        given["temperature"],
        given["seeds"],
      )
    )
  merged = reference.finish(reference.merge(*parts))
  np.testing.assert_array_equal(merged.token, whole.token)
  for a, b in zip(merged, whole, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_noise_without_log1p():
  """Both ends of the uniform, where the series meets the logarithm, and what
  lies between, against float64."""
  edges = [0, 1, 2**16, 2**29 - 1, 2**29, 2**29 + 2**10, 2**32 - 1]
  some = np.random.default_rng(0).integers(0, 2**32, 4_000)
  bits = np.concatenate([edges, some]).astype(np.uint32)
  u = np.minimum((bits.astype(np.float64) + 0.5) / 2**32, 1 - 2**-24)
  want = -np.log(-np.log1p(-u))
  # at the large end float32 knows u no better than 2^-24
  fine = u < 0.9
  found = np.asarray(gpu._gumbel(jnp.asarray(bits)))
  np.testing.assert_allclose(found[fine], want[fine], rtol=1e-6, atol=1e-6)
  plain = np.asarray(noise.of_bits(jnp.asarray(bits)))
  np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("shape", "dtype", "tied"),
  [
    ((4, 96, 264), "bfloat16", False),  # D
    ((4, 64, 260), "bfloat16", False),  # V of whole 16 bytes
    ((4, 64, 100), "bfloat16", False),  # less than a tile
    ((4, 64, 264), "bfloat16", True),  # an embedding as head
    ((4, 64, 264), "float32", False),
  ],
)
def test_refuses_what_it_does_not_compute(shape, dtype, tied):
  given = test_unmask_stats.problem(
    *shape, dtype, sampled=False, banned=False, tied=tied
  )
  with pytest.raises(ValueError, match="pallas_gpu"):
    unmask_stats(**given, implementation="pallas_gpu")


def test_no_default_chooses_it_before_it_is_measured():
  shape = lambda *size: jax.ShapeDtypeStruct(size, jnp.bfloat16)
  traced = jax.jit(unmask_stats).trace(shape(32, 128), shape(128, 8_192))
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert "mosaic_gpu" not in text


@pytest.fixture(scope="module")
def chip():
  try:
    return SingleDeviceSharding(h200.device())
  except config_lib.InputError as missing:
    pytest.skip(str(missing))


# LLaDA 8B and Dream 7B
@pytest.mark.parametrize(
  ("rows", "depth", "size", "sampled"),
  [(256, 4_096, 126_464, True), (32, 3_584, 152_064, False)],
)
def test_resources_on_h200(chip, rows, depth, size, sampled):
  place = functools.partial(jax.ShapeDtypeStruct, sharding=chip)
  operands = [
    place((rows, depth), jnp.bfloat16),
    place((depth, size), jnp.bfloat16),
    place((size,), jnp.float32),
    place((rows,), jnp.float32) if sampled else None,
    place((rows, 2), jnp.uint32) if sampled else None,
  ]
  call = lambda *given: gpu.partial(*given)
  compiled, (kernel,) = h200.compile_kernels(jax.jit(call).lower(*operands))
  assert kernel.name == "unmask_stats"
  assert kernel.spills == 0 and not kernel.serialized
  assert kernel.shared <= h200.SHARED_MEMORY
  memory = compiled.memory_analysis()
  assert memory is not None
  # a block of positions' numbers, not its logits
  logits = -(-rows // 128) * 128 * size * 4
  assert memory.temp_size_in_bytes < 0.1 * logits
