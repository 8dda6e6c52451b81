"""Calls of real models: reading and writing the memory of one layer."""

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas.example import Example
from giantsteps.kernels_pallas.fast_weight import operations
from giantsteps.kernels_pallas.newton_schulz import newton_schulz

# name, batch * heads, tokens of a chunk, d, h
_SIZES = (
  ("512", 4, 2048, 512, 512),
  ("language model 760M", 4, 2048, 384, 384),
  ("language model 3B", 4, 2048, 768, 768),
  ("novel views", 1, 65536, 768, 1536),
  ("video 1.3B", 2, 4680, 768, 1536),
)


def examples() -> list[Example]:
  """bfloat16 tokens and float32 states; one device's batch."""
  return [
    example
    for name, batch, length, d, h in _SIZES
    for example in _of_a_layer(
      f"{name}: {batch} x {length} x {d} x {h}", batch, length, d, h
    )
  ]


def _of_a_layer(name, batch, length, d, h) -> list[Example]:
  float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  sizes = ((h, d), (d, h), (h, d))
  weights = tuple(float32(batch, *size) for size in sizes)
  norms = tuple(float32(batch, rows, 1) for rows, _ in sizes)
  tokens = jax.ShapeDtypeStruct((batch, length, d), jnp.bfloat16)
  rates = (float32(batch, length, 1),) * 3
  momentum = float32(batch, 1, 1), weights
  product = 2.0 * batch * length * d * h
  elements = 3.0 * batch * d * h
  return [
    Example(f"apply {name}", operations.apply, (weights, tokens), 3 * product),
    Example(
      f"gradient {name}",
      operations.gradient,
      (weights, tokens, tokens, rates),
      6 * product,
    ),
    Example(
      f"update {name}",
      operations.update,
      (weights, weights, norms),
      6 * elements,
    ),
    Example(
      f"update with momentum {name}",
      operations.update,
      (weights, weights, norms, momentum),
      8 * elements,
    ),
    *(
      Example(
        f"muon step {kind}{name}",
        muon_step,
        (weights, norms, buffers, tokens, tokens, tokens, rates),
        9 * product
        + 15.0 * batch * (4 * d * h * min(d, h) + 2 * min(d, h) ** 3),
      )
      for kind, buffers in (("", None), ("with momentum ", momentum))
    ),
  ]


def muon_step(weights, norms, momentum, k, v, q, rates, *, implementation=None):
  """One chunk of LaCT with Muon: what it reads and the new state.

  Gradient, M = D + mu M, five Newton-Schulz steps in bfloat16 of the three
  matrices at once, W + NS(M) with rows of the old lengths, f_W(q): the
  kernels, and what XLA puts between them in one compiled program (momentum,
  stacking, transposition). Not counted: the projections that make k, v, q and
  the rates, the mean of mu, the derivative, and waits for memory.

  Args:
    weights: W0 [N, h, d], W1 [N, d, h], W2 [N, h, d] float32.
    norms: lengths of their rows, [N, rows, 1].
    momentum: mu [N, 1, 1] and the buffers M; None: M = D.
    k, v, q: [N, C, d] bfloat16.
    rates: three [N, C, 1] float32.
    implementation: of all four operations.

  Returns:
    f_W(q) [N, C, d], W and M, without momentum None.
  """
  step = operations.gradient(
    weights, k, v, rates, implementation=implementation
  )
  if momentum is not None:
    mu, buffers = momentum
    step = jax.tree.map(lambda d, m: d + mu * m, step, buffers)
  d0, d1, d2 = step
  o0, o1, o2 = newton_schulz(
    jnp.stack([d0, d1.mT, d2]),
    dtype=jnp.bfloat16,
    implementation=implementation,
  )
  weights, _, _ = operations.update(
    weights, (o0, o1.mT, o2), norms, implementation=implementation
  )
  read = operations.apply(weights, q, implementation=implementation)
  return read, weights, None if momentum is None else step


def candidates(example: Example) -> list[dict[str, int]]:
  """Block sizes worth trying, see `tpu.gradient` and `tpu.apply`."""
  operation = example.name.partition(" ")[0]
  if operation not in ("apply", "gradient"):
    return []
  if operation == "apply":
    return [
      {"tile": tile, "rows": rows, "depth": depth}
      for tile in (256, 512)
      for rows in (128, 256)
      for depth in (128, 1024)
    ]
  return [
    {"tile": tile, "rows": rows, "depth": depth, "apart": apart}
    for tile in (128, 256)
    for rows, depth, apart in ((512, 1024, 0), (768, 256, 1), (512, 256, 1))
  ]
