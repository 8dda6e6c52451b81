"""Statistics of a head's logits on Hopper GPUs (Mosaic GPU, sm_90a).

A block of threads forms 128 positions x 128 columns of the logits in registers
and writes eight numbers of each position instead, a sixteenth of the logits in
float32; XLA merges the tiles. Two warpgroups multiply, one copies.

Checked by the compiler for the H200 and by the interpreter, never run on a GPU:
ask for it by `implementation="pallas_gpu"`; no default chooses it until it has
been measured.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from giantsteps.kernels_pallas.unmask_stats import noise
from giantsteps.kernels_pallas.unmask_stats.reference import Partial, merge

ROWS, COLUMNS = 64, 128  # positions and columns of a warpgroup
BLOCK = 2 * ROWS  # positions of a block of threads
COPY_REGISTERS = 24  # of the warpgroup that copies; see fast_weight/gpu.py
_NUMBERS = len(Partial._fields)


def fits(hidden: jax.Array, head: jax.Array) -> bool:
  """Whether the kernel computes this call: 16-bit numbers, a head [D, V], D a
  multiple of 64 and V of 8, so that rows are whole 16 bytes."""
  depth, columns = head.shape
  return (
    hidden.dtype in (jnp.bfloat16, jnp.float16)
    and hidden.shape[0] > 0
    and depth % 64 == 0
    and columns >= COLUMNS
    and columns % 8 == 0
  )


def partial(
  hidden: jax.Array,
  head: jax.Array,
  bias: jax.Array | None,
  temperature: jax.Array | None,
  seeds: jax.Array | None,
  offset: jax.Array | None = None,
  *,
  depth: int = 64,
  stages: int = 4,
  interpret: Any = None,
) -> Partial:
  """`reference.partial`: one kernel for all tiles, then a tree of merges.

  Args:
    hidden: [T, D] bfloat16 or float16.
    head: [D, V]; another dtype is converted first.
    bias, temperature, seeds, offset: as of `reference.partial`.
    depth: of D per step, 64.
    stages: steps in shared memory at once; 512 depth bytes each.
    interpret: runs on a CPU, slowly; for tests.
  """
  total, size = hidden.shape
  vocabulary = head.shape[1]
  head = head.astype(hidden.dtype)
  blocks, tiles = pl.cdiv(total, BLOCK), pl.cdiv(vocabulary, COLUMNS)
  fill = lambda x: jnp.pad(
    x, ((0, blocks * BLOCK - total), *[(0, 0)] * (x.ndim - 1))
  )
  operands = [fill(hidden), head]
  if bias is not None:
    operands.append(bias.astype(jnp.float32))
  if temperature is not None:
    assert seeds is not None
    if offset is not None:  # the kernel counts columns from 0
      ahead = jnp.asarray(offset).astype(jnp.uint32) * noise.STEP
      seeds = seeds.at[:, 0].add(ahead)
    streams = lax.bitcast_convert_type(fill(seeds), jnp.int32)
    operands += [fill(temperature.astype(jnp.float32)), streams.T]
  lay = lambda width: (
    plgpu.TilingTransform((8, width)),
    plgpu.SwizzleTransform(2 * width),
  )
  token_spec = plgpu.BlockSpec(
    (BLOCK, depth), lambda step: (0, step), transforms=lay(depth)
  )
  head_spec = plgpu.BlockSpec(
    (depth, COLUMNS), lambda step: (step, 0), transforms=lay(depth)
  )

  def body(*refs):
    token_ref, head_ref, *refs, out_ref = refs
    bias_ref = refs.pop(0) if bias is not None else None
    block, tile = lax.axis_index("block"), lax.axis_index("tile")
    group = lax.axis_index("warpgroup")
    # the last tile repeats columns of the one before it, and leaves them out
    first = jnp.minimum(tile * COLUMNS, vocabulary - COLUMNS)
    mine = pl.ds(block * BLOCK + group * ROWS, ROWS)

    def scope(staged, biases, rates, seeds, arrived):
      def multiply(_, tokens, columns, accumulator):
        rows = pl.ds(group * ROWS, ROWS)
        plgpu.wgmma(accumulator, tokens.at[rows], columns)
        plgpu.wgmma_wait(0)
        return accumulator

      def compute(pipeline):
        if bias_ref is not None:
          plgpu.copy_gmem_to_smem(
            bias_ref.at[pl.ds(first, COLUMNS)],
            biases.at[group],
            arrived.at[group],
          )
        if rates is not None:
          rate_ref, seed_ref = refs
          for source, there in (
            (rate_ref.at[mine], rates.at[group]),
            (seed_ref.at[0, mine], seeds.at[group, 0]),
            (seed_ref.at[1, mine], seeds.at[group, 1]),
          ):
            plgpu.copy_gmem_to_smem(source, there, arrived.at[group])

        def accumulate(accumulator):
          pipeline(accumulator)
          finish(accumulator[...])

        pl.run_scoped(
          accumulate,
          plgpu.WGMMAAccumulatorRef((ROWS, COLUMNS), jnp.float32),
        )

      def finish(logits):
        if arrived is not None:
          plgpu.barrier_wait(arrived.at[group])
        down = lambda x: lax.broadcast_in_dim(x, (ROWS, COLUMNS), (0,))
        shape = (ROWS, COLUMNS)
        column = lax.broadcasted_iota(jnp.int32, shape, 1)
        if biases is not None:
          logits += lax.broadcast_in_dim(biases[group], shape, (1,))
        fresh = column >= tile * COLUMNS - first
        logits = jnp.where(fresh, logits, -jnp.inf)
        place = column.astype(jnp.float32)

        def highest(x):
          peak = jnp.max(x, axis=1)
          found = jnp.where(x == down(peak), place, float(COLUMNS))
          return peak, jnp.minimum(jnp.min(found, axis=1), COLUMNS - 1.0)

        peak, top = highest(logits)
        here = place == down(top)
        second = jnp.max(jnp.where(here, -jnp.inf, logits), axis=1)
        finite = jnp.where(peak == -jnp.inf, 0.0, peak)
        shifted = logits - down(finite)
        mass = jnp.exp(shifted)
        mean = jnp.where(mass > 0, mass * shifted, 0.0)
        best, chosen, logit = peak, top, peak
        if rates is not None:
          a, b = (down(seeds[group, i]).astype(jnp.uint32) for i in range(2))
          bits = noise.hash_bits(a, b, column + first)
          noised = logits + down(rates[group]) * _gumbel(bits)
          best, chosen = highest(noised)
          found = jnp.where(place == down(chosen), logits, -jnp.inf)
          logit = jnp.max(found, axis=1)
        numbers = Partial(
          first=peak,
          first_token=top,
          runner_up=second,
          total=jnp.sum(mass, axis=1),
          moment=jnp.sum(mean, axis=1),
          best=best,
          token=chosen,
          logit=logit,
        )
        for i, x in enumerate(numbers):
          staged[group, i] = x
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged.at[group], out_ref.at[tile, :, mine])
        plgpu.wait_smem_to_gmem(0)

      plgpu.emit_pipeline_warp_specialized(
        multiply,
        grid=(size // depth,),
        memory_registers=COPY_REGISTERS,
        in_specs=[token_spec, head_spec],
        wg_axis="warpgroup",
        num_compute_wgs=2,
        max_concurrent_steps=stages,
        compute_context=compute,
      )(
        token_ref.at[pl.ds(block * BLOCK, BLOCK)],
        head_ref.at[:, pl.ds(first, COLUMNS)],
      )

    copies = (bias is not None) + 3 * (temperature is not None)
    pl.run_scoped(
      scope,
      plgpu.SMEM((2, _NUMBERS, ROWS), jnp.float32),
      None if bias is None else plgpu.SMEM((2, COLUMNS), jnp.float32),
      None if temperature is None else plgpu.SMEM((2, ROWS), jnp.float32),
      None if temperature is None else plgpu.SMEM((2, 2, ROWS), jnp.int32),
      plgpu.Barrier(num_arrivals=copies, num_barriers=2) if copies else None,
      collective_axes="warpgroup",
    )

  found = plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct(
      (tiles, _NUMBERS, blocks * BLOCK), jnp.float32
    ),
    grid=(tiles, blocks),
    grid_names=("tile", "block"),
    num_threads=3,
    thread_name="warpgroup",
    kernel_name="unmask_stats",
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
    interpret=interpret,
  )(*operands)
  return _merged(found[..., :total], vocabulary, offset)


def _gumbel(bits: jax.Array) -> jax.Array:
  """`noise.of_bits` without log1p, which Mosaic GPU has not.

  Its fast logarithm has an absolute error of 2^-22, too coarse for the small
  exponentials that win: below 1/8 they are a series.
  """
  u = noise.uniform(bits)
  series = jnp.full_like(u, 1 / 9)
  for k in range(8, 0, -1):
    series = 1 / k + u * series
  exponential = jnp.where(u < 0.125, u * series, -jnp.log(1 - u))
  return -jnp.log(exponential)


def _merged(found: jax.Array, vocabulary: int, offset) -> Partial:
  """[tiles, 8, T] -> [T] each, halving the number of tiles at a time."""
  parts = Partial(*jnp.moveaxis(found, 1, 0))
  first = jnp.arange(found.shape[0]) * COLUMNS
  first = jnp.minimum(first, vocabulary - COLUMNS).astype(jnp.int32)[:, None]
  first = first if offset is None else first + offset
  ids = lambda x: x.astype(jnp.int32) + first
  parts = parts._replace(
    first_token=ids(parts.first_token), token=ids(parts.token)
  )
  while parts.first.shape[0] > 1:
    even = parts.first.shape[0] // 2 * 2
    left, right, rest = (
      jax.tree.map(lambda x, s=s: x[s], parts)
      for s in (slice(0, even, 2), slice(1, even, 2), slice(even, None))
    )
    joined = merge(left, right)
    parts = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), joined, rest)
  return jax.tree.map(lambda x: x[0], parts)
