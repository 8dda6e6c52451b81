"""One production call of a kernel, as data: what tests compile for chips that
are not here, what `experiments/inspect_kernel.py` reports on and tunes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Example(NamedTuple):
  """A call at the shapes of a real model.

  Attributes:
    name: of the case, "muon 12 x 512 x 512".
    function: f(*operands, implementation=...), the public operation.
    operands: pytrees of `jax.ShapeDtypeStruct`.
    flops: useful floating-point operations, symmetric halves counted twice.
    implementations: those that exist for it, of `dispatch.IMPLEMENTATIONS`.
  """

  name: str
  function: Callable[..., Any]
  operands: tuple[Any, ...]
  flops: float
  implementations: tuple[str, ...] = ("xla", "pallas_tpu")

  def lower(
    self, implementation: str | None, sharding: Any
  ) -> jax.stages.Lowered:
    """Lowers the call for the device of `sharding`, present or not."""
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    operands = jax.tree.map(place, self.operands)
    call = jax.jit(
      lambda *xs: self.function(*xs, implementation=implementation)
    )
    return call.lower(*operands)
