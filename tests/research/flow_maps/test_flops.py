"""What the losses cost: FLOPs by XLA's count, in forward passes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from giantsteps.research import flow_maps

D, WIDTH, BATCH = 2, 256, 256
I = flow_maps.linear()
SHAPES = [(D + 2, WIDTH), *[(WIDTH, WIDTH)] * 4, (WIDTH, D)]
PARAMS = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in SHAPES]
X = jax.ShapeDtypeStruct((BATCH, D), jnp.float32)
T = jax.ShapeDtypeStruct((BATCH,), jnp.float32)


def network(params, s, t, x):
  h = jnp.concatenate([x, s[:, None], t[:, None]], -1)
  *inner, last = params
  for w in inner:
    h = jax.nn.gelu(h @ w)
  return h @ last


def flops(f, *shapes):
  cost: Any = jax.jit(f).lower(*shapes).compile().cost_analysis()
  return cost["flops"]


@functools.cache
def forward():
  return flops(network, PARAMS, T, T, X)


def with_rule(loss, rule):
  return lambda v, *rest: loss(v, *rest, I=I, stop_gradient=rule)


LOSSES = {
  "flow_matching": (
    3,
    lambda v, x0, x1, s, t: flow_maps.flow_matching_loss(v, x0, x1, t, I),
  ),
  "progressive": (5, lambda *p: flow_maps.progressive_loss(*p, I=I)),
  "lagrangian": (7.04, with_rule(flow_maps.lagrangian_loss, "full")),
  "lagrangian, none": (9.04, with_rule(flow_maps.lagrangian_loss, "none")),
  "frozen lagrangian": (
    5,
    lambda *p: flow_maps.frozen_lagrangian_loss(*p, I=I),
  ),
  "discrete lagrangian": (
    5,
    lambda *p: flow_maps.discrete_lagrangian_loss(*p, I=I, delta=0.01),
  ),
  "eulerian": (8.05, with_rule(flow_maps.eulerian_loss, "full")),
  "eulerian, convex": (7.04, with_rule(flow_maps.eulerian_loss, "convex")),
  "eulerian, none": (9.04, with_rule(flow_maps.eulerian_loss, "none")),
  "mean_flow": (4.01, lambda *p: flow_maps.mean_flow_loss(*p, I=I)),
  "mean_flow, model": (
    5.01,
    lambda *p: flow_maps.mean_flow_loss(*p, I=I, tangent="model"),
  ),
  "improved_mean_flow": (
    5.01,
    lambda *p: flow_maps.improved_mean_flow_loss(*p, I=I),
  ),
  "discrete_consistency": (
    4,
    lambda v, x0, x1, s, t: flow_maps.discrete_consistency_loss(
      v, x0, x1, s, t, I
    ),
  ),
  "align_your_flow": (
    5.01,
    lambda v, *p: flow_maps.align_your_flow_loss(v, *p, I=I, teacher=v),
  ),
  "shortcut": (
    5,
    lambda v, *p: flow_maps.shortcut_loss(v, *p, I=I, teacher=v),
  ),
  "scm": (
    4.01,
    lambda v, x0, x1, s, t: flow_maps.scm_loss(
      lambda x, a: v(a, a, x), x0, x1, s, sigma_d=0.5
    ),
  ),
}


class FlopsTest(parameterized.TestCase):
  @parameterized.parameters(*LOSSES)
  def test_ratio(self, name):
    # a wrong stop_gradient changes it by at least one forward pass
    wanted, loss = LOSSES[name]

    def mean(params, *rest):
      return loss(functools.partial(network, params), *rest).mean()

    ratio = flops(jax.value_and_grad(mean), PARAMS, X, X, T, T) / forward()
    self.assertLess(abs(ratio / wanted - 1), 0.02, f"{name}: {ratio:.3f}")


if __name__ == "__main__":
  absltest.main()
