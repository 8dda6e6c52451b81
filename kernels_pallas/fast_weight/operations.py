"""The operations of the memory: which body runs, and their derivatives."""

import functools
from collections.abc import Callable

import jax

from giantsteps.kernels_pallas import dispatch
from giantsteps.kernels_pallas.fast_weight import gpu, reference, tpu
from giantsteps.kernels_pallas.fast_weight.reference import Weights

# Three matrices, float32 twice and bfloat16 once, beside what else a program
# holds in the 64 MiB of a TPU v5p.
_WEIGHTS = 40 * 2**20


def apply(
  weights: Weights, q: jax.Array, *, implementation: str | None = None
) -> jax.Array:
  """Reads the memory, see `reference.apply`: f_W(q).

  Args:
    weights: W0 [N, h, d], W1 [N, d, h], W2 [N, h, d].
    q: [N, C, d].
    implementation: of `dispatch.IMPLEMENTATIONS`; None is the kernel on TPUs
      for bfloat16, C >= 1024 and d, h >= 384 in multiples of 128 that fit.

  Returns:
    [N, C, d] in q.dtype.
  """
  pays = _pays(q, weights)
  kernel = tpu.apply if _narrow(q) else None
  call = _choose(reference.apply, kernel, implementation, pays, gpu.apply)
  return call(weights, q)


def gradient(
  weights: Weights,
  k: jax.Array,
  v: jax.Array,
  learning_rates: Weights,
  *,
  implementation: str | None = None,
) -> Weights:
  """What a chunk writes, see `reference.gradient`: D0, D1, D2.

  Args:
    weights: W0 [N, h, d], W1 [N, d, h], W2 [N, h, d].
    k: [N, C, d].
    v: [N, C, d].
    learning_rates: three [N, C, 1], for W0, W1, W2.
    implementation: of `dispatch.IMPLEMENTATIONS`; None is the kernel on TPUs
      for bfloat16, C >= 1024 and d, h >= 384 in multiples of 128 that fit.

  Returns:
    D0 [N, h, d], D1 [N, d, h], D2 [N, h, d], float32 or wider.
  """
  pays = _pays(k, weights)
  kernel = tpu.gradient if _narrow(k) else None
  call = _choose(reference.gradient, kernel, implementation, pays, gpu.gradient)
  return call(weights, k, v, learning_rates)


def update(
  total: Weights,
  step: Weights,
  norms: Weights | None = None,
  momentum: tuple[jax.Array, Weights] | None = None,
  *,
  keep_total: bool = False,
  implementation: str | None = None,
) -> tuple[Weights, Weights | None, Weights]:
  """The memory after a write, see `reference.update`: W, Z, M.

  Args:
    total: Z: three [N, rows, columns], float32 or wider.
    step: D, likewise.
    norms: n, three [N, rows, 1]; None leaves the lengths of the rows.
    momentum: mu [N, 1, 1] and the buffers M; None is mu = 0.
    keep_total: returns Z beside W.
    implementation: of `dispatch.IMPLEMENTATIONS`; None is the kernel on TPUs
      for float32 and sides >= 384 in multiples of 128.

  Returns:
    W, Z (None unless `keep_total`) and M.
  """
  pays = norms is not None and all(
    z.dtype == "float32" and min(z.shape[1:]) >= 384 and _aligned(z)
    for z in total
  )
  call = _choose(
    functools.partial(reference.update, keep_total=keep_total),
    functools.partial(tpu.update, keep_total=keep_total)
    if total[0].dtype == "float32"
    else None,
    implementation,
    pays,
  )
  return call(total, step, norms, momentum)


def _pays(x: jax.Array, weights: Weights) -> bool:
  """Sizes from which on the kernels are faster, by the compiler's estimates."""
  return (
    x.dtype == "bfloat16"
    and x.shape[1] >= 1024
    and min(weights[0].shape[1:]) >= 384
    and _aligned(weights[0])
    and 30 * weights[0].shape[1] * weights[0].shape[2] <= _WEIGHTS
  )


def _narrow(x: jax.Array) -> bool:
  return x.dtype in ("bfloat16", "float32")


def _aligned(x: jax.Array) -> bool:
  return not any(size % 128 for size in x.shape[1:])


def _choose(
  xla: Callable,
  kernel: Callable | None,
  implementation: str | None,
  pays: bool,
  hopper: Callable | None = None,
) -> Callable:
  """The reference, or a kernel by platform with the reference's derivatives.

  The Hopper kernels have been compiled and interpreted, but no GPU has run
  them: they must be asked for by name.

  The derivative is that of the reference in forward and in reverse mode, and
  of any order. It keeps the operands and nothing else: what it needs of the
  inside, it computes again.
  """
  if implementation in (None, "xla") and not (implementation is None and pays):
    return xla
  run = jax.custom_jvp(
    functools.partial(
      dispatch.call,
      xla=xla,
      pallas_tpu=kernel,
      pallas_gpu=hopper if implementation == "pallas_gpu" else None,
      implementation=implementation,
    )
  )

  @run.defjvp
  def _(operands, tangents):
    push = jax.checkpoint(lambda x, t: jax.jvp(xla, x, t)[1])
    return run(*operands), push(operands, tangents)

  return run
