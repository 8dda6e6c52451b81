"""One write of LaCT's fast weights, and the scan over many of them.

"Test-Time Training Done Right" (arXiv:2505.23884), equations of section 3;
`fast_weights.py` is the operator that users call. What one device does here
is all that context_parallel.py needs: a rule with an axis sums gradients and
rates over it.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas import fast_weight, precision
from giantsteps.kernels_pallas.fast_weight import Weights
from giantsteps.kernels_pallas.newton_schulz import newton_schulz


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


class Tokens(NamedTuple):
  """What one write sees.

  Attributes:
    k, v: [N, C, d].
    rates: three [N, C, 1], for W0, W1, W2.
    momentum: [N, C, 1] or None.
    valid: [N, C, 1] bool: tokens of the mean over `momentum`, and those of
      which k, v and rates are not zero; None: all.
  """

  k: jax.Array
  v: jax.Array
  rates: Weights
  momentum: jax.Array | None = None
  valid: jax.Array | None = None


class Step(NamedTuple):
  """One turn of the scan: reset, read `before`, write, read `after`.

  Attributes:
    tokens: what is written; None: nothing.
    before, after: queries [N, C, d]; None: nothing is read there.
    write: bool [] or [N], whether the write counts; None: it does.
    reset: bool [N], rows that start anew; None: none.
  """

  tokens: Tokens | None
  before: jax.Array | None = None
  after: jax.Array | None = None
  write: jax.Array | None = None
  reset: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Rule:
  """The static half of the update; the rest as in `fast_weight_scan`.

  Attributes:
    muon, prenorm, weight_norm: whether.
    kind, steps, ns_dtype: of Newton-Schulz.
    implementation: of the kernels; None chooses by platform.
    axis: of a `shard_map` around, over which the tokens are split.
    owners: of that axis each device holds the state of its own rows, N / size
      of them, and orthogonalises those only.
  """

  muon: bool = True
  prenorm: bool = False
  weight_norm: bool = True
  kind: str = "scheduled"
  steps: int = 5
  ns_dtype: str | None = None
  implementation: str | None = None
  axis: str | None = None
  owners: bool = False


def start(weights: Weights, prenorm: bool, momentum: bool) -> State:
  """The state before the first write: weights [N, ., .], float32 or wider."""
  zeros = jax.tree.map(jnp.zeros_like, weights)
  return State(
    weights, weights if prenorm else None, zeros if momentum else None
  )


def lengths(weights: Weights) -> Weights:
  """Euclidean lengths of the rows, [N, h, 1], [N, d, 1], [N, h, 1]."""
  d0, d1, d2 = (precision.length(w, -1) for w in weights)
  return d0, d1, d2


def select(flag: jax.Array, new: State, old: State) -> State:
  """`new` where flag [] or [N] is True."""
  wide = lambda x: flag.reshape(flag.shape + (1,) * (x.ndim - flag.ndim))
  pick = lambda x, y: jnp.where(wide(x), x, y)
  return jax.tree.map(pick, new, old)


def scan(
  state: State,
  steps: Step,
  norms: Weights,
  rule: Rule,
  *,
  group: int,
) -> tuple[State, tuple[jax.Array | None, jax.Array | None]]:
  """Runs steps whose leaves have a leading axis n.

  Args:
    state: before the first step, and after a reset.
    steps: leaves [n, ...].
    norms: `lengths` of the initial weights.
    rule: static.
    group: chunks between states kept for the backward pass: 0 keeps all
      activations, 1 the state before every chunk; more must divide n, and
      keeps n / group states, then `group` while a group is run backwards.

  Returns:
    The last state, and what was read before and after the writes, [n, ...].
  """

  first = state

  def body(state, step):
    return run(state, step, norms, rule, first)

  body = jax.checkpoint(body, prevent_cse=False) if group else body
  if group < 2:
    return jax.lax.scan(body, state, steps)
  inner = jax.checkpoint(
    functools.partial(jax.lax.scan, body), prevent_cse=False
  )
  split = lambda x: x.reshape(-1, group, *x.shape[1:])
  state, out = jax.lax.scan(inner, state, jax.tree.map(split, steps))
  return state, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)


def kept_bytes(
  num_chunks: int, group: int, state_bytes: int, token_bytes: int
) -> int:
  """Memory that the backward pass of `scan` holds beside one chunk's inside.

  The state before every group, the states within the group at hand, and that
  group's part of seven arrays of tokens: q, k, v, the outputs' cotangent and
  the gradients of q, k, v. Rates and momenta are left out, 4 / d of a token.

  Args:
    num_chunks: n.
    group: g > 1 chunks between kept states.
    state_bytes: of one state: weights and, if there, sums and momenta.
    token_bytes: of one chunk of q.

  Returns:
    ceil(n/g) state_bytes + g (state_bytes + 7 token_bytes); n state_bytes for
    g = 1.
  """
  if group == 1:
    return num_chunks * state_bytes
  groups = -(-num_chunks // group)
  return groups * state_bytes + group * (state_bytes + 7 * token_bytes)


def run(
  state: State,
  step: Step,
  norms: Weights,
  rule: Rule,
  first: State | None = None,
) -> tuple[State, tuple[jax.Array | None, jax.Array | None]]:
  """One step, see `Step`; returns the state and the two reads."""
  if step.reset is not None and first is not None:
    state = select(step.reset, first, state)
  before = _read(state, step.before, rule)
  if step.tokens is not None:
    new = update(state, step.tokens, norms, rule)
    state = new if step.write is None else select(step.write, new, state)
  return state, (before, _read(state, step.after, rule))


def update(state: State, tokens: Tokens, norms: Weights, rule: Rule) -> State:
  """Writes one chunk: gradient, momentum, Muon, add, normalise, in this
  order."""
  k, v, rates, momentum, valid = tokens
  weights = _whole(state.weights, k, rule)
  step = fast_weight.gradient(
    weights, k, v, rates, implementation=rule.implementation
  )
  if rule.axis is not None:
    step = _summed(step, rule)
  old = state.accumulated or state.weights
  target = norms if rule.weight_norm else None
  finish = functools.partial(
    fast_weight.update,
    keep_total=rule.prenorm,
    implementation=_not_hopper(rule),
  )
  if momentum is None or state.momentum is None:
    step = _orthogonal(step, rule) if rule.muon else step
    weights, total, _ = finish(old, step, target)
    return State(weights, total)
  mu = _mean(momentum.astype(step[0].dtype), valid, rule)
  if not rule.muon:
    return State(*finish(old, step, target, (mu, state.momentum)))
  buffer = jax.tree.map(lambda d, m: d + mu * m, step, state.momentum)
  weights, total, _ = finish(old, _orthogonal(buffer, rule), target)
  return State(weights, total, buffer)


def _read(state: State, q: jax.Array | None, rule: Rule) -> jax.Array | None:
  if q is None:
    return None
  weights = _whole(state.weights, q, rule)
  return fast_weight.apply(weights, q, implementation=rule.implementation)


def _orthogonal(step: Weights, rule: Rule) -> Weights:
  """Newton-Schulz of the three matrices at once: NS(G^T) = NS(G)^T."""
  d0, d1, d2 = step
  out = newton_schulz(
    jnp.stack([d0, d1.mT, d2]),
    rule.kind,
    rule.steps,
    rule.ns_dtype,
    implementation=_not_hopper(rule),
  )
  return out[0], out[1].mT, out[2]


def _not_hopper(rule: Rule) -> str | None:
  """The rule's choice for an operation that has no kernel for GPUs."""
  return "xla" if rule.implementation == "pallas_gpu" else rule.implementation


def _mean(momentum: jax.Array, valid: jax.Array | None, rule: Rule):
  """Mean over the valid tokens, [N, 1, 1]; 0 where there are none."""
  if valid is None and rule.axis is None:
    return jnp.mean(momentum, 1, keepdims=True)
  if valid is None:
    total, count = momentum, jnp.ones_like(momentum)
  else:
    total = jnp.where(valid, momentum, 0)
    count = valid.astype(momentum.dtype)
  both = jnp.sum(jnp.concatenate([total, count], 2), 1, keepdims=True)
  if rule.axis is not None:
    both = jax.lax.psum(both, rule.axis)
    both = _own(both, rule)
  return both[..., :1] / jnp.maximum(both[..., 1:], 1)


def _summed(step: Weights, rule: Rule) -> Weights:
  """The sum over the axis: of all rows, or of the rows that this device owns."""
  if not rule.owners:
    return jax.lax.psum(step, rule.axis)
  scatter = functools.partial(
    jax.lax.psum_scatter,
    axis_name=rule.axis,
    scatter_dimension=0,
    tiled=True,
  )
  d0, d1, d2 = map(scatter, step)
  return d0, d1, d2


def _whole(weights: Weights, like: jax.Array, rule: Rule) -> Weights:
  """The weights of all rows, sent as `like`'s dtype: products round to it."""
  if not rule.owners:
    return weights
  gather = functools.partial(
    jax.lax.all_gather, axis_name=rule.axis, axis=0, tiled=True
  )
  w0, w1, w2 = (gather(w.astype(like.dtype)) for w in weights)
  return w0, w1, w2


def _own(x: jax.Array, rule: Rule) -> jax.Array:
  """x [N, ...] -> this device's rows."""
  if not rule.owners:
    return x
  rows = x.shape[0] // jax.lax.axis_size(rule.axis)
  index = jax.lax.axis_index(rule.axis)
  return jax.lax.dynamic_slice_in_dim(x, index * rows, rows)
