"""Commit rules: which masked positions become final at one step.

A rule is data: its numbers are leaves of a pytree (sweeping a threshold does
not recompile), its choices are static. All rules rank positions by a
confidence that ignores temperature and noise, and see eligible positions
only. Fast-dLLM (arXiv:2505.22618) for threshold and factor, dParallel
(arXiv:2509.26488) for entropy, LLaDA (arXiv:2502.09992) and Dream
(arXiv:2508.15487) for top-n and its schedules.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CONFIDENCES = ("probability", "margin", "entropy", "random")
SCHEDULES = ("even", "linear_time")
Number = jax.Array | np.ndarray | float  # scalar, or [B] for one per row
_LINEAR_TIME_END = 1e-3  # Dream's eps: its time runs from 1 to this


class Progress(NamedTuple):
  """Where each row stands in its active block: [B] int32, or scalars."""

  step: Number  # model calls since the block was entered
  total: Number  # masked positions when it was entered
  block: Number  # index of the block
  num_blocks: Number


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Threshold:
  """Commits confidence >= value and the best position; see `threshold`."""

  value: Number
  confidence: str = dataclasses.field(metadata={"static": True})

  def transfer(
    self, confidence: jax.Array, eligible: jax.Array, progress: Progress
  ) -> jax.Array:
    del progress
    sure = confidence >= _column(self.value)
    return eligible & sure | best(confidence, eligible)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factor:
  """Commits the n most probable while p_n >= 1 - value/(n+1); `factor`."""

  value: Number
  confidence: ClassVar[str] = "probability"

  def transfer(
    self, confidence: jax.Array, eligible: jax.Array, progress: Progress
  ) -> jax.Array:
    del progress
    rank = _rank(confidence, eligible)
    needed = 1 - _column(self.value) / (rank + 2)  # n = rank + 1
    # The longest prefix ends before the lowest rank that fails.
    fails = eligible & (confidence < needed)
    length = jnp.min(jnp.where(fails, rank, rank.shape[-1]), -1, keepdims=True)
    return eligible & (rank < jnp.maximum(length, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopN:
  """Commits a scheduled number of the surest positions; see `top_n`."""

  steps: Number
  confidence: str = dataclasses.field(metadata={"static": True})
  schedule: str = dataclasses.field(metadata={"static": True})

  def transfer(
    self, confidence: jax.Array, eligible: jax.Array, progress: Progress
  ) -> jax.Array:
    left = jnp.sum(eligible, -1)
    count = self._count(left, progress)
    return eligible & (_rank(confidence, eligible) < count[:, None])

  def _count(self, left: jax.Array, progress: Progress) -> jax.Array:
    """Positions to commit now, [B] int32; left [B] are still masked."""
    step, total, block, num_blocks = progress
    steps = self.steps // num_blocks + (block < self.steps % num_blocks)
    steps = jnp.maximum(steps, 1)
    if self.schedule == "even":
      count = total // steps + (step < total % steps)
    else:  # left (1 - t_{i+1} / t_i) on a linear grid of times t
      dt = (1 - _LINEAR_TIME_END) / steps
      count = jnp.floor(left * (dt / (1 - step * dt))).astype(left.dtype)
    return jnp.where(step + 1 >= steps, left, count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Autoregressive:
  """Commits the leftmost position; see `autoregressive`."""

  confidence: ClassVar[str] = "probability"  # computed by no program: unused

  def transfer(
    self, confidence: jax.Array, eligible: jax.Array, progress: Progress
  ) -> jax.Array:
    del progress
    return best(jnp.zeros_like(confidence), eligible)


Rule = Threshold | Factor | TopN | Autoregressive


def threshold(value: Number = 0.9) -> Threshold:
  """Commits every position whose token has probability >= value.

  Fast-dLLM (arXiv:2505.22618). The most probable position is always
  committed, so value > 1 is one token per step.

  Args:
    value: scalar, or [B] for a threshold per row. Traced.
  """
  return Threshold(_number(value), "probability")


def entropy_threshold(value: Number = 0.5) -> Threshold:
  """Commits every position whose entropy is <= value, and the lowest one.

  dParallel (arXiv:2509.26488).

  Args:
    value: nats over the whole vocabulary; scalar or [B]. Traced.
  """
  return Threshold(-_number(value), "entropy")


def factor(value: Number = 1.0) -> Factor:
  """Commits the n most probable, n the last of 1, 2, .. that all satisfy

    p_(n) >= 1 - value / (n + 1),

  and the first always: Fast-dLLM (arXiv:2505.22618), section 3.3. With value
  1 parallel and sequential greedy decoding of one step agree (Theorem 1).

  Args:
    value: >= 0, scalar or [B]. Traced.
  """
  return Factor(_number(value))


def top_n(
  steps: Number,
  confidence: str = "probability",
  schedule: str = "even",
) -> TopN:
  """Commits the surest positions on a fixed schedule of steps.

  Args:
    steps: model calls for all blocks together, shared out evenly, earlier
      blocks first and each block at least one. Traced.
    confidence: "probability" of the token (LLaDA's low-confidence remasking,
      Dream's maskgit_plus), "margin" p1 - p2, "entropy" (negative) or
      "random".
    schedule: "even": m // steps positions, one more in the first m % steps
      steps. "linear_time" (Dream): floor(left * (1 - t'/t)) with t falling
      from 1 to 1e-3, the last step commits what is left; the floor can be 0,
      as published, and that model call is then spent for nothing.

  Raises:
    ValueError: for a confidence or schedule that does not exist, steps < 1.
  """
  if confidence not in CONFIDENCES:
    raise ValueError(f"confidence={confidence!r}: one of {CONFIDENCES}")
  if schedule not in SCHEDULES:
    raise ValueError(f"schedule={schedule!r}: one of {SCHEDULES}")
  if not isinstance(steps, jax.Array) and np.min(steps) < 1:
    raise ValueError(f"steps={steps}: at least 1")
  return TopN(_number(steps, np.int32), confidence, schedule)


def autoregressive() -> Autoregressive:
  """Commits the leftmost masked position: one token per step, in order."""
  return Autoregressive()


def commit(
  rule: Rule,
  logits: jax.Array,
  masked: jax.Array,
  key: jax.Array | None = None,
) -> jax.Array:
  """One step of a rule, with the most probable token at every position.

  Args:
    rule: `top_n` takes the first of its steps, with all of L as one block.
    logits: [B, L, V] float.
    masked: [B, L] bool, True where nothing is committed yet.
    key: needed by confidence "random" only.

  Returns:
    [B, L] bool, True at what is committed now: some masked positions, at
    least one in each row that has any. Ties go to the lowest position.

  Raises:
    ValueError: if the shapes do not fit or a key is missing.
  """
  if logits.ndim != 3 or masked.shape != logits.shape[:2]:
    raise ValueError(
      f"logits {logits.shape}, masked {masked.shape}: [B, L, V] and [B, L]"
    )
  masked = jnp.asarray(masked, bool)
  noise = None
  if rule.confidence == "random":
    if key is None:
      raise ValueError("confidence='random' needs a key")
    noise = jax.random.uniform(key, masked.shape)
  logits = jnp.asarray(logits)
  token = jnp.argmax(logits, -1)
  sure = confidence(rule.confidence, logits, token, noise)
  total = jnp.sum(masked, -1)
  committed = rule.transfer(sure, masked, Progress(0, total, 0, 1))
  some = jnp.any(committed, -1, keepdims=True)
  return jnp.where(some, committed, best(sure, masked))


def confidence(
  kind: str,
  logits: jax.Array,
  token: jax.Array,
  noise: jax.Array | None = None,
) -> jax.Array:
  """How sure the model is of each position; higher is surer.

  Args:
    kind: one of CONFIDENCES.
    logits: [B, L, V] without temperature and noise; -inf excludes a token.
    token: [B, L] int, what would be committed.
    noise: [B, L], returned for "random".

  Returns:
    [B, L] in float32 or wider, finite. Entropy is in nats, negative.
  """
  if kind == "random":
    assert noise is not None
    return noise
  wide = np.promote_types(logits.dtype, np.float32)
  logp = jax.nn.log_softmax(logits.astype(wide), -1)
  if kind == "probability":
    out = jnp.exp(jnp.take_along_axis(logp, token[..., None], -1)[..., 0])
  elif kind == "margin":
    top = jnp.exp(jax.lax.top_k(logp, 2)[0])
    out = top[..., 0] - top[..., 1]
  else:
    p = jnp.exp(logp)
    out = jnp.sum(jnp.where(p > 0, p * logp, 0), -1)
  # A model that returns NaN must not stop the loop from ending.
  return jnp.where(jnp.isnan(out), jnp.finfo(wide).min, out)


def best(confidence: jax.Array, eligible: jax.Array) -> jax.Array:
  """True at the surest eligible position of each row: [B, L] bool."""
  sure = jnp.where(eligible, confidence, -jnp.inf)
  first = jnp.argmax(sure, -1, keepdims=True)  # the lowest of equals
  return eligible & (jnp.arange(eligible.shape[-1])[None] == first)


def _rank(confidence: jax.Array, eligible: jax.Array) -> jax.Array:
  """0 for the surest eligible position, ties by position: [B, L] int32."""
  sure = jnp.where(eligible, confidence, -jnp.inf)
  order = jnp.argsort(-sure, axis=-1, stable=True)
  return jnp.argsort(order, axis=-1)


def _number(value: Number, dtype: type = np.float32) -> Number:
  """On the host and, if it is a scalar, hashable; jax arrays stay as is."""
  return value if isinstance(value, jax.Array) else np.asarray(value, dtype)[()]


def _column(value: Number) -> jax.Array:
  """Scalar or [B] -> [1 or B, 1]."""
  return jnp.reshape(jnp.asarray(value), (-1, 1))
