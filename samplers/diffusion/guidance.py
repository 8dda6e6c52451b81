"""Guidance: conditional models as plain `predict(x, t)` functions.

Guidance is linear in the prediction, and every prediction is the same affine
function of eps at fixed (x, t): what is written for eps holds for x0, v, flow
and velocity as it stands.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from giantsteps.samplers.diffusion import predictions
from giantsteps.samplers.diffusion.schedules import Schedule

Predict = Callable[[jax.Array, jax.Array], jax.Array]
Scale = float | jax.Array | Callable[[jax.Array], jax.Array]


def classifier_free(
  model: Callable[[jax.Array, jax.Array, Any], jax.Array],
  condition: Any,
  null: Any,
  scale: Scale,
  *,
  interval: tuple[float, float] | None = None,
) -> Predict:
  """u + scale (c - u) from one batch of 2 B (arXiv:2207.12598).

  Args:
    model: `model(x, t, condition)`, x [B, ...], t [B] -> [B, ...].
    condition: pytree of arrays [B, ...].
    null: the unconditional condition: the same pytree, each leaf of the shape
      of its partner or broadcastable to it.
    scale: 1 conditional, 0 unconditional, more for guidance. A number or
      array, [] or [B], possibly traced: changing it recompiles nothing. Or a
      function of the model time t [B], for guidance that differs by step.
      Only the Python number 1, without interval, leaves the doubled batch
      out: B rows instead of 2 B per call.
    interval: (low, high) model times, both included, outside of which the
      scale is 1 (arXiv:2404.07724). The batch is doubled there too.

  Returns:
    `predict(x, t)` for `tables.sample`; the model stands in it once.
  """
  if interval is None and isinstance(scale, int | float) and scale == 1:
    return lambda x, t: model(x, t, condition)
  if interval is not None and not interval[0] <= interval[1]:
    raise ValueError(f"interval {interval} must be (low, high)")
  both = jax.tree.map(_with_null, condition, null)

  def predict(x, t):
    twice = lambda a: jnp.concatenate([a, a])
    output = model(twice(x), twice(t), both)
    conditional, unconditional = jnp.split(output, 2)
    weight = _weight(scale, interval, x, t).astype(output.dtype)
    return unconditional + weight * (conditional - unconditional)

  return predict


def classifier(
  predict: Predict,
  log_prob: Callable[[jax.Array, jax.Array], jax.Array],
  scale: Scale,
  *,
  schedule: Schedule,
  prediction: str,
  interval: tuple[float, float] | None = None,
) -> Predict:
  """eps - scale sigma grad log p(y | x) (arXiv:2105.05233, alg. 2).

  Args:
    predict: the unconditional model.
    log_prob: `log_prob(x, t)` -> [B], log p(y | x_t) in nats of the labels
      wanted; differentiated in x.
    scale: as in `classifier_free`; 1 is Bayes' rule.
    schedule: of the model; its clock must rise with t.
    prediction: what predict returns, and so what is returned.
    interval: model times outside of which the scale is 0.

  Returns:
    `predict(x, t)`. One gradient of the classifier per call.
  """
  gain = _score_gain(schedule, prediction)

  def guided(x, t):
    grad = jax.grad(lambda x: jnp.sum(log_prob(x, t)))(x)
    weight = _weight(scale, interval, x, t, outside=0.0)
    step = gain(t).reshape(weight.shape[:1] + (1,) * (x.ndim - 1))
    output = predict(x, t)
    return output + (weight * step * grad).astype(output.dtype)

  return guided


def _with_null(condition: Any, null: Any) -> jax.Array:
  condition = jnp.asarray(condition)
  null = jnp.asarray(null, condition.dtype)
  if null.ndim < condition.ndim:
    null = null.reshape((1,) * (condition.ndim - null.ndim) + null.shape)
  return jnp.concatenate([condition, jnp.broadcast_to(null, condition.shape)])


def _weight(
  scale: Any,
  interval: tuple[float, float] | None,
  x: jax.Array,
  t: jax.Array,
  outside: float = 1.0,
) -> jax.Array:
  """Guidance scale per sample, [B, 1, ..]."""
  value = scale(t) if callable(scale) else scale
  weight = jnp.broadcast_to(jnp.asarray(value), t.shape)
  if interval is not None:
    inside = (interval[0] <= t) & (t <= interval[1])
    weight = jnp.where(inside, weight, outside)
  return weight.reshape(t.shape + (1,) * (x.ndim - 1))


def _score_gain(
  schedule: Schedule, prediction: str
) -> Callable[[jax.Array], jax.Array]:
  """d prediction / d score at fixed x, a function of the model time.

  Interpolated between 4096 times, half of them uniform in t, half of them in
  sqrt(t), since sigma falls like that to 0 on many schedules.
  """
  t = np.linspace(0, schedule.t_max, 2049)[1:]
  t = np.unique(np.concatenate([t, t**2 / schedule.t_max]))
  alpha, sigma = schedule.alpha_sigma(t)
  with np.errstate(divide="ignore", invalid="ignore"):
    rate = schedule.rate(t) if prediction == "velocity" else None
    _, out = predictions.affine("eps", prediction, alpha, sigma, rate)
  time, gains = schedule.model_time(t), -sigma * out
  known = np.isfinite(gains)
  time, gains = time[known], gains[known]

  def gain(t):
    return jnp.interp(t, jnp.asarray(time, t.dtype), gains.astype(t.dtype))

  return gain
