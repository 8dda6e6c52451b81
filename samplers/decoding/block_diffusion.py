"""Fills masked positions and continues prompts, block after block.

Semi-autoregressive decoding of masked diffusion models (LLaDA,
arXiv:2502.09992, section 2.4): the leftmost block with a masked position is
decoded by a commit rule, later blocks stay MASK and visible to the model.
`autoregressive` is the same loop with blocks of one position.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from giantsteps.samplers.decoding import commit_rules, kv_cache, state

Numbers = jax.Array | np.ndarray | Sequence[int]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Result:
  """What was decoded and what it cost; max(nfe) / mean(nfe) is the price of
  stragglers, for a batch runs until its last row is finished.

  Attributes:
    tokens: [B, L] int32.
    nfe: [B] int32, model calls until the row was finished, of whatever width:
      the pass that fills a cache is one, and reading a final block once more
      (cache "block"). Cache prefix and dual count two for a block that its
      first pass has finished, as published, though the second is not made.
    committed_at: [B, L] int32, the call (from 0) that committed a position;
      -1 where it was given.
    answers: [B, num_tokens] int32, the new tokens of `generate`; [B, 0] of
      `fill`.
    exactness: "greedy" (the model's token-by-token argmax), "distribution"
      (a sample of the model's token-by-token law) or "approximate" (several
      positions of a step are taken from their marginals, or a cache shows the
      model what has changed since).
  """

  tokens: jax.Array
  nfe: jax.Array
  committed_at: jax.Array
  answers: jax.Array
  exactness: str = dataclasses.field(metadata={"static": True})


class Partial(NamedTuple):
  """What a callback gets while rows are being decoded.

  Attributes:
    tokens: [B, L] int32 on the host, the mask token where masked.
    masked: [B, L] bool.
    nfe: [B] int32.
  """

  tokens: np.ndarray
  masked: np.ndarray
  nfe: np.ndarray


def fill(
  model: state.Model,
  tokens: jax.Array | np.ndarray,
  masked: jax.Array | np.ndarray,
  *,
  rule: commit_rules.Rule,
  mask_token: int | None = None,
  temperature: float | Numbers = 0.0,
  key: jax.Array | None = None,
  seeds: Numbers | None = None,
  block_size: int | None = None,
  cache: str = "none",
  refresh_every: int = 8,
  block_causal: bool | None = None,
  forbid_mask: bool = True,
  forbidden: Sequence[int] = (),
  late: Sequence[int] = (),
  transform: Callable[[jax.Array], jax.Array] | None = None,
  schedule: Callable[[jax.Array], jax.Array] | None = None,
  guidance: float | None = None,
  callback: Callable[[Partial], Any] | None = None,
  every: int = 1,
) -> Result:
  """Fills arbitrary masked positions, one compiled program per shape.

  Args:
    model: see `state.Model`; called once per step.
    tokens: [B, L] int; what stands at masked positions is ignored.
    masked: [B, L] bool, True = to be filled.
    rule: a commit rule; its numbers are traced.
    mask_token: what the model sees at masked positions; may be missing for
      `autoregressive`, which then shows token 0 (a causal model looks away).
    temperature: 0 takes the best token; a number, or [B]. Confidence ignores
      it.
    key: typed key, needed by temperature > 0 and confidence "random".
    seeds: [B] int, each row's own random stream; row numbers by default. A
      row of the same seed, tokens and key is filled alike in any batch.
    block_size: positions per block, from position 0 on; None is one block.
    cache: "none", or with a model that takes one "prefix", "dual", "refresh",
      "vicinity", "block": see `kv_cache.Policy`.
    refresh_every: steps between two refreshes of cache "refresh"; 1 is exact.
    block_causal: a position sees its own block and those before it, blocks
      counted from position 0 of the row, as the model must have been trained.
      None: with cache "block" only, which needs it.
    forbid_mask: never predict the mask token, which renormalises the
      confidences. The published decoders do not: False reproduces them, but
      a MASK that is predicted is final here (there it could loop for ever).
    forbidden: further tokens that are never predicted.
    late: tokens that are committed last, such as EOS (LLaDA's "confidence of
      EOS = -inf").
    transform: of logits [N, V] after division by the temperature, before a
      token is drawn: functions of `decoding.logits`. A module-level function,
      or partial of one: each new one compiles anew. Forms the logits of the
      active blocks [B W, V].
    schedule: of the temperature, a factor for each position of the answer
      [B, W] int32 from 0, such as `logits.annealed`; as `transform`, a function
      that lives on.
    guidance: s of classifier-free guidance (1 + s) l - s u, u the logits
      without the prompt (LLaDA); two rows per request. Of `generate` only.
    callback: called with a `Partial` every `every` steps and at the end.
    every: steps of the batch between two calls.

  Returns:
    A `Result`. Costs max(nfe) model calls for the batch.

  Raises:
    ValueError: for shapes that do not fit, missing mask_token or key,
      block_size < 1, temperature < 0, an unknown cache or one that the model
      does not take.
  """
  tokens, masked = _check_tokens(model, tokens, masked)
  batch, length = tokens.shape
  if guidance is not None:
    raise ValueError(
      f"guidance={guidance}: `fill` knows no prompt, generate does"
    )
  static = _static(
    model,
    rule,
    block_size,
    length,
    cache,
    refresh_every,
    block_causal,
    transform,
    schedule,
  )
  zero, ends = np.zeros(batch, np.int32), np.full(batch, length, np.int32)
  plan = _plan(
    rule,
    model,
    (zero, zero, ends),
    mask_token,
    temperature,
    key,
    seeds,
    (*forbidden, *([mask_token] if forbid_mask else [])),
    late,
    None,
    None,
  )
  if static.cache.name != "none" and static.cache.shift and masked[:, 0].any():
    raise ValueError(
      "masked[:, 0]: this model scores a token from the one before it"
    )
  final = _decode(model, tokens, masked, plan, static, callback, every)
  return Result(
    final.tokens,
    final.nfe,
    final.committed_at,
    final.tokens[:, :0],
    _exactness(rule, static, temperature),
  )


def generate(
  model: state.Model,
  prompts: jax.Array | np.ndarray,
  prompt_lengths: Numbers,
  *,
  num_tokens: int,
  rule: commit_rules.Rule,
  block_size: int | None = 32,
  cache: str = "none",
  refresh_every: int = 8,
  block_causal: bool | None = None,
  mask_token: int | None = None,
  eos_token: int | Sequence[int] | None = None,
  temperature: float | Numbers = 0.0,
  key: jax.Array | None = None,
  seeds: Numbers | None = None,
  forbid_mask: bool = True,
  forbidden: Sequence[int] = (),
  late: Sequence[int] = (),
  transform: Callable[[jax.Array], jax.Array] | None = None,
  schedule: Callable[[jax.Array], jax.Array] | None = None,
  guidance: float | None = None,
  callback: Callable[[Partial], Any] | None = None,
  every: int = 1,
) -> Result:
  """Continues prompts of mixed length by num_tokens tokens each.

  A row's answer stands right behind its prompt and sees nothing of the padding
  after it, so a row alone and in any batch is the same. A model that takes rows
  of different length (`ragged`) compiles once per bucket: batch to a power of
  two, positions to 64, 96, 128, 192, ...; others once per distinct prompt
  length, rows of different length in calls of their own.

  Args:
    model, rule, mask_token, temperature, key, seeds, cache, refresh_every,
      block_causal, forbid_mask, forbidden, late, transform, schedule, callback,
      every: as in `fill`. With block_causal a block that begins in the prompt belongs
      to the answer's first one.
    prompts: [B, P] int, filled on the right; row i is
      prompts[i, :prompt_lengths[i]].
    prompt_lengths: [B] int in 0..P, on the host. A model that predicts the
      next token needs at least 1.
    num_tokens: new tokens per row.
    block_size: positions per block, the last may be shorter; None is one
      block. `autoregressive` ignores it.
    eos_token: one or several; when a block that holds one is finished, the row
      is, and the rest of its answer is the (first) eos_token. None: never.
    guidance: s >= 0 of (1 + s) l - s u, u the logits where the prompt is MASK.

  Returns:
    A `Result` with tokens [B, P + num_tokens]: the prompt, the answer, then
    0 where the prompt is shorter than P (committed_at is -1 there).

  Raises:
    ValueError: as `fill`; also for lengths outside 0..P, tokens outside of the
      vocabulary and a mask token in a prompt.
  """
  prompts, lengths = np.asarray(prompts), np.asarray(prompt_lengths)
  _check_prompts(model, prompts, lengths, num_tokens, mask_token)
  if guidance is not None and mask_token is None:
    raise ValueError(f"guidance={guidance}: needs a mask_token for the prompt")
  batch, width = prompts.shape
  static = _static(
    model,
    rule,
    block_size,
    num_tokens,
    cache,
    refresh_every,
    block_causal,
    transform,
    schedule,
  )
  if static.cache.shift and batch and not lengths.min():
    raise ValueError("prompt_lengths has 0: this model needs a first token")
  size = static.block_size
  first = lengths // size * size if static.cache.blocks_only else lengths
  eos = [] if eos_token is None else np.atleast_1d(eos_token).tolist()
  plan = _plan(
    rule,
    model,
    (first, lengths, lengths + num_tokens),
    mask_token,
    temperature,
    key,
    seeds,
    (*forbidden, *([mask_token] if forbid_mask else [])),
    late,
    eos,
    guidance,
  )
  place = np.arange(width + num_tokens)[None]
  given = np.pad(prompts, ((0, 0), (0, num_tokens)))
  given = np.where(place < lengths[:, None], given, 0).astype(np.int32)
  masked = place >= lengths[:, None]
  masked &= place < (lengths + num_tokens)[:, None]

  def follow(rows, columns):
    if callback is None:
      return None
    own, tell = slice(0, len(rows)), callback
    return lambda seen: tell(
      Partial(
        seen.tokens[own, :columns], seen.masked[own, :columns], seen.nfe[own]
      )
    )

  out = Partial(given, masked, np.zeros(batch, np.int32))
  committed_at = np.full(given.shape, -1, np.int32)
  for rows, padded in _groups(static, lengths, num_tokens, width):
    count, slots = padded
    take = lambda x, r=rows, n=count: _pad(np.asarray(x)[r], n)
    columns = min(slots, given.shape[1])
    part = _take_rows(plan, rows, batch, count)
    final = _decode(
      model,
      _pad(take(given)[:, :columns].T, slots).T,
      _pad(take(masked)[:, :columns].T, slots).T,
      part,
      static,
      follow(rows, columns),
      every,
    )
    keep = lambda x, r=rows, c=columns: np.asarray(x)[: len(r), :c]
    out.tokens[rows[:, None], np.arange(columns)] = keep(final.tokens)
    committed_at[rows[:, None], np.arange(columns)] = keep(final.committed_at)
    out.nfe[rows] = np.asarray(final.nfe)[: len(rows)]
  answer = lengths[:, None] + np.arange(num_tokens)
  return Result(
    jnp.asarray(out.tokens),
    jnp.asarray(out.nfe),
    jnp.asarray(committed_at),
    jnp.asarray(np.take_along_axis(out.tokens, answer, 1)),
    _exactness(rule, static, temperature),
  )


def lower(
  model: state.Model,
  rows: int,
  prompt_length: int,
  *,
  num_tokens: int,
  rule: commit_rules.Rule,
  block_size: int | None = 32,
  cache: str = "none",
  refresh_every: int = 8,
  block_causal: bool | None = None,
  mask_token: int | None = None,
  temperature: float = 0.0,
) -> jax.stages.Lowered:
  """The loop of `generate` for a ragged model, to be compiled and looked at.

  Args:
    model: of arrays or of `jax.ShapeDtypeStruct`, here or on devices that are
      not: nothing is run.
    rows, prompt_length: B, P; they are filled up to a bucket as ever.
    num_tokens, rule, block_size, cache, refresh_every, block_causal,
      mask_token, temperature: as in `generate`.
  """
  if not getattr(model, "ragged", False):
    raise ValueError("lower: this model takes no rows of different length")
  static = _static(
    model,
    rule,
    block_size,
    num_tokens,
    cache,
    refresh_every,
    block_causal,
    None,
    None,
  )
  ends = np.full(rows, prompt_length + num_tokens)
  plan = _plan(
    rule,
    model,
    (ends - num_tokens, ends - num_tokens, ends),
    mask_token,
    temperature,
    jax.random.key(0),
    None,
    [] if mask_token is None else [mask_token],
    (),
    None,
    None,
  )
  shape = (rows, bucket(prompt_length + num_tokens))
  like = [jax.ShapeDtypeStruct(shape, x) for x in (jnp.int32, bool)]
  with _on_mesh(model):
    now = jax.eval_shape(
      lambda m, t, k, p: _start(m, t, k, p, static), model, *like, plan
    )
    return _run.lower(model, now, plan, static, np.int32(2**30))


def bucket(size: int, least: int = 64) -> int:
  """The next of 64, 96, 128, 192, 256, 384, ...: at most a third is padding."""
  power = least
  while power < size:
    power *= 2
  return power * 3 // 4 if power > least and size <= power * 3 // 4 else power


def _groups(static, lengths, num_tokens, width):
  """Rows of one call, and the batch and positions it is padded to."""
  if static.cache.ragged:
    rows = np.arange(len(lengths))
    if len(rows):
      count = bucket(len(rows), 1) if len(rows) > 1 else 1
      yield rows, (count, bucket(width + num_tokens))
    return
  for length in np.unique(lengths):
    rows = np.flatnonzero(lengths == length)
    yield rows, (len(rows), int(length) + num_tokens)


def _pad(x: np.ndarray, rows: int) -> np.ndarray:
  return np.pad(x, ((0, rows - len(x)), *[(0, 0)] * (x.ndim - 1)))


def _decode(model, tokens, masked, plan, static, callback, every):
  """Runs to the end; with a callback in pieces of `every` steps."""
  if every < 1:
    raise ValueError(f"every={every}: at least 1")
  with _on_mesh(model):
    now = _start(model, tokens, masked, plan, static)
    if callback is None:
      return _run(model, now, plan, static, np.int32(2**30))
    while not bool(_finished(now, plan, static).all()):
      now = _run(model, now, plan, static, np.int32(every))
      callback(Partial(*map(np.asarray, (now.tokens, now.masked, now.nfe))))
    return now


def _on_mesh(model):
  """Traces with the mesh in sight that the parameters lie on: the layers then
  know that their program is divided, and place their activations."""
  for leaf in jax.tree.leaves(model):
    place = getattr(leaf, "sharding", None)
    if isinstance(place, jax.sharding.NamedSharding) and place.mesh.size > 1:
      return jax.sharding.use_abstract_mesh(place.mesh.abstract_mesh)
  return contextlib.nullcontext()


@functools.partial(jax.jit, static_argnums=4)
def _start(model, tokens, masked, plan, static):
  return state.init(model, tokens, masked, plan, static)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=1)
def _run(model, now, plan, static, trips):
  return state.run(model, now, plan, static, trips)


@functools.partial(jax.jit, static_argnums=2)
def _finished(now, plan, static):
  return state.finished(now, plan, static.block_size)


def _static(
  model,
  rule,
  block_size,
  length,
  cache,
  refresh_every,
  block_causal,
  transform,
  schedule,
) -> state.Static:
  """Checks what decides about the program."""
  if block_size is not None and block_size < 1:
    raise ValueError(f"block_size={block_size}: at least 1, or None")
  if cache not in kv_cache.NAMES:
    raise ValueError(f"cache={cache!r}: one of {kv_cache.NAMES}")
  if refresh_every < 1:
    raise ValueError(f"refresh_every={refresh_every}: at least 1")
  ragged = getattr(model, "ragged", False)
  causal = bool(ragged and model.causal)
  if cache != "none" and not ragged:
    raise ValueError(f"cache={cache!r}: this model takes none, use 'none'")
  if block_causal is None:
    block_causal = cache == "block"
  if cache == "block" and not block_causal:
    raise ValueError(
      "cache='block' with block_causal=False: keys of a block "
      "are final only if nothing after it is seen; use 'dual'"
    )
  if block_causal and not ragged:
    raise ValueError("block_causal=True: this model knows no limits")
  if isinstance(rule, commit_rules.Autoregressive):
    block_size = 1
  size = block_size or length
  if not block_causal:  # otherwise it says what a position sees
    size = min(size, length)
  # One shape of window for a bucket of answers.
  policy = kv_cache.Policy(
    name=cache,
    block_size=size,
    longest=bucket(length, size) if cache == "prefix" else 0,
    every=refresh_every if cache == "refresh" else 1,
    blocks_only=block_causal,
    shift=int(ragged and model.shift),
    causal=causal,
    ragged=ragged,
  )
  return state.Static(size, policy, transform, schedule)


def _plan(
  rule,
  model,
  places,
  mask_token,
  temperature,
  key,
  seeds,
  banned,
  late,
  eos,
  guidance,
) -> state.Plan:
  """Checks the options that `fill` and `generate` share."""
  batch = len(places[0])
  if mask_token is None:
    if not isinstance(rule, commit_rules.Autoregressive):
      raise ValueError("mask_token=None: only autoregressive() needs none")
    banned = tuple(x for x in banned if x is not None)
  temperature = np.asarray(temperature, np.float32)
  if not (temperature >= 0).all() or temperature.shape not in ((), (batch,)):
    raise ValueError(f"temperature={temperature}: must be 0 or more, or [B]")
  if guidance is not None and not guidance >= 0:
    raise ValueError(f"guidance={guidance}: must be 0 or more")
  streams = jnp.asarray(range(batch) if seeds is None else seeds)
  if streams.shape != (batch,):
    raise ValueError(f"seeds {streams.shape}: expected one per row, ({batch},)")
  keys, sampled = None, bool((temperature > 0).any())
  if sampled or rule.confidence == "random":
    if key is None:
      raise ValueError(
        f"temperature={temperature}, confidence={rule.confidence!r}: give a key"
      )
    keys = _row_keys(key, streams)
  size = state.head_shape(model)[1]
  for name, ids in (("forbidden", banned), ("late", late), ("eos_token", eos)):
    for x in ids or ():
      if not 0 <= x < size:
        raise ValueError(f"{name}={x}: the vocabulary has {size} tokens")
  ids = lambda x: jnp.asarray(tuple(x), jnp.int32) if x else None
  return state.Plan(
    rule=rule,
    first=jnp.asarray(places[0], jnp.int32),
    given=jnp.asarray(places[1], jnp.int32),
    ends=jnp.asarray(places[2], jnp.int32),
    mask_token=jnp.int32(mask_token or 0),
    banned=ids(banned),
    late=ids(late),
    eos=ids(eos),
    temperature=jnp.broadcast_to(temperature, (batch,)) if sampled else None,
    guidance=None if guidance is None else jnp.float32(guidance),
    keys=keys,
  )


_row_keys = jax.vmap(jax.random.fold_in, (None, 0))


def _take_rows(
  plan: state.Plan, rows: np.ndarray, batch: int, count: int
) -> state.Plan:
  """The plan of some rows and of empty ones up to `count`."""
  index = np.concatenate([rows, np.zeros(count - len(rows), rows.dtype)])
  real = np.arange(count) < len(rows)
  one = lambda x: None if x is None else x[index]
  return plan._replace(
    rule=jax.tree.map(
      lambda x: x[index] if np.shape(x) == (batch,) else x, plan.rule
    ),
    first=one(plan.first),
    given=one(plan.given),
    ends=jnp.where(real, plan.ends[index], 0),
    temperature=one(plan.temperature),
    keys=one(plan.keys),
  )


def _check_tokens(
  model: state.Model,
  tokens: jax.Array | np.ndarray,
  masked: jax.Array | np.ndarray,
) -> tuple[jax.Array, jax.Array]:
  tokens, masked = jnp.asarray(tokens), jnp.asarray(masked)
  if (
    tokens.ndim != 2
    or not tokens.shape[1]
    or not jnp.issubdtype(tokens.dtype, jnp.integer)
  ):
    raise ValueError(
      f"tokens {tokens.dtype}{list(tokens.shape)}: expected integers [B, L],"
      " L >= 1"
    )
  if masked.shape != tokens.shape or masked.dtype != bool:
    raise ValueError(
      f"masked {masked.dtype}{list(masked.shape)}: expected"
      f" bool{list(tokens.shape)} like tokens"
    )
  return tokens.astype(jnp.int32), masked


def _check_prompts(
  model: state.Model,
  prompts: np.ndarray,
  lengths: np.ndarray,
  num_tokens: int,
  mask_token: int | None,
) -> None:
  if prompts.ndim != 2 or not np.issubdtype(prompts.dtype, np.integer):
    raise ValueError(
      f"prompts {prompts.dtype}{list(prompts.shape)}: expected [B, P] integers"
    )
  if lengths.shape != prompts.shape[:1] or not np.issubdtype(
    lengths.dtype, np.integer
  ):
    raise ValueError(
      f"prompt_lengths {lengths.dtype}{list(lengths.shape)}: expected"
      f" {len(prompts)} integers, one per prompt"
    )
  width = prompts.shape[1]
  if lengths.size and not (0 <= lengths.min() and lengths.max() <= width):
    bad = lengths[(lengths < 0) | (lengths > width)][0]
    raise ValueError(f"prompt_lengths has {bad}: expected 0..{width} (= P)")
  if num_tokens < 1:
    raise ValueError(f"num_tokens={num_tokens}: at least 1")
  size = state.head_shape(model)[1]
  inside = np.arange(width)[None] < lengths[:, None]
  wrong = inside & ((prompts < 0) | (prompts >= size))
  if wrong.any():
    row, column = np.argwhere(wrong)[0]
    raise ValueError(
      f"prompts[{row}, {column}]={prompts[row, column]}: the vocabulary has"
      f" {size} tokens"
    )
  if mask_token is not None and (inside & (prompts == mask_token)).any():
    row, column = np.argwhere(inside & (prompts == mask_token))[0]
    raise ValueError(
      f"prompts[{row}, {column}] is the mask token {mask_token}: what is to be"
      " filled within a text is a case for decoding.fill"
    )


def _exactness(rule, static, temperature) -> str:
  exact = static.cache.name in ("none", "block") or (
    static.cache.name == "refresh" and static.cache.every == 1
  )
  if not isinstance(rule, commit_rules.Autoregressive):
    return "approximate"
  if not exact and not static.cache.causal:  # a causal cache is never stale
    return "approximate"
  return "distribution" if np.any(np.asarray(temperature) > 0) else "greedy"
