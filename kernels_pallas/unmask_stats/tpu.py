"""TPU body of the statistics of a head's logits.

Every lane keeps statistics of its own columns, every 128th, so that nothing
moves across lanes before the end. A tile is multiplied while the statistics of
the one before are taken: the matrix units and the vector units work together.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from giantsteps.kernels_pallas import dispatch, tuning
from giantsteps.kernels_pallas.unmask_stats import noise
from giantsteps.kernels_pallas.unmask_stats.reference import Partial, merge

_LANES = 128
_VMEM = 56 * 2**20  # bytes: a TPU v5p has 64 MiB
# Most positions of a program, columns of a tile, columns of one product and
# terms of a sum that are added in registers.
BLOCKS = {"rows": 1024, "columns": 512, "width": 256, "depth": 4096}
_LOWEST = -1e30  # stands for -inf where differences are taken
_SIZES = (1024, 512, 256, 128)  # columns of a tile


class _Columns(NamedTuple):
  """Which columns a program takes: tiles of `size`, `each` per part."""

  size: int
  each: int
  parts: int
  vocabulary: int

  @property
  def ragged(self) -> bool:
    return self.size * self.each * self.parts != self.vocabulary


def fits(hidden: jax.Array, head: jax.Array) -> bool:
  """Whether the kernel computes this call: bfloat16 and float32, and 32 rows
  with a tile of 128 columns fit on chip."""
  names = {hidden.dtype.name, head.dtype.name}
  return (
    names <= {"bfloat16", "float32"}
    and head.size > 0
    and hidden.size > 0
    and max(head.shape) < 2**24  # tokens pass through float32
    and _bytes(32, 128, hidden, head) <= _VMEM
  )


def partial(
  hidden: jax.Array,
  head: jax.Array,
  bias: jax.Array | None,
  temperature: jax.Array | None,
  seeds: jax.Array | None,
  offset: jax.Array | None = None,
  *,
  transposed: bool = False,
  blocks: tuning.Blocks | None = None,
  interpret: Any = False,
) -> Partial:
  """`reference.partial` in one kernel.

  Args:
    hidden: [T, D] bfloat16 or float32; float32 products are exact, in several
      passes of the matrix units.
    head: [D, V], or [V, D] if transposed; another dtype than that of hidden is
      converted on chip.
    bias, temperature, seeds, offset: as of `reference.partial`.
    transposed: the head is [V, D].
    blocks: see `BLOCKS`; None is as tuned.
    interpret: runs on a CPU, slowly; for tests.
  """
  total, depth = hidden.shape
  vocabulary = head.shape[0 if transposed else 1]
  if not transposed and vocabulary % 128 and depth % 128 == 0:
    # The side that is whole tiles is the one XLA lays along the lanes of an
    # argument: so turned no copy of the head is made.
    head, transposed = head.T, True
  call = f"{depth}x{vocabulary} {hidden.dtype}"
  sizes = blocks or tuning.blocks("unmask_stats", call, BLOCKS)
  rows, width = _fitting(hidden, head, sizes)
  programs = pl.cdiv(total, rows)
  padding = ((0, programs * rows - total), (0, 0))
  tiles = pl.cdiv(vocabulary, width)
  # A chip of two cores splits the vocabulary where the rows are one program.
  parts = 2 if programs == 1 and tiles > 1 else 1
  columns = _Columns(width, pl.cdiv(tiles, parts), parts, vocabulary)

  def now(p, j):  # the tile that is multiplied
    return jnp.minimum(
      p * columns.each + jnp.minimum(j, columns.each - 1), tiles - 1
    )

  def before(p, j):  # the tile whose statistics are taken
    return now(p, jnp.maximum(j - 1, 0))

  def row(size):
    return pl.BlockSpec((rows, size), lambda i, p, j: (i, 0))

  block = (width, depth) if transposed else (depth, width)
  place = (
    (lambda i, p, j: (now(p, j), 0))
    if transposed
    else (lambda i, p, j: (0, now(p, j)))
  )
  start = jnp.zeros((), jnp.int32) if offset is None else offset
  given: dict[str, tuple[jax.Array, pl.BlockSpec]] = {
    "offset": (
      start.astype(jnp.int32).reshape(1),
      pl.BlockSpec(memory_space=pltpu.SMEM),
    ),
    "hidden": (jnp.pad(hidden, padding), row(depth)),
    "head": (head, pl.BlockSpec(block, place)),
  }
  if bias is not None:
    given["bias"] = (
      bias.astype(jnp.float32)[None],
      pl.BlockSpec((1, width), lambda i, p, j: (0, before(p, j))),
    )
  if temperature is not None:
    assert seeds is not None
    warmth = temperature.astype(jnp.float32)[:, None]
    given["temperature"] = (jnp.pad(warmth, padding), row(1))
    given["seeds"] = (jnp.pad(seeds, padding), row(2))
  operands = tuple(x for x, _ in given.values())
  shape = parts, programs * rows, 1
  whole = lambda dtype: dispatch.result(shape, dtype, operands)
  kinds = [
    jnp.int32 if "token" in name else jnp.float32 for name in Partial._fields
  ]
  found = pl.pallas_call(
    functools.partial(
      _body,
      names=tuple(given),
      columns=columns,
      width=min(sizes["width"], width),
      depth=sizes["depth"],
      transposed=transposed,
    ),
    grid=(programs, parts, columns.each + 1),
    in_specs=[spec for _, spec in given.values()],
    out_specs=[pl.BlockSpec((None, rows, 1), lambda i, p, j: (p, i, 0))] * 8,
    out_shape=[whole(kind) for kind in kinds],
    scratch_shapes=[
      pltpu.VMEM((2, rows, width), jnp.float32),
      *[pltpu.VMEM((rows, _LANES), kind) for kind in kinds],
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=_VMEM + 4 * 2**20,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * total * head.size,
      transcendentals=total * vocabulary * (1 if temperature is None else 3),
      bytes_accessed=programs * head.nbytes + hidden.nbytes,
    ),
    interpret=interpret,
    name="unmask_stats",
  )(*operands)
  found = Partial(*(x[:, :total, 0] for x in found))
  split = [jax.tree.map(lambda x, p=p: x[p], found) for p in range(parts)]
  return functools.reduce(merge, split)


def _fitting(hidden, head, sizes) -> tuple[int, int]:
  """(rows, columns of a tile): as many as asked for and as fit on chip."""
  vocabulary = head.size // hidden.shape[1]
  useful = max(_LANES, 1 << (vocabulary - 1).bit_length())
  for most in _SIZES:
    width = min(most, sizes["columns"], useful)
    rows = _rows(hidden.shape[0], sizes["rows"])
    while rows > 32 and _bytes(rows, width, hidden, head) > _VMEM:
      rows = _rows(hidden.shape[0], rows // 2)
    fewer = rows < _rows(hidden.shape[0], 256)
    if not fewer and _bytes(rows, width, hidden, head) <= _VMEM:
      return rows, width
  return 32, _LANES


def _rows(total: int, most: int) -> int:
  """Rows of a program: those of a packed register, or blocks of as many as
  `_chunks` takes."""
  programs = -(-total // most)
  each = -(-total // programs)
  blocks = -(-each // 256)
  unit = 16 if each <= 16 else 32
  return blocks * (-(-each // blocks // unit) * unit)


def _bytes(rows: int, width: int, hidden: jax.Array, head: jax.Array) -> int:
  """On chip: two buffers of the operands, two of the logits, the statistics."""
  depth = -(-hidden.shape[1] // _LANES) * _LANES
  operands = rows * hidden.dtype.itemsize + width * head.dtype.itemsize
  converted = 0 if head.dtype == hidden.dtype else 4 * depth * 256
  columns = 12 + 16  # statistics and results, of one lane tile each
  return (
    2 * depth * operands
    + converted
    + 8 * rows * width
    + 4 * rows * _LANES * columns
  )


def _body(*refs, names, columns, width, depth, transposed):
  """One tile of the vocabulary for one block of positions."""
  given = dict(zip(names, refs, strict=False))
  out = Partial(*refs[len(names) : len(names) + 8])
  logits, *state = refs[len(names) + 8 :]
  state = Partial(*state)
  part, step = pl.program_id(1), pl.program_id(2)
  rows = logits.shape[1]
  slot = jax.lax.rem(step, 2)
  previous = part * columns.each + step - 1  # the tile of the statistics

  @pl.when(step == 0)
  def _():
    logits[1] = jnp.full(logits.shape[1:], -jnp.inf, jnp.float32)
    for name, ref in zip(Partial._fields, state, strict=True):
      lowest = name in ("first", "runner_up", "best", "logit")
      ref[...] = jnp.full(ref.shape, -jnp.inf if lowest else 0, ref.dtype)

  # Of every turn: one product, and the statistics of some rows.
  # Before the first tile there is none: whatever its bias says, of no column.
  left = columns.vocabulary - previous * columns.size
  left = jnp.where(step == 0, 0, left) if columns.ragged else None
  blocks = -(-rows // 256)
  high = rows // blocks
  count = math.gcd(columns.size // width, high // 8)
  wide, some = columns.size // count, high // count

  @pl.loop(0, blocks * count)
  def _(i):
    r = pl.ds(pl.multiple_of(jax.lax.rem(i, blocks) * high, 8), high)
    c = pl.ds(pl.multiple_of(jax.lax.div(i, blocks) * wide, _LANES), wide)
    logits[slot, r, c] = _product(
      given["hidden"], given["head"], r, c, depth, transposed
    )
    for k in range(0, some, 8):
      strip = pl.ds(pl.multiple_of(i * some + k, 8), 8)
      _add(given, state, logits.at[1 - slot], strip, previous, left)

  @pl.when(step == pl.num_programs(2) - 1)
  def _():
    @pl.loop(0, rows // 8)
    def _(i):
      strip = pl.ds(pl.multiple_of(i * 8, 8), 8)
      for ref, x in zip(out, _gather(state, strip), strict=True):
        ref[strip] = x
      for ref in (out.first_token, out.token):
        ref[strip] += given["offset"][0]


def _product(hidden, head, r, c, depth, transposed):
  """Logits [rows, columns] of the tile."""
  exact = hidden.dtype == jnp.float32
  out = None
  for start in range(0, hidden.shape[1], depth):
    k = slice(start, start + depth)
    these = head[c, k] if transposed else head[k, c]
    one = jax.lax.dot_general(
      hidden[r, k],
      these.astype(hidden.dtype),
      (((1,), (1 if transposed else 0,)), ((), ())),
      precision=jax.lax.Precision.HIGHEST if exact else None,
      preferred_element_type=jnp.float32,
    )
    out = one if out is None else out + one
  return out


def _add(given, state, logits, r, tile, left):
  """The statistics of eight rows take in the columns of a tile, by lane.

  Columns from `left` on do not exist; None: all do.
  """
  first, first_token, runner_up, total, moment, best, token, logit = (
    ref[r] for ref in state
  )
  lane = jax.lax.broadcasted_iota(jnp.int32, (8, _LANES), 1)
  if "seeds" in given:
    seeds = given["seeds"][r]
    a, b = (jnp.broadcast_to(seeds[:, i : i + 1], lane.shape) for i in range(2))
    temperature = jnp.broadcast_to(given["temperature"][r], lane.shape)
  before = jnp.maximum(first, _LOWEST)
  seen = []
  width = logits.shape[1] // _LANES
  for k in range(width):
    c = slice(k * _LANES, (k + 1) * _LANES)
    block = tile * width + k  # lane 0 is token 128 block
    x = logits[r, c]
    if "bias" in given:
      x += given["bias"][:, c]
    if left is not None:
      x = jnp.where(lane < left - k * _LANES, x, -jnp.inf)
    ahead = x > first
    runner_up = jnp.maximum(runner_up, jnp.minimum(x, first))
    first = jnp.maximum(first, x)
    first_token = jnp.where(ahead, block, first_token)
    if "seeds" in given:
      of = given["offset"][0] + block * _LANES + lane
      noised = x + temperature * noise.of_bits(noise.hash_bits(a, b, of))
      beats = noised > best
      best = jnp.maximum(best, noised)
      token = jnp.where(beats, block, token)
      logit = jnp.where(beats, x, logit)
    seen.append(x)
  peak = jnp.maximum(first, _LOWEST)
  fall = before - peak
  scale = jnp.exp(fall)
  moment = scale * (moment + fall * total)
  total = scale * total
  for x in seen:
    shifted = jnp.maximum(x - peak, _LOWEST)  # or 0 * -inf for banned tokens
    mass = jnp.exp(shifted)
    total += mass
    moment += mass * shifted
  if "seeds" not in given:
    best, token, logit = first, first_token, first
  new = Partial(
    first, first_token, runner_up, total, moment, best, token, logit
  )
  for ref, x in zip(state, new, strict=True):
    ref[r] = x


def _gather(state, strip) -> Partial:
  """Of eight rows, the statistics of all lanes; tokens from the tile's start.

  The lowest token of equals; as float32, which has room for them.
  """
  x = Partial(*(ref[strip] for ref in state))
  lane = jax.lax.broadcasted_iota(jnp.int32, x.first.shape, 1)
  most = lambda y: jnp.max(y, axis=1, keepdims=True)
  add = lambda y: jnp.sum(y, axis=1, keepdims=True)

  def lowest(value, block):
    """(highest value, its token, where it is)"""
    top = most(value)
    ids = (block * _LANES + lane).astype(jnp.float32)
    there = jnp.where(value == top, ids, jnp.float32(2**25))
    found = jnp.min(there, axis=1, keepdims=True)
    return top, found.astype(jnp.int32), ids == found

  first, first_token, here = lowest(x.first, x.first_token)
  fall = jnp.maximum(x.first, _LOWEST) - jnp.maximum(first, _LOWEST)
  scale = jnp.exp(fall)
  best, token, there = lowest(x.best, x.token)
  return Partial(
    first=first,
    first_token=first_token,
    runner_up=most(jnp.where(here, x.runner_up, x.first)),
    total=add(scale * x.total),
    moment=add(scale * (x.moment + fall * x.total)),
    best=best,
    token=token,
    logit=most(jnp.where(there, x.logit, -jnp.inf)),
  )
