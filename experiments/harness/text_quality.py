"""How good a language model of bytes is, and what parallel decoding costs.

The same held-out gaps are filled one token per step and with a confidence
threshold; agreement with the true text, tokens per forward and the likelihood
of what was filled are compared row by row (paired).
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from giantsteps.experiments.harness import data
from giantsteps.samplers import decoding

THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
ONE_PER_STEP = 1.01  # no confidence reaches it: only the best one is committed


def windows(dataset: data.Dataset, count: int) -> np.ndarray:
  """`count` held-out rows [N, T] int32, evenly spaced over the split."""
  rows = dataset.held_out.num_rows
  indices = np.linspace(0, rows - 1, min(count, rows)).astype(np.int64)
  return dataset.held_out.read(indices)["tokens"]


def autoregressive_bits(
  model: Any, dataset: data.Dataset, batch: int = 64
) -> dict:
  """Held-out bits per byte of a causal model, every byte with context.

  Windows of the trained length T move by T/2 over the running text and count
  for their second half, so a byte has T/2 to T - 1 bytes of context, as the
  n-grams have theirs across window borders. The first T/2 bytes of the text
  are context only.

  Args:
    model: a causal `Bound` (its output at i predicts token i).
    dataset: rows of consecutive bytes.
    batch: windows per forward pass.

  Returns:
    bits_per_byte, standard_error over windows, bytes that were counted.
  """
  split = dataset.held_out
  rows = split.read(np.arange(split.num_rows))["tokens"]
  length = rows.shape[1]
  half, stream = length // 2, rows.ravel()
  starts = np.arange(0, len(stream) - length + 1, half)

  @jax.jit
  def bits(model, tokens):
    hidden, _ = model.forward(tokens)
    log_p = jax.nn.log_softmax((hidden @ model.head).astype(jnp.float32))
    at = jnp.take_along_axis(log_p, tokens[..., None], -1)[..., 0]
    return -jnp.mean(at[:, half:], 1) / jnp.log(2.0)

  values = []
  for i in range(0, len(starts), batch):
    # the last group is filled up with its own first window, not counted
    group = np.resize(starts[i : i + batch], batch)
    tokens = stream[group[:, None] + np.arange(length)[None]]
    kept = len(starts[i : i + batch])
    values.append(np.asarray(bits(model, tokens.astype(np.int32)))[:kept])
  return _mean_and_error(np.concatenate(values), length - half)


def masked_bits(
  evaluate: Callable, params: Any, dataset: data.Dataset, batch: int = 64
) -> dict:
  """The masked model's bound on the bits per byte, over all held-out rows.

  Args:
    evaluate: `task.evaluate`, the bound of a batch of rows.
    params: of the model.
    dataset: held-out rows are windows without context from outside.
    batch: rows per call; one number of masked bytes per row, stratified.

  Returns:
    bits_per_byte, standard_error over batches, bytes that were counted.
  """
  split = dataset.held_out
  run, key, values = jax.jit(evaluate), jax.random.key(11), []
  for i in range(split.num_rows // batch):
    rows = split.read(np.arange(i * batch, (i + 1) * batch))
    row = run(params, rows, jax.random.fold_in(key, i))
    values.append(float(row["held_out_bits_per_byte"]))
  return _mean_and_error(np.array(values), batch * rows["tokens"].shape[1])


def _mean_and_error(values: np.ndarray, bytes_each: int) -> dict:
  return {
    "bits_per_byte": float(values.mean()),
    "standard_error": float(values.std(ddof=1) / np.sqrt(len(values))),
    "bytes": len(values) * bytes_each,
  }


def random_mask(
  rows: int, length: int, fraction: float, seed: int
) -> np.ndarray:
  """[N, T] bool, the same number round(fraction T) of Trues in each row."""
  order = np.random.default_rng(seed).random((rows, length)).argsort(1)
  return order.argsort(1) < round(fraction * length)


def gap_mask(rows: int, length: int, size: int) -> np.ndarray:
  """[N, T] bool, one contiguous gap of `size` in the middle of each row."""
  start = (length - size) // 2
  inside = np.arange(length) - start
  return np.broadcast_to((inside >= 0) & (inside < size), (rows, length))


def fill_curve(
  model: Any,
  tokens: np.ndarray,
  masked: np.ndarray,
  mask_token: int,
  thresholds: Sequence[float] = THRESHOLDS,
  likelihood: bool = True,
) -> tuple[list[dict], Any]:
  """Fills the masked positions by every threshold and one token per step.

  Args:
    model: a `Bound` masked-diffusion model.
    tokens: [N, T] the true text.
    masked: [N, T] bool, what is filled; equally many per row.
    mask_token: the id of MASK.
    thresholds: confidences that commit.
    likelihood: also score what was filled, at the price of one token per step.

  Returns:
    Rows, the last one token per step: threshold, tokens_per_forward (mean
    over rows), agreement with the true text, its difference to one token per
    step with the standard error of the paired rows, nll_per_token of the
    filled text (nats, `left_to_right_nll`), seconds (second call, compiled).
    And the decoding results, in the same order.
  """
  per_row = int(masked[0].sum())
  model_tokens = jnp.asarray(tokens, jnp.int32)
  hidden = jnp.asarray(masked)
  run = lambda value: jax.block_until_ready(
    decoding.fill(
      model,
      model_tokens,
      hidden,
      rule=decoding.threshold(value),
      mask_token=mask_token,
    )
  )
  run(0.0)  # one step: compiles; thresholds are traced, so only once
  rows, results, agreements = [], [], []
  for value in (*thresholds, ONE_PER_STEP):
    start = time.perf_counter()
    result = run(value)
    seconds = time.perf_counter() - start
    right = (np.asarray(result.tokens) == tokens) & masked
    agreements.append(right.sum(1) / per_row)
    row = {
      "threshold": "one per step" if value == ONE_PER_STEP else value,
      "tokens_per_forward": float(np.mean(per_row / np.asarray(result.nfe))),
      "agreement": float(agreements[-1].mean()),
      "seconds": seconds,
    }
    if likelihood:
      nll = left_to_right_nll(model, result.tokens, hidden, mask_token, per_row)
      row["nll_per_token"] = float(np.mean(nll) / per_row)
    rows.append(row)
    results.append(result)
  for row, agreement in zip(rows, agreements, strict=True):
    change = agreement - agreements[-1]
    row["agreement_change"] = float(change.mean())
    row["paired_error"] = float(change.std(ddof=1) / np.sqrt(len(change)))
  return rows, results


def true_nll(
  model: Any, tokens: np.ndarray, masked: np.ndarray, mask_token: int
) -> float:
  """`left_to_right_nll` of the true text, nats per masked token."""
  count = int(masked[0].sum())
  nll = left_to_right_nll(
    model, jnp.asarray(tokens), jnp.asarray(masked), mask_token, count
  )
  return float(np.mean(nll) / count)


def left_to_right_nll(
  model: Any,
  tokens: jax.Array,
  masked: jax.Array,
  mask_token: int,
  count: int,
) -> np.ndarray:
  """-log p(masked text | rest) with the unknowns revealed left to right.

  A masked model gives one exact likelihood per order of revealing; this is
  the one of reading order, so it judges all decoders by one distribution.

  Args:
    model: a `Bound` masked-diffusion model.
    tokens: [N, T] int32, the text with its gaps filled.
    masked: [N, T] bool, the gaps.
    mask_token: the id of MASK, never predicted.
    count: masked positions per row.

  Returns:
    [N] float32 nats. Costs `count` forward passes.
  """
  # [N, count] positions in reading order
  positions = jnp.argsort(~masked, axis=1, stable=True)[:, :count]
  return np.asarray(_reveal(model, tokens, masked, positions, mask_token))


@jax.jit
def _reveal(model, tokens, masked, positions, mask_token):
  rows = jnp.arange(tokens.shape[0])

  def step(state, position):
    known, total = state
    hidden, _ = model.forward(known)
    logits = (hidden[rows, position] @ model.head).astype(jnp.float32)
    logits = logits.at[:, mask_token].set(-jnp.inf)
    true = tokens[rows, position]
    log_p = jax.nn.log_softmax(logits)[rows, true]
    return (known.at[rows, position].set(true), total - log_p), None

  known = jnp.where(masked, mask_token, tokens)
  total = jnp.zeros(tokens.shape[0], jnp.float32)
  (_, total), _ = jax.lax.scan(step, (known, total), positions.T)
  return total
