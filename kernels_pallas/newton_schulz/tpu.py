"""Newton-Schulz on a TPU: all iterations of a matrix without leaving VMEM.

With A = X X^T and Q = a I + b A + c A A a step is X <- Q X. A and Q are
symmetric, so only their blocks on and above the diagonal are multiplied and
the others are transposed copies. A program holds several matrices, so that the
matrix units have work of one while another waits for its results.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from giantsteps.kernels_pallas import dispatch, packed, tuning

LANES = 128
VMEM = 56 * 2**20  # bytes a program may take: a TPU v5p has 64 MiB
# Matrices per program; sides of a block of A and Q; rows of X X^T in one
# product (at most `block`: blocks); terms of a sum that are added in registers;
# columns of Q X in one product.
_BLOCKS = {
  "matrices": 4,
  "block": 256,
  "height": 1024,
  "depth": 512,
  "columns": 256,
}
_NT = (((1,), (1,)), ((), ()))
_NN = (((1,), (0,)), ((), ()))


def _spans(size: int, block: int) -> list[tuple[int, int]]:
  """(start, length) of the blocks that cover `size`, the last one shorter."""
  return [(i, min(block, size - i)) for i in range(0, size, block)]


def padded(rows: int, columns: int) -> tuple[int, int]:
  """(short side, long side), rounded up to whole lanes."""
  m, n = sorted((rows, columns))
  return -(-m // LANES) * LANES, -(-n // LANES) * LANES


def vmem(m: int, n: int, dtype: jax.typing.DTypeLike, slots: int = 1) -> int:
  """Bytes in VMEM per matrix of a program.

  Args:
    m: short side, padded.
    n: long side, padded.
    dtype: of the iteration.
    slots: iterates that are held: one, or all where they are results.
  """
  size = jnp.dtype(dtype).itemsize
  scratch = (4 + 2 * size) * m * m  # b A in float32, A and Q
  if slots > 1:
    return 2 * (4 + slots * size) * m * n + scratch  # two buffers of each
  return (2 * (4 + 4) + slots * size) * m * n + scratch


def fits(
  rows: int, columns: int, dtype: jax.typing.DTypeLike, slots: int = 1
) -> bool:
  """Whether a program can hold one matrix, on every TPU."""
  return vmem(*padded(rows, columns), dtype, slots) <= VMEM


def iterate(
  g: jax.Array,
  coefficients: Sequence[tuple[float, float, float]],
  dtype: jax.typing.DTypeLike,
  *,
  keep: bool = False,
  interpret: Any = False,
) -> jax.Array:
  """Newton-Schulz as in the reference; products accumulated in float32.

  Args:
    g: [..., m, n], m <= n; read as float32.
    coefficients: (a, b, c) of every step.
    dtype: bfloat16 or float32, of the iterates and of the products' inputs;
      float32 products are exact, in several passes of the matrix units.
    keep: all iterates, not only the last.
    interpret: runs on a CPU, slowly; for tests.

  Returns:
    The last iterate [..., m, n] in float32, or with `keep` all of them,
    [steps + 1, ..., m, n] in `dtype`, the scaled matrix first.

  Raises:
    ValueError: if m > n, for another dtype, or if one matrix does not fit.
  """
  *batch, m, n = g.shape
  dtype = jnp.dtype(dtype)
  if m > n:
    raise ValueError(f"matrices {m} x {n}: transpose them, rows <= columns")
  if dtype.name not in ("bfloat16", "float32"):
    raise ValueError(f"dtype {dtype.name}: the kernel has bfloat16 and float32")
  steps = len(coefficients)
  rows, width = padded(m, n)
  slots = steps + 1 if keep else 1
  each = vmem(rows, width, dtype, slots)
  if each > VMEM:
    raise ValueError(f"{m} x {n} {dtype.name} takes {each} bytes of {VMEM}")
  total = math.prod(batch)
  sizes = tuning.blocks(
    "newton_schulz",
    f"{rows}x{width} {dtype.name}{' kept' if keep else ''}",
    _BLOCKS,
  )
  most = min(sizes["matrices"], VMEM // each, total)
  num = max(z for z in range(1, most + 1) if total % z == 0)

  x = g.astype(jnp.float32).reshape(total, m, n)
  x = jnp.pad(x, ((0, 0), (0, rows - m), (0, width - n)))
  whole = pl.BlockSpec((num, rows, width), lambda i: (i, 0, 0))
  held = (slots, num, rows, width)
  square = packed.scratch((num, rows, rows), dtype)
  scratch = [square, pltpu.VMEM((num, rows, rows), jnp.float32), square]
  if keep:
    out_spec = pl.BlockSpec(held, lambda i: (0, i, 0, 0))
    shape = dispatch.result((slots, total, rows, width), dtype, x)
  else:
    out_spec = whole
    shape = dispatch.result((total, rows, width), jnp.float32, x)
    scratch.insert(0, packed.scratch(held, dtype))
  flops = total * steps * (4 * rows**2 * width + 2 * rows**3)
  out = pl.pallas_call(
    functools.partial(
      _body, steps, *(sizes[k] for k in ("block", "height", "depth", "columns"))
    ),
    grid=(total // num,),
    in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), whole],
    out_specs=out_spec,
    out_shape=shape,
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",),
      vmem_limit_bytes=max(16 * 2**20, num * each + 6 * 2**20),
    ),
    cost_estimate=pl.CostEstimate(
      flops=flops,
      bytes_accessed=4 * x.size + math.prod(shape.shape) * shape.dtype.itemsize,
      transcendentals=0,
    ),
    interpret=interpret,
    name="newton_schulz",
  )(jnp.asarray(coefficients, jnp.float32), x)
  out = out[..., :m, :n]
  return out.reshape(*out.shape[:-3], *batch, m, n)


def _body(
  steps, block, height, depth, columns, coefficients, g_ref, out_ref, *scratch
):
  """One program: g_ref [Z, m, n]; out_ref [Z, m, n], or all X [S, Z, m, n]."""
  keep = len(scratch) == 3
  x, gram, linear, poly = (out_ref, *scratch) if keep else scratch
  num, m, n = g_ref.shape
  exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  dot = functools.partial(
    jax.lax.dot_general,
    precision=exact,
    preferred_element_type=jnp.float32,
  )
  blocks = _spans(m, block)
  upper = [(r, c) for i, c in enumerate(blocks) for r in blocks[:i]]
  tiles = [*upper, *((r, r) for r in blocks)]
  panels = [(r, c) for c in blocks for r in _spans(sum(c), height)]
  panels = panels if height > block else tiles

  def depths(size):  # sums of more terms pass through memory, not registers
    return [slice(i, i + k) for i, k in _spans(size, depth)]

  def mirror(ref, z):
    for (i, h), (j, w) in upper:
      r, c = slice(i, i + h), slice(j, j + w)
      packed.store(ref, (z, c, r), packed.load(ref, (z, r, c)).T)

  for z in range(num):
    _normalise(g_ref, x, z)

  @pl.loop(0, steps)
  def _(step):
    a, b, c = (coefficients[step, i] for i in range(3))
    # In place: a product reads all of its X before it knows a result.
    now, then = (step, step + 1) if keep else (0, 0)

    # A loop over the three products, not one block of code: the compiler
    # moves loads ahead within a block until it runs out of registers.
    @pl.loop(0, 3)
    def _(phase):
      @pl.when(phase == 0)
      def _():
        for (i, h), (j, w) in panels:
          for k in depths(n):
            for z in range(num):
              tile = (z, slice(i, i + h), slice(j, j + w))
              left = packed.load(x, (now, z, tile[1], k))
              s = dot(left, packed.load(x, (now, z, tile[2], k)), _NT)
              s = s + linear[tile] if k.start else s
              if k.stop == n:
                packed.store(gram, tile, s)
                s = b * s
              linear[tile] = s
        for z in range(num):
          mirror(gram, z)
          for i in range(0, m, LANES):
            diagonal = slice(i, i + LANES)
            linear[z, diagonal, diagonal] += a * _identity(LANES)

      @pl.when(phase == 1)
      def _():
        for (i, h), (j, w) in tiles:
          for k in depths(m):
            for z in range(num):
              tile = (z, slice(i, i + h), slice(j, j + w))
              left = packed.load(gram, (z, tile[1], k))
              s = dot(left, packed.load(gram, (z, tile[2], k)), _NT)
              s = c * s + linear[tile]
              if k.stop == m:
                packed.store(poly, tile, s)
              else:
                linear[tile] = s
        for z in range(num):
          mirror(poly, z)

      @pl.when(phase == 2)
      def _():
        for j, w in _spans(n, columns):
          part = slice(0, w)  # of b A, which nobody needs any more
          for k in depths(m):
            for z in range(num):
              right = packed.load(x, (now, z, k, slice(j, j + w)))
              y = dot(packed.load(poly, (z, slice(0, m), k)), right, _NN)
              y = y + linear[z, :, part] if k.start else y
              if k.stop == m:
                packed.store(x, (then, z, slice(0, m), slice(j, j + w)), y)
              else:
                linear[z, :, part] = y

  if not keep:
    for z in range(num):
      _copy(x, out_ref, z)


def _copy(x, out_ref, z):
  """The result, in float32."""
  strip = _strip(out_ref)

  @pl.loop(0, out_ref.shape[1] // strip)
  def _(i):
    rows = pl.ds(pl.multiple_of(i * strip, strip), strip)
    out_ref[z, rows, :] = packed.load(x, (0, z, rows, slice(None))).astype(
      out_ref.dtype
    )


def _strip(x) -> int:
  """Rows of an elementwise pass that fit into half of the registers or so."""
  n = x.shape[-1]
  return max(
    16, min(LANES, 2 ** (2**16 // n).bit_length() // 2 // -(-n // 1024))
  )


def _normalise(g_ref, x, z):
  """x[0, z] = g / (|g| + 1e-7)."""
  m, n = g_ref.shape[1:]
  strip = _strip(x)

  def add(i, total):
    g = g_ref[z, pl.ds(i * strip, strip), :]
    square = (g * g).reshape(strip // 8, 8, n)
    return total + jnp.sum(square, axis=0)

  zero = jnp.zeros((8, n), jnp.float32)
  total = jax.lax.fori_loop(0, m // strip, add, zero)
  scale = 1 / (jnp.sqrt(jnp.sum(total)) + 1e-7)

  @pl.loop(0, m // strip)
  def _(i):
    rows = pl.ds(pl.multiple_of(i * strip, strip), strip)
    packed.store(x, (0, z, rows, slice(None)), g_ref[z, rows, :] * scale)


def _identity(n):
  row = jax.lax.broadcasted_iota(jnp.int32, (n, n), 0)
  column = jax.lax.broadcasted_iota(jnp.int32, (n, n), 1)
  return (row == column).astype(jnp.float32)
