"""Window attention for every platform."""

import functools

import jax

from giantsteps.kernels_pallas import dispatch
from giantsteps.kernels_pallas.window_attention import reference, splash

# Shorter rows and windows were not compared with XLA's.
_SHORTEST_ROW = 2_048
_SMALLEST_WINDOW = 256


def window_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  causal: bool,
  window: int | None = None,
  mask: reference.Mask | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Softmax attention with scale 1/sqrt(K); softmax in float32 or wider.

  Args:
    q: [B, T, H, K].
    k: [B, S, G, K], H a multiple of G (grouped queries).
    v: [B, S, G, K].
    causal: query i sees keys j <= i.
    window: query i sees keys |i - j| < window; None is unlimited.
    mask: a hashable function of positions, queries [T, 1] and keys [1, S] or
      both of one shape, that says which are seen, [T, S] bool; at least one by
      each query. Part of the kernel: lax.rem and lax.div, not % and //, which
      ask for the sign. With one, neither causal nor a window.
    implementation: "xla", "pallas_tpu" (bfloat16 and float32; JAX's splash
      attention), or None: on TPUs the kernel where `has_kernel`, else XLA,
      also on GPUs. The kernel has no forward mode: where it may be chosen
      `jax.jvp` fails on every platform, and "xla" is to be asked for.

  Returns:
    [B, T, H, K] in q.dtype.

  Raises:
    ValueError: for an implementation that these shapes do not have, or a mask
      beside causal or a window.
  """
  if mask is not None and (causal or window is not None):
    raise ValueError(
      f"causal={causal}, window={window}: a mask stands alone, put them into it"
    )
  options = {"causal": causal, "window": window, "mask": mask}
  takes = splash.fits(q, k, **options)
  if implementation is None:
    takes = has_kernel(q, k, **options)
  kernel = functools.partial(splash.attention, **options)
  return dispatch.call(
    q,
    k,
    v,
    xla=functools.partial(reference.attention, **options),
    pallas_tpu=kernel if takes else None,
    implementation=implementation,
  )


def streams(
  q: jax.Array,
  k: jax.Array,
  *,
  causal: bool,
  window: int | None,
  mask: reference.Mask | None = None,
) -> bool:
  """Whether not all scores of a call exist at once, on some platform: it is
  then to be run by every device for its own rows and heads."""
  options = {"causal": causal, "window": window, "mask": mask}
  return reference.streams(q, k, **options) or has_kernel(q, k, **options)


def has_kernel(
  q: jax.Array,
  k: jax.Array,
  *,
  causal: bool,
  window: int | None,
  mask: reference.Mask | None = None,
) -> bool:
  """Whether a program for TPUs takes the kernel: bfloat16, rows from 2,048
  tokens, a window from 256 on, causal without one, or a mask.

  Not inside a `shard_map` that checks what differs between devices
  (`check_vma=True`): JAX's kernel does not say it of its results.
  """
  return (
    splash.fits(q, k, causal, window, mask)
    and q.dtype.name == "bfloat16"
    and q.shape[1] >= _SHORTEST_ROW
    and (window is None or window >= _SMALLEST_WINDOW)
    and not jax.typeof(q).manual_axis_type.varying
  )
