"""Fills masked positions and continues prompts, block after block.

Semi-autoregressive decoding of masked diffusion models (LLaDA,
arXiv:2502.09992, section 2.4): the leftmost block with a masked position is
decoded by a commit rule, later blocks stay MASK and visible to the model.
`autoregressive` is the same loop with blocks of one position.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from giantsteps.samplers.decoding import commit_rules, state

CACHES = ("none",)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Result:
  """What was decoded and what it cost.

  Attributes:
    tokens: [B, L] int32.
    nfe: [B] int32, model calls until the row was finished.
    committed_at: [B, L] int32, the call (from 0) that committed a position;
      -1 where it was given.
    answers: [B, num_tokens] int32, the new tokens of `generate`; [B, 0] of
      `fill`.
    exactness: "greedy" (the model's token-by-token argmax), "distribution"
      (a sample of the model's token-by-token law) or "approximate" (several
      positions of a step are taken from their marginals).
  """

  tokens: jax.Array
  nfe: jax.Array
  committed_at: jax.Array
  answers: jax.Array
  exactness: str = dataclasses.field(metadata={"static": True})


def fill(
  model: state.Model,
  tokens: jax.Array | np.ndarray,
  masked: jax.Array | np.ndarray,
  *,
  rule: commit_rules.Rule,
  mask_token: int | None = None,
  temperature: float = 0.0,
  key: jax.Array | None = None,
  seeds: jax.Array | np.ndarray | Sequence[int] | None = None,
  block_size: int | None = None,
  forbid_mask: bool = True,
) -> Result:
  """Fills arbitrary masked positions, one compiled program per shape.

  Args:
    model: see `state.Model`; called once per step, on all L positions.
    tokens: [B, L] int; what stands at masked positions is ignored.
    masked: [B, L] bool, True = to be filled.
    rule: a commit rule; its numbers are traced.
    mask_token: what the model sees at masked positions; may be missing for
      `autoregressive`, which then shows token 0 (a causal model looks away).
    temperature: 0 takes the best token. Confidence ignores it.
    key: typed key, needed by temperature > 0 and confidence "random".
    seeds: [B] int, each row's own random stream; row numbers by default. A
      row of the same seed, tokens and key is filled alike in any batch.
    block_size: positions per block, from position 0 on; None is one block.
    forbid_mask: never predict the mask token, which renormalises the
      confidences. The published decoders do not: False reproduces them, but
      a MASK that is predicted is final here (there it could loop for ever).

  Returns:
    A `Result`. Costs max(nfe) model calls for the batch.

  Raises:
    ValueError: for shapes that do not fit, missing mask_token or key,
      block_size < 1, temperature < 0.
  """
  tokens, masked = _check_tokens(tokens, masked)
  batch, length = tokens.shape
  plan = _plan(rule, 0, batch, mask_token, temperature, key, seeds, forbid_mask)
  final = _decode(
    model,
    tokens,
    masked,
    jnp.int32(mask_token or 0),
    plan,
    **_blocks(rule, block_size, length),
  )
  return Result(
    final.tokens,
    final.nfe,
    final.committed_at,
    final.tokens[:, :0],
    _exactness(rule, temperature),
  )


def generate(
  model: state.Model,
  prompts: jax.Array | np.ndarray,
  prompt_lengths: jax.Array | np.ndarray | Sequence[int],
  *,
  num_tokens: int,
  rule: commit_rules.Rule,
  block_size: int | None = 32,
  cache: str = "none",
  mask_token: int | None = None,
  temperature: float = 0.0,
  key: jax.Array | None = None,
  seeds: jax.Array | np.ndarray | Sequence[int] | None = None,
  forbid_mask: bool = True,
) -> Result:
  """Continues prompts of mixed length by num_tokens tokens each.

  The model sees the prompt and all num_tokens positions, nothing else: rows
  of different length never share a call, for a bidirectional model would
  attend to the padding. There is one program per distinct prompt length.

  Args:
    model, rule, mask_token, temperature, key, seeds, forbid_mask: as in
      `fill`.
    prompts: [B, P] int, filled on the right; row i is
      prompts[i, :prompt_lengths[i]].
    prompt_lengths: [B] int in 0..P, on the host. A model that predicts the
      next token needs at least 1.
    num_tokens: new tokens per row.
    block_size: positions per block, the last may be shorter; None is one
      block. `autoregressive` ignores it.
    cache: "none" recomputes all positions in every call.

  Returns:
    A `Result` with tokens [B, P + num_tokens]: the prompt, the answer, then
    0 where the prompt is shorter than P (committed_at is -1 there).

  Raises:
    ValueError: as `fill`; also for another cache, and lengths outside 0..P.
  """
  if cache not in CACHES:
    raise ValueError(f"cache={cache!r}: one of {CACHES}")
  prompts = np.asarray(prompts)
  lengths = np.asarray(prompt_lengths)
  _check_prompts(prompts, lengths, num_tokens)
  batch, width = prompts.shape
  tokens = np.zeros((batch, width + num_tokens), np.int32)
  committed_at = np.full(tokens.shape, -1, np.int32)
  nfe = np.zeros(batch, np.int32)
  plan = _plan(rule, 0, batch, mask_token, temperature, key, seeds, forbid_mask)
  for length in np.unique(lengths):
    rows = np.flatnonzero(lengths == length)
    size = int(length) + num_tokens
    given = np.zeros((len(rows), size), np.int32)
    given[:, :length] = prompts[rows, :length]
    masked = np.broadcast_to(np.arange(size) >= length, given.shape)
    final = _decode(
      model,
      jnp.asarray(given),
      jnp.asarray(masked),
      jnp.int32(mask_token or 0),
      _take_rows(plan, rows, batch)._replace(first=jnp.int32(length)),
      **_blocks(rule, block_size, num_tokens),
    )
    tokens[rows, :size] = final.tokens
    committed_at[rows, :size] = final.committed_at
    nfe[rows] = final.nfe
  index = lengths[:, None] + np.arange(num_tokens)
  return Result(
    jnp.asarray(tokens),
    jnp.asarray(nfe),
    jnp.asarray(committed_at),
    jnp.asarray(np.take_along_axis(tokens, index, 1)),
    _exactness(rule, temperature),
  )


@functools.partial(jax.jit, static_argnames=("block_size", "num_blocks"))
def _decode(
  model: state.Model,
  tokens: jax.Array,
  masked: jax.Array,
  mask_token: jax.Array,
  plan: state.Plan,
  *,
  block_size: int,
  num_blocks: int,
) -> state.State:
  start = state.init(tokens, masked, mask_token)
  return state.run(
    model, start, plan, block_size=block_size, num_blocks=num_blocks
  )


def _blocks(
  rule: commit_rules.Rule, block_size: int | None, length: int
) -> dict[str, int]:
  if block_size is not None and block_size < 1:
    raise ValueError(f"block_size={block_size}: at least 1, or None")
  if isinstance(rule, commit_rules.Autoregressive):
    block_size = 1
  block_size = min(block_size or length, length)
  return {"block_size": block_size, "num_blocks": -(-length // block_size)}


def _plan(
  rule: commit_rules.Rule,
  first: int,
  batch: int,
  mask_token: int | None,
  temperature: float,
  key: jax.Array | None,
  seeds: jax.Array | np.ndarray | Sequence[int] | None,
  forbid_mask: bool,
) -> state.Plan:
  """Checks the options that `fill` and `generate` share."""
  if mask_token is None:
    if not isinstance(rule, commit_rules.Autoregressive):
      raise ValueError("mask_token=None: only autoregressive() needs none")
    forbid_mask = False
  if not temperature >= 0:
    raise ValueError(f"temperature={temperature}: must be 0 or more")
  streams = jnp.asarray(range(batch) if seeds is None else seeds)
  if streams.shape != (batch,):
    raise ValueError(f"seeds {streams.shape}: expected one per row, ({batch},)")
  keys = None
  if temperature > 0 or rule.confidence == "random":
    if key is None:
      raise ValueError(
        f"temperature={temperature}, confidence={rule.confidence!r}: give a key"
      )
    keys = _row_keys(key, streams)
  return state.Plan(
    rule=rule,
    first=jnp.int32(first),
    forbidden=jnp.int32(mask_token if forbid_mask else -1),
    temperature=jnp.float32(temperature) if temperature > 0 else None,
    keys=keys,
  )


_row_keys = jax.vmap(jax.random.fold_in, (None, 0))


def _take_rows(plan: state.Plan, rows: np.ndarray, batch: int) -> state.Plan:
  """The plan of some rows: their keys, and their numbers of the rule."""
  keys = None if plan.keys is None else plan.keys[rows]
  rule = jax.tree.map(
    lambda x: x[rows] if np.shape(x) == (batch,) else x, plan.rule
  )
  return plan._replace(keys=keys, rule=rule)


def _check_tokens(
  tokens: jax.Array | np.ndarray, masked: jax.Array | np.ndarray
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
  prompts: np.ndarray, lengths: np.ndarray, num_tokens: int
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


def _exactness(rule: commit_rules.Rule, temperature: float) -> str:
  if not isinstance(rule, commit_rules.Autoregressive):
    return "approximate"
  return "distribution" if temperature > 0 else "greedy"
