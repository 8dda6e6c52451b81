"""LaCT for novel views: fast weights remember a scene, rays ask for images.

"Test-Time Training Done Right" (arXiv:2505.23884), section 5, novel view
synthesis. All views of a scene are one set: their tokens are written in one
step, so the order of the views and the size of the set do not matter, and what
remains of a scene is one set of fast weights per block. `reconstruct` makes
them, `render` reads them, in time independent of the number of input views.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from giantsteps.kernels_pallas import dispatch
from giantsteps.kernels_pallas.fast_weight import Weights
from giantsteps.models import dit, fast_heads, layers, partitioning
from giantsteps.models.fast_weights import State, fast_weight_scan

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_TORCH_EPS = float(np.finfo(np.float32).eps)  # of an RMSNorm without eps


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape of the model; the paper's are (8, 768, 24, 12, 1) and more.

  Attributes:
    patch: side of a square patch; divides both sides of the images.
    width, depth: D, number of blocks L.
    heads: attention heads, inside one view.
    fast_heads: fast-weight heads, each of dimension d = width / fast_heads.
    expansion: h = int(expansion * d) hidden units of a fast-weight MLP.
    expand: hidden size of the MLP of a block / width.
    rate: learning rate of a token before training. Muon forgets a common
      factor of all rates: only those of tokens among each other count.
    newton_schulz_steps, ns_dtype: as in `fast_weight_scan`.
    remat: none, dots or full (`layers.remat`).
    remat_write: recomputes a write in the backward pass.
    implementation: of the fast weights' kernels; None chooses by platform.
    unroll: blocks per turn of the scan over the stack.
    dtype: compute dtype; fast weights and images are float32 all the same.
    param_dtype: dtype of the parameters.
  """

  patch: int = 8
  width: int = 768
  depth: int = 24
  heads: int = 12
  fast_heads: int = 1
  expansion: float = 2.0
  expand: int = 4
  rate: float = 1e-2
  newton_schulz_steps: int = 5
  ns_dtype: str | None = None
  remat: str = "none"
  remat_write: bool = True
  implementation: str | None = None
  unroll: int = 1
  dtype: str = "float32"
  param_dtype: str = "float32"

  def __post_init__(self):
    sizes = ("patch", "width", "depth", "heads", "fast_heads", "expand")
    for name in (*sizes, "rate", "newton_schulz_steps", "unroll"):
      if getattr(self, name) <= 0:
        raise ValueError(f"{name}={getattr(self, name)!r}: must be above 0")
    if self.width % self.heads or self.width % self.fast_heads:
      raise ValueError(
        f"width={self.width}: must be a multiple of heads={self.heads} and of "
        f"fast_heads={self.fast_heads}"
      )
    if int(self.expansion * self.width / self.fast_heads) < 1:
      raise ValueError(f"expansion={self.expansion}: leaves no hidden unit")
    for name, choices in (
      ("ns_dtype", (None, *_DTYPES)),
      ("implementation", (None, *dispatch.IMPLEMENTATIONS)),
      ("remat", layers.REMAT_POLICIES),
      ("dtype", _DTYPES),
      ("param_dtype", _DTYPES),
    ):
      if getattr(self, name) not in choices:
        raise ValueError(
          f"{name}={getattr(self, name)!r}: must be one of "
          + ", ".join(map(str, choices))
        )


class FastLayer(nn.Module):
  """Writes some tokens of a set at once, then reads with all of them.

  Attributes:
    config: shape of the model.
    num_written: the first tokens are written; 0 only reads.
  """

  config: Config
  num_written: int

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    weights: Weights | None = None,
    known: jax.Array | None = None,
  ) -> tuple[jax.Array, Weights]:
    """Runs the layer.

    Args:
      x: [B, T, D] after a norm.
      weights: continues from these, [B H, ...]; None is the initial ones.
      known: [B, num_written] bool, False is left out of the write; None is
        all.

    Returns:
      [B, T, D] and the fast weights after the write.
    """
    cfg, num_written = self.config, self.num_written
    batch, length, _ = x.shape
    d = cfg.width // cfg.fast_heads
    # silu on all three; then only directions of q and k count
    qkv = nn.silu(_dense(cfg, x, 3 * cfg.width, "qkv"))
    q, k, v = (
      fast_heads.split(y, cfg.fast_heads) for y in jnp.split(qkv, 3, -1)
    )
    q, k = fast_heads.unit(q), fast_heads.unit(k)
    rate = _dense(cfg, x, 3 * cfg.fast_heads, "rate", use_bias=True)
    rate = rate.reshape(batch, length, 3, cfg.fast_heads).swapaxes(2, 3)
    rates = fast_heads.rates(rate, cfg.rate)
    if known is not None:  # a token of rate 0 leaves no trace at all
      mask = jnp.repeat(known, cfg.fast_heads, 0)[..., None]
      mask = jnp.pad(mask, ((0, 0), (0, length - num_written), (0, 0)))
      rates = jax.tree.map(lambda eta: jnp.where(mask, eta, 0), rates)
    initial = fast_heads.initial_weights(
      self.param,
      cfg.fast_heads,
      d,
      int(cfg.expansion * d),
      math.sqrt(2),
      cfg.param_dtype,
    )
    write = [(0, num_written, True, False)] if num_written else []
    run = functools.partial(
      fast_weight_scan,
      order=[*write, (0, length, False, True)],
      detach_norm=True,
      newton_schulz="fixed",
      newton_schulz_steps=cfg.newton_schulz_steps,
      ns_dtype=cfg.ns_dtype,
      remat=cfg.remat_write,
      implementation=cfg.implementation,
    )
    out, state = fast_heads.on_each_device(run, cfg.fast_heads)(
      q,
      k,
      v,
      rates,
      fast_heads.for_rows(initial, batch),
      state=None if weights is None else State(weights),
    )
    out = fast_heads.join(out, cfg.fast_heads)
    out = layers.RMSNorm(1e-5, cfg.dtype, cfg.param_dtype, name="fast_norm")(
      out
    )
    return _dense_out(cfg, out.reshape(x.shape), "o"), state.weights


class Block(nn.Module):
  """Attention inside each view, fast weights across them, an MLP.

  Attributes:
    config: shape of the model.
    num_written: the first views are written.
  """

  config: Config
  num_written: int

  @nn.compact
  def __call__(
    self, x: jax.Array, weights: Weights | None, known: jax.Array | None
  ) -> tuple[jax.Array, Weights]:
    """x [B, V, T, D], known [B, num_written] -> (x, fast weights)."""
    cfg = self.config
    x = partitioning.constrain_rows(x)
    batch, views, tokens, _ = x.shape
    x = x.reshape(batch * views, tokens, cfg.width)
    x = x + self._attention(_norm(cfg, "attention_norm")(x))
    x = x.reshape(batch, views * tokens, cfg.width)
    if known is not None:
      known = jnp.repeat(known, tokens, 1)
    mixer = FastLayer(cfg, self.num_written * tokens, name="mixer")
    y, weights = mixer(_norm(cfg, "mixer_norm")(x), weights, known)
    x = x + y
    y = _dense(cfg, _norm(cfg, "mlp_norm")(x), cfg.expand * cfg.width, "up")
    x = x + _dense_out(cfg, nn.gelu(y, approximate=False), "down")
    return x.reshape(batch, views, tokens, cfg.width), weights

  def _attention(self, x: jax.Array) -> jax.Array:
    cfg = self.config
    qkv = _dense(cfg, x, 3 * cfg.width, "qkv")
    heads = qkv.reshape(*x.shape[:2], 3 * cfg.heads, cfg.width // cfg.heads)
    q, k, v = jnp.split(heads, 3, 2)
    norm = lambda name: layers.RMSNorm(
      _TORCH_EPS, cfg.dtype, cfg.param_dtype, name=name
    )
    y = layers.attention(norm("q_norm")(q), norm("k_norm")(k), v, causal=False)
    return _dense_out(cfg, y.reshape(x.shape), "attention_out")


class LactViews(nn.Module):
  """Images of a scene from some of its images and all rays.

  Attributes:
    config: shape of the model.
  """

  config: Config

  @nn.compact
  def __call__(
    self,
    rays: jax.Array,
    image: jax.Array | None = None,
    known: jax.Array | None = None,
    state: Weights | None = None,
  ) -> tuple[jax.Array, Weights]:
    """Writes the views that have an image, then draws all views.

    Args:
      rays: [B, V, H, W, 6], origin and unit direction of each pixel's ray.
      image: [B, N, H, W, 3] in [0, 1], of the first N <= V views; None: none.
      known: [B, N] bool; a False view is drawn without its image, as the ones
        after N are.
      state: fast weights of the blocks; None is the initial ones.

    Returns:
      [B, V, H, W, 3] float32 in [0, 1] and the fast weights after the write,
      three [L, B * fast_heads, ...].

    Raises:
      ValueError: for other shapes.
    """
    cfg = self.config
    _check(cfg, rays, image, known)
    batch, views, height, width, _ = rays.shape
    num_written = 0 if image is None else image.shape[1]
    x = self._tokens(rays, image, known)
    stack = nn.scan(
      layers.remat(partitioning.gather_layer(Block, "layers"), cfg.remat),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
      length=cfg.depth,
      unroll=cfg.unroll,
    )
    x, kept = stack(cfg, num_written, name="layers")(x, state, known)
    x = _norm(cfg, "norm")(x)
    x = nn.sigmoid(_dense(cfg, x, cfg.patch**2 * 3, "out").astype(jnp.float32))
    out = dit.unpatchify(
      x.reshape(batch * views, -1, x.shape[-1]),
      height // cfg.patch,
      width // cfg.patch,
      cfg.patch,
    )
    return out.reshape(batch, views, height, width, 3), kept

  def _tokens(self, rays, image, known):
    """[B, V, T, D]: o, d, o x d and colour in [-1, 1] of each patch's pixels,
    colour 0 where there is none."""
    cfg = self.config
    batch, views, height, width, _ = rays.shape
    origin, direction = jnp.split(rays, 2, -1)
    colour = jnp.zeros_like(origin)
    if image is not None:
      image = 2 * image.astype(rays.dtype) - 1
      if known is not None:
        image = jnp.where(known[:, :, None, None, None], image, 0)
      colour = colour.at[:, : image.shape[1]].set(image)
    pixels = jnp.concatenate(
      [rays, jnp.cross(origin, direction), colour], -1
    ).reshape(batch * views, height, width, 12)
    x = _dense(cfg, dit.patchify(pixels, cfg.patch), cfg.width, "in")
    return x.reshape(batch, views, -1, cfg.width)


def predict(
  config: Config,
  params: dict,
  rays: jax.Array,
  image: jax.Array,
  known: jax.Array | None = None,
) -> jax.Array:
  """All views at once, as in training: see `LactViews`."""
  return _apply(config, params, rays, image, known)[0]


def reconstruct(
  config: Config,
  params: dict,
  rays: jax.Array,
  image: jax.Array,
  known: jax.Array | None = None,
) -> Weights:
  """The fast weights of all blocks after the given views.

  Args:
    config: shape of the model.
    params: its parameters.
    rays: [B, N, H, W, 6].
    image: [B, N, H, W, 3] in [0, 1].
    known: [B, N] bool; False views have no effect.
  """
  return _apply(config, params, rays, image, known)[1]


def render(
  config: Config, params: dict, state: Weights, rays: jax.Array
) -> jax.Array:
  """Draws views from what `reconstruct` kept.

  The result does not depend on which views are drawn in one call, nor does the
  time per view on how many were reconstructed from.

  Args:
    config: shape of the model.
    params: its parameters.
    state: of `reconstruct`.
    rays: [B, V, H, W, 6].

  Returns:
    [B, V, H, W, 3] float32 in [0, 1].
  """
  return _apply(config, params, rays, state=state)[0]


def _apply(config, params, *args, **kwargs) -> tuple[jax.Array, Weights]:
  out: Any = LactViews(config).apply({"params": params}, *args, **kwargs)
  return out


def _check(cfg, rays, image, known):
  if rays.ndim != 5 or rays.shape[-1] != 6:
    raise ValueError(f"rays {rays.shape}: expected [B, V, H, W, 6]")
  batch, views, height, width, _ = rays.shape
  if height % cfg.patch or width % cfg.patch:
    raise ValueError(f"rays {rays.shape}: sides not in patches of {cfg.patch}")
  if image is None:
    if known is not None:
      raise ValueError("known says which images are used, but image is None")
    return
  num = image.shape[1] if image.ndim == 5 else 0
  if not 0 < num <= views or image.shape != (batch, num, height, width, 3):
    raise ValueError(
      f"image {image.shape} does not fit rays {rays.shape}: expected "
      f"[{batch}, 1 to {views}, {height}, {width}, 3]"
    )
  if known is not None and known.shape != (batch, num):
    raise ValueError(f"known {known.shape}: expected {(batch, num)}")


def _norm(config: Config, name: str) -> nn.LayerNorm:
  return nn.LayerNorm(
    1e-5,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    use_bias=False,
    name=name,
  )


def _dense(
  config: Config,
  x: jax.Array,
  features: int,
  name: str,
  *,
  use_bias: bool = False,
  scale: float = 1.0,
) -> jax.Array:
  """Linear map of the last axis; flat, as in lact.py.

  Differs from the paper: kernels start with the standard deviation
  1/sqrt(fan-in), not 0.02, which suits a width of 768 only.
  """
  dense = nn.Dense(
    features,
    use_bias=use_bias,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    kernel_init=nn.initializers.variance_scaling(scale, "fan_in", "normal"),
    name=name,
  )
  return dense(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], features)


def _dense_out(config: Config, x: jax.Array, name: str) -> jax.Array:
  """Back to the width; the sum over the 3 L branches starts at order 1."""
  scale = 1 / (3 * config.depth)
  return _dense(config, x, config.width, name, scale=scale)
