"""The state of a decoder and the one step that all commit rules share.

Every row has its own block cursor, step count and random stream, so what a
row becomes does not depend on its neighbours in the batch.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from giantsteps.samplers.decoding import commit_rules


class Model(Protocol):
  """What a decoder needs: hidden [B, L, D] whose position i, times the head,
  scores token i. A pytree, so that parameters are arguments of programs."""

  @property
  def head(self) -> jax.Array:
    """[D, V]."""
    ...

  def forward(
    self, tokens: jax.Array, positions: None = None, cache: None = None
  ) -> tuple[jax.Array, None]:
    """tokens [B, L] int32 -> hidden [B, L, D] and the cache."""
    ...


class State(NamedTuple):
  """All rows between two model calls."""

  tokens: jax.Array  # [B, L] int32, the mask token where masked
  masked: jax.Array  # [B, L] bool, True = not committed yet
  committed_at: jax.Array  # [B, L] int32, the call that committed it, or -1
  nfe: jax.Array  # [B] int32, model calls while the row was unfinished
  step: jax.Array  # [B] int32, model calls since the row's block was entered


class Plan(NamedTuple):
  """What stays the same during a run, and is traced."""

  rule: commit_rules.Rule
  first: jax.Array  # [] int32, position at which block 0 begins
  forbidden: jax.Array  # [] int32, token that is never predicted; -1 is none
  temperature: jax.Array | None  # [] float32; None takes the best token
  keys: jax.Array | None  # [B] keys, one random stream per row


def init(tokens: jax.Array, masked: jax.Array, mask_token: jax.Array) -> State:
  """State before the first call; tokens [B, L] int32, masked [B, L] bool."""
  return State(
    tokens=jnp.where(masked, mask_token, tokens),
    masked=masked,
    committed_at=jnp.full(tokens.shape, -1, jnp.int32),
    nfe=jnp.zeros(tokens.shape[:1], jnp.int32),
    step=jnp.zeros(tokens.shape[:1], jnp.int32),
  )


def step(
  model: Model, state: State, plan: Plan, *, block_size: int, num_blocks: int
) -> State:
  """One model call: commits some positions of each row's active block.

  The active block is the leftmost with a masked position. Head, noise and
  confidence are computed inside it only. Finished rows do not change.

  Args:
    model: see `Model`; called once.
    state: as `init` or `step` return it.
    plan: rule, noise and where the blocks begin.
    block_size, num_blocks: positions per block, blocks per row.

  Returns:
    The next state; unfinished rows have one call more.
  """
  hidden, _ = model.forward(state.tokens)
  rows = jnp.arange(hidden.shape[0])[:, None]
  block = _active_block(state.masked, plan.first, block_size)  # [B]
  start = plan.first + block * block_size
  index = start[:, None] + jnp.arange(block_size)[None]  # [B, W]

  def window(x, outside):  # [B, L, ...] -> [B, W, ...]
    return x.at[rows, index].get(mode="fill", fill_value=outside)

  eligible = window(state.masked, False)
  committed_at = window(state.committed_at, -1)
  progress = commit_rules.Progress(
    step=state.step,
    total=jnp.sum(eligible | (committed_at >= 0), -1),
    block=block,
    num_blocks=num_blocks,
  )
  scores = _scores(window(hidden, 0), model.head, plan.forbidden)
  token, sure = _choose(plan, scores, state.nfe, index)
  commit = plan.rule.transfer(sure, eligible, progress)

  def put(x, value):  # positions of the window outside [0, L) are dropped
    value = jnp.where(commit, value, window(x, 0))
    return x.at[rows, index].set(value, mode="drop")

  masked = put(state.masked, False)
  entered = block != _active_block(masked, plan.first, block_size)
  return State(
    tokens=put(state.tokens, token),
    masked=masked,
    committed_at=put(state.committed_at, state.nfe[:, None]),
    nfe=state.nfe + jnp.any(state.masked, -1),
    step=jnp.where(entered, 0, state.step + 1),
  )


def run(
  model: Model, state: State, plan: Plan, *, block_size: int, num_blocks: int
) -> State:
  """Steps until no position is masked; the model stands once in the program."""

  def unfinished(state):
    return jnp.any(state.masked)

  def body(state):
    return step(
      model, state, plan, block_size=block_size, num_blocks=num_blocks
    )

  return jax.lax.while_loop(unfinished, body, state)


def _active_block(
  masked: jax.Array, first: jax.Array, block_size: int
) -> jax.Array:
  """Block of the leftmost masked position, 0 in finished rows: [B] int32."""
  leftmost = jnp.argmax(masked, -1).astype(jnp.int32)
  return jnp.maximum(leftmost - first, 0) // block_size


def _scores(
  hidden: jax.Array, head: jax.Array, forbidden: jax.Array
) -> jax.Array:
  """Logits of a window without the forbidden token: [B, W, V] float32."""
  wide = np.promote_types(hidden.dtype, np.float32)
  logits = jnp.matmul(
    hidden.astype(wide), head.astype(wide), precision="highest"
  )
  banned = jnp.arange(logits.shape[-1]) == forbidden
  return jnp.where(banned[None, None], -jnp.inf, logits)


def _choose(
  plan: Plan, logits: jax.Array, nfe: jax.Array, index: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Token [B, W] int32 and confidence [B, W] at positions index [B, W]."""
  noised, order, kind = logits, None, plan.rule.confidence
  if plan.temperature is not None:
    # argmax(logits + T gumbel) has the law softmax(logits / T). The usual
    # 23-bit uniforms cut its tail off (arXiv:2409.02908).
    gumbel = functools.partial(
      jax.random.gumbel, shape=logits.shape[-1:], mode="high"
    )
    noised += plan.temperature * _draw(gumbel, plan.keys, 2 * nfe, index)
  if kind == "random":
    order = _draw(jax.random.uniform, plan.keys, 2 * nfe + 1, index)
  token = jnp.argmax(noised, -1).astype(jnp.int32)
  return token, commit_rules.confidence(kind, logits, token, order)


def _draw(
  sample: Callable[[jax.Array], jax.Array],
  keys: jax.Array | None,
  count: jax.Array,
  index: jax.Array,
) -> jax.Array:
  """One sample per (row, count, position), so that padding shifts none.

  keys [B], count [B], index [B, W] -> [B, W, ...].
  """

  def row(key, count, index):
    key = jax.random.fold_in(key, count)
    return jax.vmap(lambda i: sample(jax.random.fold_in(key, i)))(index)

  return jax.vmap(row)(keys, count, index)
