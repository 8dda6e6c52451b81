"""Reading and writing a SwiGLU memory on Hopper GPUs (Mosaic GPU, sm_90a).

"Test-Time Training Done Right" (arXiv:2505.23884). One kernel forms the hidden
features of a tile of tokens and everything elementwise behind them, so that
only bfloat16 results reach the device's memory; XLA then contracts these over
tokens or hidden features. Left to XLA alone (as compiled for the H200 by jax
0.10.2), the gradient also writes g, u and p in float32 and reads them in three
fusions, 40 bytes per token and feature beside the 6 of the results. At peak
rates 46 bytes take 9.6 ps, the 12 d FLOPs at d = 384 take 4.7.

A block of threads is two warpgroups that multiply and one that copies. Each of
the two owns 64 tokens x 128 features, 192 of its 240 registers per thread
being the accumulators of g, u and p; tiles of d arrive by TMA.

Checked by the compiler for the H200 and by the interpreter, never run on a GPU:
ask for it by `implementation="pallas_gpu"`; no default chooses it until it has
been measured.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from giantsteps.kernels_pallas.fast_weight.reference import Weights
from giantsteps.kernels_pallas.precision import einsum as _dot

ROWS, COLUMNS = 64, 128  # tokens and features of a warpgroup
BLOCK = 2 * ROWS  # tokens of a block of threads
STORE = 64  # features worked out and stored at a time: 128-byte rows
# For the warpgroup that copies. The others get (512 - 24) / 2, rounded down to
# 240 by steps of 8; 2 x 240 + 24 is what three warpgroups of 168 start with,
# and a sum above it would wait for registers for ever.
COPY_REGISTERS = 24


def gradient(
  weights: Weights,
  k: jax.Array,
  v: jax.Array,
  learning_rates: Weights,
  *,
  depth: int = 64,
  stages: int = 2,
  interpret: Any = None,
) -> Weights:
  """`reference.gradient`: one kernel for x0, x1, x2, two batched products.

  With g = W0 k, u = W2 k, p = W1^T v and s = sigmoid(g), the kernel writes
  x0 = eta0 p u s (1 + g (1 - s)), x2 = eta2 p g s and x1 = eta1 g s u; then
  D0 | D2 = sum_t x0 | x2 k^T in one product, D1 = sum_t v x1^T.

  Args:
    weights: W0 [N, h, d], W1 [N, d, h], W2 [N, h, d]; h a multiple of 128, d of
      `depth`.
    k: [N, C, d] bfloat16 or float16, any C > 0.
    v: [N, C, d].
    learning_rates: three [N, C, 1], for W0, W1, W2.
    depth: of d per step, 64 or 32.
    stages: steps in shared memory at once; 640 depth bytes each.
    interpret: runs on a CPU, slowly; for tests.

  Returns:
    D0 [N, h, d], D1 [N, d, h], D2 [N, h, d] float32.

  Raises:
    ValueError: for shapes or dtypes that the tensor cores do not take.
  """
  w0, w1, w2 = weights
  _check(w0, k, depth)
  v = v.astype(k.dtype)
  rates = jnp.concatenate(learning_rates, axis=-1).astype(jnp.float32)
  k, v, rates = (_at_least_a_block(x) for x in (k, v, rates))

  def combine(products, rates):
    g, u, p = products
    eta0, eta1, eta2 = rates
    s = _sigmoid(g)
    a = g * s
    x0 = eta0 * (p * u * s * (1 + g * (1 - s)))
    return x0, eta2 * (p * a), eta1 * (a * u)

  x02, x1 = _hidden(
    combine,
    (k, v),
    ((0, w0.mT), (0, w2.mT), (1, w1)),
    _by_block(rates),
    (2, 1),
    name="lact_gradient",
    depth=depth,
    stages=stages,
    interpret=interpret,
  )
  d02 = _dot("nch,ncd->nhd", x02, k, k)
  d0, d2 = jnp.split(d02, 2, axis=1)
  return d0, _dot("ncd,nch->ndh", v, x1, k), d2


def apply(
  weights: Weights,
  q: jax.Array,
  *,
  depth: int = 64,
  stages: int = 4,
  interpret: Any = None,
) -> jax.Array:
  """`reference.apply`: one kernel for silu(W0 q) * (W2 q), then a product.

  Args:
    weights: W0 [N, h, d], W1 [N, d, h], W2 [N, h, d]; h a multiple of 128, d of
      `depth`.
    q: [N, C, d] bfloat16 or float16, any C > 0.
    depth: of d per step, 64 or 32.
    stages: steps in shared memory at once; 384 depth bytes each.
    interpret: runs on a CPU, slowly; for tests.

  Returns:
    [N, C, d] in q.dtype.

  Raises:
    ValueError: for shapes or dtypes that the tensor cores do not take.
  """
  w0, w1, w2 = weights
  _check(w0, q, depth)

  def combine(products, _):
    g, u = products
    return (g * _sigmoid(g) * u,)

  (hidden,) = _hidden(
    combine,
    (_at_least_a_block(q),),
    ((0, w0.mT), (0, w2.mT)),
    None,
    (1,),
    name="lact_apply",
    depth=depth,
    stages=stages,
    interpret=interpret,
  )
  hidden = hidden[:, : q.shape[1]]
  return _dot("nch,ndh->ncd", hidden, w1, q).astype(q.dtype)


def _check(w0: jax.Array, tokens: jax.Array, depth: int) -> None:
  h, d = w0.shape[-2:]
  if tokens.dtype not in (jnp.bfloat16, jnp.float16):
    raise ValueError(
      f"pallas_gpu multiplies bfloat16 or float16, not {tokens.dtype}: "
      'implementation="xla" takes any'
    )
  if depth not in (32, 64):
    raise ValueError(f"depth={depth}: choose 64 or 32")
  if tokens.shape[1] == 0 or d % depth or h % COLUMNS:
    raise ValueError(
      f"pallas_gpu needs tokens, d a multiple of {depth} and h of {COLUMNS}, "
      f'not C={tokens.shape[1]}, d={d}, h={h}: implementation="xla" takes any'
    )


def _sigmoid(x: jax.Array) -> jax.Array:
  """By rsqrt(y)^2 = 1 / y: an exact division costs registers and spills."""
  root = lax.rsqrt(1 + jnp.exp(-x))
  return root * root


def _at_least_a_block(x: jax.Array) -> jax.Array:
  """[N, C, ...], with zero tokens if C < 128; these read and write nothing."""
  short = max(0, BLOCK - x.shape[1])
  return jnp.pad(x, ((0, 0), (0, short), (0, 0))) if short else x


def _by_block(rates: jax.Array) -> jax.Array:
  """[N, C, R] -> [N, R, blocks, 128], the last block being the last tokens."""
  n, c, r = rates.shape
  rates, whole = rates.mT, c // BLOCK * BLOCK
  if whole < c:
    last = rates[..., c - BLOCK :]
    rates = jnp.concatenate([rates[..., :whole], last], axis=-1)
  return rates.reshape(n, r, -1, BLOCK)


def _tiled(columns: int) -> tuple[Any, ...]:
  """How a 2-byte tile lies in shared memory: rows swizzled over the banks."""
  width = min(columns, 64)
  tiling = plgpu.TilingTransform((8, width))
  return tiling, plgpu.SwizzleTransform(2 * width)


def _hidden(
  combine: Callable,
  tokens: Sequence[jax.Array],
  factors: Sequence[tuple[int, jax.Array]],
  rates: jax.Array | None,
  outputs: Sequence[int],
  *,
  name: str,
  depth: int,
  stages: int,
  interpret: Any,
) -> list[jax.Array]:
  """Products of tokens and weights, combined before they leave the registers.

  A C that is no multiple of 128 ends with a block that repeats tokens of the
  one before it, and writes the same results there.

  Args:
    combine: (products, rates) -> tiles; all [64, 64] float32.
    tokens: [N, C, d] each, C >= 128.
    factors: of each product, which tokens and by what [N, d, h].
    rates: [N, R, blocks, 128] float32, or None.
    outputs: of each result, how many tiles of `combine` lie side by side in it.
    name: of the kernel, in profiles.
    depth: of d per step.
    stages: steps in shared memory at once.
    interpret: as of `plgpu.kernel`.

  Returns:
    [N, C, outputs[i] h] in the dtype of the tokens.
  """
  n, c, d = tokens[0].shape
  dtype, h = tokens[0].dtype, factors[0][1].shape[-1]
  weights = [w.astype(dtype) for _, w in factors]
  operands = [*tokens, *weights, *([] if rates is None else [rates])]
  # result and first column of every tile of `combine`
  places = [(i, p * h) for i, count in enumerate(outputs) for p in range(count)]
  token_spec = plgpu.BlockSpec(
    (BLOCK, depth), lambda step: (0, step), transforms=_tiled(depth)
  )
  # swizzled as the tokens are: a product wants one swizzle for both
  weight_spec = plgpu.BlockSpec(
    (depth, COLUMNS), lambda step: (step, 0), transforms=_tiled(depth)
  )

  def body(*refs):
    token_refs, refs = refs[: len(tokens)], refs[len(tokens) :]
    weight_refs, refs = refs[: len(weights)], refs[len(weights) :]
    rate_ref, results = (None, refs) if rates is None else (refs[0], refs[1:])
    matrix, block, column = (
      lax.axis_index(axis) for axis in ("matrix", "block", "column")
    )
    group = lax.axis_index("warpgroup")
    start = jnp.minimum(block * BLOCK, c - BLOCK)
    first = column * COLUMNS
    rows = pl.ds(group * ROWS, ROWS)

    def scope(staged, rate_tile, arrived):
      def multiply(_, *arguments):
        *tiles, accumulators = arguments
        for i, (which, _) in enumerate(factors):
          plgpu.wgmma(
            accumulators[i], tiles[which].at[rows], tiles[len(tokens) + i]
          )
        plgpu.wgmma_wait(0)
        return accumulators

      def compute(pipeline):
        if rate_ref is not None:
          plgpu.copy_gmem_to_smem(
            rate_ref.at[matrix, :, block, rows],
            rate_tile.at[group],
            arrived.at[group],
          )

        def accumulate(*accumulators):
          pipeline(accumulators)
          finish([x[...] for x in accumulators])

        accumulator = plgpu.WGMMAAccumulatorRef((ROWS, COLUMNS), jnp.float32)
        pl.run_scoped(accumulate, *([accumulator] * len(factors)))

      def finish(products):
        columns = ()
        if rate_ref is not None:
          plgpu.barrier_wait(arrived.at[group])
          columns = [rate_tile[group, i] for i in range(rate_ref.shape[1])]
          spread = lambda x: lax.broadcast_in_dim(x, (ROWS, STORE), (0,))
          columns = [spread(x) for x in columns]
        mine = pl.ds(start + group * ROWS, ROWS)
        for left in range(0, COLUMNS, STORE):
          cut = [x[:, left : left + STORE] for x in products]
          tiles = combine(cut, columns)
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # staged is free
          for i, tile in enumerate(tiles):
            staged[group, i] = tile.astype(dtype)
          plgpu.commit_smem()
          for i, (result, offset) in enumerate(places):
            there = pl.ds(offset + first + left, STORE)
            plgpu.copy_smem_to_gmem(
              staged.at[group, i], results[result].at[matrix, mine, there]
            )
        plgpu.wait_smem_to_gmem(0)

      plgpu.emit_pipeline_warp_specialized(
        multiply,
        grid=(d // depth,),
        memory_registers=COPY_REGISTERS,
        in_specs=[*[token_spec] * len(tokens), *[weight_spec] * len(weights)],
        wg_axis="warpgroup",
        num_compute_wgs=2,
        max_concurrent_steps=stages,
        compute_context=compute,
      )(
        *(x.at[matrix, pl.ds(start, BLOCK)] for x in token_refs),
        *(w.at[matrix, :, pl.ds(first, COLUMNS)] for w in weight_refs),
      )

    pl.run_scoped(
      scope,
      plgpu.SMEM(
        (2, len(places), ROWS, STORE), dtype, transforms=_tiled(STORE)
      ),
      None
      if rates is None
      else plgpu.SMEM((2, rates.shape[1], ROWS), jnp.float32),
      None if rates is None else plgpu.Barrier(num_barriers=2),
      collective_axes="warpgroup",
    )

  kernel = plgpu.kernel(
    body,
    out_type=[
      jax.ShapeDtypeStruct((n, c, count * h), dtype) for count in outputs
    ],
    grid=(n, pl.cdiv(c, BLOCK), h // COLUMNS),
    grid_names=("matrix", "block", "column"),
    num_threads=3,
    thread_name="warpgroup",
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(
      approx_math=True,  # exp and rsqrt to 2^-22, far below bfloat16's 2^-9
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
    interpret=interpret,
  )
  return kernel(*operands)
