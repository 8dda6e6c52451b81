"""What the losses cost: FLOPs by XLA's count, in forward passes."""

import functools

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


@functools.cache
def forward():
  return jax.jit(network).lower(PARAMS, T, T, X).compile().cost_analysis()


def with_rule(loss, rule):
  return lambda v, *rest: loss(v, *rest, I, stop_gradient=rule)


LOSSES = {
  "flow_matching": (
    3,
    lambda v, x0, x1, s, t: flow_maps.flow_matching_loss(v, x0, x1, t, I),
  ),
  "progressive": (5, lambda *p: flow_maps.progressive_loss(*p, I)),
  "lagrangian": (7.04, with_rule(flow_maps.lagrangian_loss, "full")),
  "lagrangian, none": (9.04, with_rule(flow_maps.lagrangian_loss, "none")),
  "frozen lagrangian": (5, lambda *p: flow_maps.frozen_lagrangian_loss(*p, I)),
  "discrete lagrangian": (
    5,
    lambda *p: flow_maps.discrete_lagrangian_loss(*p, I, 0.01),
  ),
  "eulerian": (8.05, with_rule(flow_maps.eulerian_loss, "full")),
  "eulerian, convex": (7.04, with_rule(flow_maps.eulerian_loss, "convex")),
  "eulerian, none": (9.04, with_rule(flow_maps.eulerian_loss, "none")),
  "mean_flow": (4.01, lambda *p: flow_maps.mean_flow_loss(*p, I)),
  "mean_flow, model": (
    5.01,
    lambda *p: flow_maps.mean_flow_loss(*p, I, "model"),
  ),
  "improved_mean_flow": (
    5.01,
    lambda *p: flow_maps.improved_mean_flow_loss(*p, I),
  ),
  "discrete_consistency": (
    4,
    lambda v, x0, x1, s, t: flow_maps.discrete_consistency_loss(
      v, x0, x1, s, t, I
    ),
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

    step = jax.jit(jax.value_and_grad(mean)).lower(PARAMS, X, X, T, T)
    ratio = step.compile().cost_analysis()["flops"] / forward()["flops"]
    self.assertLess(abs(ratio / wanted - 1), 0.02, f"{name}: {ratio:.3f}")


if __name__ == "__main__":
  absltest.main()
