"""The loss of a flow map by its name in a config, and how a batch is split
between the diagonal and the jumps."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from giantsteps.experiments.harness import config as config_lib
from giantsteps.research import flow_maps

_LOSSES = {
  "lagrangian": flow_maps.lagrangian_loss,
  "frozen_lagrangian": flow_maps.frozen_lagrangian_loss,
  "eulerian": flow_maps.eulerian_loss,
  "progressive": flow_maps.progressive_loss,
  "mean_flow": flow_maps.mean_flow_loss,
  "improved_mean_flow": flow_maps.improved_mean_flow_loss,
}


def jumps(
  name: str,
  velocity: Any,
  x0: jax.Array,
  x1: jax.Array,
  s: jax.Array,
  t: jax.Array,
  r: jax.Array,
  I: flow_maps.Interpolant,
) -> jax.Array:
  """The loss `FlowMap.loss` of rows that jump, [B], summed over coordinates.

  The network teaches itself: no teacher but its own frozen output.

  Args:
    name: of the loss.
    velocity: velocity(s, t, x), in evaluation mode.
    x0, x1: [B, ...] noise, data.
    s, t: [B] in [0, 1], s <= t.
    r: [B] in [0, 1), of progressive_uniform: it splits the jump at u = r s +
      (1 - r) t.
    I: the interpolant.
  """
  if name == "progressive_uniform":
    u = r * s + (1 - r) * t
    return flow_maps.progressive_loss(velocity, x0, x1, s, t, I, u)
  if name == "discrete_lagrangian":
    # 1e-3: below, float32 sees no difference. No time is before 0.
    delta = jnp.maximum((t - s) / 10, 1e-3)
    return flow_maps.discrete_lagrangian_loss(
      *(velocity, x0, x1, s, jnp.maximum(t, delta), I, delta),
      stop_gradient="convex",
    )
  return _LOSSES[name](velocity, x0, x1, s, t, I)


def draw_times(
  wants: config_lib.FlowMap, key: jax.Array, rows: int
) -> tuple[jax.Array, jax.Array]:
  """s, t [B]; the first `diagonal_count` of them are on the diagonal."""
  draw = flow_maps.times.triangle
  if wants.times == "logit_normal":
    draw = flow_maps.times.logit_normal
  return draw(key, rows, diagonal=wants.diagonal)


def split(arrays: dict, count: int) -> tuple[dict, dict]:
  """`count` rows of [B, ...] leaves and the others, drawn evenly from the
  whole batch, so that on a mesh both parts are where the rows already are."""

  def part(take, x):
    rows = x.shape[0]
    groups = math.gcd(rows, count)
    cut = count // groups
    x = x.reshape(groups, rows // groups, *x.shape[1:])
    x = x[:, :cut] if take else x[:, cut:]
    return x.reshape(-1, *x.shape[2:])

  return tuple(
    jax.tree.map(functools.partial(part, take), arrays)
    for take in (True, False)
  )  # pyright: ignore[reportReturnType]
