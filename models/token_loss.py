"""Cross entropy of tokens under a head, without the logits of all of them."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from giantsteps.kernels_pallas.precision import accumulator
from giantsteps.models import partitioning, transformer

# Bytes of logits per device. Above the first number they are streamed, in
# chunks of about the second.
_WHOLE = 2**30
_CHUNK = 2**28


def cross_entropy(
  hidden: jax.Array,
  head: jax.Array,
  tokens: jax.Array,
  *,
  chunk: int | None = None,
) -> jax.Array:
  """-log softmax(hidden head)[token] of each position, in nats.

  Products take the dtype of `hidden`; logits, their sums and, where they are
  streamed, the gradient of the head are float32 or wider. Streamed, the
  logits of `chunk` positions of every row exist at a time, forwards and
  backwards, and are computed once more in the backward pass.

  Args:
    hidden: [B, T, D].
    head: [D, V].
    tokens: [B, T] int, what each position is to predict.
    chunk: positions of a row at a time, T for all. None: all if their logits
      on one device take up to 1 GiB, else about 256 MB of them.

  Returns:
    [B, T] float32 or wider.

  Raises:
    ValueError: if the shapes do not fit or chunk is below 1.
  """
  if hidden.shape[:2] != tokens.shape or hidden.shape[2:] != head.shape[:1]:
    raise ValueError(
      f"hidden {hidden.shape}, head {head.shape}, tokens {tokens.shape}: "
      "[B, T, D], [D, V], [B, T]"
    )
  if chunk is not None and chunk < 1:
    raise ValueError(f"chunk={chunk}: at least 1, or None")
  length = tokens.shape[1]
  axes = _row_axes(hidden.shape[0])
  size = chunk or _positions(hidden, head, axes)
  if size >= length:
    return _losses(hidden, head, tokens)
  stream = functools.partial(_stream, size=size, axes=axes)
  if not axes:
    return stream(hidden, head, tokens)
  # Every device streams its rows, and the gradients of the head are added
  # across devices once, after the last chunk.
  return jax.shard_map(
    stream,
    in_specs=(P(axes), P(), P(axes)),
    out_specs=P(axes),
    axis_names=set(axes),
  )(hidden, head, tokens)


def _losses(hidden, head, tokens):
  logits = transformer.project(hidden, head)
  chosen = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
  return jax.nn.logsumexp(logits, -1) - chosen


def _stream(hidden, head, tokens, *, size, axes):
  rows, length = tokens.shape
  count = -(-length // size)
  if axes:  # here, not in the loop, where the sum of its transpose would be
    head = jax.lax.pcast(head, axes, to="varying")

  def chunks(x):  # [B, T, ...] -> [count, B, size, ...]
    pad = [(0, 0), (0, count * size - length), *[(0, 0)] * (x.ndim - 2)]
    x = jnp.pad(x, pad).reshape(rows, count, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  one = jax.checkpoint(lambda x: _losses(x[0], head, x[1]), prevent_cse=False)
  out = jax.lax.map(one, (chunks(hidden), chunks(tokens)))
  return jnp.moveaxis(out, 0, 1).reshape(rows, -1)[:, :length]


def _row_axes(rows: int) -> tuple[str, ...]:
  """The axes of the mesh in use that split the rows, if the partitioner is to
  place them and they divide them."""
  mesh = partitioning.automatic_mesh()
  if mesh is None:
    return ()
  axes = tuple(a for a in partitioning.batch_axes(mesh) if mesh.shape[a] > 1)
  parts = math.prod(mesh.shape[axis] for axis in axes)
  return axes if parts > 1 and rows % parts == 0 else ()


def _positions(hidden, head, axes):
  """Positions of a row whose logits may exist at once."""
  rows, length, _ = hidden.shape
  mesh = jax.sharding.get_abstract_mesh()
  rows //= math.prod(mesh.shape[axis] for axis in axes)
  each = rows * head.shape[1] * accumulator(hidden.dtype).itemsize
  if length * each <= _WHOLE:
    return length
  size = -(-length // -(-length * each // _CHUNK))
  return size if size < 128 else -(-size // 128) * 128  # whole tiles of a TPU
