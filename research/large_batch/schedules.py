"""Learning rates over the steps of a run, and how they scale with the batch.

Every schedule is a function step -> rate, jit-safe, float32 (float64 for
float64 steps), clamped outside [0, num_steps]. The recipes of LAMB's tables
(arXiv:1904.00962) are functions of the batch size.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

BERT_EXAMPLES = 512 * 1_000_000  # one million steps of batch 512
IMAGENET_EXAMPLES = 1_281_167


class Recipe(NamedTuple):
  """What one training run needs to know.

  Attributes:
    learning_rate: peak.
    warmup: part of the steps over which the rate rises from 0.
    num_steps: optimizer steps.
  """

  learning_rate: float
  warmup: float
  num_steps: int


def linear(peak: float, num_steps: int) -> Schedule:
  """peak (1 - t / num_steps).

  Args:
    peak: rate at step 0.
    num_steps: step from which on the rate is 0.

  Returns:
    step (int or float, any shape) -> rate, same shape.
  """
  return polynomial_with_warmup(peak, num_steps, warmup=0)


def polynomial_with_warmup(
  peak: float,
  num_steps: int,
  *,
  warmup: int | float,
  power: float = 1.0,
  continuous: bool = False,
) -> Schedule:
  """peak t / w for t < w, then peak (1 - t / T)^power (BERT, LAMB).

  The published form counts the decay from step 0, so the rate jumps down from
  peak to peak (1 - w / T)^power where the warm-up ends. continuous=True decays
  from the end of the warm-up instead: peak (1 - (t - w) / (T - w))^power.

  Args:
    peak: rate towards which the warm-up rises.
    num_steps: T, from which on the rate is 0.
    warmup: w; an int counts steps, a float in [0, 1] is a part of num_steps.
    power: 1 for BERT, 2 for LARS.
    continuous: no jump.

  Returns:
    step (int or float, any shape) -> rate, same shape.

  Raises:
    ValueError: for a warm-up that does not fit into num_steps.
  """
  w = _steps("warmup", warmup, num_steps)

  def schedule(step):
    t = _clamped(step, num_steps)
    start = w if continuous else 0
    # a run of no steps, or of warm-up only, is at its end
    left = (num_steps - t) / max(num_steps - start, 1e-30)
    falling = jnp.clip(left, 0, 1) ** power
    return peak * jnp.where(t < w, t / max(w, 1), falling)

  return schedule


def warmup_stable_decay(
  peak: float,
  num_steps: int,
  *,
  warmup: int | float = 0.1,
  decay: int | float = 0.2,
  shape: Literal["linear", "sqrt"] = "linear",
) -> Schedule:
  """Rises over the warm-up, stays at peak, falls to 0 over the last steps.

  WSD, arXiv:2404.06395; the shape 1 - sqrt(z) is of arXiv:2405.18392.

  Args:
    peak: rate of the plateau.
    num_steps: T, from which on the rate is 0.
    warmup, decay: an int counts steps, a float in [0, 1] is a part of T.
    shape: over the last steps, z from 0 to 1: 1 - z, or 1 - sqrt(z).

  Returns:
    step (int or float, any shape) -> rate, same shape.

  Raises:
    ValueError: where warmup and decay exceed num_steps; an unknown shape.
  """
  if shape not in ("linear", "sqrt"):
    raise ValueError(f"shape={shape!r}: choose linear or sqrt")
  w = _steps("warmup", warmup, num_steps)
  d = _steps("decay", decay, num_steps)
  if w + d > num_steps * (1 + 1e-9):
    raise ValueError(f"warmup {w} and decay {d} exceed num_steps={num_steps}")

  def schedule(step):
    t = _clamped(step, num_steps)
    left = jnp.clip((num_steps - t) / max(d, 1e-30), 0, 1)
    falling = left if shape == "linear" else 1 - jnp.sqrt(1 - left)
    return peak * jnp.where(t < w, t / max(w, 1e-30), falling)

  return schedule


def stages(recipes: Sequence[Recipe]) -> Schedule:
  """One `polynomial_with_warmup` after the other, each rising from 0 again.

  The re-warm-up of LAMB's mixed-batch run: where the sequence length changes,
  the rate starts from 0, the moments stay.

  Args:
    recipes: the stages in order, such as `bert_64k_32k()`.

  Returns:
    step, counted through all stages -> rate; 0 after the last.

  Raises:
    ValueError: for no stages.
  """
  if not recipes:
    raise ValueError("stages: give at least one recipe")
  starts = [sum(r.num_steps for r in recipes[:i]) for i in range(len(recipes))]
  parts = [
    polynomial_with_warmup(r.learning_rate, r.num_steps, warmup=r.warmup)
    for r in recipes
  ]

  def schedule(step):
    t = _clamped(step, starts[-1] + recipes[-1].num_steps)
    rate = parts[0](t)
    for start, part in zip(starts[1:], parts[1:], strict=True):
      rate = jnp.where(t >= start, part(t - start), rate)
    return rate

  return schedule


def bert(batch_size: int) -> Recipe:
  """LAMB's untuned recipe for BERT: square-root rate, linear-epoch warm-up.

  lr = 5e-3 2^(-(15 - log2 B) / 2), warm-up B / 32768 / 5 of the steps (3,125
  of them whatever B), 512 million examples in all.

  Args:
    batch_size: B, sequences; the paper's table has 512 to 32,768.

  Returns:
    The recipe; polynomial decay of power 1.

  Raises:
    ValueError: where the warm-up would be longer than the run.
  """
  return Recipe(
    scale_lr(5e-3, 32_768, batch_size),
    scale_warmup(1 / 5, 32_768, batch_size),
    round(BERT_EXAMPLES / batch_size),
  )


def bert_64k_32k() -> tuple[Recipe, Recipe]:
  """BERT with batch 65,536 at 128 tokens, then 32,768 at 512, 8,601 steps.

  NVIDIA's published settings of the run that the paper reports with 8,599
  steps and without its rates. Use: `stages(bert_64k_32k())`.
  """
  return Recipe(6e-3, 0.2843, 7_038), Recipe(4e-3, 0.128, 1_563)


def resnet50(batch_size: int, *, epochs: int = 90) -> Recipe:
  """LAMB's untuned recipe for ResNet-50 on ImageNet.

  lr = 4e-2 2^(-(15 - log2 B) / 2), warm-up over 20 B / 32768 epochs.

  Args:
    batch_size: B, images; the paper's table has 512 to 32,768.
    epochs: passes over 1,281,167 images.

  Returns:
    The recipe; the warm-up as a part of the steps.

  Raises:
    ValueError: where the warm-up would be longer than the run.
  """
  return Recipe(
    scale_lr(4e-2, 32_768, batch_size),
    scale_warmup(20 / epochs, 32_768, batch_size),
    round(epochs * IMAGENET_EXAMPLES / batch_size),
  )


def scale_lr(
  rate: float,
  batch_size: float,
  new_batch_size: float,
  rule: Literal["sqrt", "linear"] = "sqrt",
) -> float:
  """The rate for another batch size.

  sqrt keeps the covariance of the step (arXiv:1705.08741; LAMB), linear the
  expected step (arXiv:1706.02677).

  Args:
    rate: known to work with batch_size.
    batch_size, new_batch_size: positive.
    rule: the power, 1/2 or 1.

  Returns:
    rate (new_batch_size / batch_size)^power.

  Raises:
    ValueError: for a batch size that is not positive or an unknown rule.
  """
  if rule not in ("sqrt", "linear"):
    raise ValueError(f"rule={rule!r}: choose sqrt or linear")
  if batch_size <= 0 or new_batch_size <= 0:
    raise ValueError(f"batch sizes {batch_size}, {new_batch_size}: positive")
  ratio = new_batch_size / batch_size
  return rate * (math.sqrt(ratio) if rule == "sqrt" else ratio)


def scale_warmup(
  warmup: float, batch_size: float, new_batch_size: float
) -> float:
  """The part of the run to warm up over: in proportion to the batch (LAMB).

  At a constant number of examples that is a constant number of steps.

  Args:
    warmup: part of the steps with batch_size, in [0, 1].
    batch_size, new_batch_size: positive.

  Returns:
    warmup new_batch_size / batch_size.

  Raises:
    ValueError: where that is more than the whole run.
  """
  scaled = scale_lr(warmup, batch_size, new_batch_size, "linear")
  if not 0 <= scaled <= 1:
    raise ValueError(
      f"warm-up of {scaled:.3g} of the run at batch {new_batch_size}: choose it"
      " yourself, the rule ends here"
    )
  return scaled


def _clamped(step, num_steps: int) -> jax.Array:
  """The step in [0, num_steps], float32 or the wider float it has."""
  t = jnp.asarray(step)
  float_type = t.dtype if jnp.issubdtype(t.dtype, jnp.floating) else jnp.float32
  t = t.astype(jnp.promote_types(float_type, jnp.float32))
  return jnp.clip(t, 0, num_steps)


def _steps(name: str, value: int | float, num_steps: int) -> float:
  """An int as it is, a float times num_steps; warns of less than one step."""
  whole = isinstance(value, int)
  steps = float(value) if whole else value * num_steps
  if num_steps < 0 or not 0 <= value <= (num_steps if whole else 1):
    raise ValueError(
      f"{name}={value} of num_steps={num_steps}: give an int of at most"
      " num_steps, or a float in [0, 1]"
    )
  if 0 < steps < 1:
    warnings.warn(f"{name} of {steps:.2g} steps is none", stacklevel=3)
  return steps
