"""Statistics of logits hidden @ head that are never stored."""

import functools

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas import dispatch
from giantsteps.kernels_pallas.unmask_stats import gpu, reference, tpu
from giantsteps.kernels_pallas.unmask_stats.reference import Partial, Stats

# Smaller heads were not compared with XLA's by the compiler's estimates.
_SMALLEST = 4_096


def unmask_stats(
  hidden: jax.Array,
  head: jax.Array,
  *,
  bias: jax.Array | None = None,
  temperature: jax.Array | float | None = None,
  seeds: jax.Array | None = None,
  transposed: bool = False,
  axis_name: str | None = None,
  implementation: str | None = None,
) -> Stats:
  """Token, its logit, logsumexp, entropy and the runner-up, per position.

  Costs 2 T D V FLOPs; the head is read once, logits [T, V] are never formed.

  Args:
    hidden: [T, D] float; products are accumulated in float32 or wider.
    head: [D, V].
    bias: [V] float, added to the logits; -inf bans a token. None: 0.
    temperature: [T] or a number, >= 0: the token is a sample of
      softmax(logits / temperature) with the noise of `noise.gumbel`, in which
      neither tiles nor neighbours count. None: the best token. The other
      statistics are those of the logits without noise and temperature.
    seeds: [T, 2] uint32, the stream of each position; with temperature only.
    transposed: the head is [V, D], as an embedding is: no copy is made.
    axis_name: inside `jax.shard_map`, the axis over which the vocabulary is
      split: head and bias are this device's columns, as many on every device,
      in the order of the axis. Devices exchange 8 numbers per position.
    implementation: "xla", "pallas_tpu" (bfloat16 and float32), "pallas_gpu"
      (`gpu.fits`; no default takes it before it is measured), or None: on TPUs
      the kernel for bfloat16 hidden and V >= 4096, else XLA. Kernels have no
      derivatives.

  Returns:
    `Stats`, [T] each; the lowest token of equals.

  Raises:
    ValueError: if shapes do not fit, temperature comes without seeds, or the
      implementation does not exist for the call.
  """
  rows = hidden.shape[0]
  want = "[V, D]" if transposed else "[D, V]"
  depth, size = head.shape[::-1] if transposed else head.shape
  if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != depth:
    raise ValueError(
      f"hidden {hidden.shape}, head {head.shape}: want [T, D] and {want}"
    )
  if bias is not None and bias.shape != (size,):
    raise ValueError(f"bias {bias.shape}: want {(size,)}, one per token")
  if temperature is not None:
    temperature = jnp.broadcast_to(jnp.asarray(temperature), (rows,))
    if seeds is None or seeds.shape != (rows, 2) or seeds.dtype != jnp.uint32:
      have = None if seeds is None else f"{seeds.dtype}{list(seeds.shape)}"
      raise ValueError(f"seeds {have}: temperature wants uint32[{rows}, 2]")
  else:
    seeds = None
  offset = None
  if axis_name is not None:
    offset = jax.lax.axis_index(axis_name) * size
  exists = tpu.fits(hidden, head)
  pays = hidden.dtype == jnp.bfloat16 and size >= _SMALLEST
  pays &= not dispatch.divided()
  kernel = functools.partial(tpu.partial, transposed=transposed)
  asked = implementation is not None and not transposed
  on_gpu = gpu.partial if asked and gpu.fits(hidden, head) else None
  found = dispatch.call(
    hidden,
    head,
    bias,
    temperature,
    seeds,
    offset,
    xla=functools.partial(reference.partial, transposed=transposed),
    pallas_tpu=kernel if exists and (pays or implementation) else None,
    pallas_gpu=on_gpu,
    implementation=implementation,
  )
  if axis_name is not None:
    found = _of_all(found, axis_name)
  return reference.finish(found)


def _of_all(local: Partial, axis_name: str) -> Partial:
  """Merges the parts of all devices, in the order of their tokens."""
  gathered = jax.lax.all_gather(local, axis_name)
  size = jax.lax.axis_size(axis_name)
  parts = [jax.tree.map(lambda x, i=i: x[i], gathered) for i in range(size)]
  return functools.reduce(reference.merge, parts)
