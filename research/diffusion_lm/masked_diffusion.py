"""Masked diffusion language models: corruption, losses, likelihood bound.

LLaDA (arXiv:2502.09992): pretraining loss equation 3 (Algorithm 1), SFT loss
equation 5 (Algorithm 2), likelihood estimate equation 6 (Algorithm 3).
Masked means unknown: True where the model sees the mask token.

A model with `shift` (Dream, arXiv:2508.15487) scores a token from the output
before it. Token 0 is then never predicted: it is to be given (`corrupt` with
prompt_lengths of 1 or more, `scored` False there) and does not count.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def stratified_times(key: jax.Array, batch: int) -> jax.Array:
  """Low-discrepancy times t_b = (u + b / B) mod 1, one u ~ U(0, 1).

  Each t_b is uniform, together they cover [0, 1) evenly: losses stay unbiased
  and vary less (Kingma et al., arXiv:2107.00630, appendix I.1).

  Returns:
    [batch] float32 in [0, 1).
  """
  u = jax.random.uniform(key)
  return (u + jnp.arange(batch, dtype=jnp.float32) / batch) % 1


def corrupt(
  tokens: jax.Array,
  t: jax.Array,
  u: jax.Array,
  mask_token: int,
  eps: float = 1e-3,
  prompt_lengths: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Masks each token with probability p = (1 - eps) t + eps.

  Args:
    tokens: [B, L] int32.
    t: [B] float in [0, 1).
    u: [B, L] float, uniform in [0, 1): a position is masked if u < p.
    mask_token: what replaces a masked token.
    eps: lowest probability; bounds the weight 1/p of the loss.
    prompt_lengths: [B] int; positions before it stay clean. None is 0.

  Returns:
    noisy [B, L] int32, masked [B, L] bool, probability [B, L] float32 (p of
    the row, also at positions of the prompt).

  Raises:
    ValueError: if the shapes do not fit.
  """
  if u.shape != tokens.shape or t.shape != tokens.shape[:1]:
    raise ValueError(
      f"tokens {tokens.shape}, t {t.shape}, u {u.shape}: [B, L], [B], [B, L]"
    )
  probability = jnp.broadcast_to((1 - eps) * t[:, None] + eps, tokens.shape)
  masked = u < probability
  if prompt_lengths is not None:
    masked &= _answer(tokens, prompt_lengths)
  return jnp.where(masked, mask_token, tokens), masked, probability


def pretrain_loss(
  logits: jax.Array,
  tokens: jax.Array,
  masked: jax.Array,
  probability: jax.Array,
  *,
  shift: bool = False,
) -> jax.Array:
  """1/(B L) sum over masked positions of cross entropy / p.

  With t uniform its expectation is an upper bound of the negative
  log-likelihood in nats per token, up to eps.

  Args:
    logits: [B, L, V]; cross entropy is taken in float32.
    tokens: [B, L] int, the clean ones.
    masked, probability: [B, L] as `corrupt` returns them.
    shift: logits[:, i] score token i + 1; the mean is then over B (L - 1).

  Returns:
    [] float32.
  """
  if shift:
    logits, tokens = logits[:, :-1], tokens[:, 1:]
    masked, probability = masked[:, 1:], probability[:, 1:]
  return pretrain_mean(cross_entropy(logits, tokens), masked, probability)


def pretrain_mean(
  losses: jax.Array, masked: jax.Array, probability: jax.Array
) -> jax.Array:
  """`pretrain_loss` of the cross entropies [B, L] of the clean tokens."""
  return jnp.mean(jnp.where(masked, losses / probability, 0))


def sft_loss(
  logits: jax.Array,
  tokens: jax.Array,
  masked: jax.Array,
  probability: jax.Array,
  prompt_lengths: jax.Array,
  *,
  shift: bool = False,
) -> jax.Array:
  """1/B sum over masked positions of cross entropy / (p * answer length).

  The answer is all after the prompt: padding by EOS is part of it, for the
  model must learn to emit it.

  Args:
    logits, tokens, masked, probability: as in `pretrain_loss`.
    prompt_lengths: [B] int, below L.
    shift: logits[:, i] score token i + 1.

  Returns:
    [] float32.
  """
  answer = _answer(tokens, prompt_lengths)
  if shift:
    logits, tokens, answer = logits[:, :-1], tokens[:, 1:], answer[:, 1:]
    masked, probability = masked[:, 1:], probability[:, 1:]
  loss = cross_entropy(logits, tokens) / probability
  loss = jnp.sum(jnp.where(masked & answer, loss, 0), -1)
  return jnp.mean(loss / jnp.sum(answer, -1))


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """-log softmax(logits)[token]: [B, L, V], [B, L] -> [B, L] in nats."""
  wide = np.promote_types(logits.dtype, np.float32)
  logits = logits.astype(wide)
  chosen = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
  return jax.nn.logsumexp(logits, -1) - chosen


def likelihood_strata(k: int, batch: int, length: int) -> np.ndarray:
  """Masked positions per row of LLaDA's likelihood estimate, as published.

  round(linspace(k, k + (B-1) n/B, B)) wrapped to 1..n with k ~ U{1..n}: each
  row's count covers 1..n, except that halves round to even numbers.
  `negative_log_likelihood_bound` spreads its counts without that flaw.

  Args:
    k: first count, in 1..length.
    batch: B rows.
    length: n positions to be scored.

  Returns:
    [B] int64 in 1..length.
  """
  last = k + (batch - 1) * (length / batch)
  counts = np.round(np.linspace(k, last, batch)).astype(np.int64)
  return (counts - 1) % length + 1


def exact_count_mask(
  key: jax.Array, counts: jax.Array, scored: jax.Array
) -> jax.Array:
  """Masks exactly counts[b] of the scored positions, uniformly.

  counts [B] int, scored [B, L] bool -> [B, L] bool.
  """
  noise = jnp.where(scored, jax.random.uniform(key, scored.shape), 2)
  rank = jnp.argsort(jnp.argsort(noise, -1), -1)
  return scored & (rank < counts[:, None])


def negative_log_likelihood_bound(
  forward: Callable[[jax.Array], jax.Array],
  tokens: jax.Array,
  key: jax.Array,
  mask_token: int,
  *,
  num_samples: int = 1,
  scored: jax.Array | None = None,
  unit: str = "nats",
) -> jax.Array:
  """Unbiased estimate of an upper bound of -log p per scored token and row.

  Equation 6 of LLaDA: with l of the n scored positions masked, l ~ U{1..n},

    -log p(scored | rest) <= E[ n/l * sum over masked of cross entropy ],

  which is the exact likelihood averaged over all orders of the tokens.

  Differs from the paper: l = 1 + floor(n ((u + i/(B S)) mod 1)) with one u
  and a different i for every row and sample, which is uniform for each of
  them also where the published rounding is not. Rows are therefore not
  independent: their spread overstates the error of their mean.

  Args:
    forward: noisy tokens [B, L] int32 -> logits [B, L, V] that score their own
      position. It stands once in the program and is called num_samples times.
    tokens: [B, L] int32.
    key: positions and u.
    mask_token: what the model sees at masked positions.
    num_samples: S draws per row; the variance falls at least like 1/S.
    scored: [B, L] bool, True = part of the likelihood, the rest is given;
      None is everything.
    unit: "nats" or "bits".

  Returns:
    [B] float32 per scored token; 0 in rows with none.

  Raises:
    ValueError: for another unit, num_samples < 1 or a shape that does not fit.
  """
  if unit not in ("nats", "bits"):
    raise ValueError(f"unit={unit!r}: nats or bits")
  if num_samples < 1:
    raise ValueError(f"num_samples={num_samples}: at least 1")
  scored = jnp.ones(tokens.shape, bool) if scored is None else scored
  if tokens.ndim != 2 or scored.shape != tokens.shape:
    raise ValueError(
      f"tokens {tokens.shape}, scored {scored.shape}: both must be [B, L]"
    )
  batch = tokens.shape[0]
  start, draws = jax.random.split(key)
  total = jnp.sum(scored, -1)
  grid = np.arange(num_samples * batch) / (num_samples * batch)
  grid = jnp.asarray(grid.reshape(num_samples, batch), jnp.float32)
  place = (jax.random.uniform(start) + grid) % 1

  def add(nll, draw):
    key, place = draw
    # float32 may round up to n + 1
    counts = jnp.minimum(1 + (place * total).astype(jnp.int32), total)
    masked = exact_count_mask(key, counts, scored)
    logits = forward(jnp.where(masked, mask_token, tokens))
    loss = jnp.where(masked, cross_entropy(logits, tokens), 0)
    # n/l * sum / n: per token it is the mean over masked positions
    return nll + jnp.sum(loss, -1) / jnp.maximum(counts, 1), None

  keys = jax.random.split(draws, num_samples)
  nll, _ = jax.lax.scan(add, jnp.zeros(batch), (keys, place))
  return nll / (num_samples * (np.log(2) if unit == "bits" else 1))


def _answer(tokens: jax.Array, prompt_lengths: jax.Array) -> jax.Array:
  """True after the prompt: [B, L] bool."""
  index = jnp.arange(tokens.shape[1])[None]
  return index >= jnp.asarray(prompt_lengths)[:, None]
