"""Low-rank adapters of a tree of parameters (LoRA, arXiv:2106.09685).

W stays as it is, W + scale A B computes (the paper's W + (alpha / r) B A on
transposed matrices), and only A and B are trained:

  adapters = lora.init(params, rank=8, key=key)
  loss = lambda adapters: objective(lora.merge(params, adapters))
  grads = jax.grad(loss)(adapters)

The network knows nothing of it, so any of models/ can be adapted, and merged
parameters are saved like others. The price: merged matrices exist during a
step, one more copy of those that are adapted.
"""

import dataclasses
import re
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import traverse_util

ATTENTION = r"(.*/)?(q|k|v|o)/kernel"
MATRICES = r"(.*/)?(q|k|v|o|gate|up|down)/kernel"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
  """The change scale A B of one matrix, or of one per layer.

  Attributes:
    a: [..., in, r] float32.
    b: [..., r, out] float32.
    scale: alpha / r, no leaf: it is not trained.
  """

  a: jax.Array
  b: jax.Array
  scale: float = dataclasses.field(metadata={"static": True})


def init(
  params: dict,
  *,
  rank: int,
  key: jax.Array,
  alpha: float | None = None,
  pattern: str = MATRICES,
) -> dict[str, Adapter]:
  """Adapters that change nothing yet: A is Gaussian, B is 0.

  Args:
    params: parameters of a network; its matrices are [in, out], stacked ones
      [..., in, out], each with an adapter of its own.
    rank: r, at most the smaller side of every matrix.
    key: of A, whose entries have variance 1 / in.
    alpha: scale = alpha / r; None is r, a scale of 1.
    pattern: regular expression for the whole path of what is adapted,
      "layers/q/kernel".

  Returns:
    {path: adapter}.

  Raises:
    ValueError: if the pattern fits nothing or something that is no matrix, or
      the rank does not fit.
  """
  flat = _flatten(params)
  paths = sorted(path for path in flat if re.fullmatch(pattern, path))
  if not paths:
    raise ValueError(
      f"pattern={pattern!r} fits none of {', '.join(sorted(flat))}"
    )
  adapters = {}
  keys = jax.random.split(key, len(paths))
  for path, path_key in zip(paths, keys, strict=True):
    shape = flat[path].shape
    if len(shape) < 2:
      raise ValueError(f"pattern={pattern!r} fits {path} {shape}, no matrix")
    *stack, inner, outer = shape
    if not 1 <= rank <= min(inner, outer):
      raise ValueError(
        f"rank={rank}: must be in 1..{min(inner, outer)}, {path}"
      )
    a = jax.random.normal(path_key, (*stack, inner, rank)) / inner**0.5
    scale = 1.0 if alpha is None else alpha / rank
    adapters[path] = Adapter(a, jnp.zeros((*stack, rank, outer)), scale)
  return adapters


def merge(params: dict, adapters: dict[str, Adapter]) -> dict:
  """W + scale A B where there is an adapter, in float32, cast to W's dtype.

  Raises:
    ValueError: if an adapter has no matrix of its shape in `params`.
  """
  flat = _flatten(params)
  for path, adapter in adapters.items():
    shape = (*adapter.a.shape[:-1], adapter.b.shape[-1])
    if path not in flat or flat[path].shape != shape:
      found = flat[path].shape if path in flat else "nothing"
      raise ValueError(f"adapter {path!r} of {shape}: params have {found}")
    product = jnp.matmul(adapter.a, adapter.b, precision="highest")
    change = adapter.scale * product
    merged = flat[path].astype(change.dtype) + change
    flat[path] = merged.astype(flat[path].dtype)
  return traverse_util.unflatten_dict(flat, sep="/")


def _flatten(tree: dict) -> dict[str, Any]:
  """A new {"layers/q/kernel": leaf}."""
  return cast(dict, traverse_util.flatten_dict(tree, sep="/"))
