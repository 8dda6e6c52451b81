"""The fast weights of LaCT with the tokens of every chunk split over devices.

A chunk's gradient is a plain sum over its tokens ("Test-Time Training Done
Right", arXiv:2505.23884, section 3.4): every device sums its own, then the
axis does. `fast_weight_update.py` holds both sums; here the arrays are laid out.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from giantsteps.kernels_pallas.fast_weight import Weights
from giantsteps.models.fast_weight_update import Rule, State, Step


def call(
  function: Callable,
  axis: int,
  parallel: tuple[Mesh | AbstractMesh, str],
  state: State,
  steps: Step,
  norms: Weights,
  rule: Rule,
) -> tuple[State, tuple[jax.Array | None, jax.Array | None]]:
  """function(state, steps, norms, rule), the tokens split over devices.

  Args:
    function: `fast_weight_update.run` or `scan`, which the rule tells of the
      split.
    axis: of the tokens in steps: 1 for one step, 2 for many.
    parallel: mesh and the axis of it.
    state: whole.
    steps: any number of tokens; it is filled up to a multiple of the devices.
    norms: `lengths` of the initial weights.
    rule: of one device.

  Returns:
    What the function returns, whole or split in the same way.

  Raises:
    ValueError: if the mesh lacks the axis.
  """
  mesh, name = parallel
  if any(size > 1 for axis, size in mesh.shape.items() if axis != name):
    # the partitioner, which has the other axes, cannot split a kernel
    rule = dataclasses.replace(rule, implementation="xla")
  if name not in mesh.axis_names:
    raise ValueError(f"axis={name!r}: the mesh has {mesh.axis_names}")
  if isinstance(mesh, Mesh):  # `jax.make_mesh` types its axes Explicit
    mesh = Mesh(mesh.devices, mesh.axis_names)
  size = mesh.shape[name]
  owners = state.weights[0].shape[0] % size == 0
  length = next(x for x in (steps.tokens, steps.before) if x is not None)
  length = jax.tree.leaves(length)[0].shape[axis]
  steps = _fill(steps, axis, -length % size)
  rule = dataclasses.replace(rule, axis=name, owners=owners)
  lead = [None] * axis
  tokens = P(*lead, name)
  rows = P(name) if owners else P()
  flags = lambda x: P(*lead[1:], rows[0]) if owners and x.ndim == axis else P()
  places = Step(
    jax.tree.map(lambda _: tokens, steps.tokens),
    jax.tree.map(lambda _: tokens, steps.before),
    jax.tree.map(lambda _: tokens, steps.after),
    jax.tree.map(flags, steps.write),
    jax.tree.map(flags, steps.reset),
  )
  mapped = jax.shard_map(
    lambda state, steps, norms: function(state, steps, norms, rule),
    mesh=mesh,
    in_specs=(rows, places, rows),
    out_specs=(rows, tokens),
    axis_names={name},
  )
  state, reads = mapped(state, steps, norms)
  cut = lambda x: jax.lax.slice_in_dim(x, 0, length, axis=axis)
  return state, jax.tree.map(cut, reads)


def _fill(steps: Step, axis: int, extra: int) -> Step:
  """Adds tokens that are not valid."""
  if not extra:
    return steps

  def fill(x):
    return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)])

  tokens = steps.tokens
  if tokens is not None and tokens.valid is None:
    tokens = tokens._replace(valid=jnp.ones_like(tokens.rates[0], bool))
  tokens, before, after = jax.tree.map(
    fill, (tokens, steps.before, steps.after)
  )
  return steps._replace(tokens=tokens, before=before, after=after)
