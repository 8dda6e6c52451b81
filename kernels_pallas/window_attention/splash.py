"""The one place that knows JAX's own TPU kernel, "splash attention".

It forms no scores in memory, forwards or backwards, and skips the blocks that
the mask hides.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention

from giantsteps.kernels_pallas.window_attention.reference import Mask

# Queries, and keys, of one program, the best first; a length that is no
# multiple is padded.
_BLOCKS = (512, 256, 128)


class _Computed(splash_attention.Mask):
  """A mask that the kernel computes from positions, where it computes any.

  JAX finds the blocks that are seen in whole, in part or not at all by slices
  of one block; it takes the function where there are these two attributes.
  """

  def __init__(self, length: int, mask: Mask):
    self.q_sequence = np.arange(length, dtype=np.int32)
    self.mask_function = mask

  @property
  def shape(self) -> tuple[int, ...]:
    return (len(self.q_sequence),) * 2

  def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
    query, key = (jnp.asarray(self.q_sequence[part]) for part in index)
    return np.asarray(self.mask_function(query[:, None], key[None]))


def fits(
  q: jax.Array,
  k: jax.Array,
  causal: bool,
  window: int | None,
  mask: Mask | None = None,
) -> bool:
  """Whether the kernel computes this call: every token asks and is asked,
  bfloat16 or float32, heads a multiple of 64 wide; rows that are no multiple
  of 128 only if no query can see the padding, which is at the end."""
  return (
    q.shape[1] == k.shape[1] >= _BLOCKS[-1]
    and q.shape[-1] % 64 == 0
    and q.dtype == k.dtype
    and q.dtype.name in ("bfloat16", "float32")
    and (causal or window is not None or mask is not None)
    and (causal or q.shape[1] % _BLOCKS[-1] == 0)
  )


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  causal: bool,
  window: int | None,
  mask: Mask | None = None,
  interpret: bool = False,
) -> jax.Array:
  """TPU body of `reference.attention` where `fits`; first derivatives only,
  in reverse mode.

  Args:
    q, k, v, causal, window, mask: as of `window_attention`.
    interpret: runs on a CPU, slowly; for tests.

  Returns:
    [B, T, H, K] in q.dtype.
  """
  rows, length, heads, width = q.shape
  block = next(
    b for b in _BLOCKS if length % b == 0 or (causal and b <= length)
  )
  padded = -(-length // block) * block
  # One rounding: the kernel has no scale of its own.
  wide = q.astype(jnp.float32) * width**-0.5
  kernel = _kernel(padded, causal, window, mask, block, interpret)

  def merged(x):  # [B, T, H, K] -> [B H, T, K]; groups of heads stay together
    x = jnp.moveaxis(x, 1, 2).reshape(-1, length, width)
    return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0)))

  out = kernel(merged(wide.astype(q.dtype)), merged(k), merged(v))
  out = out[:, :length].reshape(rows, heads, length, width)
  return jnp.moveaxis(out, 1, 2)


@functools.lru_cache(maxsize=64)
def _kernel(length, causal, window, mask, block, interpret):
  """The kernel with its tables of visible blocks, as NumPy arrays: constants
  of any program, made once."""
  shape = (length, length)
  if mask is not None:
    visible = _Computed(length, mask)
  elif window is None:
    visible = splash_attention.CausalMask(shape)
  else:
    visible = splash_attention.LocalMask(
      shape, (window - 1, 0 if causal else window - 1), 0
    )
  with jax.ensure_compile_time_eval():
    kernel = splash_attention.make_splash_mha(
      # one mask stands for all heads
      splash_attention.MultiHeadMask([visible]),
      block_sizes=splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
      ),
      head_shards=1,
      q_seq_shards=1,
      interpret=interpret,
    )
    return jax.tree.map(np.asarray, kernel)
