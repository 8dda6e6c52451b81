"""Which positions a step of a decoder recomputes, and what the others show.

A step feeds the model a window around the active block, whose keys and values
replace those in the cache; what lies outside is as it was when the row was last
refreshed. Fast-dLLM (arXiv:2505.22618) for prefix and dual, dInfer for
vicinity. Only "none", "refresh" in every step, and "block" are exact.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

NAMES = ("none", "prefix", "dual", "refresh", "vicinity", "block")
_TOKENS = 512  # of the rows that are refreshed in one pass, or so


class Policy(NamedTuple):
  """Static description of a cache and of the model that fills it.

  Attributes:
    name: none (every position in every call), prefix (at the entry of a block
      everything, then the block and all after it), dual (then the block alone),
      refresh (dual, and everything every `every` steps), vicinity (dual with
      `margin` positions on both sides) or block (what is before the block is
      final and exact, nothing after it is seen).
    block_size: W positions of a block.
    longest: most positions of an answer; prefix recomputes as many.
    every: of refresh.
    margin: of vicinity.
    blocks_only: a position sees its own block and those before it, blocks
      counted from position 0; otherwise the whole row.
    shift: 1 if the model's output at i - 1 scores token i, else 0.
    causal: the model never looks ahead.
    ragged: whether the model takes rows of different length.
  """

  name: str
  block_size: int
  longest: int = 0
  every: int = 8
  margin: int = 16
  blocks_only: bool = False
  shift: int = 0
  causal: bool = False
  ragged: bool = True

  @property
  def around(self) -> tuple[int, int]:
    """Positions before and after the active block that a step recomputes."""
    if self.name == "prefix":
      return self.shift, max(self.longest - self.block_size, 0)
    if self.name == "vicinity":
      return max(self.shift, self.margin), self.margin
    # of a causal model the last output scores what is not asked
    return self.shift, -self.shift if self.causal else 0

  @property
  def must_reread(self) -> bool:
    """Whether a block is read once more when it is final, for its keys."""
    alone = self.causal and self.shift and self.block_size == 1
    return self.name == "block" and not alone


def group_size(batch: int, slots: int) -> int:
  """Rows whose cache is filled in one pass."""
  return max(1, min(batch, _TOKENS // slots))


class Rows(NamedTuple):
  """What a call needs to know of each row.

  Attributes:
    tokens: [B, S] int32.
    start: [B] int32, first position of the active block.
    given, ends: [B] int32, lengths of the prompt and of the row.
    weight: [B, W] of `vectors` in the inputs of the block, or None.
    vectors: [B, W, D] or None.
  """

  tokens: jax.Array
  start: jax.Array
  given: jax.Array
  ends: jax.Array
  weight: jax.Array | None = None
  vectors: jax.Array | None = None


def look(
  model: Any,
  rows: Rows,
  cache: Any,
  due: jax.Array | None,
  active: jax.Array,
  policy: Policy,
  mask_token: jax.Array,
  guidance: jax.Array | None,
) -> tuple[jax.Array, Any]:
  """The model at the active blocks.

  Args:
    model: see `state.Model`.
    rows: all rows.
    cache: of the model; None for "none".
    due: [B] bool, rows whose whole cache is computed anew.
    active: [B] bool, rows that are not finished.
    policy: the cache.
    mask_token: stands for the prompt where `guidance` looks away from it.
    guidance: [] or None, see `state.Plan`.

  Returns:
    hidden [B, W, D] that scores the positions start .. start + W - 1, and the
    cache.
  """
  slots, size = rows.tokens.shape[1], policy.block_size
  call = lambda rows, positions, cache: _call(
    model, rows, positions, cache, policy, mask_token, guidance
  )
  if policy.name == "none":
    hidden, _ = call(rows, jnp.arange(slots)[None], None)
    index = rows.start[:, None] - policy.shift + jnp.arange(size)[None]
    row = jnp.arange(len(rows.start))[:, None]
    index = jnp.maximum(index, 0)  # nothing has predicted position 0
    return hidden.at[row, index].get(mode="fill", fill_value=0), None
  assert due is not None
  guided = guidance is not None
  hidden, cache = _refresh(model, call, rows, cache, due, policy, guided)
  before, after = policy.around
  place = jnp.arange(-before, size + after)

  def window(cache):
    out, cache = call(rows, rows.start[:, None] + place[None], cache)
    return out[:, before - policy.shift :][:, :size].astype(hidden.dtype), cache

  skip = lambda cache: (hidden, cache)
  seen, cache = jax.lax.cond(jnp.any(active & ~due), window, skip, cache)
  return jnp.where(due[:, None, None], hidden, seen), cache


def _refresh(model, call, rows, cache, due, policy, guided):
  """hidden [B, W, D] and the cache of rows `due` [B], a few rows at a time.

  Rows that enter a block at different times cost no more than those that do it
  together, and no row's numbers depend on its neighbours.
  """
  batch, slots = rows.tokens.shape
  group = group_size(batch, slots)
  pick = jnp.arange(policy.block_size)[None] - policy.shift

  def some(due):
    chosen = jnp.argsort(~due, stable=True)[:group]
    part = jax.tree.map(lambda x: x[chosen], rows)
    empty = model.init_cache(2 * group if guided else group, slots)
    hidden, new = call(part, jnp.arange(slots)[None], empty)
    index = part.start[:, None] + pick
    hidden = hidden.at[jnp.arange(group)[:, None], index].get(
      mode="fill", fill_value=0
    )
    return chosen, hidden, new

  def body(carry):
    due, found, cache = carry
    chosen, hidden, new = some(due)
    total = jax.tree.leaves(cache)[0].shape[1]
    place = jnp.where(due[chosen], chosen, total)
    found = found.at[place].set(hidden, mode="drop")
    if guided:
      place = jnp.concatenate([place, place + batch])
    write = lambda old, x: old.at[:, place].set(x, mode="drop")
    cache = jax.tree.map(write, cache, new)
    return due.at[chosen].set(False), found, cache

  shape = jax.eval_shape(some, due)[1]
  found = jnp.zeros((batch, *shape.shape[1:]), shape.dtype)
  more = lambda carry: jnp.any(carry[0])
  # The condition around the loop: with one row, all of its body is the same in
  # every turn, and the compiler would run it even for no turn at all.
  return jax.lax.cond(
    jnp.any(due),
    lambda cache: jax.lax.while_loop(more, body, (due, found, cache))[1:],
    lambda cache: (found, cache),
    cache,
  )


def _call(model, rows, positions, cache, policy, mask_token, guidance):
  """hidden [B, T, D] at positions [B or 1, T], which may lie outside."""
  if not policy.ragged:  # all rows are of one length
    return model.forward(rows.tokens)
  batch, slots = rows.tokens.shape
  positions = jnp.broadcast_to(positions, (batch, positions.shape[1]))
  row = jnp.arange(batch)[:, None]
  tokens = rows.tokens[row, jnp.clip(positions, 0, slots - 1)]
  limits = jnp.broadcast_to(rows.ends[:, None], positions.shape)
  if policy.blocks_only:
    block_end = (positions // policy.block_size + 1) * policy.block_size
    limits = jnp.minimum(limits, block_end)
  mix = None
  if rows.weight is not None:
    at = positions - rows.start[:, None]
    inside = (at >= 0) & (at < policy.block_size)
    at = jnp.clip(at, 0, policy.block_size - 1)
    mix = jnp.where(inside, rows.weight[row, at], 0), rows.vectors[row, at]
  if guidance is None:
    return model.extend(tokens, positions, cache, limits, mix)
  blind = jnp.where(positions < rows.given[:, None], mask_token, tokens)
  twice = lambda x: jnp.concatenate([x, x])
  hidden, cache = model.extend(
    jnp.concatenate([tokens, blind]),
    *(twice(positions), cache, twice(limits), jax.tree.map(twice, mix)),
  )
  hidden = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
  seeing, blind = jnp.split(hidden, 2)  # the head is linear: so are logits
  return blind + (1 + guidance) * (seeing - blind), cache
