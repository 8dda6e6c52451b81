"""TPU bodies of reading and writing the fast weights.

To write, weights and features lie transposed on chip, [h, d] and [h, tokens]: then no
product needs a transposed left side, and the rate of a token is a row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from giantsteps.kernels_pallas import dispatch, packed, tuning
from giantsteps.kernels_pallas.fast_weight.reference import EPSILON, Weights

_BETWEEN = (((1,), (1,)), ((), ()))  # a b^T
_PLAIN = (((1,), (0,)), ((), ()))  # a b
_LANES = 128
_STRIP = 64  # rows of an elementwise pass, few enough for the registers
# Without spills on a v6e; other chips' sizes are in tuned/.
APPLY_BLOCKS = {"tile": 512, "rows": 256, "depth": 1024}
GRADIENT_BLOCKS = {"tile": 256, "rows": 512, "depth": 1024, "apart": 0}
_VMEM = 60 * 2**20  # bytes: what a v5p has, less than the others


def apply(
  weights: Weights,
  q: jax.Array,
  *,
  blocks: tuning.Blocks | None = None,
  interpret: Any = False,
) -> jax.Array:
  """`reference.apply` in one kernel; the weights are rounded on chip.

  Args:
    weights: W0 [N, h, d], W1 [N, d, h], W2 [N, h, d]; all of a head on chip.
    q: [N, C, d] bfloat16 or float32.
    blocks: "tile", tokens of one program, a multiple of 8; "rows", most
      hidden features of one product, and "depth", most of d, multiples of 128;
      None is as tuned.
    interpret: runs on a CPU, slowly; for tests.

  Returns:
    [N, C, d] in q.dtype.
  """
  n, length, d = q.shape
  call = f"apply {d}x{weights[0].shape[1]} {q.dtype}"
  blocks = blocks or tuning.blocks("fast_weight", call, APPLY_BLOCKS)
  tile, rows = blocks["tile"], blocks["rows"]
  q = _padded(_padded(q, 1, tile), 2, _LANES)
  w0, w1, w2 = (_padded(_padded(w, 1, _LANES), 2, _LANES) for w in weights)
  h, d_padded = w0.shape[1:]
  rows = _divisor(h, rows)
  token = pl.BlockSpec((None, tile, d_padded), lambda n, t: (n, t, 0))
  up = pl.BlockSpec((None, h, d_padded), lambda n, t: (n, 0, 0))
  down = pl.BlockSpec((None, d_padded, h), lambda n, t: (n, 0, 0))
  operands = (w0, w1, w2, q)
  out = pl.pallas_call(
    functools.partial(_apply_body, rows=rows, depth=blocks["depth"]),
    grid=(n, q.shape[1] // tile),
    in_specs=[up, down, up, token],
    out_specs=token,
    out_shape=dispatch.result(q.shape, q.dtype, operands),
    scratch_shapes=[
      pltpu.VMEM((3, h // rows, rows, d_padded), q.dtype),
      pltpu.VMEM((h // rows, 2, tile, rows), jnp.float32),
      pltpu.VMEM((tile, d_padded), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM
    ),
    cost_estimate=pl.CostEstimate(
      flops=6 * q.size * h,
      transcendentals=q.size // d_padded * h,
      bytes_accessed=sum(x.nbytes for x in operands) + q.nbytes,
    ),
    interpret=interpret,
    name="fast_weight_apply",
  )(*operands)
  return out[:, :length, :d]


def _apply_body(
  w0_ref, w1_ref, w2_ref, q_ref, out_ref,
  weights, features, total,
  *, rows, depth,
):  # fmt: skip
  """One block of tokens, the whole memory; W1 lies transposed, as [h, d]."""
  blocks, dtype = features.shape[0], q_ref.dtype

  @pl.when(pl.program_id(1) == 0)
  def _():
    for j in range(blocks):
      for i in range(0, rows, _LANES):
        r, to = pl.ds(j * rows + i, _LANES), pl.ds(i, _LANES)
        weights[0, j, to] = w0_ref[r].astype(dtype)
        weights[1, j, to] = w2_ref[r].astype(dtype)
        weights[2, j, to] = w1_ref[:, r].astype(dtype).T

  parts = _parts(q_ref.shape[1], depth)

  def project(j):  # g, u
    for i in range(2):
      for c in parts:
        s = _dot(q_ref[:, c], weights[i, j, :, c], _BETWEEN)
        features[j, i] = features[j, i] + s if c.start else s

  def read(j):
    x = jax.nn.silu(features[j, 0]) * features[j, 1]
    for c in parts:
      total[:, c] += _dot(x.astype(dtype), weights[2, j, :, c], _PLAIN)

  total[...] = jnp.zeros_like(total)
  _loop(blocks, project)
  _loop(blocks, read)
  out_ref[...] = total[...].astype(dtype)


def gradient(
  weights: Weights,
  k: jax.Array,
  v: jax.Array,
  learning_rates: Weights,
  *,
  blocks: tuning.Blocks | None = None,
  interpret: Any = False,
) -> Weights:
  """`reference.gradient` in one kernel: g, u and p never leave the chip.

  Sizes that are no multiple of a tile are padded with zeros, which write
  nothing; the model's sizes need none but in the tokens.

  Args:
    weights: W0 [N, h, d], W1 [N, d, h], W2 [N, h, d]; rounded to k.dtype on
      chip.
    k: [N, C, d] bfloat16 or float32.
    v: [N, C, d] in k.dtype.
    learning_rates: three [N, C, 1], for W0, W1, W2.
    blocks: "tile", tokens of one product, a multiple of 128: the width of the
      matrix unit, 256 from v6e on and 128 before; "rows", most hidden rows
      of one program, and "depth", most of d in one product, multiples of 128;
      "apart", 1: the elementwise part is a phase of its own, for wide d, where
      its registers beside those of a product do not suffice. None is as tuned.
    interpret: runs on a CPU, slowly; for tests.

  Returns:
    D0 [N, h, d], D1 [N, d, h], D2 [N, h, d] float32.
  """
  n, length, d = k.shape
  h = weights[0].shape[1]
  call = f"gradient {d}x{h} {k.dtype}"
  blocks = blocks or tuning.blocks("fast_weight", call, GRADIENT_BLOCKS)
  tile, rows = blocks["tile"], blocks["rows"]
  most = pl.cdiv(length, tile)
  tiles = pl.cdiv(most, pl.cdiv(most, 1024 // tile))
  rates = [
    _padded(x.astype(jnp.float32), 1, tile * tiles).reshape(n, -1, 1, tile)
    for x in learning_rates
  ]
  k, v = (
    _padded(_padded(x, 1, tile * tiles), 2, _LANES)
    for x in (k, v.astype(k.dtype))
  )
  w0, w1, w2 = (_padded(_padded(w, 1, _LANES), 2, _LANES) for w in weights)
  h_padded, d_padded = w0.shape[1:]
  rows = _divisor(h_padded, rows)
  token = pl.BlockSpec(
    (None, tile * tiles, d_padded), lambda n, i, t: (n, t, 0)
  )
  up = pl.BlockSpec((None, rows, d_padded), lambda n, i, t: (n, i, 0))
  down = pl.BlockSpec((None, d_padded, rows), lambda n, i, t: (n, 0, i))
  rate = pl.BlockSpec((None, tiles, 1, tile), lambda n, i, t: (n, t, 0, 0))
  operands = (w0, w1, w2, k, v, *rates)
  products = 6 * n * k.shape[1] * h_padded * d_padded
  d0, d1, d2 = pl.pallas_call(
    functools.partial(
      _gradient_body,
      tile=tile,
      depth=blocks["depth"],
      strip=None if blocks["apart"] else _divisor(rows, 256),
    ),
    grid=(n, h_padded // rows, k.shape[1] // (tile * tiles)),
    in_specs=[up, down, up, token, token, rate, rate, rate],
    out_specs=[up, down, up],
    out_shape=[
      dispatch.result(w.shape, jnp.float32, operands) for w in (w0, w1, w2)
    ],
    scratch_shapes=[
      pltpu.VMEM((3, rows, d_padded), k.dtype),
      pltpu.VMEM((rows, d_padded), jnp.float32),
      pltpu.VMEM((tiles, 3 if blocks["apart"] else 4, rows, tile), jnp.float32),
      *(
        [packed.scratch((tiles, 3, rows, tile), k.dtype)]
        if blocks["apart"]
        else []
      ),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=_VMEM,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * products,
      transcendentals=products // 6 // d_padded,
      bytes_accessed=sum(x.nbytes for x in operands) + 3 * w0.size * 4,
    ),
    interpret=interpret,
    name="fast_weight_gradient",
  )(*operands)
  return d0[:, :h, :d], d1[:, :d, :h], d2[:, :h, :d]


def _gradient_body(
  w0_ref, w1_ref, w2_ref, k_ref, v_ref, rate0_ref, rate1_ref, rate2_ref,
  d0_ref, d1_ref, d2_ref,
  weights, d1_transposed, features, *weighed,
  tile, depth, strip,
):  # fmt: skip
  """One block of hidden rows and one of tokens; tokens come innermost.

  Each loop is a phase with few values alive, so that the compiler keeps them
  in registers: one straight body overlaps more and spills hundreds.
  """
  rows, dtype = w0_ref.shape[0], k_ref.dtype
  tiles = k_ref.shape[0] // tile

  @pl.when(pl.program_id(2) == 0)
  def _():
    for r in (pl.ds(i, _LANES) for i in range(0, rows, _LANES)):
      weights[0, r] = w0_ref[r].astype(dtype)
      weights[1, r] = w2_ref[r].astype(dtype)
      weights[2, r] = w1_ref[:, r].astype(dtype).T
      for out in (d0_ref, d2_ref, d1_transposed):
        out[r] = jnp.zeros((_LANES, out.shape[1]), out.dtype)

  def tokens(i):
    return pl.ds(pl.multiple_of(i * tile, tile), tile)

  parts = _parts(k_ref.shape[1], depth)

  def project(i):  # g, u, p
    for j, x_ref in enumerate((k_ref, k_ref, v_ref)):
      for c in parts:
        s = _dot(weights[j, :, c], x_ref[tokens(i), c], _BETWEEN)
        features[i, j] = features[i, j] + s if c.start else s

  def add(out_ref, r, x, x_ref, i):  # x times tokens
    for c in parts:
      out_ref[r, c] += _dot(x, x_ref[tokens(i), c], _PLAIN)

  def write_down(i):  # D1; a and silu'(g) for the others
    def part(j):
      r = pl.ds(pl.multiple_of(j * strip, strip), strip)
      g = features[i, 0, r]
      s = jax.nn.sigmoid(g)
      a = g * s
      features[i, 0, r] = a
      features[i, 3, r] = s * (1 + g - a)
      x = (rate1_ref[i] * (a * features[i, 1, r])).astype(dtype)
      add(d1_transposed, r, x, v_ref, i)

    _loop(rows // strip, part)

  def write_up(i):  # D0, D2
    a, u, p, slope = (features[i, j] for j in range(4))
    x = (rate2_ref[i] * (p * a)).astype(dtype)
    add(d2_ref, slice(None), x, k_ref, i)
    x = (rate0_ref[i] * (p * (u * slope))).astype(dtype)
    add(d0_ref, slice(None), x, k_ref, i)

  def weigh(i):  # what meets the tokens in D0, D1, D2
    def part(j):
      r = pl.ds(pl.multiple_of(j * _STRIP, _STRIP), _STRIP)
      g, u, p = (features[i, j, r] for j in range(3))
      s = 0.5 + 0.5 * jnp.tanh(0.5 * g)  # fewer steps than a division
      a = g * s
      slope = s * (1 + g - a)
      packed.store(
        weighed[0], (i, 0, r, slice(None)), rate0_ref[i] * (p * (u * slope))
      )
      packed.store(weighed[0], (i, 1, r, slice(None)), rate1_ref[i] * (a * u))
      packed.store(weighed[0], (i, 2, r, slice(None)), rate2_ref[i] * (p * a))

    _loop(rows // _STRIP, part)

  def write(i):
    written = ((d0_ref, k_ref), (d1_transposed, v_ref), (d2_ref, k_ref))
    for j, (out, x_ref) in enumerate(written):
      for c in parts:
        x = packed.load(weighed[0], (i, j, slice(0, rows), slice(None)))
        out[:, c] += _dot(x, x_ref[tokens(i), c], _PLAIN)

  together, apart = (write_down, write_up), (weigh, write)
  for phase in (project, *(together if strip else apart)):
    _loop(tiles, phase)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    d1_ref[...] = d1_transposed[...].T


def update(
  total: Weights,
  step: Weights,
  norms: Weights | None = None,
  momentum: tuple[jax.Array, Weights] | None = None,
  *,
  keep_total: bool = False,
  interpret: Any = False,
) -> tuple[Weights, Weights | None, Weights]:
  """`reference.update`: every array is read once and written once.

  Args:
    total: Z, three [N, rows, columns] float32.
    step: D, likewise.
    norms: n, three [N, rows, 1]; None leaves the lengths of the rows.
    momentum: mu [N, 1, 1] and the buffers M.
    keep_total: returns Z beside W.
    interpret: runs on a CPU, slowly; for tests.

  Returns:
    W, Z (None unless `keep_total`) and M.
  """
  lengths = norms if norms is not None else (None,) * 3
  mu, buffers = momentum if momentum is not None else (None, (None,) * 3)
  parts = [
    _update_one(*parts, mu, keep_total, interpret)
    for parts in zip(total, step, lengths, buffers, strict=True)
  ]
  weights, totals, buffers = zip(*parts, strict=True)
  return weights, totals if keep_total else None, buffers


def _update_one(total, step, norm, buffer, mu, keep_total, interpret):
  """One matrix: W, Z, M; a block is some rows, whole."""
  n, rows, columns = total.shape
  fits = 2**19 // columns // 8 * 8  # rows whose blocks take 2 MiB each
  block = max([r for r in range(8, fits + 1, 8) if rows % r == 0] or [rows])
  matrix = pl.BlockSpec((None, block, columns), lambda n, i: (n, i, 0))
  row = pl.BlockSpec((None, block, 1), lambda n, i: (n, i, 0))
  scalar = pl.BlockSpec((None, 1, 1), lambda n, i: (n, 0, 0))
  given = {"z": (total, matrix), "d": (step, matrix)}
  if norm is not None:
    given["n"] = (norm, row)
  if buffer is not None:
    given |= {"m": (buffer, matrix), "mu": (mu, scalar)}
  wanted = ["w"]
  if norm is not None and keep_total:
    wanted.append("z")
  if buffer is not None:
    wanted.append("m")

  strip = max(8, 2**14 // columns // 8 * 8)  # rows held in registers
  strip = strip if block % strip == 0 else block

  def body(*refs):
    read = dict(zip(given, refs[: len(given)], strict=True))
    write = dict(zip(wanted, refs[len(given) :], strict=True))

    def part(i):
      r = pl.ds(pl.multiple_of(i * strip, strip), strip)
      m = read["d"][r]
      if buffer is not None:
        m += read["mu"][...] * read["m"][r]
        write["m"][r] = m
      w = z = read["z"][r] + m
      if norm is not None:
        size = jnp.sqrt(jnp.sum(z * z, axis=1, keepdims=True))
        w = z * (read["n"][r] / (size + EPSILON))
        if keep_total:
          write["z"][r] = z
      write["w"][r] = w

    _loop(block // strip, part)

  operands = tuple(x for x, _ in given.values())
  out = pl.pallas_call(
    body,
    grid=(n, rows // block),
    in_specs=[spec for _, spec in given.values()],
    out_specs=[matrix] * len(wanted),
    out_shape=[dispatch.result(total.shape, jnp.float32, operands)]
    * len(wanted),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VMEM
    ),
    cost_estimate=pl.CostEstimate(
      flops=8 * total.size,
      transcendentals=n * rows,
      bytes_accessed=(len(operands) + len(wanted)) * total.nbytes,
    ),
    interpret=interpret,
    name="fast_weight_update",
  )(*operands)
  found = dict(zip(wanted, out, strict=True))
  return found["w"], found.get("z", found["w"]), found.get("m", step)


def _loop(trips, body):
  """A loop that stays one: what it holds is scheduled alone."""
  jax.lax.fori_loop(0, trips, lambda i, _: (body(i), None)[1], None)


def _parts(d: int, depth: int) -> list[slice]:
  """Of d: terms of a sum, or columns of a result, that registers can hold."""
  return [slice(c, min(c + depth, d)) for c in range(0, d, depth)]


def _dot(a, b, contract):
  highest = a.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    contract,
    precision=jax.lax.Precision.HIGHEST if highest else None,
    preferred_element_type=jnp.float32,
  )


def _padded(x: jax.Array, axis: int, multiple: int) -> jax.Array:
  """Zeros up to a multiple along an axis."""
  missing = -x.shape[axis] % multiple
  if not missing:
    return x
  widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, widths)


def _divisor(size: int, most: int) -> int:
  """The largest multiple of 128 that divides `size` and is <= `most`."""
  return max(
    r for r in range(_LANES, min(size, most) + 1, _LANES) if size % r == 0
  )
