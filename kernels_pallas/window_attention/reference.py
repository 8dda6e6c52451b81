"""Softmax attention in jax.numpy: all scores at once, by blocks of a window,
or some of those blocks after the other where the scores would be large."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from giantsteps.kernels_pallas.precision import accumulator

# Positions of queries [T, 1] and keys [1, S] -> which are seen, [T, S] bool.
Mask = Callable[[jax.Array, jax.Array], jax.Array]

# Bytes of scores that may exist at once; more are made block after block.
LIMIT = 2**28


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  causal: bool,
  window: int | None = None,
  mask: Mask | None = None,
  limit: int = LIMIT,
) -> jax.Array:
  """The specification of `window_attention`, and its body on CPUs and GPUs.

  Args:
    q, k, v, causal, window, mask: as there.
    limit: bytes of scores. With a window or a mask, rows that need more are
      attended block after block, forwards and backwards: the same sums, and the
      scores are computed once more in the backward pass.

  Returns:
    [B, T, H, K] in q.dtype.
  """
  length, num_keys = q.shape[1], k.shape[1]
  streamed = streams(q, k, causal=causal, window=window, mask=mask, limit=limit)
  if mask is not None:
    pieces = limit if streamed else None
    return _masked(q, k, v, mask, pieces)
  if streamed:
    assert window is not None
    return _streamed(q, k, v, causal, window, limit)
  if window is not None and length == num_keys and length > 3 * window:
    return _windowed(q, k, v, causal, window)
  query, key = jnp.arange(length), jnp.arange(num_keys)
  return _attend(q, k, v, _visible(query, key, causal, window)[None])


def streams(
  q: jax.Array,
  k: jax.Array,
  *,
  causal: bool,
  window: int | None,
  mask: Mask | None = None,
  limit: int = LIMIT,
) -> bool:
  """Whether `attention` makes the scores one after the other."""
  rows, length, heads, _ = q.shape
  if mask is not None:
    size = accumulator(q.dtype).itemsize
    return rows * heads * length * k.shape[1] * size > limit
  if window is None or length != k.shape[1] or length <= window:
    return False
  reach = min(length, (2 if causal else 3) * window)
  size = rows * heads * length * reach * accumulator(q.dtype).itemsize
  return size > limit


def _attend(
  q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array
) -> jax.Array:
  """`attention` under a mask [B or 1, T, S], True where a key is seen."""
  _, length, heads, _ = q.shape
  groups = k.shape[2]
  # Queries of a group are rows of one matrix and every product has exactly
  # two leading batch axes: with more of them XLA's CPU code is 3 times slower.
  q = jnp.moveaxis(q, 1, 2).reshape(q.shape[0], groups, -1, q.shape[3])
  k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
  wide = accumulator(q.dtype)
  scores = jnp.einsum("bgtk,bgsk->bgts", q, k, preferred_element_type=wide)
  scores = scores * (q.shape[-1] ** -0.5)
  visible = jnp.tile(visible, (1, heads // groups, 1))[:, None]
  scores = jnp.where(visible, scores, jnp.finfo(wide).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  out = jnp.einsum("bgts,bgsk->bgtk", weights, v)
  out = out.reshape(out.shape[0], heads, length, -1)
  return jnp.moveaxis(out, 2, 1)


def _masked(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, limit: int | None
) -> jax.Array:
  """`attention` under a mask; with a limit, some queries after the others."""
  rows, length, heads, _ = q.shape
  key = jnp.arange(k.shape[1])[None]
  if limit is None:
    return _attend(q, k, v, mask(jnp.arange(length)[:, None], key)[None])
  each = rows * heads * k.shape[1] * accumulator(q.dtype).itemsize
  size = _divisor(length, limit // each)

  def attend(piece):
    start, q = piece
    query = start + jnp.arange(size)
    return _attend(q, k, v, mask(query[:, None], key)[None])

  pieces = jnp.moveaxis(q.reshape(rows, -1, size, heads, q.shape[3]), 1, 0)
  start = size * jnp.arange(length // size)
  attend = jax.checkpoint(attend, prevent_cse=False)
  out = jnp.moveaxis(jax.lax.map(attend, (start, pieces)), 0, 1)
  return out.reshape(rows, length, heads, -1)


def _windowed(
  q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, window: int
) -> jax.Array:
  """`attention` where each block of `window` queries meets its neighbours."""
  rows, length = q.shape[:2]
  count = -(-length // window)

  def reach(x):
    near = jnp.concatenate(_neighbours(x, window, causal), 2)
    return near.reshape(rows * count, -1, *x.shape[2:])

  start = window * jnp.arange(count)
  visible = _within_reach(start, length, causal, window)
  merged = _blocks(q, window).reshape(rows * count, window, *q.shape[2:])
  out = _attend(merged, reach(k), reach(v), jnp.tile(visible, (rows, 1, 1)))
  return out.reshape(rows, count * window, *out.shape[2:])[:, :length]


def _streamed(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  causal: bool,
  window: int,
  limit: int,
) -> jax.Array:
  """`_windowed`, one after the other as many pieces as the limit allows.

  A piece is a block of queries of one row and the heads of one group.
  """
  rows, length, heads, _ = q.shape
  groups, count = k.shape[2], -(-length // window)

  def pieces(x):  # [B, count, W, heads, K] -> [B G count, W, heads / G, K]
    x = x.reshape(*x.shape[:3], groups, -1, x.shape[-1])
    return jnp.moveaxis(x, 3, 1).reshape(-1, window, *x.shape[4:])

  def near(x):
    return [pieces(block) for block in _neighbours(x, window, causal)]

  total = rows * groups * count
  each = accumulator(q.dtype).itemsize * heads // groups * window**2
  at_once = _divisor(total, limit // (each * (2 if causal else 3)))
  start = window * jnp.tile(jnp.arange(count), rows * groups)

  def attend(piece):
    start, q, k, v = piece
    visible = _within_reach(start, length, causal, window)
    return _attend(q, jnp.concatenate(k, 1), jnp.concatenate(v, 1), visible)

  split = lambda x: x.reshape(-1, at_once, *x.shape[1:])
  arrays = start, pieces(_blocks(q, window)), near(k), near(v)
  attend = jax.checkpoint(attend, prevent_cse=False)
  out = jax.lax.map(attend, jax.tree.map(split, arrays))
  out = out.reshape(rows, groups, count, window, heads // groups, -1)
  out = jnp.moveaxis(out, 1, 3).reshape(rows, count * window, heads, -1)
  return out[:, :length]


def _divisor(total: int, most: int) -> int:
  """The largest divisor of `total` up to `most`, at least 1."""
  return next(
    n for n in range(max(min(most, total), 1), 0, -1) if not total % n
  )


def _blocks(x: jax.Array, window: int) -> jax.Array:
  """[B, T, ...] -> [B, count, window, ...], zeros at the end."""
  rows, length = x.shape[:2]
  count = -(-length // window)
  pad = ((0, 0), (0, count * window - length), (0, 0), (0, 0))
  return jnp.pad(x, pad).reshape(rows, count, window, *x.shape[2:])


def _neighbours(x: jax.Array, window: int, causal: bool) -> list[jax.Array]:
  """The block before, itself and, unless causal, the one after."""
  x = _blocks(x, window)
  around = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
  return [around[:, i : i + x.shape[1]] for i in range(2 if causal else 3)]


def _within_reach(
  start: jax.Array, length: int, causal: bool, window: int
) -> jax.Array:
  """First positions [N] of blocks -> bool [N, window, S] of `_neighbours`."""
  query = start[:, None] + jnp.arange(window)[None]
  reach = jnp.arange(-window, window if causal else 2 * window)
  key = start[:, None] + reach[None]
  visible = jax.vmap(lambda i, j: _visible(i, j, causal, window))(query, key)
  return visible & ((key >= 0) & (key < length))[:, None]


def _visible(
  query: jax.Array, key: jax.Array, causal: bool, window: int | None
) -> jax.Array:
  """Positions [T] of queries and [S] of keys -> bool [T, S]."""
  distance = query[:, None] - key[None]
  visible = jnp.ones(distance.shape, bool)
  if causal:
    visible &= distance >= 0
  if window is not None:
    visible &= jnp.abs(distance) < window
  return visible
