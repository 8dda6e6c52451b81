"""A mixture of SwiGLU experts, of which every token uses a few.

"Outrageously Large Neural Networks" (arXiv:1701.06538) with the gates of
Mixtral (arXiv:2401.04088). No token is dropped: the copies of the tokens are
sorted by expert and multiplied group by group (`jax.lax.ragged_dot`), so the
shapes are static whatever the router decides, and the products are those of
the chosen experts alone where the backend has a grouped kernel.

On a mesh every device sorts its own rows and runs the experts it holds. The
experts lie along `model` (partitioning.py), where the rows are whole: a block
sums over that axis once, as the dense one does, and no token travels.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from giantsteps.models import layers, partitioning

_ROUTER_INIT = nn.initializers.lecun_normal()
_EXPERT_INIT = nn.initializers.lecun_normal(batch_axis=0)


class Load(NamedTuple):
  """What the experts got from each row, for a load-balancing loss.

  Stacks of blocks put their layers first.

  Attributes:
    counts: [..., B, E] int32, tokens of the row that an expert took; the sum
      over experts is tokens * experts_per_token. No gradient.
    probabilities: [..., B, E] float32, the router's probability of an expert
      summed over the tokens of the row.
  """

  counts: jax.Array
  probabilities: jax.Array


class MixtureOfExperts(nn.Module):
  """sum_j g_j down_j(silu(gate_j x) * up_j x) over the chosen experts j.

  Attributes:
    num_experts: E.
    experts_per_token: how many each token uses, k.
    hidden: F, hidden size of one expert.
    dtype: compute dtype; the router computes in float32 or wider.
    param_dtype: dtype of the parameters.
    down_init: initializer of [E, F, D], E its batch axis.
  """

  num_experts: int
  experts_per_token: int
  hidden: int
  dtype: jnp.dtype | str = jnp.float32
  param_dtype: jnp.dtype | str = jnp.float32
  down_init: Callable = _EXPERT_INIT

  @nn.compact
  def __call__(
    self, x: jax.Array, valid: jax.Array | None = None
  ) -> tuple[jax.Array, Load]:
    """x [B, T, D] -> [B, T, D] in dtype, and the load of the experts.

    `valid` [B, T] bool says which tokens count in the load (False: padding);
    None: all.
    """
    width, count = x.shape[-1], self.num_experts
    # A token whose two best experts are close must not change its mind with
    # the precision: TPUs multiply float32 in bfloat16 unless told.
    logits = nn.Dense(
      count,
      use_bias=False,
      dtype=layers.accumulator(self.dtype),
      param_dtype=self.param_dtype,
      precision=jax.lax.Precision.HIGHEST,
      kernel_init=_ROUTER_INIT,
      name="router",
    )(x)
    probabilities, gates, chosen = route(logits, self.experts_per_token)
    weights = _Experts(
      (count, width, self.hidden),
      self.param_dtype,
      self.down_init,
      name="experts",
    )()
    weights = [w.astype(self.dtype) for w in weights]
    y = _on_mesh(x.astype(self.dtype), gates, chosen, *weights)
    return y, load(probabilities, chosen, valid)


class _Experts(nn.Module):
  """The matrices, E first: gate, up [E, D, F] and down [E, F, D]."""

  shape: tuple[int, int, int]
  param_dtype: jnp.dtype | str
  down_init: Callable

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    count, width, hidden = self.shape
    down = (count, hidden, width)
    return (
      self.param("gate", _EXPERT_INIT, self.shape, self.param_dtype),
      self.param("up", _EXPERT_INIT, self.shape, self.param_dtype),
      self.param("down", self.down_init, down, self.param_dtype),
    )


def route(
  logits: jax.Array, experts_per_token: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Chooses the experts of each token.

  Args:
    logits: [..., E] float32 or wider; of equal ones the first is taken.
    experts_per_token: k.

  Returns:
    probabilities [..., E], the softmax of the logits; gates [..., k], those
    of the chosen experts, divided by their sum if k > 1 (with one expert that
    would be 1, and the router would learn nothing: Switch, arXiv:2101.03961);
    chosen [..., k] int32, best first.
  """
  probabilities = jax.nn.softmax(logits, axis=-1)
  chosen = jax.lax.top_k(logits, experts_per_token)[1]
  gates = jnp.take_along_axis(probabilities, chosen, axis=-1)
  if experts_per_token > 1:
    gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
  return probabilities, gates, chosen


def load(
  probabilities: jax.Array, chosen: jax.Array, valid: jax.Array | None = None
) -> Load:
  """What each row sent to each expert.

  Args:
    probabilities: [..., T, E] float32.
    chosen: [..., T, k] int32.
    valid: [..., T] bool, False where a token does not count; None: all do.
  """
  experts = jnp.arange(probabilities.shape[-1], dtype=chosen.dtype)
  experts = jax.lax.expand_dims(experts, range(chosen.ndim))
  # an expert is taken once per token at most
  taken = jnp.any(chosen[..., None] == experts, axis=-2)  # [..., T, E]
  if valid is not None:
    taken = taken & valid[..., None]
    probabilities = jnp.where(valid[..., None], probabilities, 0)
  return Load(
    jnp.sum(taken, axis=-2, dtype=jnp.int32), jnp.sum(probabilities, axis=-2)
  )


def apply_experts(
  x: jax.Array,
  gates: jax.Array,
  chosen: jax.Array,
  gate: jax.Array,
  up: jax.Array,
  down: jax.Array,
  first: jax.Array | int = 0,
) -> jax.Array:
  """The sum over the chosen experts that are among those given.

  Args:
    x: [B, T, D].
    gates: [B, T, k] float.
    chosen: [B, T, k] int32, experts counted over all devices.
    gate, up, down: [S, D, F], [S, D, F], [S, F, D] in x.dtype: experts first
      to first + S - 1.
    first: number of the first one given.

  Returns:
    [B, T, D] in x.dtype. 6 B T k D F operations if all experts are given.
  """
  share, k = gate.shape[0], chosen.shape[-1]
  expert = chosen.reshape(-1) - first  # one entry per copy of a token
  expert = jnp.where((expert >= 0) & (expert < share), expert, share)
  order = jnp.argsort(expert)  # copies for other devices come last
  sizes = jnp.sum(
    expert[:, None] == jnp.arange(share, dtype=expert.dtype)[None],
    axis=0,
    dtype=jnp.int32,
  )
  # What lies beyond the groups is nobody's: not used, and no gradient either.
  here = (jnp.arange(expert.size) < jnp.sum(sizes))[:, None]
  product = lambda a, w: jax.lax.ragged_dot(a, w, sizes)
  rows = jnp.repeat(x.reshape(-1, x.shape[-1]), k, axis=0)
  rows = jnp.where(here, _permute(rows, order), 0)
  hidden = nn.silu(product(rows, gate)) * product(rows, up)
  out = jnp.where(here, product(hidden, down), 0)
  out = _permute(out, jnp.argsort(order)).reshape(*chosen.shape, -1)
  return jnp.sum(out * gates[..., None].astype(out.dtype), axis=-2)


def _on_mesh(x, gates, chosen, gate, up, down):
  """`apply_experts`, each device with its own rows and experts."""
  mesh = partitioning.automatic_mesh()
  if mesh is None:
    return apply_experts(x, gates, chosen, gate, up, down)
  rows = P(partitioning.row_axes(mesh, x.shape[0]))
  split = mesh.shape.get("model", 1)
  split = split if gate.shape[0] % split == 0 else 1
  experts = P("model") if split > 1 else P()

  def local(x, gates, chosen, gate, up, down):
    if split == 1:
      return apply_experts(x, gates, chosen, gate, up, down)
    # Here and not where x meets its order: the gradients of the k copies of a
    # token are then added before the devices', k times fewer bytes, and jax
    # 0.10.2 computes a wrong gradient of x the other way round.
    own = lambda a: jax.lax.pcast(a, "model", to="varying")
    x, gates, chosen = own(x), own(gates), own(chosen)
    first = jax.lax.axis_index("model") * gate.shape[0]
    y = apply_experts(x, gates, chosen, gate, up, down, first)
    return jax.lax.psum(y, "model")

  return jax.shard_map(
    local, in_specs=(rows,) * 3 + (experts,) * 3, out_specs=rows
  )(x, gates, chosen, gate, up, down)


def _permute(x: jax.Array, order: jax.Array) -> jax.Array:
  return x.at[order].get(unique_indices=True, mode="promise_in_bounds")
