"""TPU body of attention up to a limit: one pass over the cache, online softmax.

A tile of slots is read once for all groups; scores stay on chip, and tiles
that no query of a row sees are neither read nor multiplied.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from giantsteps.kernels_pallas import dispatch, tuning

_LANES, _SUBLANES = 128, 8
_VMEM = 56 * 2**20  # bytes: a TPU v5p has 64 MiB
# Slots of a tile; most rows of a group's matrix (queries times heads) in a
# program, and in one product.
BLOCKS = {"slots": 512, "rows": 256, "height": 128}
_HIDDEN = -0.7 * float(np.finfo(np.float32).max)  # score of a slot not seen


def fits(q: jax.Array, k: jax.Array) -> bool:
  """Whether the kernel computes this call: bfloat16 and float32, where the
  groups of a program fit on chip."""
  size, lanes = q.dtype.itemsize, -(-q.shape[3] // _LANES) * _LANES
  tile, rows = BLOCKS["slots"], BLOCKS["rows"]
  # two buffers and a copy of keys and values; of queries and results
  group = lanes * (6 * tile * size + rows * (4 * size + 4)) + 8 * rows * _LANES
  shared = rows * (2 * tile * (4 + size) + 16 * _LANES)
  return (
    q.dtype == k.dtype
    and q.dtype.name in ("bfloat16", "float32")
    and q.size > 0
    and k.size > 0
    and _together(k.shape[-2]) * group + shared <= _VMEM
  )


def _together(groups: int) -> int:
  """Groups of a program, whose work is written out: a tile of sublanes, or
  all."""
  return _SUBLANES if groups % _SUBLANES == 0 else groups


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  limits: jax.Array,
  layer: jax.Array,
  *,
  blocks: tuning.Blocks | None = None,
  interpret: Any = False,
) -> jax.Array:
  """`reference.block_attention` in one kernel.

  Args:
    q: [B, T, H, K] bfloat16 or float32.
    k, v: [L, B, S, G, K] like q.
    limits: [B, T] int32.
    layer: [] int32; the others are not read.
    blocks: see `BLOCKS`; None is as tuned.
    interpret: runs on a CPU, slowly; for tests.

  Returns:
    [B, T, H, K] in q.dtype.
  """
  batch, length, heads, width = q.shape
  slots, groups = k.shape[2:4]
  each = heads // groups
  call = f"{each * length}x{groups}x{width} {q.dtype}"
  sizes = blocks or tuning.blocks("block_attention", call, BLOCKS)
  tile = min(sizes["slots"], -(-slots // _LANES) * _LANES)
  tiles = pl.cdiv(slots, tile)
  # Queries of a group are rows of one matrix, a query's heads side by side.
  total = length * each
  programs = pl.cdiv(total, sizes["rows"])
  pieces = pl.cdiv(pl.cdiv(total, programs), sizes["height"])
  height = -(-pl.cdiv(total, programs * pieces) // 16) * 16
  rows = pieces * height
  padding = programs * rows - total
  some = _together(groups)
  q = jnp.moveaxis(q.reshape(batch, length, groups, each, width), 2, 1)
  q = q.reshape(batch, groups, total, width)
  q = jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, 0)))
  limits = jnp.repeat(jnp.clip(limits, 0, slots), each, axis=1)
  limits = jnp.pad(limits, ((0, 0), (0, padding))).astype(jnp.int32)
  most = jnp.max(limits.reshape(batch, programs, rows), axis=2)
  needed = jnp.maximum((most + tile - 1) // tile, 1)  # tiles

  def of_queries(b, n, i, j, needed, layer):
    return b, n, i, 0

  def of_slots(b, n, i, j, needed, layer):
    row = layer[0] * batch + b
    return row, jnp.minimum(j, needed[b, i] - 1), n, 0

  def of_limits(b, n, i, j, needed, layer):
    return b, i, 0

  layer = jnp.asarray(layer, jnp.int32).reshape(1)
  k, v = (x.reshape(-1, slots, groups, width) for x in (k, v))
  operands = (needed, layer, q, k, v, limits[..., None])
  queries = pl.BlockSpec((None, some, rows, width), of_queries)
  cache = pl.BlockSpec((1, tile, some, width), of_slots)
  scores = 2 * batch * heads * length * slots * width
  out = pl.pallas_call(
    functools.partial(_body, scale=width**-0.5, slots=slots),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(batch, groups // some, programs, tiles),
      in_specs=[
        queries,
        cache,
        cache,
        pl.BlockSpec((None, rows, 1), of_limits),
      ],
      out_specs=queries,
      scratch_shapes=[
        pltpu.VMEM((some, tile, width), k.dtype),
        pltpu.VMEM((some, tile, width), k.dtype),
        pltpu.VMEM((2, height, tile), jnp.float32),
        pltpu.VMEM((2, height, tile), v.dtype),
        pltpu.VMEM((some, rows, width), jnp.float32),
        pltpu.VMEM((some, rows, _LANES), jnp.float32),
        pltpu.VMEM((some, rows, _LANES), jnp.float32),
        pltpu.VMEM((2, height, _LANES), jnp.float32),
      ],
    ),
    out_shape=dispatch.result(q.shape, q.dtype, operands),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",) * 3 + ("arbitrary",),
      vmem_limit_bytes=_VMEM,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * scores,
      transcendentals=scores // (2 * width),
      bytes_accessed=2 * programs * k[:batch].nbytes + 2 * q.nbytes,
    ),
    interpret=interpret,
    name="block_attention",
  )(*operands)
  out = out[:, :, :total].reshape(batch, groups, length, each, width)
  return jnp.moveaxis(out, 1, 2).reshape(batch, length, heads, width)


def _body(
  needed_ref, layer_ref, q_ref, k_ref, v_ref, limits_ref, out_ref,
  keys, values, scores, weights, total, peak, mass, shrink,
  *, scale, slots,
):  # fmt: skip
  """One tile of slots for some queries of one row of the batch.

  peak [G, R, lanes] is the highest score, the same in every lane; mass the sum
  of weights of the slots of a lane.
  """
  groups, rows, width = total.shape
  height = scores.shape[1]
  pieces = rows // height
  # of two pieces one is multiplied while the other is softened
  pair = 2 if groups * pieces % 2 == 0 else 1
  factor = np.float32(scale / np.log(2))
  tile = keys.shape[1]
  step = pl.program_id(3)

  @pl.when(step == 0)
  def _():
    total[...] = jnp.zeros_like(total)
    mass[...] = jnp.zeros_like(mass)
    peak[...] = jnp.full_like(peak, _HIDDEN)

  def piece(i):  # group, its first row
    first = jax.lax.rem(i, pieces) * height
    return jax.lax.div(i, pieces), pl.multiple_of(first, 16)

  def score(i, slot):
    g, first = piece(i)
    q = q_ref[g, pl.ds(first, height)]
    scores[slot] = _dot(q, keys[g], (((1,), (1,)), ((), ())))

  def soften(i, slot):
    g, first = piece(i)
    for here in range(0, height, 16):
      r = pl.ds(pl.multiple_of(first + here, 16), 16)
      part = slice(here, here + 16)
      limit = limits_ref[r] - step * tile
      seen = jax.lax.broadcasted_iota(jnp.int32, (16, tile), 1) < limit
      s = jnp.where(seen, scores[slot, part], _HIDDEN)
      before = peak[g, r]
      now = jnp.maximum(before, jnp.max(s, axis=1, keepdims=True))
      fall = jnp.exp2((before - now) * factor)
      p = jnp.exp2((s - _wide(now, tile)) * factor)
      parts = [p[:, c : c + _LANES] for c in range(0, tile, _LANES)]
      mass[g, r] = fall * mass[g, r] + functools.reduce(jnp.add, parts)
      weights[slot, part] = p.astype(weights.dtype)
      peak[g, r] = now
      shrink[slot, part] = fall

  def read(i, slot):
    g, first = piece(i)
    r = pl.ds(first, height)
    found = _dot(weights[slot], values[g], (((1,), (0,)), ((), ())))
    total[g, r] = _wide(shrink[slot], width) * total[g, r] + found

  @pl.when(step < needed_ref[pl.program_id(0), pl.program_id(2)])
  def _():
    for g in range(groups):
      keys[g] = _group(k_ref, g)
      x = _group(v_ref, g)
      if slots % tile:  # what lies behind the cache may be NaN
        place = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
        x = jnp.where(place < slots - step * tile, x, jnp.zeros_like(x))
      values[g] = x

    @pl.loop(0, groups * pieces // pair)
    def _(i):
      score(i * pair, 0)
      for slot in range(pair):
        if slot + 1 < pair:
          score(i * pair + 1, 1)
        soften(i * pair + slot, slot)
        read(i * pair + slot, slot)

  @pl.when(step == pl.num_programs(3) - 1)
  def _():
    for g in range(groups):
      whole = jnp.sum(mass[g], axis=1, keepdims=True)
      out_ref[g] = (total[g] / whole).astype(out_ref.dtype)


def _group(ref, g):
  """[1, S, G, K] -> [S, K] of a group.

  Two groups of bfloat16 share 32-bit words, which are read with a stride
  where the groups fill their tile of sublanes.
  """
  _, slots, groups, width = ref.shape
  packed = 4 // ref.dtype.itemsize
  words = groups // packed
  if groups % packed or groups == 1 or words & (words - 1):
    return ref[0, :, g]
  rows = pl.ds(g // packed, slots, stride=words)
  if packed == 1:
    return ref.reshape(slots * words, width)[rows]
  x = ref.bitcast(jnp.uint32).reshape(slots * words, width)[rows]
  x = x & np.uint32(0xFFFF0000) if g % 2 else x << 16
  return pltpu.bitcast(x, jnp.float32).astype(jnp.bfloat16)


def _wide(x, size):
  """[R, lanes], all lanes the same -> [R, size]."""
  if size <= x.shape[1]:
    return x[:, :size]
  return jnp.concatenate([x] * (size // x.shape[1]), axis=1)


def _dot(a, b, contract):
  exact = a.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    contract,
    precision=jax.lax.Precision.HIGHEST if exact else None,
    preferred_element_type=jnp.float32,
  )
