"""Solver runs as tables of coefficients, and the one loop that executes them.

A linear multistep, singlestep or Runge-Kutta solver, with or without a
corrector, is N rows of numbers. Everything that needs care (limits, phi
functions, cancellation) happens on the host in float64 when the table is
made; what is compiled is the same short scan for every solver, with the model
in it once.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

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

  `threshold` is the one hook that is not linear: dynamic thresholding of m_0
  where m is x0 (arXiv:2205.11487). None, the default, leaves it out of the
  program; a table with it is another pytree, and so another program.
  """

  time: Array  # [N] what the model is told
  target: Array  # [N, 2]
  anchor: Array  # [N, 2]
  corrector: Array  # [N, K]
  advance: Array  # [N]
  history: Array  # [N, K] newest first
  noise: Array  # [N] standard deviation of the fresh noise
  threshold: Array | None = None  # [N, 3] quantile, floor, cap

  @property
  def nfe(self) -> int:
    """Model calls of the run, N; of the longest, for a stack of tables."""
    return self.time.shape[-1]


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


def pad(table: Table, nfe: int) -> Table:
  """The same run followed by rows that do nothing, nfe rows in all.

  A padding row calls the model and ignores it, so runs of different length
  can share a batch (`stack`) or a program.

  Args:
    table: a host table (NumPy).
    nfe: rows wanted.

  Raises:
    ValueError: if the table is longer.
  """
  add = nfe - table.nfe
  if add < 0:
    raise ValueError(f"a table of {table.nfe} rows does not fit in nfe={nfe}")
  idle = jax.tree.map(lambda leaf: np.zeros((add, *leaf.shape[1:])), table)
  idle = idle._replace(
    time=np.full(add, table.time[-1]),
    anchor=np.tile([0.0, 1.0], (add, 1)),
    advance=np.ones(add),
  )
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), table, idle)


def stack(runs: Sequence[Table]) -> Table:
  """One table per sample: leaves [B, N, ...], padded to the longest run.

  Args:
    runs: B host tables of any solvers, lengths and widths; all of them
      thresholded, or none.

  Returns:
    A table for `sample`, whose batch then has one run per row: requests with
    different numbers of calls share each forward pass.
  """
  nfe = max(table.nfe for table in runs)
  width = max(table.history.shape[1] for table in runs)
  even = [pad(resize(table, width), nfe) for table in runs]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *even)


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
  state: State,
  row: Table,
  output: jax.Array,
  xi: jax.Array | None = None,
  *,
  batch_axes: int = 1,
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
    batch_axes: leading axes of state.x that tell samples apart: 1, or 0 under
      `vmap`. Only thresholding, which is per sample, asks.
  """
  num = state.past.shape[0]
  slot = state.row % num
  target = row.target[0] * state.x + row.target[1] * output.astype(
    state.x.dtype
  )
  if row.threshold is not None:
    target = threshold(target, *row.threshold, batch_axes=batch_axes)
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


def threshold(
  x0: jax.Array,
  quantile: ArrayLike,
  floor: ArrayLike,
  cap: ArrayLike,
  *,
  batch_axes: int = 1,
) -> jax.Array:
  """Dynamic thresholding (arXiv:2205.11487): clip x0 to [-s, s], divide by s.

  s is the quantile of |x0| in each sample (linear interpolation), at least
  floor and at most cap.

  Args:
    x0: [B, ...] float32 or wider.
    quantile: scalar in (0, 1]; 0 leaves x0 alone (padding rows).
    floor: scalar > 0.
    cap: scalar, inf for none.
    batch_axes: leading axes that tell samples apart.
  """
  axes = tuple(range(batch_axes, x0.ndim))
  s = jnp.quantile(jnp.abs(x0), quantile, axes, keepdims=True)
  s = jnp.minimum(jnp.maximum(s, floor), cap)
  return jnp.where(jnp.asarray(quantile) > 0, jnp.clip(x0, -s, s) / s, x0)


def sample(
  predict: Callable[[jax.Array, jax.Array], jax.Array],
  x_T: jax.Array,
  table: Table,
  key: jax.Array | None = None,
  noise: jax.Array | None = None,
  *,
  return_trajectory: bool = False,
  report: Callable[[int], None] | None = None,
  report_every: int = 1,
) -> Any:
  """Runs `table` from x_T with exactly `table.nfe` model calls.

  Args:
    predict: `predict(x, t)`, x [B, ...], t [B] (model time) -> [B, ...]; it is
      traced once.
    x_T: [B, ...] sample at the table's first node, alpha x0 + sigma eps: for
      most schedules unit noise, for `edm` noise times t_max.
    table: from one of the solvers, or `stack` of B tables, a run for each
      sample; an argument of the jitted function, never a constant in it.
    key: draws the noise of stochastic tables; ignored by the others.
    noise: [nfe, B, ...] unit normals to use instead of a key.
    return_trajectory: also return every committed sample (N + 1 times the
      memory).
    report: called on the host with the number of calls done; about 100 us
      each time.
    report_every: k, to report every k-th call.

  Returns:
    [B, ...] the sample, float32 or x_T's dtype if wider. With
    return_trajectory also [N + 1, B, ...]: x_T, the sample committed by each
    later row (after its corrector), the result.

  Raises:
    ValueError: the table has noise and neither key nor noise is given (where
      the table is traced, and so unknown, the result is NaN instead); both
      are given; noise of another shape; a stack of another batch size.
  """
  each = table.time.ndim == 2
  if each and table.time.shape[0] != x_T.shape[0]:
    raise ValueError(
      f"a stack of {table.time.shape[0]} tables for x_T {x_T.shape}: one"
      " table per sample is needed"
    )
  if key is not None and noise is not None:
    raise ValueError("give key or noise, not both")
  if noise is not None and noise.shape != (table.nfe, *x_T.shape):
    raise ValueError(f"noise {noise.shape} is not {(table.nfe, *x_T.shape)}")
  start = functools.partial(init, num_targets=table.history.shape[-1])
  state = jax.vmap(start)(x_T) if each else start(x_T)
  shape, dtype = state.x.shape, state.x.dtype
  table = _refuse_missing_noise(table, key is None and noise is None)
  rows = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), table)
  if each:
    rows = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), rows)
  keys = None if key is None else jax.random.split(key, table.nfe)

  def body(state: State, inputs: Any) -> tuple[State, Any]:
    count, row, key, xi = inputs
    output = predict(state.x, jnp.broadcast_to(row.time, shape[:1]))
    if key is not None:
      xi = jax.random.normal(key, shape, dtype)
    if each:
      one = functools.partial(step, batch_axes=0)
      state = jax.vmap(one)(state, row, output, xi)
    else:
      state = step(state, row, output, xi)
    if report is not None:
      _report(report, report_every, count)
    return state, state.base if return_trajectory else None

  count = None if report is None else jnp.arange(1, table.nfe + 1)
  state, bases = jax.lax.scan(body, state, (count, rows, keys, noise))
  if return_trajectory:
    return state.x, jnp.concatenate([bases, state.x[None]])
  return state.x


def _report(
  report: Callable[[int], None], every: int, count: jax.Array
) -> None:
  tell = lambda n: jax.debug.callback(lambda n: report(int(n)), n)
  jax.lax.cond(count % every == 0, tell, lambda n: None, count)


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
