"""One transformer for Llama, Qwen2, Qwen3, LLaDA, Dream and small byte models.

Pre-norm blocks of attention and SwiGLU with RMSNorm, rotary positions and
grouped queries; causal or bidirectional. What those families differ in (q/k
norms, q/k/v biases, tied embeddings, stretched rotary wavelengths, shifted
outputs) is in `Config`, as is a mixture of experts (moe.py) in place of the
SwiGLU. The stack is one scanned block: parameters under
"layers" have a leading axis L and compile time does not grow with depth.
pretrained.py reads those families' published checkpoints.
"""

import dataclasses
import functools
import math
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from giantsteps.kernels_pallas.unmask_stats import Stats
from giantsteps.kernels_pallas.window_attention import Mask
from giantsteps.models import kv_cache, layers, moe, partitioning, token_stats

_KERNEL_INIT = nn.initializers.lecun_normal()
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_ROPE_TYPES = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape and variant of a transformer.

  Attributes:
    vocab_size: V.
    embedding_size: rows of the embedding and columns of the head, V or more;
      those from V on are padding whose logits are -inf. None: V.
    width, depth: D, number of blocks L.
    num_heads, num_kv_heads: query heads, key/value heads (a divisor).
    head_dim: K, even; num_heads * head_dim need not be the width.
    mlp_width: hidden size of the SwiGLU, or of each expert.
    num_experts: SwiGLUs per block among which a router chooses; 0: one, and
      no router.
    experts_per_token: how many of them each token uses.
    causal: position i sees positions <= i; otherwise all.
    shifted: the output at i predicts token i+1 although the model is
      bidirectional (Dream); causal models are always shifted.
    window: position i sees |i - j| < window; None is unlimited.
    rope_theta: base of the rotary wavelengths.
    rope_type: default, linear (all wavelengths times rope_factor) or llama3
      (`layers.llama3_frequencies` with the other rope_ fields).
    eps: of every RMSNorm.
    qkv_bias: biases on q, k and v (Qwen2, Dream).
    qk_norm: RMSNorm of each q and k head before the rotation (Qwen3).
    tie_embeddings: the head is the transposed embedding.
    scale_embeddings: embeddings times sqrt(width) (LLaDA's input_emb_norm).
    scale_logits: hidden states, and so logits, over sqrt(width).
    short_conv: taps of a depthwise convolution over the normed input of q,
      of k and of v each, causal if the model is; 0 is none.
    remat: none, dots or full (`layers.remat`).
    dtype: compute dtype; logits are float32 all the same.
    param_dtype: dtype of the parameters.
  """

  vocab_size: int = 256
  embedding_size: int | None = None
  width: int = 256
  depth: int = 4
  num_heads: int = 4
  num_kv_heads: int = 4
  head_dim: int = 64
  mlp_width: int = 768
  num_experts: int = 0
  experts_per_token: int = 2
  causal: bool = True
  shifted: bool = False
  window: int | None = None
  rope_theta: float = 10_000.0
  rope_type: str = "default"
  rope_factor: float = 1.0
  rope_low: float = 1.0
  rope_high: float = 4.0
  rope_original_length: int = 8192
  eps: float = 1e-6
  qkv_bias: bool = False
  qk_norm: bool = False
  tie_embeddings: bool = False
  scale_embeddings: bool = False
  scale_logits: bool = False
  short_conv: int = 0
  remat: str = "none"
  dtype: str = "float32"
  param_dtype: str = "float32"

  def __post_init__(self):
    sizes = ("vocab_size", "width", "depth", "num_heads", "num_kv_heads")
    for name in (*sizes, "head_dim", "mlp_width", "rope_original_length"):
      _check(getattr(self, name) > 0, name, getattr(self, name), "above 0")
    _check(
      self.embedding_size is None or self.embedding_size >= self.vocab_size,
      "embedding_size",
      self.embedding_size,
      f"vocab_size={self.vocab_size} or more, or None",
    )
    _check(
      self.num_heads % self.num_kv_heads == 0,
      "num_kv_heads",
      self.num_kv_heads,
      f"a divisor of num_heads={self.num_heads}",
    )
    _check(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even")
    _check(
      self.window is None or self.window > 0,
      "window",
      self.window,
      "above 0, or None for all positions",
    )
    _check(self.num_experts >= 0, "num_experts", self.num_experts, "0 or more")
    _check(
      not self.num_experts or 1 <= self.experts_per_token <= self.num_experts,
      "experts_per_token",
      self.experts_per_token,
      f"1 to num_experts={self.num_experts}",
    )
    _check(self.short_conv >= 0, "short_conv", self.short_conv, "0 or more")
    for name in ("rope_theta", "rope_factor", "eps"):
      _check(getattr(self, name) > 0, name, getattr(self, name), "above 0")
    _check(
      self.rope_high > self.rope_low,
      "rope_high",
      self.rope_high,
      f"above rope_low={self.rope_low}",
    )
    for name, choices in (
      ("rope_type", _ROPE_TYPES),
      ("remat", layers.REMAT_POLICIES),
      ("dtype", _DTYPES),
      ("param_dtype", _DTYPES),
    ):
      value = getattr(self, name)
      _check(value in choices, name, value, "one of " + ", ".join(choices))


class Transformer(nn.Module):
  """Tokens to hidden states after the final norm.

  Attributes:
    config: shape and variant.
  """

  config: Config

  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    valid: jax.Array | None = None,
    mask: Mask | None = None,
  ) -> jax.Array:
    """tokens [B, T] int32, positions [B, T] int -> [B, T, D] in dtype.

    The output at i has seen token i. Positions count from 0 by default. A mask
    says which token sees which (`window_attention`, by their places in the
    row, whatever their positions) in a model that is not causal. With
    experts, their `moe.Load`, leaves [L, B, E], is sown as "load" into the
    collection "intermediates"; tokens where `valid` [B, T] bool is False
    (padding) are not counted in it. They are seen all the same.

    Raises:
      ValueError: if tokens, positions or valid have another shape, or the model
        takes no mask.
    """
    return self.extend(tokens, positions, valid, mask=mask)[0]

  @nn.compact
  def extend(
    self,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    valid: jax.Array | None = None,
    limits: jax.Array | None = None,
    cache: kv_cache.Cache | None = None,
    mix: tuple[jax.Array, jax.Array] | None = None,
    mask: Mask | None = None,
  ) -> tuple[jax.Array, kv_cache.Cache | None]:
    """As `__call__`, for rows of different length and with a cache.

    Args:
      tokens: [B, T] int32.
      positions: [B, T] int, also the slots of the cache that are written; one
        outside of it is not.
      valid: [B, T] bool, for experts.
      limits: [B, T] int: token i sees positions below limits[:, i], and none
        above its own if the model is causal. None: all T.
      cache: keys and values of all positions; None: those of these tokens.
      mix: (weight [B, T], vectors [B, T, D]): the input of a token becomes
        (1 - weight) embedding + weight vector.
      mask: as of `__call__`, without limits.

    Returns:
      [B, T, D] in dtype, and the cache with these tokens' keys and values.

    Raises:
      ValueError: if shapes do not fit, limits are missing, or the model's
        attention window or short convolutions look beyond a cache.
    """
    cfg = self.config
    if tokens.ndim != 2:
      raise ValueError(f"tokens {tokens.shape}: expected [B, T]")
    if positions is None:
      positions = jnp.arange(tokens.shape[1])[None]
    if positions.ndim != 2 or positions.shape[1] != tokens.shape[1]:
      raise ValueError(
        f"positions {positions.shape} do not fit tokens {tokens.shape}"
      )
    if valid is not None and valid.shape != tokens.shape:
      raise ValueError(
        f"valid {valid.shape} does not fit tokens {tokens.shape}"
      )
    if cache is not None and limits is None:
      raise ValueError("a cache wants limits: its slots are not all filled")
    if limits is not None and not ragged(cfg):
      raise ValueError(
        f"window={cfg.window}, short_conv={cfg.short_conv}: limits and caches "
        "are for full attention without convolutions"
      )
    if mask is not None and (
      limits is not None or cfg.causal or not ragged(cfg)
    ):
      raise ValueError(
        f"causal={cfg.causal}, window={cfg.window}, short_conv="
        f"{cfg.short_conv}: a mask is for full attention without limits, not "
        "causal, no convolutions"
      )
    if limits is not None:
      positions = jnp.broadcast_to(positions, tokens.shape)
      limits = jnp.broadcast_to(limits, tokens.shape)
    if limits is not None and cfg.causal:
      limits = jnp.minimum(limits, positions + 1)
    # In bfloat16 neighbouring positions beyond 256 would be one.
    wide = layers.accumulator(cfg.dtype)
    frequency = jnp.asarray(_frequencies(cfg), wide)
    angle = positions[..., None].astype(wide) * frequency[None, None]
    num_rows = cfg.embedding_size or cfg.vocab_size
    x = nn.Embed(
      num_rows,
      cfg.width,
      dtype=cfg.dtype,
      param_dtype=cfg.param_dtype,
      embedding_init=nn.initializers.normal(_embedding_std(cfg)),
      name="embed",
    )(tokens)
    if mix is not None:
      weight, vectors = mix
      weight = weight[..., None].astype(x.dtype)
      x = (1 - weight) * x + weight * vectors.astype(x.dtype)
    if cfg.scale_embeddings:
      x = _scaled(x, math.sqrt(cfg.width))
    if not cfg.tie_embeddings:
      self.param(
        "head",
        nn.initializers.normal(0.5 / math.sqrt(cfg.width)),
        (cfg.width, num_rows),
        cfg.param_dtype,
      )
    stack = nn.scan(
      layers.remat(partitioning.gather_layer(Block, "layers"), cfg.remat),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(0, *[nn.broadcast] * 4),  # pyright: ignore[reportArgumentType]
      length=cfg.depth,
    )
    (x, cache), load = stack(cfg, mask, name="layers")(
      (x, cache), jnp.arange(cfg.depth), angle, valid, positions, limits
    )
    if cfg.num_experts:
      self.sow("intermediates", "load", load)
    x = _norm(cfg, "norm")(x)
    if cfg.scale_logits:
      x = _scaled(x, 1 / math.sqrt(cfg.width))
    return x, cache


class Block(nn.Module):
  """x + attention(norm(x)), then x + swiglu(norm(x)) or a mixture of them.

  Attributes:
    config: shape and variant.
    mask: which token sees which; None: as the config says.
  """

  config: Config
  mask: Mask | None = None

  @nn.compact
  def __call__(
    self,
    carry: tuple[jax.Array, kv_cache.Cache | None],
    layer: jax.Array,
    angle: jax.Array,
    valid: jax.Array | None = None,
    positions: jax.Array | None = None,
    limits: jax.Array | None = None,
  ) -> tuple[tuple[jax.Array, kv_cache.Cache | None], moe.Load | None]:
    """One block of the stack.

    Args:
      carry: x [B, T, D] and the cache of all layers, or None.
      layer: [] int, which of them this is.
      angle: [B or 1, T, K/2], rotary.
      valid, positions, limits: as in `Transformer.extend`.

    Returns:
      The carry, and the experts' load or None.
    """
    x, cache = carry
    x = partitioning.constrain_rows(x)
    y = _norm(self.config, "attention_norm")(x)
    y, cache = self._attention(y, angle, layer, positions, limits, cache)
    x = x + y
    y = _norm(self.config, "mlp_norm")(x)
    if not self.config.num_experts:
      return (x + self._mlp(y), cache), None
    y, load = self._experts()(y, valid)
    return (x + y, cache), load

  def _attention(self, x, angle, layer, positions, limits, cache):
    """x [B, T, D] -> [B, T, D] and the cache."""
    cfg = self.config
    q = self._heads(x, "q", cfg.num_heads)
    k = self._heads(x, "k", cfg.num_kv_heads)
    v = self._heads(x, "v", cfg.num_kv_heads)
    if cfg.qk_norm:
      q, k = _norm(cfg, "q_norm")(q), _norm(cfg, "k_norm")(k)
    q, k = layers.rotate(q, angle), layers.rotate(k, angle)
    if cache is not None:
      cache = kv_cache.put(cache, layer, positions, k, v)
      out = layers.block_attention(q, *cache, limits, layer)
    elif limits is not None:
      out = layers.block_attention(q, k, v, limits)
    else:
      out = layers.attention(
        q, k, v, causal=cfg.causal, window=cfg.window, mask=self.mask
      )
    out = out.reshape(-1, cfg.num_heads * cfg.head_dim)
    return self._out(out, "o").reshape(x.shape), cache

  def _heads(self, x: jax.Array, name: str, num_heads: int) -> jax.Array:
    """x [B, T, D] -> [B, T, num_heads, K]."""
    cfg = self.config
    if cfg.short_conv:
      x = layers.ShortConv(
        cfg.short_conv,
        cfg.causal,
        cfg.dtype,
        cfg.param_dtype,
        name=f"conv_{name}",
      )(x)
    width = num_heads * cfg.head_dim
    rows = x.reshape(-1, cfg.width)
    y = _dense(cfg, width, name, use_bias=cfg.qkv_bias)(rows)
    return y.reshape(*x.shape[:2], num_heads, cfg.head_dim)

  def _mlp(self, x: jax.Array) -> jax.Array:
    cfg = self.config
    # As a matrix of tokens: the gradients of the kernels are then plain
    # transposed products, a third faster on CPUs than from [B, T, D].
    rows = x.reshape(-1, cfg.width)
    gate = _dense(cfg, cfg.mlp_width, "gate")(rows)
    up = _dense(cfg, cfg.mlp_width, "up")(rows)
    return self._out(nn.silu(gate) * up, "down").reshape(x.shape)

  def _experts(self) -> moe.MixtureOfExperts:
    cfg = self.config
    return moe.MixtureOfExperts(
      num_experts=cfg.num_experts,
      experts_per_token=cfg.experts_per_token,
      hidden=cfg.mlp_width,
      dtype=cfg.dtype,
      param_dtype=cfg.param_dtype,
      down_init=_out_init(cfg, batch_axis=0),
      name="moe",
    )

  def _out(self, x: jax.Array, name: str) -> jax.Array:
    """[N, ...] -> [N, D], back to the width."""
    cfg = self.config
    return _dense(cfg, cfg.width, name, kernel_init=_out_init(cfg))(x)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["params"],
  meta_fields=["module", "shift", "vocab_size"],
)
@dataclasses.dataclass(frozen=True)
class Bound:
  """A token model with its parameters, as decoders take it: a pytree.

  Attributes:
    params: parameters of `module`.
    module: tokens [B, T], positions -> hidden [B, T, D].
    shift: the module's output at i predicts token i+1.
    vocab_size: V, if the head has columns beyond it; None: it has V.
  """

  params: dict
  module: nn.Module
  shift: bool
  vocab_size: int | None = None

  @property
  def head(self) -> jax.Array:
    """[D, V] in the parameters' dtype: logits are hidden @ head."""
    head = _head(self.params)
    return head if self.vocab_size is None else head[:, : self.vocab_size]

  @property
  def ragged(self) -> bool:
    """Whether a call takes rows of different length, and a cache."""
    return isinstance(self.module, Transformer) and ragged(self.module.config)

  @property
  def causal(self) -> bool:
    """Whether no token sees a later one."""
    return self.module.config.causal  # pyright: ignore[reportAttributeAccessIssue]

  def init_cache(self, rows: int, slots: int) -> kv_cache.Cache:
    """An empty cache of `slots` positions for each row, in the model's dtype.

    Raises:
      ValueError: if the model takes none.
    """
    if not self.ragged:
      raise ValueError(f"{type(self.module).__name__} of this config: no cache")
    cfg = self.module.config  # pyright: ignore[reportAttributeAccessIssue]
    shape = (cfg.depth, rows, slots, cfg.num_kv_heads, cfg.head_dim)
    place = lambda x: partitioning.constrain_rows(x, axis=1, heads=3)
    return kv_cache.Cache(*(place(jnp.zeros(shape, cfg.dtype)) for _ in "kv"))

  @property
  def embedding(self) -> jax.Array:
    """[V, D] in the parameters' dtype."""
    return self.params["embed"]["embedding"][: self.vocab_size]

  def unmask_stats(
    self,
    hidden: jax.Array,
    bias: jax.Array | None = None,
    temperature: jax.Array | None = None,
    seeds: jax.Array | None = None,
  ) -> Stats:
    """What a decoder needs of the logits, see `token_stats.unmask_stats`.

    Args:
      hidden: [T, D], of `extend` or `forward`.
      bias, temperature, seeds: [V], [T] and [T, 2], or None.
    """
    tied = "head" not in self.params
    head = self.params["embed"]["embedding"] if tied else self.params["head"]
    return token_stats.unmask_stats(
      hidden,
      head,
      bias,
      temperature,
      seeds,
      transposed=tied,
      size=self.vocab_size,
    )

  def extend(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    cache: kv_cache.Cache | None,
    limits: jax.Array,
    mix: tuple[jax.Array, jax.Array] | None = None,
  ) -> tuple[jax.Array, kv_cache.Cache | None]:
    """`Transformer.extend`: the output at i has seen token i, and scores it or,
    with `shift`, the next one."""
    out = self.module.apply(
      {"params": self.params},
      tokens,
      positions,
      cache=cache,
      limits=limits,
      mix=mix,
      method="extend",
    )
    return typing.cast(tuple[jax.Array, kv_cache.Cache | None], out)

  def outputs(
    self,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    mask: Mask | None = None,
  ) -> jax.Array:
    """The module's own outputs [B, T, D], before any shift; a mask as of
    `Transformer.__call__`."""
    masked = {} if mask is None else {"mask": typing.cast(typing.Any, mask)}
    variables = {"params": self.params}
    out = self.module.apply(variables, tokens, positions, **masked)
    return typing.cast(jax.Array, out)

  def forward(
    self,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    cache: None = None,
  ) -> tuple[jax.Array, None]:
    """Hidden states that predict the token at their own position.

    Args:
      tokens: [B, T] int32, all of one length.
      positions: [B, T] int; None counts from 0.
      cache: None; caches go with `extend`.

    Returns:
      hidden [B, T, D] with hidden[:, i] @ head scoring tokens[:, i], and the
      cache. If the module predicts the next token, the outputs move by one
      and position 0 repeats the first: nothing has predicted it.

    Raises:
      ValueError: if a cache is given.
    """
    if cache is not None:
      raise ValueError(f"cache={type(cache).__name__}: extend takes caches")
    hidden = self.outputs(tokens, positions)
    return shifted(hidden) if self.shift else hidden, None


def shifted(outputs: jax.Array) -> jax.Array:
  """outputs [B, T, D] that score the next token -> [B, T, D] that score the
  token of their own position; position 0 repeats the first."""
  return jnp.concatenate([outputs[:, :1], outputs[:, :-1]], axis=1)


def bind(config: Config, params: dict) -> Bound:
  """Joins parameters to their model; see `Bound`."""
  shift = config.causal or config.shifted
  padded = config.embedding_size is not None
  vocab_size = config.vocab_size if padded else None
  return Bound(params, Transformer(config), shift, vocab_size)


def logits(config: Config, params: dict, tokens: jax.Array) -> jax.Array:
  """The plain head, never shifted: tokens [B, T] int32 -> [B, T, V] float32.

  With an embedding_size the last axis has that size, -inf from V on.
  """
  hidden = Transformer(config).apply({"params": params}, tokens)
  assert isinstance(hidden, jax.Array)
  return _plain_logits(config, params, hidden)


def logits_and_load(
  config: Config,
  params: dict,
  tokens: jax.Array,
  valid: jax.Array | None = None,
) -> tuple[jax.Array, moe.Load]:
  """`logits` and what the experts of each block got.

  Args:
    config: with num_experts above 0.
    params: parameters of `Transformer`.
    tokens: [B, T] int32.
    valid: [B, T] bool, False for tokens that do not count in the load; None:
      all count.

  Returns:
    [B, T, V] float32 as `logits`, and a load with leaves [L, B, E].

  Raises:
    ValueError: if the config has no experts.
  """
  hidden, load = hidden_and_load(config, params, tokens, valid)
  return project(hidden, bind(config, params).head), load


def hidden_and_load(
  config: Config,
  params: dict,
  tokens: jax.Array,
  valid: jax.Array | None = None,
  positions: jax.Array | None = None,
  mask: Mask | None = None,
) -> tuple[jax.Array, moe.Load]:
  """As `logits_and_load`, before the head: hidden [B, T, D] and the load;
  positions and mask as of `Transformer.__call__`."""
  if not config.num_experts:
    raise ValueError("num_experts=0: a dense block has no load, use logits")
  hidden, sown = Transformer(config).apply(
    {"params": params},
    tokens,
    positions,
    valid,
    mask,
    mutable=["intermediates"],
  )
  assert isinstance(hidden, jax.Array)
  (load,) = typing.cast(dict, sown)["intermediates"]["load"]
  return hidden, load


def project(hidden: jax.Array, head: jax.Array) -> jax.Array:
  """hidden [..., D] @ head [D, V], accumulated in float32 or wider."""
  return jnp.matmul(
    hidden,
    head.astype(hidden.dtype),
    preferred_element_type=layers.accumulator(hidden.dtype),
  )


def ragged(config: Config) -> bool:
  """Whether the model takes limits and a cache: nothing in it looks a fixed
  distance back."""
  return config.window is None and not config.short_conv


def _plain_logits(config: Config, params: dict, hidden: jax.Array) -> jax.Array:
  out = project(hidden, _head(params))
  if config.embedding_size is None:
    return out
  token = jax.lax.broadcasted_iota(jnp.int32, out.shape, out.ndim - 1)
  return jnp.where(token < config.vocab_size, out, -jnp.inf)


def _head(params: dict) -> jax.Array:
  """[D, V or embedding_size]."""
  if "head" in params:
    return params["head"]
  return params["embed"]["embedding"].T


def _scaled(x: jax.Array, factor: float) -> jax.Array:
  """x * factor, rounded once: the factor itself is not cast to x.dtype."""
  return (x.astype(layers.accumulator(x.dtype)) * factor).astype(x.dtype)


def _check(ok: bool, name: str, value: object, wanted: str) -> None:
  if not ok:
    raise ValueError(f"{name}={value!r}: must be {wanted}")


def _frequencies(config: Config) -> np.ndarray:
  """Radians per position of each rotated pair: [K/2] float64."""
  plain = layers.rotary_frequencies(config.head_dim, config.rope_theta)
  if config.rope_type == "linear":
    return plain / config.rope_factor
  if config.rope_type == "llama3":
    return layers.llama3_frequencies(
      plain,
      factor=config.rope_factor,
      low=config.rope_low,
      high=config.rope_high,
      original_length=config.rope_original_length,
    )
  return plain


def _embedding_std(config: Config) -> float:
  """Order 1 alone; as a head it must also give logits of order 1."""
  return 0.5 / math.sqrt(config.width) if config.tie_embeddings else 1.0


def _out_init(
  config: Config, batch_axis: tuple[int, ...] | int = ()
) -> nn.initializers.Initializer:
  """Of matrices back to the width: the sum over blocks is order 1."""
  return nn.initializers.variance_scaling(
    0.5 / config.depth, "fan_in", "normal", batch_axis=batch_axis
  )


def _norm(config: Config, name: str) -> layers.RMSNorm:
  return layers.RMSNorm(config.eps, config.dtype, config.param_dtype, name=name)


def _dense(
  config: Config,
  features: int,
  name: str,
  *,
  use_bias: bool = False,
  kernel_init: nn.initializers.Initializer = _KERNEL_INIT,
) -> nn.Dense:
  return nn.Dense(
    features,
    use_bias=use_bias,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    kernel_init=kernel_init,
    name=name,
  )
