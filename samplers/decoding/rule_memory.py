"""What `credit` and `smoothing` keep of a block's logits from step to step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from giantsteps.samplers.decoding import commit_rules


class _Credits(NamedTuple):
  """The matrix M of `credit`, at most W entries of each position."""

  token: jax.Array  # [B, W, W] int32
  value: jax.Array  # [B, W, W] float32, 0 where there is none


def memory(rule: commit_rules.Rule, rows: int, size: int, width: int):
  """What a rule keeps while it works on a block, at its entry.

  Args:
    rule: any.
    rows, size: B, W.
    width: D of the model.

  Returns:
    A pytree with leaves [B, ...]; None for rules that keep nothing.
  """
  match _plain(rule):
    case commit_rules.Credit():
      shape = (rows, size, size)
      return _Credits(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape))
    case commit_rules.Smoothing():
      return jnp.zeros((rows, size, width))
    case _:
      return None


def wants_logits(rule: commit_rules.Rule) -> bool:
  """Whether a rule looks at all logits of a block [B, W, V]."""
  return isinstance(_plain(rule), commit_rules.Credit | commit_rules.Smoothing)


def fuse(rule, logits, eligible, kept, step, model=None):
  """Logits that a rule makes of the model's, and what it keeps of them.

  Args:
    rule: any.
    logits: [B, W, V].
    eligible: [B, W] bool.
    kept: of `memory` or the last step.
    step: [B] int32, steps in this block before this one.
    model: has the embedding [V, D], for `smoothing`.

  Returns:
    [B, W, V] and the memory.
  """
  match inner := _plain(rule):
    case commit_rules.Credit():
      return _fuse_credit(inner, logits, eligible, kept, step)
    case commit_rules.Smoothing():
      assert model is not None
      p = jax.nn.softmax(logits, -1)
      embedding = model.embedding.astype(p.dtype)
      return logits, jnp.einsum("bwv,vd->bwd", p, embedding)
    case _:
      return logits, kept


def _fuse_credit(rule, logits, eligible, kept, step):
  p = jax.nn.softmax(logits, -1)
  top = jnp.argmax(logits, -1).astype(jnp.int32)[..., None]
  gain = jnp.max(p, -1)[..., None] ** rule.gamma
  value = jnp.where(step[:, None, None] > 0, kept.value * rule.beta, kept.value)
  known = kept.token == top
  slot = jnp.where(
    jnp.any(known, -1), jnp.argmax(known, -1), jnp.argmin(value, -1)
  )
  here = jnp.arange(kept.token.shape[-1])[None, None] == slot[..., None]
  here &= eligible[..., None]
  old = jnp.where(known, value, 0)  # another token's place is taken over
  kept = _Credits(
    jnp.where(here, top, kept.token), jnp.where(here, old + gain, value)
  )
  rows, size = top.shape[:2]
  place = (
    jnp.arange(rows)[:, None, None],
    jnp.arange(size)[None, :, None],
    jnp.where(kept.token < 0, logits.shape[-1], kept.token),
  )
  bonus = rule.alpha * jnp.log1p(kept.value)
  return logits.at[place].add(bonus.astype(logits.dtype), mode="drop"), kept


def mix(rule: commit_rules.Rule, eligible: jax.Array, state):
  """Weight [B, W] and vectors [B, W, D] that `smoothing` mixes into the inputs
  of masked positions; None, None for other rules."""
  inner = _plain(rule)
  if not isinstance(inner, commit_rules.Smoothing):
    return None, None
  grown = inner.weight + inner.growth * (state.step - 1)
  weight = jnp.where(state.step > 0, jnp.minimum(grown, inner.most), 0)
  return jnp.where(eligible, weight[:, None], 0), state.memory


def _plain(rule: commit_rules.Rule) -> commit_rules.Rule:
  """What `remasking` wraps, or the rule itself."""
  return rule.rule if isinstance(rule, commit_rules.Remasking) else rule
