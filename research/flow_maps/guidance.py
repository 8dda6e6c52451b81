"""Guidance folded into the velocity at training time.

Guidance is a statement about the velocity field, that is the diagonal: a
guided v_{s,t} at t > s has no meaning. So the guided velocity becomes the
teacher (`velocity`) or the tangent (`fold`) of a loss, and sampling needs one
network call per step.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from giantsteps.research.flow_maps.interpolants import Velocity, expand
from giantsteps.samplers.diffusion import guidance


def fold(
  drift: jax.Array,
  conditional: jax.Array,
  unconditional: jax.Array,
  s: jax.Array,
  *,
  omega: float | jax.Array = 1.0,
  kappa: float | jax.Array = 0.5,
  interval: tuple[float, float] = (0.0, 1.0),
  dropped: jax.Array | None = None,
) -> jax.Array:
  """omega d + (1 - omega - kappa) v_null + kappa v_cond (arXiv:2505.13447).

  The tangent of `mean_flow_loss` for a map of the guided flow, whose scale is
  omega / (1 - kappa). No gradient passes.

  Args:
    drift: [B, ...] d = dI_s/ds.
    conditional: [B, ...] v_{s,s}(x) with the label.
    unconditional: [B, ...] v_{s,s}(x) without.
    s: [B] the time of x.
    omega: [] or [B].
    kappa: [] or [B], not 1.
    interval: times s, both ends included, outside of which d is kept.
    dropped: [B] bool, rows trained without their label, which keep d. Draw it
      independently of which rows are on the diagonal.

  Returns:
    [B, ...] like drift.
  """
  if not interval[0] <= interval[1]:
    raise ValueError(f"interval {interval} must be (low, high)")
  w, k = expand(jnp.asarray(omega), drift), expand(jnp.asarray(kappa), drift)
  guided = w * drift + (1 - w - k) * unconditional + k * conditional
  inside = (interval[0] <= s) & (s <= interval[1])
  if dropped is not None:
    inside = inside & ~dropped
  guided = jnp.where(expand(inside, drift), guided.astype(drift.dtype), drift)
  return jax.lax.stop_gradient(guided)


def velocity(
  model: Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array],
  condition: Any,
  null: Any,
  scale: guidance.Scale,
  *,
  interval: tuple[float, float] | None = None,
) -> Velocity:
  """Classifier-free guidance as a teacher: u + scale (c - u) at (t, t, x).

  Args:
    model: model(s, t, x, condition) -> [B, ...].
    condition: pytree of arrays [B, ...].
    null: the unconditional condition, of the same or a broadcastable shape.
    scale: 1 conditional, more for guidance; a number, [] or [B], or a
      function of t [B].
    interval: times outside of which the scale is 1.

  Returns:
    velocity(s, t, x) for `teacher=`: the second of its two times counts, and
    losses ask it where they are equal. One call on a doubled batch.
  """
  predict = guidance.classifier_free(
    lambda x, t, c: model(t, t, x, c), condition, null, scale, interval=interval
  )
  return lambda s, t, x: predict(x, t)


def autoguided(
  good: Velocity, bad: Velocity, scale: float | jax.Array
) -> Velocity:
  """bad + scale (good - bad) on the diagonal (arXiv:2406.02507).

  Args:
    good: the teacher, velocity(s, t, x).
    bad: a smaller or less trained teacher.
    scale: 1 is good itself; [] or [B].

  Returns:
    velocity(s, t, x) for `teacher=`; the second of its times counts.
  """

  def guided(s, t, x):
    del s
    low = bad(t, t, x)
    weight = expand(jnp.asarray(scale, low.dtype), low)
    return low + weight * (good(t, t, x) - low)

  return guided
