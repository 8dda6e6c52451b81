"""Newton-Schulz for every platform, with its derivatives."""

import functools

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas import dispatch
from giantsteps.kernels_pallas.newton_schulz import reference, tpu

# Short side of the smallest model whose estimates were compared with XLA's.
_SMALLEST = 384


def newton_schulz(
  g: jax.Array,
  kind: str = "scheduled",
  steps: int = 5,
  dtype: jax.typing.DTypeLike | None = None,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """Moves the singular values of each matrix towards 1 (Muon's step).

  X = g / (|g|_F + 1e-7), then `steps` times A = X X^T, X = a X + (b A + c A A)
  X on the short side. Costs steps (4 m^2 n + 2 m^3) FLOPs, m = min, n = max.

  Args:
    g: [..., rows, columns] float.
    kind: "scheduled" (language model: other coefficients in every step, at
      most 5) or "fixed" (view synthesis and video).
    steps: number of iterations.
    dtype: of the iteration; None keeps that of g. bfloat16, as in the
      authors' code, changes results by some per cent.
    implementation: "xla", "pallas_tpu" (bfloat16 and float32 iterations), or
      None: on TPUs the kernel for bfloat16 where it is faster than XLA by the
      compiler's estimate (a short side of 384 or more that fits on chip), else
      XLA.

  Returns:
    [..., rows, columns] in g.dtype; zero where g is zero.

  Raises:
    ValueError: for another kind, more steps than scheduled coefficients, or an
      implementation that these shapes do not have.
  """
  coefficients = reference.coefficients(kind, steps)
  dtype = jnp.dtype(dtype or g.dtype)
  rows, columns = g.shape[-2:]
  exists = (
    steps > 0
    and g.size > 0
    and g.dtype != jnp.float64
    and dtype.name in ("bfloat16", "float32")
    and tpu.fits(rows, columns, dtype)
  )
  pays = dtype == jnp.bfloat16 and min(rows, columns) >= _SMALLEST
  kernel = functools.partial(
    _with_kernel, coefficients=coefficients, dtype=dtype
  )
  return dispatch.call(
    g,
    xla=functools.partial(
      reference.newton_schulz, kind=kind, steps=steps, dtype=dtype
    ),
    pallas_tpu=kernel if exists and (pays or implementation) else None,
    implementation=implementation,
  )


def _with_kernel(g, *, coefficients, dtype):
  """Transposed where that is shorter; NS(G^T) = NS(G)^T."""
  tall = g.shape[-2] > g.shape[-1]
  x = _last(g.mT if tall else g, coefficients, dtype)
  return (x.mT if tall else x).astype(g.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _last(g, coefficients, dtype):
  """The last iterate [..., m, n] of g [..., m, n], m <= n, in float32."""
  return tpu.iterate(g, coefficients, dtype)


@_last.defjvp
def _(coefficients, dtype, primals, tangents):
  """The tangent of every step at the iterate that the kernel kept.

  It is linear in the tangent, so that JAX transposes it: reverse mode stores
  the iterates in `dtype` and multiplies by XLA.
  """
  (g,), (dg,) = primals, tangents
  x = _all(g, coefficients, dtype)
  scaled = functools.partial(reference.scaled, dtype=dtype)
  dx = jax.jvp(scaled, (g,), (dg,))[1]
  for i, abc in enumerate(coefficients):
    step = functools.partial(reference.step, abc=abc)
    dx = jax.jvp(step, (x[i],), (dx,))[1]
  return x[-1].astype(jnp.float32), dx.astype(jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _all(g, coefficients, dtype):
  """All iterates, [steps + 1, ..., m, n] in `dtype`."""
  rows, columns = g.shape[-2:]
  if not tpu.fits(rows, columns, dtype, len(coefficients) + 1):
    return _all_by_xla(g, coefficients, dtype)
  return tpu.iterate(g, coefficients, dtype, keep=True)


@_all.defjvp
def _(coefficients, dtype, primals, tangents):
  """Second derivatives are those of XLA."""
  tangent = jax.jvp(
    functools.partial(_all_by_xla, coefficients=coefficients, dtype=dtype),
    primals,
    tangents,
  )[1]
  return _all(*primals, coefficients, dtype), tangent


def _all_by_xla(g, coefficients, dtype):
  x = [reference.scaled(g, dtype)]
  for abc in coefficients:
    x.append(reference.step(x[-1], abc))
  return jnp.stack(x)
