"""LARS, momentum with one learning rate per layer (arXiv:1708.03888).

Two algorithms go by this name. They differ in the norm that divides: that of
the decayed gradient (optax), or the sum of the norms of gradient and decay
(the paper's algorithm 1 and the code for TPUs). In both
the rate is inside the buffer, so a falling rate does not shrink steps that the
momentum still carries.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from giantsteps.research.large_batch.layer_axes import (
  Axes,
  Mask,
  mask_leaves,
  require_tree,
  squared_norm,
  stacked_axes,
  wide,
)


class LarsState(NamedTuple):
  """State of `lars`.

  Attributes:
    count: [] int32, steps taken.
    trace: like the parameters, float32 or wider: the momentum buffer.
  """

  count: jax.Array
  trace: optax.Updates


def lars(
  learning_rate: optax.ScalarOrSchedule,
  *,
  form: Literal["optax", "tpu"] = "optax",
  momentum: float = 0.9,
  trust_coefficient: float = 0.001,
  weight_decay: float = 1e-4,
  eps: float = 0.0,
  nesterov: bool = False,
  trust_mask: Mask = None,
  decay_mask: Mask = None,
  layer_axes: Axes = None,
) -> optax.GradientTransformation:
  """LARS, s = lr r (g + decay x), buf <- momentum buf + s, x <- x - buf.

  form="optax": r = trust_coefficient |x| / (|g + decay x| + eps);
  form="tpu": r = trust_coefficient |x| / (|g| + decay |x| + eps). One r per
  layer, 1 where the norm of x, or the one it is divided by, is 0.

  Differs from the paper: the rate multiplies s, as in both codes; the paper's
  buffer holds lr r too, but its r has no exclusions.

  Args:
    learning_rate: float or schedule, float of the steps before this one.
    form: which norm divides.
    momentum: decay of the buffer, in [0, 1).
    trust_coefficient: the paper's eta.
    weight_decay: the paper's beta, added to the gradient.
    eps: added to the norm that divides.
    nesterov: x <- x - (momentum buf + s) with the new buf.
    trust_mask: True where r applies, False where r = 1; see `lamb`. Biases
      and scales of norms are usually left out (`matrices`). None: everywhere.
    decay_mask: likewise, where the parameters decay.
    layer_axes: axes that count layers; see `lamb`.

  Returns:
    A transform whose `update` needs the parameters. Updates and the buffer
    are float32, or wider where the parameters are. Memory: one buffer.

  Raises:
    ValueError: for an unknown form, for axes or names as in `lamb`, or, in
      `init`, for one flat vector (optax.flatten) without explicit axes.
  """
  if form not in ("optax", "tpu"):
    raise ValueError(f"form={form!r}: choose optax or tpu")

  def init(params: optax.Params) -> LarsState:
    require_tree(params, layer_axes)
    stacked_axes(params, layer_axes)  # names and axes that do not exist
    zeros = lambda x: jnp.zeros_like(x, wide(x))
    return LarsState(jnp.zeros((), jnp.int32), jax.tree.map(zeros, params))

  # one trace per shape and kind of leaf; see lamb.py
  @functools.partial(jax.jit, static_argnames=("axes", "trusts", "decays"))
  def leaf(g, buf, x, rate, *, axes, trusts, decays):
    g, x = g.astype(buf.dtype), x.astype(buf.dtype)
    norm = lambda a: jnp.sqrt(squared_norm(a, axes))
    decay = weight_decay if decays else 0.0
    s = g + decay * x if decays else g
    if trusts:
      x_norm = norm(x)
      base = norm(s) if form == "optax" else norm(g)
      usual = (x_norm > 0) & (base > 0)
      if form == "tpu":
        base = base + decay * x_norm
      r = trust_coefficient * x_norm / jnp.where(usual, base + eps, 1)
      s = jnp.where(usual, r, 1) * s
    s = rate.astype(s.dtype) * s
    buf = momentum * buf + s
    return -(momentum * buf + s if nesterov else buf), buf

  def update(updates, state, params=None):
    if params is None:
      raise ValueError(
        "lars needs the parameters: update(updates, state, params)"
      )
    rate = learning_rate
    rate = jnp.asarray(rate(state.count) if callable(rate) else rate)
    treedef = jax.tree.structure(params)
    column = treedef.flatten_up_to
    arrays = zip(
      column(updates), column(state.trace), column(params), strict=True
    )
    kinds = zip(
      stacked_axes(params, layer_axes),
      mask_leaves(trust_mask, params, layer_axes),
      mask_leaves(decay_mask, params, layer_axes),
      strict=True,
    )
    rows = [
      leaf(*row, rate, axes=axes, trusts=trusts, decays=decays)
      for row, (axes, trusts, decays) in zip(arrays, kinds, strict=True)
    ]
    updates, trace = (
      treedef.unflatten([row[i] for row in rows]) for i in range(2)
    )
    count = jnp.asarray(optax.safe_increment(state.count))
    return updates, LarsState(count, trace)

  return optax.GradientTransformation(init, update)
