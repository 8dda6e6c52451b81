"""The network of the flow-map papers' checkerboard (arXiv:2505.18825): times
and a point beside each other into a plain MLP, 1.05M parameters as it is.

`mlp` conditions better and costs more; this one makes figures comparable.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas.precision import accumulator


@dataclasses.dataclass(frozen=True)
class Config:
  """The network, written to JSON.

  Attributes:
    width, depth: hidden size, hidden layers after the first.
    num_classes: 0 ignores labels; otherwise label num_classes is "none" and
      the label enters as a one-hot vector.
    two_times: the network takes (s, t) and not t alone.
    dtype, param_dtype: of the computation and of the parameters.
  """

  width: int = 512
  depth: int = 4
  num_classes: int = 0
  two_times: bool = True
  dtype: str = "float32"
  param_dtype: str = "float32"


class PlainMlp(nn.Module):
  """Predicts an array like x from (x, t) or (x, s, t), and a class.

  For data of standard deviation sigma_0 it is called with x / sigma_0 and its
  output is multiplied by sigma_0. The output is not zero at the start.
  """

  config: Config

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    t: jax.Array,
    s: jax.Array | None = None,
    labels: jax.Array | None = None,
  ) -> jax.Array:
    """Runs the network; arguments, result and errors as of `mlp.Mlp`."""
    cfg = self.config
    if s is not None and not cfg.two_times:
      raise ValueError("a second time s needs a config with two_times=True")
    if labels is not None and not cfg.num_classes:
      raise ValueError("labels need a config with num_classes > 0")
    dtypes: Any = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}
    dense = functools.partial(nn.Dense, **dtypes)
    flat = x.reshape(x.shape[0], -1)
    times = [t if s is None else s, t] if cfg.two_times else [t]
    parts = [jnp.stack(times, -1).astype(flat.dtype), flat]
    if cfg.num_classes:
      if labels is None:
        labels = jnp.full(t.shape, cfg.num_classes, jnp.int32)
      parts.append(jax.nn.one_hot(labels, cfg.num_classes + 1))
    h = nn.gelu(dense(cfg.width, name="in")(jnp.concatenate(parts, -1)))
    for i in range(cfg.depth):
      h = nn.gelu(dense(cfg.width, name=f"hidden_{i}")(h))
    out = dense(flat.shape[-1], name="out")(h)
    return out.astype(accumulator(x.dtype)).reshape(x.shape)
