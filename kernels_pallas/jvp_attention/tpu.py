"""TPU bodies of bidirectional attention and of its tangent.

Each is one pass over the keys with an online softmax; scores stay on chip. The
tangent (arXiv:2410.11081, appendix), with scores S, weights P and output O:

    dO = (P dS) V - rowsum(P dS) O + P dV

so the sums over keys are those of (P dS) V + P dV, P dS and P.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from giantsteps.kernels_pallas import dispatch, tuning

_LANES = 128
_WIDEST = 256  # channels of a head
# Queries and keys of a program.
BLOCKS = {"queries": 256, "keys": 512}
_HIDDEN = -0.7 * float(np.finfo(np.float32).max)  # score of a key not there


def fits(q: jax.Array, k: jax.Array) -> bool:
  """Whether the kernels compute this call: bfloat16 or float32, heads of up to
  256 channels."""
  return (
    q.dtype == k.dtype
    and q.dtype.name in ("bfloat16", "float32")
    and q.shape[3] <= _WIDEST
    and q.size > 0
    and k.size > 0
  )


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  blocks: tuning.Blocks | None = None,
  interpret: Any = False,
) -> jax.Array:
  """`reference.attention` in one kernel.

  Args:
    q, k, v: as of `jvp_attention`, all bfloat16 or all float32.
    blocks: see `BLOCKS`; None is as tuned. Keys in multiples of 128.
    interpret: runs on a CPU, slowly; for tests.

  Returns:
    [B, T, H, K] in q.dtype.
  """
  return _call(
    _attention, (q,), (k, v), 4, blocks, interpret, "attention", sums=2
  )


def tangent(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  out: jax.Array,
  dq: jax.Array,
  dk: jax.Array,
  dv: jax.Array,
  *,
  blocks: tuning.Blocks | None = None,
  interpret: Any = False,
) -> jax.Array:
  """The derivative of `attention` along dq, dk and dv, [B, T, H, K].

  Args:
    q, k, v, blocks, interpret: as of `attention`.
    out: what `attention` returns for them.
    dq, dk, dv: in the dtype of q.
  """
  return _call(
    _tangent,
    (q, dq, out),
    (k, v, dk, dv),
    10,
    blocks,
    interpret,
    "attention_tangent",
    sums=3,
  )


def _call(body, of_queries, of_keys, flops, blocks, interpret, name, *, sums):
  """One kernel over (rows and heads, queries, keys).

  Args:
    body: takes refs of the arrays, the result and scratch.
    of_queries, of_keys: arrays [B, T, H, K] and [B, S, H, K].
    flops: per query, key and channel.
    blocks, interpret: as of `attention`.
    name: of the kernel.
    sums: scratch arrays with one number per query, the highest score first.
  """
  q, keys = of_queries[0], of_keys[0].shape[1]
  rows, length, heads, width = q.shape
  sizes = blocks or tuning.blocks(
    "jvp_attention", f"{name} {width} {q.dtype}", BLOCKS
  )
  size = min(sizes["queries"], -(-length // 16) * 16)
  tile = min(sizes["keys"], -(-keys // _LANES) * _LANES)
  merge = lambda block: lambda x: _merged(x, block)
  operands = [
    *map(merge(size), of_queries),
    *map(merge(tile), of_keys),
  ]
  padded, tiles = operands[0].shape[1], operands[-1].shape[1] // tile
  queries = pl.BlockSpec((None, size, width), lambda n, i, j: (n, i, 0))
  cache = pl.BlockSpec((None, tile, width), lambda n, i, j: (n, j, 0))
  scores = rows * heads * padded * keys
  each = rows * heads * width * q.dtype.itemsize
  out = pl.pallas_call(
    functools.partial(body, scale=width**-0.5, keys=keys),
    grid=(rows * heads, padded // size, tiles),
    in_specs=[queries] * len(of_queries) + [cache] * len(of_keys),
    out_specs=queries,
    out_shape=dispatch.result((rows * heads, padded, width), q.dtype, operands),
    scratch_shapes=[
      pltpu.VMEM((size, width), jnp.float32),
      *[pltpu.VMEM((size, _LANES), jnp.float32)] * sums,
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    ),
    cost_estimate=pl.CostEstimate(
      flops=flops * scores * width,
      transcendentals=scores,
      bytes_accessed=each
      * (padded * (len(of_queries) + 1) + padded // size * keys * len(of_keys)),
    ),
    interpret=interpret,
    name=name,
  )(*operands)
  out = out[:, :length].reshape(rows, heads, length, width)
  return jnp.moveaxis(out, 1, 2)


def _merged(x: jax.Array, block: int) -> jax.Array:
  """[B, T, H, K] -> [B H, T', K], zeros up to a multiple of `block`."""
  rows, length, heads, width = x.shape
  x = jnp.moveaxis(x, 1, 2).reshape(rows * heads, length, width)
  return jnp.pad(x, ((0, 0), (0, -length % block), (0, 0)))


def _attention(q_ref, k_ref, v_ref, out_ref, total, peak, mass, *, scale, keys):
  """One tile of keys for some queries of a head."""
  _start(total, peak, mass)
  s = _scores(q_ref[...], k_ref[...], scale, keys)
  p, fall = _weights(s, peak)
  mass[...] = fall * mass[...] + jnp.sum(p, 1, keepdims=True)
  found = _dot(p.astype(v_ref.dtype), v_ref[...])
  total[...] = fall[:, :1] * total[...] + found

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    out_ref[...] = (total[...] / mass[:, :1]).astype(out_ref.dtype)


def _tangent(
  q_ref, dq_ref, o_ref, k_ref, v_ref, dk_ref, dv_ref, out_ref,
  total, peak, mass, moved, *, scale, keys,
):  # fmt: skip
  """One tile of keys for some queries of a head; `moved` sums P dS."""
  _start(total, peak, mass, moved)
  q, k = q_ref[...], k_ref[...]
  s = _scores(q, k, scale, keys)
  ds = scale * (_dot_t(dq_ref[...], k) + _dot_t(q, dk_ref[...]))
  p, fall = _weights(s, peak)
  pds = p * ds
  mass[...] = fall * mass[...] + jnp.sum(p, 1, keepdims=True)
  moved[...] = fall * moved[...] + jnp.sum(pds, 1, keepdims=True)
  found = _dot(pds.astype(v_ref.dtype), v_ref[...])
  found += _dot(p.astype(v_ref.dtype), dv_ref[...])
  total[...] = fall[:, :1] * total[...] + found

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    less = moved[:, :1] * o_ref[...].astype(jnp.float32)
    out_ref[...] = ((total[...] - less) / mass[:, :1]).astype(out_ref.dtype)


def _start(total, peak, *sums):
  @pl.when(pl.program_id(2) == 0)
  def _():
    peak[...] = jnp.full_like(peak, _HIDDEN)
    for x in (total, *sums):
      x[...] = jnp.zeros_like(x)


def _scores(q, k, scale, keys):
  """[R, S] float32; keys of the padding are hidden."""
  s = scale * _dot_t(q, k)
  if keys % s.shape[1] == 0:
    return s
  place = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
  return jnp.where(place < keys - pl.program_id(2) * s.shape[1], s, _HIDDEN)


def _weights(s, peak):
  """exp(s - peak) after `peak` [R, lanes] rose, and how far all before fall."""
  before = peak[...]
  now = jnp.maximum(before, jnp.max(s, 1, keepdims=True))
  peak[...] = now
  return jnp.exp(s - now[:, :1]), jnp.exp(before - now)


def _dot_t(a, b):
  return _product(a, b, (((1,), (1,)), ((), ())))


def _dot(a, b):
  return _product(a, b, (((1,), (0,)), ((), ())))


def _product(a, b, contract):
  exact = a.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    contract,
    precision=jax.lax.Precision.HIGHEST if exact else None,
    preferred_element_type=jnp.float32,
  )
