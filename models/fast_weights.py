"""LaCT's operator: fast weights written and read along a sequence.

"Test-Time Training Done Right" (arXiv:2505.23884). A head owns a SwiGLU MLP
f_W(x) = W1 (silu(W0 x) * (W2 x)) whose weights are its memory: writing a chunk
is one gradient step on -sum_t <f_W(k_t), v_t>, reading is f_W(q). The paper's
W1, W3, W2 are W0, W2, W1 here, as in the authors' code.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from giantsteps.kernels_pallas import precision
from giantsteps.kernels_pallas.fast_weight import Weights
from giantsteps.models import context_parallel
from giantsteps.models import fast_weight_documents as documents
from giantsteps.models import fast_weight_update as update
from giantsteps.models.fast_weight_update import Rule, State, Step, Tokens

Order = str | Sequence[tuple[int, int, bool, bool]]


def fast_weight_scan(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  learning_rates: Weights,
  weights: Weights,
  *,
  chunk_size: int | None = None,
  order: Order = "causal",
  muon: bool = True,
  momentum: jax.Array | None = None,
  prenorm: bool = False,
  weight_norm: bool = True,
  detach_norm: bool = False,
  newton_schulz: str = "scheduled",
  newton_schulz_steps: int = 5,
  ns_dtype: str | None = None,
  state: State | None = None,
  valid: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  num_documents: int | None = None,
  remat: bool | int | str = True,
  implementation: str | None = None,
  parallel: tuple[Mesh | AbstractMesh, str] | None = None,
) -> tuple[jax.Array, State]:
  """Runs the fast weights over a sequence: writes k, v, reads q.

  One write is D = gradient (M = D + mean_t(momentum) M, if given), D = NS(D)
  with Muon, W = W + D, each row rescaled to its length in `weights`. Nothing
  is detached unless `detach_norm`: gradients flow through every step.

  Args:
    q: [N, L, d], N = batch * heads; bfloat16 inputs mean bfloat16 products,
      accumulated in float32.
    k: [N, L, d].
    v: [N, L, d].
    learning_rates: three [N, L, 1] >= 0, for W0, W1, W2.
    weights: initial W0 [N, h, d], W1 [N, d, h], W2 [N, h, d], or without N.
    chunk_size: tokens C of one write for "causal"; None is one chunk.
    order: "causal" reads chunk i with the weights written by chunks < i; the
      last 1..C tokens are only read. "bidirectional" writes all tokens in
      one step, then reads all. Or entries (start, end, update, apply) in
      sequence, the update before the apply; the outputs are concatenated.
    muon: orthogonalises the step, which then has spectral norm near 1.
    momentum: [N, L, 1] in (0, 1).
    prenorm: keeps the sum of all steps and normalises a copy of it, so that
      the relative step decays; otherwise the normalised weights are the state.
    weight_norm: rescales the rows.
    detach_norm: no gradient through the lengths of the initial rows.
    newton_schulz: "scheduled" or "fixed".
    newton_schulz_steps: iterations.
    ns_dtype: dtype of the iteration, e.g. "bfloat16"; None is that of the
      state.
    state: continues from here, and every document begins here; `weights`
      still set the row lengths.
    valid: [N, L] bool, False for padding: such tokens fill places of a chunk
      but have no part in its gradient or in its mean of the momentum, and
      their outputs are 0, whatever their values. Nothing is written without
      a valid token in the chunk and, if causal, one after it: a row padded
      on its right ends in the state it has alone. A row padded on its left
      counts chunks from its first valid token if segment_ids is `valid`.
    segment_ids: [N, L] int: runs of equal ids are documents, each as if it
      were alone, chunks counted from its first token. Not with entries. The
      state returned is that of the last document with valid tokens. Costs
      another read of every token; bidirectional as many writes and reads of
      all tokens as there are documents.
    num_documents: at least the documents of any row, for "bidirectional";
      None counts them, or is L where segment_ids is traced.
    remat: what the backward pass keeps. True or "chunk": the state before
      each chunk, and recomputes the inside. An integer g: every g-th state;
      then it recomputes g states at a time. "two_level": the g that holds
      fewest bytes (`fast_weight_update.kept_bytes`), below the square root of
      the chunks. False or "none": everything.
    implementation: of the kernels (`kernels_pallas.dispatch`); None chooses
      by platform and shape. Under "pallas_gpu" Newton-Schulz and the update
      stay with XLA.
    parallel: mesh and axis of it that splits the tokens of every chunk; see
      `context_parallel_scan`.

  Returns:
    Outputs [N, L, d] in q.dtype (for a list, the applied tokens) and the
    state after the last write, float32 or wider.

  Raises:
    ValueError: if shapes do not fit, for an unknown order or remat, for
      segment_ids with entries, or bidirectional ones in parallel.
  """
  _check(q, k, v, learning_rates, weights, momentum, valid, segment_ids)
  n, length, _ = q.shape
  wide = precision.wide(q, *weights)
  weights = jax.tree.map(
    lambda w: jnp.broadcast_to(w.astype(wide), (n, *w.shape[-2:])), weights
  )
  norms = update.lengths(weights)
  norms = jax.lax.stop_gradient(norms) if detach_norm else norms
  if state is None:
    state = update.start(weights, prenorm, momentum is not None)
  for name, kept, wanted in (
    ("prenorm", state.accumulated, prenorm),
    ("momentum", state.momentum, momentum is not None),
  ):
    if (kept is not None) != wanted:
      raise ValueError(
        f"state {'with' if kept else 'without'} {name}, but it is "
        f"{'asked for' if wanted else 'not given'}: go on as it was begun"
      )
  rule = Rule(
    muon=muon,
    prenorm=prenorm,
    weight_norm=weight_norm,
    kind=newton_schulz,
    steps=newton_schulz_steps,
    ns_dtype=ns_dtype,
    implementation=implementation,
  )
  eta0, eta1, eta2 = learning_rates
  tokens = Tokens(k, v, (eta0, eta1, eta2), momentum)
  if valid is not None:
    # Not by rate 0 alone: 0 times the NaN of a padded place is NaN.
    mask = lambda x: jnp.where(valid[..., None], x, 0)
    q, tokens = mask(q), jax.tree.map(mask, tokens)
    tokens = tokens._replace(valid=valid[..., None])

  def go(function, axis, state, steps):
    """function(state, steps, norms, rule); `axis` is the tokens' in steps."""
    if parallel is None:
      return function(state, steps, norms, rule)
    return context_parallel.call(
      function, axis, parallel, state, steps, norms, rule
    )

  if order == "causal":
    chunk = min(chunk_size or length, length)
    if segment_ids is None:
      out, state = _causal(go, state, q, tokens, chunk, remat)
    else:
      out, state = _packed(go, state, q, tokens, segment_ids, chunk, remat)
  elif order == "bidirectional" and segment_ids is not None:
    if parallel is not None:
      raise ValueError(
        "bidirectional documents (segment_ids) are not split over devices: "
        "leave parallel out, or call once per document"
      )
    everywhere = jnp.ones(q.shape[:2], bool) if valid is None else valid
    out, state = documents.bidirectional(
      state,
      q,
      tokens,
      segment_ids,
      everywhere,
      num_documents or _count(segment_ids),
      norms,
      rule,
      _group(remat, 1) > 0,
    )
  elif segment_ids is None:
    if order == "bidirectional":
      order = [(0, length, True, True)]
    if isinstance(order, str):
      raise ValueError(
        f"order={order!r}: choose causal, bidirectional or a list of entries"
      )
    return _entries(go, state, q, tokens, order, remat)
  else:
    raise ValueError(
      f"segment_ids with order={order!r}: a list of entries says itself which "
      "tokens meet; give one list per document, or causal or bidirectional"
    )
  return (out if valid is None else mask(out)), state


def context_parallel_scan(
  mesh: Mesh | AbstractMesh,
  axis: str,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  learning_rates: Weights,
  weights: Weights,
  **options: Any,
) -> tuple[jax.Array, State]:
  """`fast_weight_scan` with the tokens of each chunk split over devices.

  Each device sums the gradients of its tokens; per chunk they are summed over
  the axis, 3 N d h numbers. If the axis divides N, a device receives the sums
  of its own N / size rows, orthogonalises and normalises them, and the new
  weights are gathered in k's dtype; otherwise all devices do all rows.

  Args:
    mesh: the devices; other axes are left to the partitioner, and where it
      has some, XLA does all operations.
    axis: its name on the mesh.
    q, k, v, learning_rates, weights: as in `fast_weight_scan`.
    **options: its keywords, but `parallel`.

  Returns:
    As `fast_weight_scan`, to rounding.

  Raises:
    ValueError: as it does, or if the mesh has no such axis.
  """
  return fast_weight_scan(
    q, k, v, learning_rates, weights, parallel=(mesh, axis), **options
  )


def _check(q, k, v, learning_rates, weights, momentum, valid, segment_ids):
  """Raises ValueError for shapes that do not fit together."""
  if q.ndim != 3 or not q.shape == k.shape == v.shape:
    raise ValueError(f"q, k, v {q.shape}, {k.shape}, {v.shape}: want [N, L, d]")
  per_token = (*q.shape[:2], 1)
  rates = [*learning_rates, *([] if momentum is None else [momentum])]
  for x in rates:
    if x.shape != per_token:
      raise ValueError(f"rate or momentum {x.shape}: want {per_token}")
  for name, x in (("valid", valid), ("segment_ids", segment_ids)):
    if x is not None and x.shape != q.shape[:2]:
      raise ValueError(f"{name} {x.shape}: want {q.shape[:2]}")
  if valid is not None and valid.dtype != bool:
    raise ValueError(f"valid is {valid.dtype}: want bool, False for padding")
  h, d = weights[0].shape[-2:]
  want = ((h, d), (d, h), (h, d))
  if d != q.shape[-1] or tuple(w.shape[-2:] for w in weights) != want:
    shapes = [w.shape for w in weights]
    raise ValueError(f"weights {shapes} for d={q.shape[-1]}: want {want}")


def _causal(
  go: Callable, state: State, q: jax.Array, tokens: Tokens, chunk: int, remat
) -> tuple[jax.Array, State]:
  """Chunk i is read, then written if i C + C < L."""
  n, length, d = q.shape
  num_chunks = max(1, -(-length // chunk))
  group = _group(remat, num_chunks, _cost(state, q, chunk, num_chunks))
  # Beyond one chunk per kept state all chunks are scanned, and the last write
  # is dropped: leaving the last chunk out would copy every token.
  whole = group > 1
  num_steps = -(-num_chunks // group) * group if whole else num_chunks - 1
  split = num_steps * chunk

  def chunks(x):  # [N, L, ...] -> [steps, N, C, ...]
    extra = max(0, split - length)
    x = jnp.pad(x, ((0, 0), (0, extra), (0, 0))) if extra else x[:, :split]
    return jnp.moveaxis(x.reshape(n, num_steps, chunk, x.shape[2]), 1, 0)

  write = None
  if whole:
    write = jnp.arange(num_steps) < num_chunks - 1
  if tokens.valid is not None:
    later = jnp.flip(jnp.cumsum(jnp.flip(tokens.valid, 1), 1), 1)
    later = chunks(later)[:, :, 0, 0]  # valid tokens from a chunk's first on
    after = jnp.concatenate([later[1:], jnp.zeros_like(later[:1])])
    if not whole and num_steps:
      after = after.at[-1].set(jnp.sum(tokens.valid[:, split:], (1, 2)))
    write = (after > 0) & (later > after)
  steps = Step(
    tokens=jax.tree.map(chunks, tokens), before=chunks(q), write=write
  )
  scan = functools.partial(update.scan, group=group)
  state, (out, _) = go(scan, 2, state, steps)
  out = jnp.moveaxis(out, 0, 1).reshape(n, split, d)
  if split >= length:
    return out[:, :length], state
  tail = _read(go, state, q[:, split:])
  return jnp.concatenate([out, tail], 1), state


def _packed(
  go: Callable,
  state: State,
  q: jax.Array,
  tokens: Tokens,
  segment_ids: jax.Array,
  chunk: int,
  remat,
) -> tuple[jax.Array, State]:
  """`_causal` of every document in its row."""
  valid = jnp.ones(q.shape[:2], bool)
  valid = valid if tokens.valid is None else tokens.valid[..., 0]
  first = _read(go, state, q)
  where = documents.places(segment_ids, valid, chunk)
  num_places = where.write.shape[1]
  if not num_places:
    return first, state
  group = _group(remat, num_places, _cost(state, q, chunk, num_places))
  steps = documents.steps(where, q, tokens)
  extra = -num_places % max(1, group)
  fill = lambda x: jnp.pad(x, ((0, extra), *[(0, 0)] * (x.ndim - 1)))
  scan = functools.partial(update.scan, group=group)
  last, (_, after) = go(scan, 2, state, jax.tree.map(fill, steps))
  out = documents.collect(where, first, after[:num_places])
  return out, update.select(where.restart, state, last)


def _entries(
  go: Callable,
  state: State,
  q: jax.Array,
  tokens: Tokens,
  order: Sequence[tuple[int, int, bool, bool]],
  remat,
) -> tuple[jax.Array, State]:
  """(start, end, update, apply) in sequence; outputs concatenated."""
  run = update.run
  if _group(remat, 1):
    run = jax.checkpoint(run, static_argnums=(3,))
  outputs = [q[:, :0]]
  for start, end, write, read in order:
    if write:
      some = jax.tree.map(lambda x: x[:, start:end], tokens)  # noqa: B023
      flag = None if some.valid is None else jnp.any(some.valid, (1, 2))
      state, _ = go(run, 1, state, Step(some, write=flag))
    if read:
      outputs.append(_read(go, state, q[:, start:end]))
  return jnp.concatenate(outputs, 1), state


def _read(go: Callable, state: State, q: jax.Array) -> jax.Array:
  _, (out, _) = go(update.run, 1, state, Step(None, before=q))
  return out


def _group(
  remat: bool | int | str, num_chunks: int, cost: Callable | None = None
) -> int:
  """Chunks between kept states, 0 keeps all activations: the cheapest by
  cost(group) if `remat` leaves the choice."""
  if remat == "two_level":
    groups = range(1, 2 * math.isqrt(num_chunks) + 1)
    return min(groups, key=cost) if cost and num_chunks > 3 else 1
  named = {"none": 0, "chunk": 1}
  group = named.get(remat, remat) if isinstance(remat, str) else int(remat)
  if not isinstance(group, int) or group < 0:
    raise ValueError(
      f"remat={remat!r}: choose none, chunk, two_level, a bool or the number "
      "of chunks between kept states"
    )
  return max(1, min(group, num_chunks)) if group else 0


def _cost(
  state: State, q: jax.Array, chunk: int, num_chunks: int
) -> Callable[[int], int]:
  """`update.kept_bytes` of a group, and what is copied to fill the last up."""
  leaves = jax.tree.leaves(state)
  states = sum(x.size * x.dtype.itemsize for x in leaves)
  tokens = q.shape[0] * chunk * q.shape[2] * q.dtype.itemsize

  def cost(group):
    copies = 7 * num_chunks * tokens if num_chunks % group else 0
    return copies + update.kept_bytes(num_chunks, group, states, tokens)

  return cost


def _count(segment_ids: jax.Array) -> int:
  """Most documents in a row, or L if the ids are not known yet."""
  try:
    ids = np.asarray(segment_ids)
  except jax.errors.TracerArrayConversionError:
    return segment_ids.shape[1]
  return 1 + int(np.max(np.sum(ids[:, 1:] != ids[:, :-1], 1), initial=0))
