"""Solver runs as tables of coefficients, and the one loop that executes them.

A linear multistep, singlestep or Runge-Kutta solver, with or without a
corrector, is N rows of numbers. Everything that needs care (limits, phi
functions, cancellation) happens on the host in float64 when the table is
made; what is compiled is the same short scan for every solver, with the model
in it once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Array = Any  # np.ndarray on the host, jax.Array in a program


class Table(NamedTuple):
  """One run of a solver: row i describes the i-th model call.

  With z the point to evaluate, base the committed sample, and m_0, m_1, ..
  the targets of this call, the one before, ..:

      m_0  = target[0] z + target[1] model(z, time)
      base = anchor[0] base + anchor[1] z + sum_k corrector[k] m_k
      z    = advance base + sum_k history[k] m_k + noise xi,   xi ~ N(0, I)

  and z after the last row is the sample. A pytree of arrays, float64 on the
  host, so it is an argument of the jitted program and not part of it: tables
  with the same N and K share one compiled program, and `vmap` over stacked
  tables evaluates many solvers at once. Solvers make K = 4 unless they need
  more; `resize` changes it.
  """

  time: Array  # [N] what the model is told
  target: Array  # [N, 2]
  anchor: Array  # [N, 2]
  corrector: Array  # [N, K]
  advance: Array  # [N]
  history: Array  # [N, K] newest first
  noise: Array  # [N] standard deviation of the fresh noise

  @property
  def nfe(self) -> int:
    """Model calls of the run, N."""
    return self.time.shape[0]


class State(NamedTuple):
  """A run between two model calls; `x` is the sample once all rows are done."""

  x: jax.Array  # [...] where the model is evaluated next
  base: jax.Array  # [...] the committed sample
  past: jax.Array  # [K, ...] ring of targets: call i wrote slot i mod K
  row: jax.Array  # [] int32, calls done


def resize(table: Table, num_targets: int) -> Table:
  """The same run with K = num_targets columns of history.

  More columns let tables share a program; fewer save memory traffic: a step
  reads and writes about K + 3 copies of the state.

  Args:
    table: a host table (NumPy).
    num_targets: K >= 1.

  Raises:
    ValueError: if a column that would be dropped is in use.
  """

  def fit(name):
    columns = np.asarray(getattr(table, name))
    if np.any(columns[:, num_targets:]):
      used = 1 + int(np.nonzero(np.any(columns, 0))[0][-1])
      raise ValueError(
        f"num_targets={num_targets}: {name} uses {used} columns; keep those"
      )
    add = max(0, num_targets - columns.shape[1])
    return np.pad(columns[:, :num_targets], ((0, 0), (0, add)))

  if num_targets < 1:
    raise ValueError(f"num_targets={num_targets}: at least 1")
  return table._replace(corrector=fit("corrector"), history=fit("history"))


def init(x_T: jax.Array, num_targets: int) -> State:
  """The state before the first call.

  Args:
    x_T: [...] initial sample, alpha x0 + sigma eps at the first node.
    num_targets: K of the table.

  Returns:
    A State in float32, or x_T's dtype if wider.
  """
  x = x_T.astype(jnp.promote_types(x_T.dtype, jnp.float32))
  past = jnp.zeros((num_targets, *x.shape), x.dtype)
  return State(x, x, past, jnp.zeros((), jnp.int32))


def step(
  state: State, row: Table, output: jax.Array, xi: jax.Array | None = None
) -> State:
  """Executes one row, given what the model returned for (state.x, row.time).

  `sample` is a scan over this function. A serving engine calls it under
  `vmap` over (state, row, output), with requests at different rows of
  different tables in one batch.

  Args:
    state: from `init` or the last `step`.
    row: one row: a Table whose leaves have lost their leading axis, in the
      dtype of state.x.
    output: [...] the model's output, like state.x.
    xi: [...] unit normal noise, or None to leave the noise out.
  """
  num = state.past.shape[0]
  slot = state.row % num
  target = row.target[0] * state.x + row.target[1] * output.astype(
    state.x.dtype
  )
  past = jax.lax.dynamic_update_index_in_dim(state.past, target, slot, 0)
  age = (slot - jnp.arange(num)) % num  # of each slot; 0 is the newest

  def combine(weights):
    return sum(w * m for w, m in zip(weights[age], past, strict=True))

  base = row.anchor[0] * state.base + row.anchor[1] * state.x
  base = base + combine(row.corrector)
  x = row.advance * base + combine(row.history)
  if xi is not None:
    x = x + row.noise * xi.astype(x.dtype)
  return State(x, base, past, state.row + 1)


def sample(
  predict: Callable[[jax.Array, jax.Array], jax.Array],
  x_T: jax.Array,
  table: Table,
  key: jax.Array | None = None,
  noise: jax.Array | None = None,
  *,
  return_trajectory: bool = False,
) -> Any:
  """Runs `table` from x_T with exactly `table.nfe` model calls.

  Args:
    predict: `predict(x, t)`, x [B, ...], t [B] (model time) -> [B, ...]; it is
      traced once.
    x_T: [B, ...] sample at the table's first node, alpha x0 + sigma eps: for
      most schedules unit noise, for `edm` noise times t_max.
    table: from one of the solvers; an argument of the jitted function, never
      a constant in it.
    key: draws the noise of stochastic tables; ignored by the others.
    noise: [nfe, B, ...] unit normals to use instead of a key.
    return_trajectory: also return every committed sample (N + 1 times the
      memory).

  Returns:
    [B, ...] the sample, float32 or x_T's dtype if wider. With
    return_trajectory also [N + 1, B, ...]: x_T, the sample committed by each
    later row (after its corrector), the result.

  Raises:
    ValueError: the table has noise and neither key nor noise is given (where
      the table is traced, and so unknown, the result is NaN instead); both
      are given; noise of another shape.
  """
  state = init(x_T, table.history.shape[-1])
  shape, dtype = state.x.shape, state.x.dtype
  if key is not None and noise is not None:
    raise ValueError("give key or noise, not both")
  if noise is not None and noise.shape != (table.nfe, *shape):
    raise ValueError(f"noise {noise.shape} is not {(table.nfe, *shape)}")
  table = _refuse_missing_noise(table, key is None and noise is None)
  table = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), table)
  keys = None if key is None else jax.random.split(key, table.nfe)

  def body(state: State, inputs: Any) -> tuple[State, Any]:
    row, key, xi = inputs
    output = predict(state.x, jnp.full(shape[:1], row.time))
    if key is not None:
      xi = jax.random.normal(key, shape, dtype)
    state = step(state, row, output, xi)
    return state, state.base if return_trajectory else None

  state, bases = jax.lax.scan(body, state, (table, keys, noise))
  if return_trajectory:
    return state.x, jnp.concatenate([bases, state.x[None]])
  return state.x


def _refuse_missing_noise(table: Table, missing: bool) -> Table:
  """Never a stochastic table run as if it had no noise."""
  if not missing:
    return table
  if isinstance(table.noise, Tracer):
    poisoned = jnp.where(table.noise == 0, table.advance, jnp.nan)
    return table._replace(advance=poisoned)
  if np.any(np.asarray(table.noise)):
    raise ValueError("the table is stochastic: pass key= or noise= to sample")
  return table
