"""LaCT's operator: fast weights written and read along a sequence.

"Test-Time Training Done Right" (arXiv:2505.23884). A head owns a SwiGLU MLP
f_W(x) = W1 (silu(W0 x) * (W2 x)) whose weights are its memory: writing a chunk
is one gradient step on -sum_t <f_W(k_t), v_t>, reading is f_W(q). The paper's
W1, W3, W2 are W0, W2, W1 here, as in the authors' code.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas import fast_weight, precision
from giantsteps.kernels_pallas.fast_weight import Weights
from giantsteps.kernels_pallas.newton_schulz import (
  newton_schulz as orthogonalise,
)

Order = str | Sequence[tuple[int, int, bool, bool]]


class State(NamedTuple):
  """What the fast weights remember, all float32 or wider.

  Attributes:
    weights: W0 [N, h, d], W1 [N, d, h], W2 [N, h, d]: what is applied.
    accumulated: sums of all steps before normalisation; None unless prenorm.
    momentum: the three buffers of raw gradients; None without momentum.
  """

  weights: Weights
  accumulated: Weights | None = None
  momentum: Weights | None = None


@dataclasses.dataclass(frozen=True)
class _Rule:
  """The static half of the update: see `fast_weight_scan`."""

  muon: bool
  prenorm: bool
  weight_norm: bool
  kind: str
  steps: int
  ns_dtype: str | None


def _orthogonal(step: Weights, rule: _Rule) -> Weights:
  """Newton-Schulz of the three matrices at once: NS(G^T) = NS(G)^T."""
  d0, d1, d2 = step
  stacked = jnp.stack([d0, d1.mT, d2])
  out = orthogonalise(stacked, rule.kind, rule.steps, rule.ns_dtype)
  return out[0], out[1].mT, out[2]


def _update(state: State, tokens: Any, norms: Weights, rule: _Rule) -> State:
  """Writes one chunk (k, v, learning rates, momentum): gradient, momentum,
  Muon, add, normalise, in this order."""
  k, v, learning_rates, momentum = tokens
  add = lambda x, y: jax.tree.map(jnp.add, x, y)
  step = fast_weight.gradient(state.weights, k, v, learning_rates)
  buffer = state.momentum
  if momentum is not None:
    mu = jnp.mean(momentum.astype(step[0].dtype), 1, keepdims=True)  # [N, 1, 1]
    buffer = add(step, jax.tree.map(lambda m: mu * m, buffer))
    step = buffer
  if rule.muon:
    step = _orthogonal(step, rule)
  total = add(state.accumulated if rule.prenorm else state.weights, step)
  weights = total
  if rule.weight_norm:
    weights = jax.tree.map(
      lambda w, n: w / (precision.length(w, -1) + 1e-5) * n, total, norms
    )
  return State(weights, total if rule.prenorm else None, buffer)


def _check(q, k, v, learning_rates, weights, momentum):
  """Raises ValueError for shapes that do not fit together."""
  if q.ndim != 3 or not q.shape == k.shape == v.shape:
    raise ValueError(f"q, k, v {q.shape}, {k.shape}, {v.shape}: want [N, L, d]")
  per_token = (*q.shape[:2], 1)
  rates = [*learning_rates, *([] if momentum is None else [momentum])]
  for x in rates:
    if x.shape != per_token:
      raise ValueError(f"rate or momentum {x.shape}: want {per_token}")
  h, d = weights[0].shape[-2:]
  want = ((h, d), (d, h), (h, d))
  if d != q.shape[-1] or tuple(w.shape[-2:] for w in weights) != want:
    shapes = [w.shape for w in weights]
    raise ValueError(f"weights {shapes} for d={q.shape[-1]}: want {want}")


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
  remat: bool = True,
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
    state: continues from here; `weights` still set the row lengths.
    remat: recomputes the inside of a chunk in the backward pass, which then
      keeps one state per chunk.

  Returns:
    Outputs [N, L, d] in q.dtype (for a list, the applied tokens) and the
    state after the last write, float32 or wider.

  Raises:
    ValueError: if shapes do not fit, or for an unknown order.
  """
  _check(q, k, v, learning_rates, weights, momentum)
  n, length, _ = q.shape
  wide = precision.wide(q, *weights)
  weights = jax.tree.map(
    lambda w: jnp.broadcast_to(w.astype(wide), (n, *w.shape[-2:])), weights
  )
  norms = jax.tree.map(lambda w: precision.length(w, -1), weights)
  norms = jax.lax.stop_gradient(norms) if detach_norm else norms
  if state is None:
    zeros = jax.tree.map(jnp.zeros_like, weights)
    state = State(
      weights,
      weights if prenorm else None,
      None if momentum is None else zeros,
    )
  rule = _Rule(
    muon, prenorm, weight_norm, newton_schulz, newton_schulz_steps, ns_dtype
  )
  tokens = (k, v, tuple(learning_rates), momentum)

  def update(state: State, tokens: Any) -> State:
    return _update(state, tokens, norms, rule)

  if order == "causal":
    return _causal(state, q, tokens, chunk_size or length, update, remat)
  if order == "bidirectional":
    order = [(0, length, True, True)]
  if isinstance(order, str):
    raise ValueError(
      f"order={order!r}: choose causal, bidirectional or a list of entries"
    )
  update = jax.checkpoint(update) if remat else update
  outputs = [q[:, :0]]
  for start, end, write, read in order:
    if write:
      state = update(state, jax.tree.map(lambda x: x[:, start:end], tokens))  # noqa: B023
    if read:
      outputs.append(fast_weight.apply(state.weights, q[:, start:end]))
  return jnp.concatenate(outputs, 1), state


def _causal(state, q, tokens, chunk_size, update, remat):
  """Scan over the chunks i with i C + C < L, then the tail is only read."""
  n, length, _ = q.shape
  num_writes = max(0, -(-(length - chunk_size) // chunk_size))
  split = num_writes * chunk_size

  def chunks(x):  # [N, L, ...] -> [chunks, N, C, ...]
    x = x[:, :split].reshape(n, num_writes, chunk_size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def body(state, chunk):
    q, tokens = chunk
    return update(state, tokens), fast_weight.apply(state.weights, q)

  body = jax.checkpoint(body, prevent_cse=False) if remat else body
  state, out = jax.lax.scan(body, state, jax.tree.map(chunks, (q, tokens)))
  out = jnp.moveaxis(out, 0, 1).reshape(n, split, q.shape[-1])
  tail = fast_weight.apply(state.weights, q[:, split:])
  return jnp.concatenate([out, tail], 1), state
