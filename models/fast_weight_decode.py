"""The fast weights of LaCT token by token: decoding equals the causal scan.

"Test-Time Training Done Right" (arXiv:2505.23884). A chunk is written when it
is full and a further token arrives, which is when `fast_weight_scan` writes
it: its last 1..C tokens wait. Differs from the authors' code, whose cache drops
the state of the fast weights.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas import precision
from giantsteps.kernels_pallas.fast_weight import Weights
from giantsteps.models import fast_weight_update as update
from giantsteps.models.fast_weight_update import Rule, State, Step, Tokens
from giantsteps.models.fast_weights import fast_weight_scan


class DecodeState(NamedTuple):
  """Everything that the next token needs, of a size that does not grow.

  Attributes:
    fast: the fast weights; buffers that a decoder does not use stay as they
      are.
    norms: row lengths of the initial weights, [N, h, 1], [N, d, 1], [N, h, 1].
    waiting: tokens that are not written yet, leaves [N, C, ...]; places from
      `count` on mean nothing.
    count: [N] int32, 0..C of them per row.
  """

  fast: State
  norms: Weights
  waiting: Tokens
  count: jax.Array


def decode_state(
  weights: Weights,
  chunk_size: int,
  *,
  rows: int | None = None,
  momentum: bool = True,
  prenorm: bool = True,
  dtype: jax.typing.DTypeLike | None = None,
) -> DecodeState:
  """The state before the first token.

  Args:
    weights: initial W0 [N, h, d], W1 [N, d, h], W2 [N, h, d], or without N.
    chunk_size: tokens C of one write.
    rows: N, for weights without it.
    momentum: False saves its buffers, for decoding without momentum.
    prenorm: False saves the sums of all steps, likewise.
    dtype: of the waiting k and v, at least theirs; None is that of the state.

  Raises:
    ValueError: if the rows are unknown or chunk_size is below 1.
  """
  if chunk_size < 1:
    raise ValueError(f"chunk_size={chunk_size}: must be 1 or more")
  shape = jnp.shape(weights[0])
  if len(shape) == 2 and rows is None:
    raise ValueError(f"weights {shape} have no rows: want [N, h, d], or rows=N")
  rows = shape[0] if len(shape) == 3 else rows
  wide = precision.wide(*weights)
  w0, w1, w2 = (
    jnp.broadcast_to(w.astype(wide), (rows, *w.shape[-2:])) for w in weights
  )
  zeros = lambda size, kind: jnp.zeros((rows, chunk_size, size), kind)
  k, v = (zeros(shape[-1], dtype or wide) for _ in "kv")
  rates = zeros(1, wide), zeros(1, wide), zeros(1, wide)
  return DecodeState(
    fast=update.start((w0, w1, w2), prenorm, momentum),
    norms=update.lengths((w0, w1, w2)),
    waiting=Tokens(k, v, rates, zeros(1, wide) if momentum else None),
    count=jnp.zeros(rows, jnp.int32),
  )


def decode_step(
  state: DecodeState,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  rates: Weights,
  momentum: jax.Array | None = None,
  muon: bool = True,
  prenorm: bool = False,
  *,
  weight_norm: bool = True,
  newton_schulz: str = "scheduled",
  newton_schulz_steps: int = 5,
  ns_dtype: str | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, DecodeState]:
  """Reads the next tokens' queries and lets their k, v wait to be written.

  Outputs are those of `fast_weight_scan` with order "causal" at the same
  positions. Rows may be at different positions; each costs 6 d h FLOPs per
  token, and one write of all rows when any row's chunk is due.

  Args:
    state: from `decode_state`, `prefill` or the last step.
    q, k, v: [N, T, d], T tokens in turn, or [N, d] for one.
    rates: three [N, T, 1] or [N, 1], for W0, W1, W2.
    momentum: [N, T, 1] or [N, 1] in (0, 1), in every step or in none.
    muon, prenorm, weight_norm, newton_schulz, newton_schulz_steps, ns_dtype,
      implementation: as in `fast_weight_scan`, the same in every step.

  Returns:
    Outputs like q, and the state, of the same shapes.

  Raises:
    ValueError: if shapes do not fit, or the state lacks what is asked for.
  """
  if q.ndim == 2:
    one = lambda x: x[:, None]
    q, k, v, rates, momentum = jax.tree.map(one, (q, k, v, rates, momentum))
    single = True
  else:
    single = False
  _check(state, q, k, v, rates, momentum, prenorm)
  rule = Rule(
    muon=muon,
    prenorm=prenorm,
    weight_norm=weight_norm,
    kind=newton_schulz,
    steps=newton_schulz_steps,
    ns_dtype=ns_dtype,
    implementation=implementation,
  )

  def token(state, x):
    q, tokens = jax.tree.map(lambda y: y[:, None], x)
    return _next(state, q, tokens, rule)

  eta0, eta1, eta2 = rates
  tokens = Tokens(k, v, (eta0, eta1, eta2), momentum)
  turned = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, tokens))
  if q.shape[1] == 1:  # no loop in the program
    state, out = token(state, jax.tree.map(lambda x: x[0], turned))
    out = out[:, None]
  else:
    state, out = jax.lax.scan(token, state, turned)
    out = jnp.moveaxis(out, 0, 1)
  return (out[:, 0] if single else out), state


def prefill(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  rates: Weights,
  weights: Weights,
  *,
  chunk_size: int,
  momentum: jax.Array | None = None,
  lengths: jax.Array | None = None,
  muon: bool = True,
  prenorm: bool = False,
  newton_schulz: str = "scheduled",
  newton_schulz_steps: int = 5,
  ns_dtype: str | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, DecodeState]:
  """`fast_weight_scan`, causal, and the state from which decoding goes on.

  Args:
    q, k, v, rates, weights, momentum: as there, N rows of L tokens.
    lengths: [N] int, 0..L tokens of each row, the rest is padding; None: L.
    chunk_size, muon, prenorm, newton_schulz, newton_schulz_steps, ns_dtype,
      implementation: as there.

  Returns:
    Outputs [N, L, d], 0 for padding, and the state after each row's length.
  """
  rows, length, _ = q.shape
  if lengths is None:
    lengths, valid = jnp.full(rows, length, jnp.int32), None
  else:
    valid = jnp.arange(length)[None] < lengths[:, None]
  out, fast = fast_weight_scan(
    q,
    k,
    v,
    rates,
    weights,
    chunk_size=chunk_size,
    muon=muon,
    momentum=momentum,
    prenorm=prenorm,
    newton_schulz=newton_schulz,
    newton_schulz_steps=newton_schulz_steps,
    ns_dtype=ns_dtype,
    valid=valid,
    implementation=implementation,
  )
  empty = decode_state(
    weights,
    chunk_size,
    rows=rows,
    momentum=momentum is not None,
    prenorm=prenorm,
    dtype=k.dtype,
  )
  written = jnp.maximum(0, -(-lengths // chunk_size) - 1) * chunk_size
  index = written[:, None] + jnp.arange(chunk_size)[None]
  index = jnp.minimum(index, length - 1)[..., None]
  take = lambda x, old: jnp.take_along_axis(x, index, 1).astype(old.dtype)
  eta0, eta1, eta2 = rates
  tokens = Tokens(k, v, (eta0, eta1, eta2), momentum)
  return out, empty._replace(
    fast=fast,
    waiting=jax.tree.map(take, tokens, empty.waiting),
    count=(lengths - written).astype(jnp.int32),
  )


def _next(
  state: DecodeState, q: jax.Array, tokens: Tokens, rule: Rule
) -> tuple[DecodeState, jax.Array]:
  """One token, leaves [N, 1, ...] -> the state and its output [N, d]."""
  fast, norms, waiting, count = state
  chunk_size = waiting.k.shape[1]
  like = tokens.k.dtype  # products take the dtype of the tokens

  def write(fast: State) -> State:
    chunk = waiting._replace(k=waiting.k.astype(like), v=waiting.v.astype(like))
    if tokens.momentum is None:
      chunk = chunk._replace(momentum=None)
    step = Step(chunk, write=count == chunk_size)
    used = fast._replace(
      accumulated=fast.accumulated if rule.prenorm else None,
      momentum=None if tokens.momentum is None else fast.momentum,
    )
    new, _ = update.run(used, step, norms, rule)
    keep = lambda x, old: old if x is None else x
    return State(
      new.weights,
      keep(new.accumulated, fast.accumulated),
      keep(new.momentum, fast.momentum),
    )

  due = count == chunk_size
  fast = jax.lax.cond(jnp.any(due), write, lambda fast: fast, fast)
  _, (out, _) = update.run(fast, Step(None, before=q), norms, rule)
  assert out is not None
  count = jnp.where(due, 0, count)
  row = jnp.arange(count.shape[0])
  put = lambda old, x: old.at[row, count].set(x[:, 0].astype(old.dtype))
  if tokens.momentum is None:  # a buffer that is not used stays
    tokens = tokens._replace(momentum=_first(waiting.momentum))
  waiting = jax.tree.map(put, waiting, tokens)
  return DecodeState(fast, norms, waiting, count + 1), out[:, 0]


def _first(x: jax.Array | None) -> jax.Array | None:
  return None if x is None else x[:, :1]


def _check(state, q, k, v, rates, momentum, prenorm):
  """Raises ValueError for shapes and states that do not fit."""
  rows, _, size = state.waiting.k.shape
  if q.ndim != 3 or not q.shape == k.shape == v.shape:
    raise ValueError(
      f"q, k, v {q.shape}, {k.shape}, {v.shape}: want [N, T, d] or [N, d]"
    )
  if q.shape[0] != rows or q.shape[2] != size or not q.shape[1]:
    raise ValueError(f"q {q.shape}: this state is for [{rows}, T, {size}]")
  for x in (*rates, *([] if momentum is None else [momentum])):
    if x.shape != (*q.shape[:2], 1):
      raise ValueError(f"rate or momentum {x.shape}: want {(*q.shape[:2], 1)}")
  if momentum is not None and state.fast.momentum is None:
    raise ValueError("momentum: the state was made with momentum=False")
  if prenorm and state.fast.accumulated is None:
    raise ValueError("prenorm: the state was made with prenorm=False")
  held = state.waiting.k.dtype
  if jnp.promote_types(held, k.dtype) != held:
    raise ValueError(
      f"k is {k.dtype}, the state holds {held}: decode_state(dtype=...)"
    )
