"""LaCT: fast weights trained inside the forward pass, one step per large chunk.

"Test-Time Training Done Right" (arXiv:2505.23884). A head owns a SwiGLU MLP
f_W(x) = W1 (silu(W0 x) * (W2 x)) whose weights are its memory: writing a chunk
is one gradient step on -sum_t <f_W(k_t), v_t>, reading is f_W(q). The paper's
W1, W3, W2 are W0, W2, W1 here, as in the authors' code.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from giantsteps.models import layers, partitioning, transformer

Weights = tuple[jax.Array, jax.Array, jax.Array]  # W0, W1, W2
Order = str | Sequence[tuple[int, int, bool, bool]]

# Coefficients (a, b, c) of one Newton-Schulz step, X <- a X + (b A + c A A) X.
SCHEDULED = (
  (4.0848, -6.8946, 2.9270),
  (3.9505, -6.3029, 2.6377),
  (3.7418, -5.5913, 2.3037),
  (2.8769, -3.1427, 1.2046),
  (2.8366, -3.0525, 1.2012),
)
FIXED = (3.4445, -4.7750, 2.0315)

_DTYPES = ("float32", "bfloat16", "float16", "float64")


class State(NamedTuple):
  """What the fast weights remember, all float32 or wider.

  Attributes:
    weights: W0 [N, h, d], W1 [N, d, h], W2 [N, h, d]: what is applied.
    accumulated: sums of all steps before normalisation; None unless prenorm.
    momentum: the three buffers of raw gradients; None without momentum.
  """

  weights: Weights
  accumulated: Weights | None = None
  momentum: Weights | None = None


@dataclasses.dataclass(frozen=True)
class _Rule:
  """The static half of the update: see `fast_weight_scan`."""

  muon: bool
  prenorm: bool
  weight_norm: bool
  kind: str
  steps: int
  ns_dtype: str | None


def _wide(*arrays: jax.Array) -> np.dtype:
  """float32, or the widest dtype of the arrays if that is wider."""
  dtypes = (np.dtype(x.dtype) for x in arrays)
  return layers.accumulator(functools.reduce(np.promote_types, dtypes))


def _length(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
  """Euclidean norm, axes kept, with gradient zero where x = 0."""
  square = jnp.sum(x * x, axis=axis, keepdims=True)
  safe = jnp.where(square > 0, square, 1)
  return jnp.where(square > 0, jnp.sqrt(safe), 0)


def newton_schulz(
  g: jax.Array,
  kind: str = "scheduled",
  steps: int = 5,
  dtype: jnp.dtype | str | None = None,
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

  Returns:
    [..., rows, columns] in g.dtype; zero where g is zero.

  Raises:
    ValueError: for another kind, or more steps than scheduled coefficients.
  """
  if kind not in ("scheduled", "fixed"):
    raise ValueError(f"newton_schulz={kind!r}: choose scheduled or fixed")
  if kind == "scheduled" and steps > len(SCHEDULED):
    raise ValueError(f"{steps} steps: only {len(SCHEDULED)} are scheduled")
  coefficients = SCHEDULED[:steps] if kind == "scheduled" else (FIXED,) * steps
  tall = g.shape[-2] > g.shape[-1]
  x = g.astype(_wide(g))
  x = (x / (_length(x, (-2, -1)) + 1e-7)).astype(dtype or g.dtype)
  x = x.mT if tall else x
  for a, b, c in coefficients:
    gram = x @ x.mT
    x = a * x + (b * gram + c * (gram @ gram)) @ x
  return (x.mT if tall else x).astype(g.dtype)


def _dot(equation: str, a: jax.Array, b: jax.Array, like: jax.Array):
  """einsum with inputs in the dtype of `like` and a wide accumulator."""
  wide = _wide(a, b, like)
  a, b = a.astype(like.dtype), b.astype(like.dtype)
  return jnp.einsum(equation, a, b, preferred_element_type=wide)


def apply(weights: Weights, q: jax.Array) -> jax.Array:
  """Reads the memory: f_W(q), 6 d h FLOPs per token.

  Args:
    weights: W0 [N, h, d], W1 [N, d, h], W2 [N, h, d].
    q: [N, C, d]; its dtype is that of the matrix products' inputs.

  Returns:
    [N, C, d] in q.dtype.
  """
  w0, w1, w2 = weights
  gate = jax.nn.silu(_dot("ncd,nhd->nch", q, w0, q))
  up = _dot("ncd,nhd->nch", q, w2, q)
  return _dot("nch,ndh->ncd", gate * up, w1, q).astype(q.dtype)


def gradient(
  weights: Weights, k: jax.Array, v: jax.Array, learning_rates: Weights
) -> Weights:
  """Negative gradient of -sum_t <f_W(k_t), v_t>, token t weighted by its rate.

  D1 = sum_t eta1 v (a u)^T, D0 = sum_t eta0 (p u silu'(g)) k^T, D2 = sum_t
  eta2 (p a) k^T with g = W0 k, u = W2 k, a = silu(g), p = W1^T v. All rates
  meet the same W. 12 d h FLOPs per token.

  Args:
    weights: W0 [N, h, d], W1 [N, d, h], W2 [N, h, d].
    k: [N, C, d].
    v: [N, C, d].
    learning_rates: three [N, C, 1], for W0, W1, W2.

  Returns:
    D0 [N, h, d], D1 [N, d, h], D2 [N, h, d], float32 or wider.
  """
  w0, w1, w2 = weights
  g = _dot("ncd,nhd->nch", k, w0, k)
  u = _dot("ncd,nhd->nch", k, w2, k)
  p = _dot("ncd,ndh->nch", v, w1, k)
  eta0, eta1, eta2 = (eta.astype(g.dtype) for eta in learning_rates)
  s = jax.nn.sigmoid(g)
  a = g * s
  d0 = _dot("nch,ncd->nhd", eta0 * (p * u * s * (1 + g * (1 - s))), k, k)
  d1 = _dot("ncd,nch->ndh", v, eta1 * (a * u), k)
  d2 = _dot("nch,ncd->nhd", eta2 * (p * a), k, k)
  return d0, d1, d2


def _orthogonal(step: Weights, rule: _Rule) -> Weights:
  """Newton-Schulz of the three matrices at once: NS(G^T) = NS(G)^T."""
  d0, d1, d2 = step
  stacked = jnp.stack([d0, d1.mT, d2])
  out = newton_schulz(stacked, rule.kind, rule.steps, rule.ns_dtype)
  return out[0], out[1].mT, out[2]


def _update(state: State, tokens: Any, norms: Weights, rule: _Rule) -> State:
  """Writes one chunk (k, v, learning rates, momentum): gradient, momentum,
  Muon, add, normalise, in this order."""
  k, v, learning_rates, momentum = tokens
  add = lambda x, y: jax.tree.map(jnp.add, x, y)
  step = gradient(state.weights, k, v, learning_rates)
  buffer = state.momentum
  if momentum is not None:
    mu = jnp.mean(momentum.astype(step[0].dtype), 1, keepdims=True)  # [N, 1, 1]
    buffer = add(step, jax.tree.map(lambda m: mu * m, buffer))
    step = buffer
  if rule.muon:
    step = _orthogonal(step, rule)
  total = add(state.accumulated if rule.prenorm else state.weights, step)
  weights = total
  if rule.weight_norm:
    weights = jax.tree.map(
      lambda w, n: w / (_length(w, -1) + 1e-5) * n, total, norms
    )
  return State(weights, total if rule.prenorm else None, buffer)


def _check(q, k, v, learning_rates, weights, momentum):
  """Raises ValueError for shapes that do not fit together."""
  if q.ndim != 3 or not q.shape == k.shape == v.shape:
    raise ValueError(f"q, k, v {q.shape}, {k.shape}, {v.shape}: want [N, L, d]")
  per_token = (*q.shape[:2], 1)
  rates = [*learning_rates, *([] if momentum is None else [momentum])]
  for x in rates:
    if x.shape != per_token:
      raise ValueError(f"rate or momentum {x.shape}: want {per_token}")
  h, d = weights[0].shape[-2:]
  want = ((h, d), (d, h), (h, d))
  if d != q.shape[-1] or tuple(w.shape[-2:] for w in weights) != want:
    shapes = [w.shape for w in weights]
    raise ValueError(f"weights {shapes} for d={q.shape[-1]}: want {want}")


def fast_weight_scan(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  learning_rates: Weights,
  weights: Weights,
  *,
  chunk_size: int | None = None,
  order: Order = "causal",
  muon: bool = True,
  momentum: jax.Array | None = None,
  prenorm: bool = False,
  weight_norm: bool = True,
  detach_norm: bool = False,
  newton_schulz: str = "scheduled",
  newton_schulz_steps: int = 5,
  ns_dtype: str | None = None,
  state: State | None = None,
  remat: bool = True,
) -> tuple[jax.Array, State]:
  """Runs the fast weights over a sequence: writes k, v, reads q.

  One write is D = gradient (M = D + mean_t(momentum) M, if given), D = NS(D)
  with Muon, W = W + D, each row rescaled to its length in `weights`. Nothing
  is detached unless `detach_norm`: gradients flow through every step.

  Args:
    q: [N, L, d], N = batch * heads; bfloat16 inputs mean bfloat16 products,
      accumulated in float32.
    k: [N, L, d].
    v: [N, L, d].
    learning_rates: three [N, L, 1] >= 0, for W0, W1, W2.
    weights: initial W0 [N, h, d], W1 [N, d, h], W2 [N, h, d], or without N.
    chunk_size: tokens C of one write for "causal"; None is one chunk.
    order: "causal" reads chunk i with the weights written by chunks < i; the
      last 1..C tokens are only read. "bidirectional" writes all tokens in
      one step, then reads all. Or entries (start, end, update, apply) in
      sequence, the update before the apply; the outputs are concatenated.
    muon: orthogonalises the step, which then has spectral norm near 1.
    momentum: [N, L, 1] in (0, 1).
    prenorm: keeps the sum of all steps and normalises a copy of it, so that
      the relative step decays; otherwise the normalised weights are the state.
    weight_norm: rescales the rows.
    detach_norm: no gradient through the lengths of the initial rows.
    newton_schulz: "scheduled" or "fixed".
    newton_schulz_steps: iterations.
    ns_dtype: dtype of the iteration, e.g. "bfloat16"; None is that of the
      state.
    state: continues from here; `weights` still set the row lengths.
    remat: recomputes the inside of a chunk in the backward pass, which then
      keeps one state per chunk.

  Returns:
    Outputs [N, L, d] in q.dtype (for a list, the applied tokens) and the
    state after the last write, float32 or wider.

  Raises:
    ValueError: if shapes do not fit, or for an unknown order.
  """
  _check(q, k, v, learning_rates, weights, momentum)
  n, length, _ = q.shape
  wide = _wide(q, *weights)
  weights = jax.tree.map(
    lambda w: jnp.broadcast_to(w.astype(wide), (n, *w.shape[-2:])), weights
  )
  norms = jax.tree.map(lambda w: _length(w, -1), weights)
  norms = jax.lax.stop_gradient(norms) if detach_norm else norms
  if state is None:
    zeros = jax.tree.map(jnp.zeros_like, weights)
    state = State(
      weights,
      weights if prenorm else None,
      None if momentum is None else zeros,
    )
  rule = _Rule(
    muon, prenorm, weight_norm, newton_schulz, newton_schulz_steps, ns_dtype
  )
  tokens = (k, v, tuple(learning_rates), momentum)

  def update(state: State, tokens: Any) -> State:
    return _update(state, tokens, norms, rule)

  if order == "causal":
    return _causal(state, q, tokens, chunk_size or length, update, remat)
  if order == "bidirectional":
    order = [(0, length, True, True)]
  if isinstance(order, str):
    raise ValueError(
      f"order={order!r}: choose causal, bidirectional or a list of entries"
    )
  update = jax.checkpoint(update) if remat else update
  outputs = [q[:, :0]]
  for start, end, write, read in order:
    if write:
      state = update(state, jax.tree.map(lambda x: x[:, start:end], tokens))  # noqa: B023
    if read:
      outputs.append(apply(state.weights, q[:, start:end]))
  return jnp.concatenate(outputs, 1), state


def _causal(state, q, tokens, chunk_size, update, remat):
  """Scan over the chunks i with i C + C < L, then the tail is only read."""
  n, length, _ = q.shape
  num_writes = max(0, -(-(length - chunk_size) // chunk_size))
  split = num_writes * chunk_size

  def chunks(x):  # [N, L, ...] -> [chunks, N, C, ...]
    x = x[:, :split].reshape(n, num_writes, chunk_size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def body(state, chunk):
    q, tokens = chunk
    return update(state, tokens), apply(state.weights, q)

  body = jax.checkpoint(body, prevent_cse=False) if remat else body
  state, out = jax.lax.scan(body, state, jax.tree.map(chunks, (q, tokens)))
  out = jnp.moveaxis(out, 0, 1).reshape(n, split, q.shape[-1])
  tail = apply(state.weights, q[:, split:])
  return jnp.concatenate([out, tail], 1), state


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape and variant of a LaCT language model.

  Attributes:
    vocab_size: V.
    width, depth: D, number of blocks L.
    num_heads: attention heads; width / num_heads is even.
    fast_heads: fast-weight heads, each of dimension d = width / fast_heads.
    expansion: h = int(expansion * d) hidden units of a fast-weight MLP.
    mlp_width: hidden size of the SwiGLU.
    causal: shifted block-causal writes and causal attention; otherwise one
      write of all tokens and bidirectional attention.
    window: position i attends to |i - j| < window; None is unlimited. Causal:
      below chunk_size, some tokens of a chunk never meet.
    chunk_size: tokens of one write, if causal.
    muon, momentum, prenorm, detach_norm: as in `fast_weight_scan`.
    newton_schulz, newton_schulz_steps, ns_dtype: likewise.
    remat_chunks: likewise, `remat`.
    rate: learning rate of a token before training.
    low_rank: W0 = L R + I/2 (W2 too) with this inner size; 0 is full.
    fast_rope, fast_silu_v, fast_gate: rotation of the fast q and k, silu of
      the fast v, a gate per token and head on the fast output.
    rope_theta: base of the rotary wavelengths.
    eps: of every RMSNorm.
    qkv_bias: biases on q, k and v.
    qk_norm: RMSNorm of q and k over the width.
    short_conv: taps of a depthwise convolution over the normed input of q,
      of k and of v each, causal if the model is; 0 is none.
    remat: none, dots or full (`layers.remat`).
    unroll: blocks per turn of the scan over the stack; `depth` of them save
      a third of the time on CPUs (no copies of stacked activations), for a
      program that grows with depth.
    dtype: compute dtype; fast weights and logits are float32 all the same.
    param_dtype: dtype of the parameters.
  """

  vocab_size: int = 257
  width: int = 256
  depth: int = 4
  num_heads: int = 4
  fast_heads: int = 4
  expansion: float = 1.0
  mlp_width: int = 768
  causal: bool = False
  window: int | None = None
  chunk_size: int = 64
  muon: bool = True
  momentum: bool = False
  prenorm: bool = False
  detach_norm: bool = False
  newton_schulz: str = "scheduled"
  newton_schulz_steps: int = 5
  ns_dtype: str | None = None
  remat_chunks: bool = True
  rate: float = 1e-3
  low_rank: int = 0
  fast_rope: bool = True
  fast_silu_v: bool = True
  fast_gate: bool = True
  rope_theta: float = 10_000.0
  eps: float = 1e-5
  qkv_bias: bool = False
  qk_norm: bool = False
  short_conv: int = 0
  remat: str = "none"
  unroll: int = 1
  dtype: str = "float32"
  param_dtype: str = "float32"

  def __post_init__(self):
    sizes = ("vocab_size", "width", "depth", "num_heads", "fast_heads")
    sizes += ("mlp_width", "chunk_size", "newton_schulz_steps", "unroll")
    for name in (*sizes, "rate", "rope_theta", "eps"):
      if getattr(self, name) <= 0:
        raise ValueError(f"{name}={getattr(self, name)!r}: must be above 0")
    for name in ("low_rank", "short_conv"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name}={getattr(self, name)!r}: must be 0 or more")
    if self.window is not None and self.window <= 0:
      raise ValueError(f"window={self.window}: must be above 0, or None")
    if self.width % (2 * self.num_heads) or self.width % self.fast_heads:
      raise ValueError(
        f"width={self.width}: must be a multiple of 2 num_heads="
        f"{2 * self.num_heads} and of fast_heads={self.fast_heads}"
      )
    if int(self.expansion * self.fast_dim) < 1:
      raise ValueError(f"expansion={self.expansion}: leaves no hidden unit")
    for name, choices in (
      ("newton_schulz", ("scheduled", "fixed")),
      ("ns_dtype", (None, *_DTYPES)),
      ("remat", layers.REMAT_POLICIES),
      ("dtype", _DTYPES),
      ("param_dtype", _DTYPES),
    ):
      if getattr(self, name) not in choices:
        raise ValueError(
          f"{name}={getattr(self, name)!r}: must be one of "
          + ", ".join(map(str, choices))
        )

  @property
  def fast_dim(self) -> int:
    """d of one fast-weight head."""
    return self.width // self.fast_heads


class LactLayer(nn.Module):
  """Attention for what is near, fast weights for the rest, summed.

  Both read the same q, k, v. LaCT's layer for language (section 5 of the
  paper; "GAU-like" in its code).

  Attributes:
    config: shape and variant.
  """

  config: Config

  @nn.compact
  def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
    """x [B, T, D] after a norm, positions [B or 1, T] -> [B, T, D]."""
    cfg = self.config
    q, k, v = (self._project(x, name) for name in ("q", "k", "v"))
    if cfg.qk_norm:
      q, k = _norm(cfg, "q_norm")(q), _norm(cfg, "k_norm")(k)
    heads = (*x.shape[:2], cfg.num_heads, cfg.width // cfg.num_heads)

    def rotate(y):
      y = layers.rotary(y.reshape(heads), positions, cfg.rope_theta)
      return y.reshape(x.shape)

    out = layers.attention(
      *(y.reshape(heads) for y in (rotate(q), rotate(k), v)),
      causal=cfg.causal,
      window=cfg.window,
    ).reshape(x.shape)
    fast_q, fast_k = self._rescale(q, "q"), self._rescale(k, "k")
    fast_q, fast_k = (self._unit(nn.silu(y)) for y in (fast_q, fast_k))
    if cfg.fast_rope:
      fast_q, fast_k = rotate(fast_q), rotate(fast_k)
    fast_v = nn.silu(v) if cfg.fast_silu_v else v
    return self._out(out + self._fast(x, fast_q, fast_k, fast_v))

  def _project(self, x: jax.Array, name: str) -> jax.Array:
    cfg = self.config
    if cfg.short_conv:
      x = layers.ShortConv(
        cfg.short_conv,
        cfg.causal,
        cfg.dtype,
        cfg.param_dtype,
        name=f"conv_{name}",
      )(x)
    return _dense(cfg, x, cfg.width, name, use_bias=cfg.qkv_bias)

  def _rescale(self, x: jax.Array, name: str) -> jax.Array:
    """x * scale + offset per channel: the fast weights' own q and k."""
    init = nn.initializers
    shape, dtype = (x.shape[-1],), self.config.param_dtype
    scale = self.param(f"{name}_scale", init.ones, shape, dtype)
    offset = self.param(f"{name}_offset", init.zeros, shape, dtype)
    scale, offset = (y.astype(x.dtype)[None, None] for y in (scale, offset))
    return x * scale + offset

  def _unit(self, x: jax.Array) -> jax.Array:
    """x / (|x| + 1e-5) in each fast head, float32 or wider."""
    y = x.reshape(*x.shape[:2], self.config.fast_heads, -1).astype(_wide(x))
    return (y / (_length(y, -1) + 1e-5)).astype(x.dtype).reshape(x.shape)

  def _fast(self, x, q, k, v):
    """The fast-weight branch: q, k, v [B, T, D] -> [B, T, D]."""
    cfg = self.config
    shape = (*x.shape[:2], cfg.fast_heads, cfg.fast_dim)
    rows = lambda y: _rows(y.reshape(*shape[:3], -1))
    rates = self._per_head(x, "rate", 3)  # [B, T, H, 3], for W0, W1, W2
    rates = jax.nn.softplus(rates + math.log(math.expm1(cfg.rate)))
    eta0, eta1, eta2 = (rows(eta) for eta in jnp.split(rates, 3, -1))
    momentum = None
    if cfg.momentum:
      momentum = rows(jax.nn.sigmoid(self._per_head(x, "momentum", 1)))
    weights = jax.tree.map(
      lambda w: jnp.tile(w, (shape[0], 1, 1)), self._weights()
    )
    out, _ = fast_weight_scan(
      rows(q),
      rows(k),
      rows(v),
      (eta0, eta1, eta2),
      weights,
      chunk_size=cfg.chunk_size,
      order="causal" if cfg.causal else "bidirectional",
      muon=cfg.muon,
      momentum=momentum,
      prenorm=cfg.prenorm,
      detach_norm=cfg.detach_norm,
      newton_schulz=cfg.newton_schulz,
      newton_schulz_steps=cfg.newton_schulz_steps,
      ns_dtype=cfg.ns_dtype,
      remat=cfg.remat_chunks,
    )
    out = out.reshape(shape[0], shape[2], shape[1], shape[3])
    out = _norm(cfg, "fast_norm")(jnp.swapaxes(out, 1, 2))
    if cfg.fast_gate:
      gate = nn.silu(self._per_head(x, "fast_gate", 1))
      out = out * gate.astype(out.dtype)
    return out.reshape(x.shape)

  def _per_head(self, x: jax.Array, name: str, features: int) -> jax.Array:
    """Linear map of x [B, T, D] to float32 or wider [B, T, H, features]."""
    heads = self.config.fast_heads
    init = nn.initializers.normal(0.02)
    y = _dense(
      self.config, x, heads * features, name, use_bias=True, kernel_init=init
    )
    return y.astype(_wide(y)).reshape(*x.shape[:2], heads, features)

  def _weights(self) -> Weights:
    """Initial fast weights of all heads, the layer's own parameters."""
    cfg = self.config
    d, h = cfg.fast_dim, int(cfg.expansion * cfg.fast_dim)

    def full(name, rows, columns, gain=1.0):
      init = nn.initializers.normal(gain / math.sqrt(columns))
      shape = (cfg.fast_heads, rows, columns)
      return self.param(name, init, shape, cfg.param_dtype)

    def inward(name):
      if not cfg.low_rank:
        return full(name, h, d)
      left = full(f"{name}_left", h, cfg.low_rank, 0.5)
      right = full(f"{name}_right", cfg.low_rank, d, 0.5)
      return left @ right + 0.5 * jnp.eye(h, d, dtype=left.dtype)[None]

    return inward("w0"), full("w1", d, h), inward("w2")

  def _out(self, x: jax.Array) -> jax.Array:
    return _dense_out(self.config, x, "o")


class Block(nn.Module):
  """x + lact(norm(x)), then x + swiglu(norm(x)).

  Attributes:
    config: shape and variant.
  """

  config: Config

  @nn.compact
  def __call__(
    self, x: jax.Array, positions: jax.Array
  ) -> tuple[jax.Array, None]:
    """x [B, T, D], positions [B or 1, T] -> ([B, T, D], None)."""
    cfg = self.config
    x = partitioning.constrain_rows(x)
    y = _norm(cfg, "mixer_norm")(x)
    x = x + LactLayer(cfg, name="mixer")(y, positions)
    y = _norm(cfg, "mlp_norm")(x)
    gate = _dense(cfg, y, cfg.mlp_width, "gate")
    up = _dense(cfg, y, cfg.mlp_width, "up")
    return x + _dense_out(cfg, nn.silu(gate) * up, "down"), None


class Lact(nn.Module):
  """Tokens to hidden states after the final norm.

  Attributes:
    config: shape and variant.
  """

  config: Config

  @nn.compact
  def __call__(
    self, tokens: jax.Array, positions: jax.Array | None = None
  ) -> jax.Array:
    """tokens [B, T] int32, positions [B, T] int -> [B, T, D] in dtype.

    Causal: the output at i has seen tokens <= i. Positions count from 0 by
    default.

    Raises:
      ValueError: if tokens or positions have another shape.
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
    x = nn.Embed(
      cfg.vocab_size,
      cfg.width,
      dtype=cfg.dtype,
      param_dtype=cfg.param_dtype,
      embedding_init=nn.initializers.normal(1.0),
      name="embed",
    )(tokens)
    self.param(
      "head",
      nn.initializers.normal(0.5 / math.sqrt(cfg.width)),
      (cfg.width, cfg.vocab_size),
      cfg.param_dtype,
    )
    stack = nn.scan(
      layers.remat(partitioning.gather_layer(Block, "layers"), cfg.remat),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast,),  # pyright: ignore[reportArgumentType]
      length=cfg.depth,
      unroll=cfg.unroll,
    )
    x, _ = stack(cfg, name="layers")(x, positions)
    return _norm(cfg, "norm")(x)


def bind(config: Config, params: dict) -> transformer.Bound:
  """Joins parameters to their model; see `transformer.Bound`."""
  return transformer.Bound(params, Lact(config), config.causal)


def logits(config: Config, params: dict, tokens: jax.Array) -> jax.Array:
  """The plain head, never shifted: tokens [B, T] int32 -> [B, T, V] float32."""
  hidden = Lact(config).apply({"params": params}, tokens)
  assert isinstance(hidden, jax.Array)
  return transformer.project(hidden, params["head"])


def _rows(x: jax.Array) -> jax.Array:
  """[B, T, H, d] -> [B H, T, d], as `fast_weight_scan` wants it."""
  return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], x.shape[3])


def _norm(config: Config, name: str) -> layers.RMSNorm:
  return layers.RMSNorm(config.eps, config.dtype, config.param_dtype, name=name)


def _dense(
  config: Config,
  x: jax.Array,
  features: int,
  name: str,
  *,
  use_bias: bool = False,
  kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init,
) -> jax.Array:
  """Linear map of the last axis of x [B, T, F].

  Flat, because the gradient of the kernel contracts all but the last axis: of
  one axis XLA's CPU backend needs no transposed copy, and is 3 times faster.
  """
  dense = nn.Dense(
    features,
    use_bias=use_bias,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    kernel_init=kernel_init,
    name=name,
  )
  y = dense(x.reshape(-1, x.shape[-1]))
  return y.reshape(*x.shape[:-1], features)


def _dense_out(config: Config, x: jax.Array, name: str) -> jax.Array:
  """Back to the width; small enough that the sum over blocks is order 1."""
  init = nn.initializers.variance_scaling(
    0.5 / config.depth, "fan_in", "normal"
  )
  return _dense(config, x, config.width, name, kernel_init=init)
