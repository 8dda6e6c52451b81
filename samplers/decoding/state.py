"""The state of a decoder and the one step that all commit rules share.

Every row has its own length, block cursor, step count and random stream, so
what a row becomes does not depend on its neighbours in the batch.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas.unmask_stats import reference, unmask_stats
from giantsteps.samplers.decoding import commit_rules, kv_cache, rule_memory


class Model(Protocol):
  """What a decoder needs: hidden [B, T, D] whose column i, times the head,
  scores token i. A pytree, so that parameters are arguments of programs.

  A model that can mix rows of different length and keep a cache says so with
  `ragged` = True and takes `limits` and `cache`: models/transformer.py `Bound`.
  One that has a method `unmask_stats` reads its head itself.
  """

  @property
  def head(self) -> jax.Array:
    """[D, V]."""
    ...

  def forward(
    self, tokens: jax.Array, positions: Any = None, cache: Any = None
  ) -> tuple[jax.Array, Any]:
    """tokens [B, T] int32 -> hidden [B, T, D] and the cache."""
    ...


def head_shape(model: Model) -> tuple[int, int]:
  """(D, V), without the head, which a model may have to copy."""
  return jax.eval_shape(lambda model: model.head, model).shape


class State(NamedTuple):
  """All rows between two model calls."""

  tokens: jax.Array  # [B, S] int32, the mask token where masked
  masked: jax.Array  # [B, S] bool, True = not committed yet
  committed_at: jax.Array  # [B, S] int32, the call that committed it, or -1
  sure: jax.Array  # [B, S] float32, probability when committed; 0 elsewhere
  nfe: jax.Array  # [B] int32, model calls while the row was unfinished
  block: jax.Array  # [B] int32, the active block; beyond the last: finished
  step: jax.Array  # [B] int32, model calls since the block was entered
  trips: jax.Array  # [] int32, steps of the batch
  memory: Any  # of the rule, about the active block
  cache: Any  # of the model, or None


class Plan(NamedTuple):
  """What stays the same during a run, and is traced."""

  rule: commit_rules.Rule
  first: jax.Array  # [B] int32, where block 0 begins
  given: jax.Array  # [B] int32, length of the prompt
  ends: jax.Array  # [B] int32, length of the row
  mask_token: jax.Array  # [] int32
  banned: jax.Array | None  # [E] int32, tokens that are never predicted
  late: jax.Array | None  # [E] int32, tokens that are committed last
  eos: jax.Array | None  # [E] int32: after one of them a row is finished
  temperature: jax.Array | None  # [B] float32; None: the best token
  guidance: jax.Array | None  # [] float32, (1 + guidance) c - guidance u
  keys: jax.Array | None  # [B] keys, one random stream per row


class Static(NamedTuple):
  """What the program depends on."""

  block_size: int
  cache: kv_cache.Policy
  transform: Callable | None = None  # of logits, when tokens are drawn
  schedule: Callable | None = None  # position in the answer -> temperature


def init(
  model: Model,
  tokens: jax.Array,
  masked: jax.Array,
  plan: Plan,
  static: Static,
) -> State:
  """State before the first call; tokens [B, S] int32, masked [B, S] bool."""
  rows, slots = tokens.shape
  state = State(
    tokens=jnp.where(masked, plan.mask_token, tokens),
    masked=masked,
    committed_at=jnp.full(tokens.shape, -1, jnp.int32),
    sure=jnp.zeros(tokens.shape, jnp.float32),
    nfe=jnp.zeros(rows, jnp.int32),
    block=jnp.zeros(rows, jnp.int32),
    step=jnp.zeros(rows, jnp.int32),
    trips=jnp.int32(0),
    memory=_memory(model, plan, rows, static.block_size),
    cache=None,
  )
  state = state._replace(block=_leftmost_block(state, plan, static.block_size))
  if static.cache.name == "none":
    return state
  copies = 1 if plan.guidance is None else 2
  return state._replace(cache=model.init_cache(copies * rows, slots))  # pyright: ignore[reportAttributeAccessIssue]


def finished(state: State, plan: Plan, block_size: int) -> jax.Array:
  """[B] bool, rows that need no more calls."""
  return state.block >= _num_blocks(plan, block_size)


def step(model: Model, state: State, plan: Plan, static: Static) -> State:
  """One step: commits some positions of each row's active block.

  The active block is the leftmost with a masked position. Head, noise and
  confidence are computed inside it only. Finished rows do not change.
  """
  size = static.block_size
  rows = jnp.arange(state.tokens.shape[0])[:, None]
  start = plan.first + state.block * size
  index = start[:, None] + jnp.arange(size)[None]  # [B, W]
  done = finished(state, plan, size)

  def window(x, outside):  # [B, S, ...] -> [B, W, ...]
    return x.at[rows, index].get(mode="fill", fill_value=outside)

  answer = (index >= plan.given[:, None]) & (index < plan.ends[:, None])
  answer &= ~done[:, None]
  eligible = window(state.masked, False) & answer
  committed_at = window(state.committed_at, -1)
  decided = committed_at >= 0
  now = window(state.tokens, 0)

  weight, vectors = rule_memory.mix(plan.rule, eligible, state)
  hidden, cache = kv_cache.look(
    model,
    kv_cache.Rows(state.tokens, start, plan.given, plan.ends, weight, vectors),
    state.cache,
    _due(state, done, static.cache),
    ~done,
    static.cache,
    plan.mask_token,
    plan.guidance,
  )
  progress = commit_rules.Progress(
    step=state.step,
    total=jnp.sum(eligible | decided, -1),
    block=state.block,
    num_blocks=_num_blocks(plan, size),
  )
  stats, memory = _stats(model, hidden, index, eligible, state, plan, static)
  probability = jnp.exp(stats.logit - stats.logsumexp)
  order = None
  if plan.rule.confidence == "random":
    order = _draw(jax.random.uniform, plan.keys, 2 * state.step + 1, index)
  sure = commit_rules.confidence_of(plan.rule.confidence, stats, order)
  if plan.late is not None:
    late = jnp.any(stats.token[..., None] == plan.late[None, None], -1)
    sure = jnp.where(late, jnp.finfo(sure.dtype).min, sure)

  change = commit_rules.decide(
    plan.rule,
    commit_rules.View(
      token=stats.token,
      confidence=sure,
      probability=probability,
      eligible=eligible,
      decided=decided & answer & ~eligible,
      current=now,
      committed_as=window(state.sure, 0),
      progress=progress,
    ),
  )
  masked = eligible & ~change.commit | change.remask
  token = jnp.where(change.commit, stats.token, now)
  token = jnp.where(change.remask, plan.mask_token, token)

  def put(x, where, value):  # positions outside [0, S) are dropped
    value = jnp.where(where, value, window(x, 0)).astype(x.dtype)
    return x.at[rows, index].set(value, mode="drop")

  touched = change.commit | change.remask
  tried = state._replace(
    tokens=put(state.tokens, touched, token),
    masked=put(state.masked, answer, masked),
    committed_at=put(
      put(state.committed_at, change.commit, state.nfe[:, None]),
      change.remask,
      -1,
    ),
    sure=put(state.sure, change.commit, probability),
    nfe=state.nfe + ~done,
    step=state.step + 1,
    trips=state.trips + 1,
    memory=memory,
    cache=cache,
  )
  return _leave(model, tried, ~change.hold & ~done, touched, plan, static)


def run(
  model: Model, state: State, plan: Plan, static: Static, trips: jax.Array
) -> State:
  """Steps until all rows are finished, `trips` at most."""
  last = state.trips + trips

  def unfinished(state):
    more = ~jnp.all(finished(state, plan, static.block_size))
    return more & (state.trips < last)

  def body(state):
    return step(model, state, plan, static)

  return jax.lax.while_loop(unfinished, body, state)


def _due(state, done, policy):
  """Rows whose cache is to be computed anew: [B] bool, None without one."""
  match policy.name:
    case "none":
      return None
    case "block":
      due = state.nfe == 0
    case "refresh":
      due = state.step % policy.every == 0
    case _:
      due = state.step == 0
  return due & ~done


def _leave(model, state, may, touched, plan, static):
  """Rows that have finished their block enter the next, or end with an EOS.

  Args:
    model: see `Model`.
    state: after the commits of a step.
    may: [B] bool, rows that may leave.
    touched: [B, W] bool, what the step has changed.
    plan, static: as ever.
  """
  size = static.block_size
  place = jnp.arange(state.tokens.shape[1])[None]
  start = plan.first + state.block * size
  inside = (place >= start[:, None]) & (place < start[:, None] + size)
  leave = may & ~jnp.any(state.masked & inside, -1)
  ended = jnp.zeros_like(leave)
  if plan.eos is not None:
    answer = (place >= plan.given[:, None]) & (place < plan.ends[:, None])
    is_end = jnp.any(state.tokens[..., None] == plan.eos[None, None], -1)
    is_end &= answer & ~state.masked
    ended = leave & jnp.any(is_end, -1)
    first = jnp.argmax(is_end, -1)[:, None]
    over = ended[:, None] & answer & (place > first)
    state = state._replace(  # all that is left of the row is EOS
      tokens=jnp.where(over, plan.eos[0], state.tokens),
      masked=state.masked & ~over,
    )
  last = ended | ~jnp.any(state.masked, -1)
  again = jnp.zeros_like(leave)
  if static.cache.name in ("prefix", "dual"):
    # As Fast-dLLM counts: its loop looks at every block after the entry, too.
    again = leave & (state.step == 1)
  if static.cache.must_reread:
    leave &= last | ~jnp.any(touched, -1)  # keys of what stands there
  following = _leftmost_block(state, plan, size)
  if static.cache.name == "block":  # blocks in between are read all the same
    following = jnp.minimum(following, state.block + 1)
  following = jnp.where(last, _num_blocks(plan, size), following)
  fresh = _memory(model, plan, len(leave), size)
  reset = lambda x, new: jnp.where(
    leave.reshape(-1, *[1] * (x.ndim - 1)), new, x
  )
  return state._replace(
    block=jnp.where(leave, following, state.block),
    step=jnp.where(leave, 0, state.step),
    nfe=state.nfe + again,
    memory=jax.tree.map(reset, state.memory, fresh),
  )


def _memory(model, plan, rows, size):
  """Of the rule, at the entry of a block."""
  return rule_memory.memory(plan.rule, rows, size, head_shape(model)[0])


def _num_blocks(plan: Plan, block_size: int) -> jax.Array:
  """Blocks of each row: [B] int32."""
  return -((plan.first - plan.ends) // block_size)


def _leftmost_block(state: State, plan: Plan, block_size: int) -> jax.Array:
  """Block of the leftmost masked position, beyond the last if there is none."""
  leftmost = jnp.argmax(state.masked, -1).astype(jnp.int32)
  block = jnp.maximum(leftmost - plan.first, 0) // block_size
  some = jnp.any(state.masked, -1)
  return jnp.where(some, block, _num_blocks(plan, block_size))


def _stats(model, hidden, index, eligible, state, plan, static):
  """Statistics of the window's logits, [B, W] each, and the rule's memory."""
  rows, size, width = hidden.shape
  bias = None
  if plan.banned is not None:
    bias = jnp.zeros(head_shape(model)[1], jnp.float32)
    bias = bias.at[plan.banned].set(-jnp.inf, mode="drop")
  seeds = temperature = None
  if plan.temperature is not None:
    bits = functools.partial(jax.random.bits, shape=(2,), dtype=jnp.uint32)
    seeds = _draw(bits, plan.keys, 2 * state.step, index)
    temperature = jnp.broadcast_to(plan.temperature[:, None], index.shape)
    if static.schedule is not None:
      temperature *= static.schedule(index - plan.given[:, None])
    temperature = temperature.reshape(-1)
    seeds = seeds.reshape(-1, 2)
  flat = hidden.reshape(-1, width)
  memory = state.memory
  if static.transform is None and not rule_memory.wants_logits(plan.rule):
    own = getattr(model, "unmask_stats", None)
    look = own or functools.partial(unmask_stats, head=model.head)
    stats = look(flat, bias=bias, temperature=temperature, seeds=seeds)
  else:
    logits = reference.project(flat, model.head)
    if bias is not None:
      logits += bias[None]
    if rule_memory.wants_logits(plan.rule):
      apart = logits.reshape(rows, size, -1)
      apart, memory = rule_memory.fuse(
        plan.rule, apart, eligible, memory, state.step, model
      )
      logits = apart.reshape(logits.shape)
    noised = logits
    if temperature is not None:
      assert seeds is not None
      noised = logits / jnp.maximum(temperature, 1e-6)[:, None]
      if static.transform is not None:
        noised = static.transform(noised)
      noised += reference.gumbel(seeds, logits.shape[1]).astype(logits.dtype)
      # temperature 0 in a row of a batch that samples: the best token
      noised = jnp.where((temperature > 0)[:, None], noised, logits)
    column = jnp.arange(logits.shape[1], dtype=jnp.int32)
    stats = reference.finish(reference.summarise(logits, noised, column))
  return jax.tree.map(lambda x: x.reshape(rows, size), stats), memory


def _draw(
  sample: Callable[[jax.Array], jax.Array],
  keys: jax.Array | None,
  count: jax.Array,
  index: jax.Array,
) -> jax.Array:
  """One sample per (row, count, position): padding and caches shift none.

  keys [B], count [B], index [B, W] -> [B, W, ...].
  """

  def row(key, count, index):
    key = jax.random.fold_in(key, count)
    return jax.vmap(lambda i: sample(jax.random.fold_in(key, i)))(index)

  return jax.vmap(row)(keys, count, index)
