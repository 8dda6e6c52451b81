"""Statistics of logits hidden @ head that are never stored."""

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas import dispatch
from giantsteps.kernels_pallas.unmask_stats import reference
from giantsteps.kernels_pallas.unmask_stats.reference import Stats


def unmask_stats(
  hidden: jax.Array,
  head: jax.Array,
  *,
  bias: jax.Array | None = None,
  temperature: jax.Array | float | None = None,
  seeds: jax.Array | None = None,
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
    implementation: "xla" or None.

  Returns:
    `Stats`, [T] each; the lowest token of equals.

  Raises:
    ValueError: if shapes do not fit, or temperature comes without seeds.
  """
  rows = hidden.shape[0]
  if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[0]:
    raise ValueError(
      f"hidden {hidden.shape}, head {head.shape}: want [T, D] and [D, V]"
    )
  if bias is not None and bias.shape != head.shape[1:]:
    raise ValueError(f"bias {bias.shape}: want {head.shape[1:]}, one per token")
  if temperature is not None:
    temperature = jnp.broadcast_to(jnp.asarray(temperature), (rows,))
    if seeds is None or seeds.shape != (rows, 2) or seeds.dtype != jnp.uint32:
      have = None if seeds is None else f"{seeds.dtype}{list(seeds.shape)}"
      raise ValueError(f"seeds {have}: temperature wants uint32[{rows}, 2]")
  else:
    seeds = None
  return dispatch.call(
    hidden,
    head,
    bias,
    temperature,
    seeds,
    xla=reference.unmask_stats,
    implementation=implementation,
  )
