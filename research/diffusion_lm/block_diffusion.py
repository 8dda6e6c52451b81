"""Block diffusion: masked diffusion within a block, given the blocks before it.

BD3-LM (arXiv:2503.09573): the likelihood is a product over blocks of W tokens,
each of them a masked diffusion model whose context is clean:

  L = sum_b E_t [ 1/t  sum over masked positions of block b of cross entropy ].

One pass over the noisy row and the clean row together, [x_t ; x_0] of 2 L
tokens, gives every block its clean context. What a block sees is what `samplers.decoding` shows it with block_causal:
its own noisy tokens and the clean ones before it.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from giantsteps.models import token_loss, transformer
from giantsteps.research.diffusion_lm import masked_diffusion


@dataclasses.dataclass(frozen=True)
class Visible:
  """Which of the 2 L tokens [x_t ; x_0] sees which: a function, no array.

  A noisy token sees the noisy ones of its block and the clean ones of the
  blocks before; a clean token the clean ones of its block and before.

  Attributes:
    length: L.
    block_size: W, a divisor of L.
  """

  length: int
  block_size: int

  def __call__(self, query: jax.Array, key: jax.Array) -> jax.Array:
    """Places [T, 1] and [1, S] in 0 .. 2 L - 1 -> [T, S] bool."""
    # of the block, in the same half and in the clean one
    start = query - jax.lax.rem(query, self.block_size)
    clean = jax.lax.rem(start, self.length) + self.length
    own = (key >= start) & (key < start + self.block_size)
    return own | (key >= self.length) & (key < clean)


def stratified_times(key: jax.Array, rows: int, blocks: int) -> jax.Array:
  """A time for every block, all of them spread evenly over [0, 1), and so are
  those of a row: [rows, blocks] float32 as of `masked_diffusion`."""
  times = masked_diffusion.stratified_times(key, rows * blocks)
  return times.reshape(blocks, rows).T


def corrupt(
  tokens: jax.Array,
  t: jax.Array,
  u: jax.Array,
  mask_token: int,
  rates: tuple[float, float] = (1e-3, 1.0),
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Masks each token of block b with probability p = beta + (omega - beta) t_b.

  Args:
    tokens: [B, L] int32.
    t: [B, L / W] float in [0, 1), a time for every block.
    u: [B, L] float, uniform in [0, 1): a position is masked if u < p.
    mask_token: what replaces a masked token.
    rates: (beta, omega), the clipped schedule U[beta, omega]. Only with
      (0, 1), or nearly so, is the loss a bound of the likelihood.

  Returns:
    noisy [B, L] int32, masked [B, L] bool, probability [B, L] float32.

  Raises:
    ValueError: if the shapes do not fit or the rates are no part of (0, 1].
  """
  low, high = rates
  if not 0 < low <= high <= 1:
    raise ValueError(f"rates={rates}: 0 < beta <= omega <= 1, for weights 1/p")
  if (
    u.shape != tokens.shape
    or t.shape[:1] != tokens.shape[:1]
    or tokens.shape[1] % t.shape[1]
  ):
    raise ValueError(
      f"tokens {tokens.shape}, t {t.shape}, u {u.shape}: [B, L], [B, L / W], "
      "[B, L]"
    )
  size = tokens.shape[1] // t.shape[1]
  probability = jnp.repeat((high - low) * t + low, size, axis=1)
  masked = u < probability
  return jnp.where(masked, mask_token, tokens), masked, probability


def doubled(
  noisy: jax.Array, clean: jax.Array, block_size: int
) -> tuple[jax.Array, jax.Array, Visible]:
  """What a model is called with: tokens, positions and mask of [x_t ; x_0].

  Args:
    noisy, clean: [B, L] int32.
    block_size: W, a divisor of L; L is plain masked diffusion.

  Returns:
    [B, 2 L] int32, [1, 2 L] int32 (both halves count from 0) and the mask, as
    `transformer.Bound.outputs` takes them.

  Raises:
    ValueError: if the shapes do not fit or W does not divide L.
  """
  length = clean.shape[1]
  if noisy.shape != clean.shape:
    raise ValueError(f"noisy {noisy.shape}, clean {clean.shape}: both [B, L]")
  if block_size < 1 or length % block_size:
    raise ValueError(
      f"block_size={block_size}: a divisor of the {length} tokens of a row"
    )
  place = jnp.arange(length, dtype=jnp.int32)
  return (
    jnp.concatenate([noisy, clean], 1),
    jnp.concatenate([place, place])[None],
    Visible(length, block_size),
  )


def scoring(
  outputs: jax.Array, block_size: int, *, shift: bool = False
) -> jax.Array:
  """Those of the outputs [B, 2 L, D] that score the tokens: [B, L, D].

  They are the noisy half. With `shift` the one before a token scores it: within
  a block that of the noisy half, for the first token of a block the clean one
  before it, which has seen all that is known; with W = 1 that is the usual
  autoregressive model. Position 0 repeats the first output.
  """
  noisy, clean = jnp.split(outputs, 2, axis=1)
  if not shift:
    return noisy
  first = jnp.arange(noisy.shape[1]) % block_size == 0
  noisy, clean = transformer.shifted(noisy), transformer.shifted(clean)
  return jnp.where(first[None, :, None], clean, noisy)


def loss(
  outputs: jax.Array,
  head: jax.Array,
  tokens: jax.Array,
  masked: jax.Array,
  probability: jax.Array,
  *,
  block_size: int,
  shift: bool = False,
) -> jax.Array:
  """1/(B L) sum over masked positions of cross entropy / p: nats per token.

  With rates up to 1 its expectation is an upper bound of the negative
  log-likelihood, up to the lowest rate; with W = L it is
  `masked_diffusion.pretrain_loss`, with W = 1 and no shift the cross entropy of
  each token given those before it.

  Args:
    outputs: [B, 2 L, D] of the model at `doubled` tokens.
    head: [D, V].
    tokens: [B, L] int, the clean ones.
    masked, probability: [B, L] as `corrupt` returns them.
    block_size: W.
    shift: the model's outputs score the next token (`Bound.shift`); token 0,
      which nothing has predicted, then does not count.

  Returns:
    [] float32.
  """
  hidden = scoring(outputs, block_size, shift=shift)
  losses = token_loss.cross_entropy(hidden, head, tokens)
  first = int(shift)
  return masked_diffusion.pretrain_mean(
    losses[:, first:], masked[:, first:], probability[:, first:]
  )


def clipped_rates(
  rates: np.ndarray,
  losses: np.ndarray,
  widths: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
  step: float = 0.1,
) -> tuple[float, float]:
  """The interval (beta, omega) in which the loss varies least: the paper's
  data-driven choice of the clipped schedule.

  Args:
    rates: [N] masking rates in (0, 1] of blocks or rows.
    losses: [N] their losses, with the weight 1/p, by the model as it is.
    widths: of the intervals that are compared; all begin at multiples of
      `step`.
    step: between two intervals of one width.

  Returns:
    beta, omega; the widest of equals. beta may be 0, where `corrupt` wants
    something above it, such as 1e-3.

  Raises:
    ValueError: if no interval holds two of the rates.
  """
  found = []
  for width in sorted(widths, reverse=True):
    for i in range(round((1 - width) / step) + 1):
      low, high = round(i * step, 9), round(i * step + width, 9)
      inside = (rates >= low) & (rates <= high)
      if inside.sum() > 1:
        found.append((float(np.var(losses[inside])), low, high))
  if not found:
    raise ValueError(f"rates {np.shape(rates)}: none of {widths} holds two")
  _, low, high = min(found, key=lambda entry: entry[0])
  return low, high
