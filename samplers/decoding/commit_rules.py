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

from giantsteps.kernels_pallas.unmask_stats import Stats

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hierarchical:
  """Commits the best of every run of masked positions; see `hierarchical`."""

  high: Number
  low: Number
  confidence: ClassVar[str] = "probability"

  def transfer(
    self, confidence: jax.Array, eligible: jax.Array, progress: Progress
  ) -> jax.Array:
    del progress
    before = jnp.pad(eligible, ((0, 0), (1, 0)))[:, :-1]
    run = jnp.cumsum(eligible & ~before, -1)
    together = eligible[:, None] & (run[:, None] == run[:, :, None])
    place = jnp.arange(eligible.shape[1])
    earlier = (place[None] < place[:, None])[None]
    other, own = confidence[:, None], confidence[..., None]
    ahead = together & ((other > own) | (other == own) & earlier)
    leads = ~jnp.any(ahead, -1) & (confidence > _column(self.low))
    sure = leads | (confidence > _column(self.high))
    return eligible & sure | best(confidence, eligible)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Credit:
  """A threshold on logits that remember what was likely; see `credit`."""

  value: Number
  alpha: Number
  gamma: Number
  beta: Number
  confidence: ClassVar[str] = "probability"

  def transfer(
    self, confidence: jax.Array, eligible: jax.Array, progress: Progress
  ) -> jax.Array:
    rule = Threshold(self.value, "probability")
    return rule.transfer(confidence, eligible, progress)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Smoothing:
  """A falling threshold, masked inputs softened; see `smoothing`."""

  value: Number
  weight: Number
  growth: Number
  most: Number
  fall: Number
  confidence: ClassVar[str] = "probability"

  def transfer(
    self, confidence: jax.Array, eligible: jax.Array, progress: Progress
  ) -> jax.Array:
    value = 1 - jnp.asarray(self.fall) * jnp.asarray(progress.step)
    rule = Threshold(jnp.maximum(value, self.value), "probability")
    return rule.transfer(confidence, eligible, progress)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Remasking:
  """Another rule that now and then takes back; see `remasking`."""

  rule: "Rule"
  count: Number
  every: Number
  times: Number

  @property
  def confidence(self) -> str:
    return self.rule.confidence

  def transfer(
    self, confidence: jax.Array, eligible: jax.Array, progress: Progress
  ) -> jax.Array:
    return self.rule.transfer(confidence, eligible, progress)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Editing:
  """A threshold that also replaces what it has committed; see `editing`."""

  value: Number
  edit: Number
  post: Number
  confidence: ClassVar[str] = "probability"

  def transfer(
    self, confidence: jax.Array, eligible: jax.Array, progress: Progress
  ) -> jax.Array:
    rule = Threshold(self.value, "probability")
    return rule.transfer(confidence, eligible, progress)


Rule = (
  Threshold
  | Factor
  | TopN
  | Autoregressive
  | Hierarchical
  | Credit
  | Smoothing
  | Remasking
  | Editing
)


class View(NamedTuple):
  """What a rule sees of the active blocks, [B, W] each but `progress`."""

  token: jax.Array  # what would be committed
  confidence: jax.Array  # of the rule's kind, higher is surer
  probability: jax.Array  # of that token
  eligible: jax.Array  # masked positions of the answer
  decided: jax.Array  # positions that were committed
  current: jax.Array  # tokens that stand there
  committed_as: jax.Array  # probability of those when they were committed
  progress: Progress


class Change(NamedTuple):
  """What becomes of the blocks."""

  commit: jax.Array  # [B, W] bool, takes the new token
  remask: jax.Array  # [B, W] bool, becomes masked again
  hold: jax.Array  # [B] bool, the block goes on though nothing is masked


def decide(rule: Rule, view: View) -> Change:
  """One step of a rule; at least one position where any is eligible."""
  none = jnp.zeros_like(view.eligible)
  hold = jnp.zeros(none.shape[0], bool)
  change = Change(
    rule.transfer(view.confidence, view.eligible, view.progress), none, hold
  )
  match rule:
    case Remasking():
      turn = jnp.asarray(view.progress.step) + 1
      due = (turn % rule.every == 0) & (turn <= rule.every * rule.times)
      there = view.decided | change.commit
      kept = jnp.where(change.commit, view.probability, view.committed_as)
      worst = _rank(-kept, there) < _column(rule.count)
      due = jnp.reshape(due, (-1, 1))
      remask = there & worst & due
      return Change(change.commit & ~remask, remask, hold)
    case Editing():
      better = view.probability > _column(rule.edit)
      edit = view.decided & (view.token != view.current) & better
      left = jnp.asarray(view.progress.total + rule.post - view.progress.step)
      edit &= (left > 0)[:, None]
      again = jnp.any(edit | change.commit, -1) & (left > 1)
      return Change(change.commit | edit, none, again)
    case _:
      return change


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


def hierarchical(high: Number = 0.9, low: Number = 0.4) -> Hierarchical:
  """Commits probabilities above `high`, the best of every run of neighbouring
  masked positions if above `low`, and the best of the block (dInfer).

  Args:
    high, low: scalar or [B]. Traced.
  """
  return Hierarchical(_number(high), _number(low))


def credit(
  value: Number = 0.9,
  alpha: Number = 0.7,
  gamma: Number = 0.2,
  beta: Number = 0.8,
) -> Credit:
  """`threshold` on logits + alpha log(1 + M), M the credit of each token: every
  step M falls by `beta` and grows by p^gamma at the best token (dInfer).

  Begins anew in every block. Needs the logits of the active block [B, W, V].

  Args:
    value, alpha, gamma, beta: scalars. Traced.
  """
  return Credit(*map(_number, (value, alpha, gamma, beta)))


def smoothing(
  value: Number = 0.9,
  weight: Number = 0.15,
  growth: Number = 0.02,
  most: Number = 0.3,
  fall: Number = 0.02,
) -> Smoothing:
  """Masked inputs become (1-w) MASK + w times the expected embedding (dInfer).

  After i steps of a block w = min(weight + growth (i-1), most), and what is
  committed has a probability of at least max(value, 1 - fall i). Needs the
  logits of the active block and a model that takes `mix`.

  Args:
    value, weight, growth, most, fall: scalars. Traced.
  """
  return Smoothing(*map(_number, (value, weight, growth, most, fall)))


def remasking(
  rule: Rule, count: Number, every: Number, times: Number
) -> Remasking:
  """Another rule whose least sure commits become masked again (ReMDM,
  arXiv:2503.00307, as a schedule by number instead of probability).

  Args:
    rule: commits.
    count: positions of the block that are taken back, those of the lowest
      probability when they were committed.
    every: steps of a block between two times. Traced, like all.
    times: how often per block, so that it ends.

  Raises:
    ValueError: if a number is below 1 (count: 0), or the rules are nested.
  """
  if isinstance(rule, Remasking | Editing):
    raise ValueError(f"remasking({type(rule).__name__}): takes a plain rule")
  for name, x, low in (
    ("count", count, 0),
    ("every", every, 1),
    ("times", times, 1),
  ):
    if not isinstance(x, jax.Array) and np.min(x) < low:
      raise ValueError(f"{name}={x}: at least {low}")
  return Remasking(rule, *(_number(x, np.int32) for x in (count, every, times)))


def editing(
  value: Number = 0.5, edit: Number = 0.0, post: Number = 8
) -> Editing:
  """`threshold`, and committed tokens of the block are replaced where the model
  now prefers another one with a probability above `edit` (LLaDA2.1's joint
  threshold). The block goes on until a step changes nothing, for at most `post`
  steps more than it has masks.

  Args:
    value, edit: scalar or [B]; post: scalar. Traced.
  """
  return Editing(_number(value), _number(edit), _number(post, np.int32))


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
    rule: `top_n` takes the first of its steps, with all of L as one block;
      `credit` has nothing to remember yet, so it is its threshold.
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


def confidence_of(
  kind: str, stats: Stats, noise: jax.Array | None
) -> jax.Array:
  """`confidence` from statistics of the logits, [B, W].

  "margin" is that of the token over the best other one: below zero where
  noise has chosen another token than the best.
  """
  if kind == "random":
    assert noise is not None
    return noise
  if kind == "entropy":
    out = -stats.entropy
  else:
    out = jnp.exp(stats.logit - stats.logsumexp)
    if kind == "margin":
      out -= jnp.exp(stats.second - stats.logsumexp)
  # A model that returns NaN must not stop the loop from ending.
  return jnp.where(jnp.isnan(out), jnp.finfo(out.dtype).min, out)


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
