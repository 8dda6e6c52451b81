"""Floating-point operations of matrix products in a traced program.

The compiler's own count takes the body of a loop once; here scans are
multiplied by their length. What is recomputed in a backward pass counts.
"""

import math
from typing import Any

import jax
from jax.extend import core


def count(jaxpr: core.ClosedJaxpr, devices: int = 1) -> float:
  """2 M N K of every product and convolution, on all devices together.

  A `while` loop without a known length counts once, of the branches of a
  `cond` the largest.

  Args:
    jaxpr: of `jax.make_jaxpr(f)(...)` or `jax.jit(f).trace(...).jaxpr`.
    devices: that run the body of a `shard_map`, each on its own share.
  """
  return sum(_equation(e, devices) for e in jaxpr.jaxpr.eqns)


def _equation(equation: Any, devices: int) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    inner = math.prod(shape[i] for i in contracted)
    return 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
  if name == "ragged_dot_general":  # every row meets the matrix of its group
    return (
      2.0 * equation.invars[0].aval.size * equation.outvars[0].aval.shape[-1]
    )
  if name == "conv_general_dilated":
    kernel = equation.invars[1].aval.shape
    out_features = params["dimension_numbers"].rhs_spec[0]
    taps = math.prod(kernel) / kernel[out_features]
    return 2.0 * taps * math.prod(equation.outvars[0].aval.shape)
  inner = [_jaxpr(j, devices) for j in _subprograms(params)]
  if name == "cond":
    return max(inner, default=0.0)
  times = params["length"] if name == "scan" else 1
  times *= devices if name == "shard_map" else 1
  return times * sum(inner)


def _jaxpr(jaxpr: Any, devices: int) -> float:
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  return sum(_equation(e, devices) for e in jaxpr.eqns)


def _subprograms(params: dict) -> list:
  """The programs among the parameters of an equation, also in tuples."""
  is_program = lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr))
  leaves = jax.tree.leaves(list(params.values()), is_leaf=is_program)
  return [x for x in leaves if is_program(x)]
