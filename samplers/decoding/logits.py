"""Transforms of logits before a token is drawn: dropped tokens become -inf.

Pure functions of logits [..., V] and a value, a number or one per row [...].
Without sorting: a threshold on the logits is found bit by bit, in 32 passes of
counting or summing, which TPUs do faster than a sort of the vocabulary. Put
`temperature` first, as the transformers library does; after a truncation it
gives another law.
"""

import jax
import jax.numpy as jnp
import numpy as np

Value = jax.Array | np.ndarray | float
_TOP_H = 100  # tokens that the released code of top-H looks at


def temperature(logits: jax.Array, value: Value) -> jax.Array:
  """logits / value, value > 0."""
  return logits / _column(value)


def top_k(logits: jax.Array, value: Value) -> jax.Array:
  """Keeps the `value` highest, and all that equal the lowest of them."""
  count = lambda keep: jnp.sum(keep, -1, keepdims=True)
  return _keep(logits, _descend(logits, count, _column(value)))


def top_p(logits: jax.Array, value: Value) -> jax.Array:
  """Keeps the fewest highest whose probabilities sum to `value` or more
  (nucleus sampling, arXiv:1904.09751), and all that equal the lowest."""
  p = jax.nn.softmax(logits, -1)
  return _keep(logits, _descend(logits, _mass(p), _column(value)))


def min_p(logits: jax.Array, value: Value) -> jax.Array:
  """Keeps p >= value max p (arXiv:2407.01082)."""
  p = jax.nn.softmax(logits, -1)
  return _keep(logits, p >= _column(value) * jnp.max(p, -1, keepdims=True))


def typical(logits: jax.Array, value: Value) -> jax.Array:
  """Keeps the fewest whose -log p is nearest to the entropy and whose
  probabilities sum to `value` or more (arXiv:2202.00666)."""
  log_p = jax.nn.log_softmax(logits, -1)
  p = jnp.exp(log_p)
  near = -jnp.abs(-log_p - _entropy(log_p))
  return _keep(logits, _descend(near, _mass(p), _column(value)))


def epsilon(logits: jax.Array, value: Value) -> jax.Array:
  """Keeps p >= value, and the highest (arXiv:2210.15191)."""
  p = jax.nn.softmax(logits, -1)
  return _keep(logits, (p >= _column(value)) | _highest(logits))


def eta(logits: jax.Array, value: Value) -> jax.Array:
  """Keeps p >= min(value, sqrt(value) e^-H), and the highest
  (arXiv:2210.15191)."""
  log_p = jax.nn.log_softmax(logits, -1)
  value = _column(value)
  least = jnp.minimum(value, jnp.sqrt(value) * jnp.exp(-_entropy(log_p)))
  return _keep(logits, (jnp.exp(log_p) >= least) | _highest(logits))


def top_h(
  logits: jax.Array, value: Value, criterion: str = "partial_sum"
) -> jax.Array:
  """Keeps the highest while their entropy is at most `value` times that of all
  (top-H, arXiv:2509.02510). Sorts.

  Args:
    logits: [..., V].
    value: alpha, 0.4 in the paper.
    criterion: "renormalized", the stated problem: the entropy of the kept ones
      as a distribution, over the whole vocabulary; or "partial_sum", the
      released code: the sum of -p log p over the kept ones, p of the 100
      highest, which keeps more where the law is flat.

  Raises:
    ValueError: for another criterion.
  """
  if criterion not in ("partial_sum", "renormalized"):
    raise ValueError(f"criterion={criterion!r}: partial_sum or renormalized")
  partial = criterion == "partial_sum"
  size = min(_TOP_H, logits.shape[-1]) if partial else logits.shape[-1]
  high, token = jax.lax.top_k(logits, size)
  log_p = jax.nn.log_softmax(high, -1)
  p = jnp.exp(log_p)
  terms = jnp.where(p > 0, -p * log_p, 0)
  budget = _column(value) * jnp.sum(terms, -1, keepdims=True)
  spent = jnp.cumsum(terms, -1)
  if not partial:
    mass = jnp.cumsum(p, -1)
    spent = spent / mass + jnp.log(mass)
  # Once over the budget, over it: the first token stays in any case.
  over = jnp.cumsum(spent > budget, -1) > 0
  keep = ~over.at[..., 0].set(False)
  kept = jnp.zeros(logits.shape, bool)
  kept = jnp.put_along_axis(kept, token, keep, -1, inplace=False)
  return _keep(logits, kept)


def annealed(
  position: jax.Array,
  decay: Value,
  highest: float = 1.2,
  lowest: float = 0.1,
  start: int = 10,
) -> jax.Array:
  """Temperature of the t-th token, max(1 + highest - e^(t / decay), lowest),
  and 1 before `start`: exploratory annealed decoding (arXiv:2510.05251).

  Args:
    position: t, integers from 0.
    decay: d in tokens, a number or like position.
    highest, lowest, start: tau_max, tau_min, c.

  Returns:
    float32 like position.
  """
  t = jnp.asarray(position, jnp.float32)
  value = jnp.maximum(1 + highest - jnp.exp(t / decay), lowest)
  return jnp.where(t < start, 1.0, value)


def _descend(x, amount, wanted):
  """True where x >= the highest threshold at which amount(kept) >= wanted.

  Float32 in the order of its bits: one bit of the threshold per pass.
  """
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
  bits = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))  # rises with x
  order = jax.lax.bitcast_convert_type(bits, jnp.uint32) ^ np.uint32(2**31)

  def step(i, threshold):
    higher = threshold | (np.uint32(2**31) >> i.astype(jnp.uint32))
    return jnp.where(amount(order >= higher) >= wanted, higher, threshold)

  zero = jnp.zeros((*x.shape[:-1], 1), jnp.uint32)
  return order >= jax.lax.fori_loop(0, 32, step, zero)


def _mass(p):
  return lambda keep: jnp.sum(jnp.where(keep, p, 0), -1, keepdims=True)


def _entropy(log_p):
  p = jnp.exp(log_p)
  return -jnp.sum(jnp.where(p > 0, p * log_p, 0), -1, keepdims=True)


def _highest(logits):
  return logits == jnp.max(logits, -1, keepdims=True)


def _keep(logits, keep):
  return jnp.where(keep, logits, -jnp.inf)


def _column(value):
  """A number, or [...] -> [..., 1]."""
  value = jnp.asarray(value)
  return value[..., None] if value.ndim else value
