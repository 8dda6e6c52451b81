"""DPM-Solver-12 and -23: step size by an embedded pair (arXiv:2206.00927)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from giantsteps.samplers.diffusion import predictions, tables
from giantsteps.samplers.diffusion.schedules import Schedule

LOOKUP = 4096  # intervals of the clock's table, uniform in lambda


class Clock(NamedTuple):
  """t -> functions of lambda on a uniform grid, for use in a program."""

  first: float
  width: float
  model_time: np.ndarray  # [M + 1]
  log_alpha: np.ndarray  # [M + 1]


class _Loop(NamedTuple):
  x: jax.Array
  previous: jax.Array  # lower-order solution of the last accepted step
  lam: jax.Array
  h: jax.Array
  nfe: jax.Array


def adaptive(
  predict: Callable[[jax.Array, jax.Array], jax.Array],
  x_T: jax.Array,
  schedule: Schedule,
  *,
  prediction: str,
  order: int = 2,
  t_start: float | None = None,
  t_end: float | None = None,
  gauge: str = "data",
  first_step: float = 0.05,
  atol: float = 0.0078,
  rtol: float = 0.05,
  safety: float = 0.9,
  t_tolerance: float = 1e-5,
  max_calls: int = 10_000,
) -> tuple[jax.Array, jax.Array]:
  """Singlestep DPM-Solver(++) of orders (1, 2) or (2, 3), step by step.

  A step h in lambda gives x_low and x_high from the same calls; with delta =
  max(atol, rtol max(|x_low|, |x_low before|)) it is accepted if E = max over
  samples of rms((x_high - x_low) / delta) <= 1, and h becomes min(safety h
  E^(-1 / order), what is left) in any case.

  Args:
    predict: `predict(x, t)`, x [B, ...], t [B] (model time) -> [B, ...]; it
      stands in the program once.
    x_T: [B, ...] sample at t_start; all samples share the steps.
    schedule: alpha, sigma and the model's clock, lambda finite from t_start to
      t_end.
    prediction: what the model returns, one of `predictions.KINDS` but
      "velocity".
    order: 2 (DPM-Solver-12) or 3 (DPM-Solver-23).
    t_start: schedule.t_max if None.
    t_end: schedule.t_min if None.
    gauge: "data" (DPM-Solver++) or "noise" (DPM-Solver).
    first_step: first h, in lambda.
    atol: absolute tolerance; .0078 is 2 / 256, for images in [-1, 1].
    rtol: relative tolerance.
    safety: theta of the paper.
    t_tolerance: the run ends within this of t_end.
    max_calls: gives up after that many calls, with NaN.

  Returns:
    ([B, ...] the sample, [] int32 calls made: order per attempt).

  Raises:
    ValueError: other settings, or infinite lambda at an end.
  """
  if order not in (2, 3) or gauge not in ("data", "noise"):
    raise ValueError(
      f"order={order} must be 2 or 3, gauge={gauge!r} data/noise"
    )
  t0 = schedule.t_max if t_start is None else t_start
  t1 = schedule.t_min if t_end is None else t_end
  first, last = float(schedule.lam(t0)), float(schedule.lam(t1))
  if not (np.isfinite(first) and np.isfinite(last) and first < last):
    raise ValueError(
      f"log-SNR must rise and be finite from t_start={t0} to t_end={t1}, not"
      f" {first} to {last}; move the ends, rectified_flow to .999 and .001"
    )
  clock = _clock(schedule, first, last)
  # |t - t_end| < t_tolerance, in lambda
  slack = max(last - float(schedule.lam(t1 + t_tolerance)), 1e-5)
  state = tables.init(x_T, order)
  dtype = state.x.dtype
  axes = tuple(range(1, x_T.ndim))

  def attempt(run: _Loop) -> _Loop:
    row = _rows(clock, run.lam, run.h, order, gauge, prediction)
    row = jax.tree.map(lambda leaf: leaf.astype(dtype), row)

    def body(state, row):
      output = predict(state.x, jnp.full(x_T.shape[:1], row.time))
      return tables.step(state, row, output), None

    end, _ = jax.lax.scan(body, tables.init(run.x, order), row)
    # the embedded solution: one order less, of the stages it needs
    weights = _low(clock, run.lam, run.h, order, gauge)
    low = weights[0].astype(dtype) * run.x
    for weight, m in zip(weights[1:], end.past, strict=False):
      low = low + weight.astype(dtype) * m
    scale = jnp.maximum(jnp.abs(low), jnp.abs(run.previous))
    error = (end.x - low) / jnp.maximum(atol, rtol * scale)
    error = jnp.sqrt(jnp.mean(error**2, axes)).max()
    accept = error <= 1
    lam = jnp.where(accept, run.lam + run.h, run.lam)
    factor = safety * error ** (-1.0 / order)
    return _Loop(
      jnp.where(accept, end.x, run.x),
      jnp.where(accept, low, run.previous),
      lam,
      jnp.minimum(run.h * factor, last - lam),
      run.nfe + order,
    )

  start = _Loop(
    state.x,
    state.x,
    jnp.asarray(first, dtype),
    jnp.asarray(first_step, dtype),
    jnp.zeros((), jnp.int32),
  )
  run = jax.lax.while_loop(
    lambda run: (last - run.lam > slack) & (run.nfe < max_calls), attempt, start
  )
  done = last - run.lam <= slack
  return jnp.where(done, run.x, jnp.nan), run.nfe


def _clock(schedule: Schedule, first: float, last: float) -> Clock:
  lam = np.linspace(first, last, LOOKUP + 1)
  t = schedule.t_of_lambda(lam)
  alpha, _ = schedule.alpha_sigma(t)
  width = (last - first) / LOOKUP
  return Clock(first, width, schedule.model_time(t), np.log(alpha))


def _look_up(clock: Clock, values: np.ndarray, lam: jax.Array) -> jax.Array:
  """Cubic interpolation through four neighbours; error of order width^4."""
  place = (lam - clock.first) / clock.width
  i = jnp.clip(jnp.floor(place), 1, LOOKUP - 2).astype(jnp.int32)
  u = place - i.astype(place.dtype)
  f = [jnp.asarray(values, lam.dtype)[i + k] for k in (-1, 0, 1, 2)]
  return (
    -u * (u - 1) * (u - 2) / 6 * f[0]
    + (u + 1) * (u - 1) * (u - 2) / 2 * f[1]
    - (u + 1) * u * (u - 2) / 2 * f[2]
    + (u + 1) * u * (u - 1) / 6 * f[3]
  )


def _moments(h: jax.Array, num: int, sign: int) -> list[jax.Array]:
  """J_k by quadrature: all terms positive, exact to rounding in float32."""
  node, weight = np.polynomial.legendre.leggauss(24)
  r, w = (jnp.asarray(a, h.dtype) for a in ((node + 1) / 2, weight / 2))
  kernel = jnp.exp(sign * h * (1 - r)) * w
  return [h * jnp.sum(kernel * r**k) for k in range(num)]


def _move(clock, a, h, gauge):
  """(advance, factor of the moments, moments) from lambda = a by h."""
  log_a, log_b = (_look_up(clock, clock.log_alpha, x) for x in (a, a + h))
  if gauge == "data":
    advance, factor = jnp.exp(log_b - log_a - h), jnp.exp(log_b)
    return advance, factor, _moments(h, 3, -1)
  return jnp.exp(log_b - log_a), -jnp.exp(log_b - a - h), _moments(h, 3, 1)


def _rows(clock, lam, h, order, gauge, prediction) -> tables.Table:
  """The rows of one attempt, traced: midpoint variants, r = 1/2 or 1/3, 2/3."""
  inner = [k / order for k in range(order)]
  points = jnp.stack([lam + r * h for r in inner])
  log_alpha = _look_up(clock, clock.log_alpha, points)
  alpha, sigma = jnp.exp(log_alpha), jnp.exp(log_alpha - points)
  kind = {"data": "x0", "noise": "eps"}[gauge]
  target = jnp.stack(predictions.affine(prediction, kind, alpha, sigma), -1)
  advance, weights = [], []
  for i, r in enumerate([*inner[1:], 1.0]):
    gain, factor, j = _move(clock, lam, r * h, gauge)
    match i, order:
      case 0, _:
        row = [j[0]]
      case 1, 2:
        row = [j[0], 0 * j[0]]
      case 1, 3:
        row = [2 * j[1], j[0] - 2 * j[1]]
      case _:
        row = [j[1] * 1.5, 0 * j[0], j[0] - j[1] * 1.5]
    advance.append(gain)
    weights.append(
      jnp.stack([*(factor * w for w in row), *[0 * h] * (order - len(row))])
    )
  first = jnp.arange(order) == 0
  return tables.Table(
    time=_look_up(clock, clock.model_time, points),
    target=target,
    anchor=jnp.stack([~first, first], -1).astype(h.dtype),
    corrector=jnp.zeros((order, order)),
    advance=jnp.stack(advance),
    history=jnp.stack(weights),
    noise=jnp.zeros(order),
  )


def _low(clock, lam, h, order, gauge) -> list[jax.Array]:
  """Weights of the lower-order solution: of x, m_0 (, m_1)."""
  gain, factor, j = _move(clock, lam, h, gauge)
  if order == 2:
    return [gain, factor * j[0]]
  # singlestep order 2 with r1 = 1/3: slope J_0 / (2 r1)
  return [gain, factor * (j[0] - 1.5 * j[0]), factor * 1.5 * j[0]]
