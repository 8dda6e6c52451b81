"""LAMB, Adam with one learning rate per layer (arXiv:1904.00962, algorithm 2).

The ratio |x| / |u| belongs to a layer, and a scanned or vmapped stack holds L
layers in one array: one ratio for the stack is another algorithm, in which a
layer of small norm moves at the pace of the largest (layer_axes.py finds the
layers). An expert of a mixture is a layer, too: some take ten times the tokens of
others. The published implementations differ in what they exclude, clip and
correct; each is a choice of keywords, four of them have names here.

Leaves alike in shape, type and masks share one jitted function. It is traced
once per shape, and its scalars stay inside it, so that the compiler sees equal
kernels and compiles each once. Stacking the leaves instead copies every array
twice, compiles a slice per leaf, and gathers those that are sharded.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from giantsteps.research.large_batch.layer_axes import (
  Axes,
  Mask,
  Tree,
  mask_leaves,
  matrices,
  require_tree,
  squared_norm,
  stacked_axes,
  wide,
)


class LambState(NamedTuple):
  """State of `lamb`.

  Attributes:
    count: [] int32, steps taken.
    mu, nu: like the parameters, float32 or wider (mu: `moment_dtype`): the
      moments.
    unscaled: per leaf, bool, 1 in place of all axes but the layers': layers
      whose ratio is 1 for good, since they started at zero.
    master: None, or like the parameters: float32 of those that are narrower,
      None at the others.
  """

  count: jax.Array
  mu: optax.Updates
  nu: optax.Updates
  unscaled: Tree
  master: Tree = None


def lamb(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.01,
  bias_correction: bool = True,
  grad_averaging: bool = True,
  decay_in_gradient: bool = False,
  max_grad_norm: float | None = None,
  trust_mask: Mask = None,
  decay_mask: Mask = None,
  always_adapt: bool = True,
  ratio_clip: tuple[float, float] | None = None,
  phi_clip: tuple[float, float] | None = None,
  layer_axes: Axes = None,
  min_norm: float = 0.0,
  zero_init: Literal["unscaled", "paper"] = "unscaled",
  moment_dtype: jax.typing.DTypeLike | None = None,
  master_params: bool = False,
) -> optax.GradientTransformation:
  """LAMB, x <- x - lr r u, u = m^ / (sqrt(v^) + eps) + decay x, r = |x| / |u|.

  m and v are the moments of Adam, m^ and v^ their bias-corrected forms. The
  ratio r is one number per layer, and 1 where |x| or |u| is 0.

  Differs from the paper: a matrix that starts at zero (an output layer, the
  gates of adaLN) has r = 1 in the first step and then r = |x| / |u| of about
  the rate itself: it never grows. Those layers, found at `init`, keep r = 1;
  `zero_init="paper"` or a `trust_mask` decides otherwise. Bias correction is
  the authors' later code's, not the paper's.

  Args:
    learning_rate: float or schedule, float of the steps before this one.
    b1, b2: decay of the moments, in [0, 1).
    eps: added to sqrt(v^).
    weight_decay: decoupled, inside the ratio.
    bias_correction: divides the moments by 1 - b^t.
    grad_averaging: m = b1 m + (1 - b1) g; False: m = b1 m + g.
    decay_in_gradient: adds decay x to g before the moments instead of to u
      (apex without `adam_w_mode`).
    max_grad_norm: first divides g by max(1, |g| / max_grad_norm), |g| over all
      parameters. None: no clipping.
    trust_mask: True where r applies, False where r = 1; a tree of bools (a
      prefix of the parameters) or a function params -> tree, such as
      `matrices` (which then knows `layer_axes`). None: everywhere.
    decay_mask: likewise, where the parameters decay.
    always_adapt: False keeps r = 1 where nothing decays, too (apex without
      `use_nvlamb`).
    ratio_clip: (low, high), r is clipped to it.
    phi_clip: (low, high), r = clip(|x|) / |u|, the phi of the paper's theory;
      still 1 where |x| = 0.
    layer_axes: axes that count layers, () for an array that is one layer.
      None: axis 0 below the key "layers" or "experts" (0 and 1 below two), or
      where flax metadata says "layers". Otherwise a tree of tuples of int: its
      leaves stand for all parameters at or below them, parameters it leaves
      out are one layer each ({} or (): none is stacked); or a function
      params -> tree.
    min_norm: r = max(|x|, min_norm) / |u|; 0 is the paper.
    zero_init: "unscaled" keeps r = 1 in matrices that start at zero (two axes
      or more besides the layers'); vectors follow the paper. "paper": all do.
    moment_dtype: type of m between steps; bfloat16 is rounded stochastically.
      v stays wide: with b2 = .999 a bfloat16 v would stop. None: wide.
    master_params: keeps float32 copies of narrower parameters, so that steps
      below their resolution add up; they equal the copies, rounded, as long as
      only `optax.apply_updates` changes them.

  Returns:
    A transform whose `update` needs the parameters. Updates, norms and v are
    float32, or wider where the parameters are. Memory: two moments.

  Raises:
    ValueError: for an unknown `zero_init`, an empty interval, a `moment_dtype`
      that is no float, axes that a parameter does not have or names that no
      parameter has, or, in `init`, for parameters that are one flat vector
      (optax.flatten) without explicit `layer_axes`.
  """
  if zero_init not in ("unscaled", "paper"):
    raise ValueError(f"zero_init={zero_init!r}: choose unscaled or paper")
  for name, interval in (("ratio_clip", ratio_clip), ("phi_clip", phi_clip)):
    if interval is not None and not 0 <= interval[0] <= interval[1]:
      raise ValueError(f"{name}={interval}: give (low, high), 0 <= low <= high")
  if _is_zero(max_grad_norm):
    raise ValueError("max_grad_norm=0: give a positive number, or None")
  if moment_dtype is not None and not jnp.issubdtype(
    moment_dtype, jnp.floating
  ):
    raise ValueError(f"moment_dtype={moment_dtype}: give a float type")

  def init(params: optax.Params) -> LambState:
    require_tree(params, layer_axes)
    leaves, treedef = jax.tree.flatten(params)
    unscaled = []
    for x, axes in zip(leaves, stacked_axes(params, layer_axes), strict=True):
      zero = squared_norm(x.astype(wide(x)), axes) == 0
      matrix = x.ndim - len(axes) >= 2 and zero_init == "unscaled"
      unscaled.append(zero if matrix else jnp.zeros_like(zero))
    copy = lambda x: x.astype(wide(x)) if x.dtype != wide(x) else None
    return LambState(
      count=jnp.zeros((), jnp.int32),
      mu=jax.tree.map(
        lambda x: jnp.zeros_like(x, moment_dtype or wide(x)), params
      ),
      nu=jax.tree.map(lambda x: jnp.zeros_like(x, wide(x)), params),
      unscaled=treedef.unflatten(unscaled),
      master=jax.tree.map(copy, params) if master_params else None,
    )

  @functools.partial(jax.jit, static_argnames=("axes", "trusts", "decays"))
  def leaf(g, m, v, x, master, unscaled, scalars, *, axes, trusts, decays):
    count, rate, clip = scalars
    low, x = x, (x if master is None else master).astype(v.dtype)
    m_dtype, g, m = m.dtype, g.astype(v.dtype), m.astype(v.dtype)
    if clip is not None:
      g = g * clip.astype(g.dtype)
    if decays and decay_in_gradient:
      g = g + weight_decay * x
    m = b1 * m + (1 - b1 if grad_averaging else 1) * g
    v = b2 * v + (1 - b2) * g**2
    hat = lambda a, b: a / (1 - b ** count.astype(a.dtype))
    m_hat, v_hat = (hat(m, b1), hat(v, b2)) if bias_correction else (m, v)
    u = m_hat / (jnp.sqrt(v_hat) + eps)
    if decays and not decay_in_gradient:
      u = u + weight_decay * x
    scaled = -rate.astype(u.dtype) * u
    if trusts:
      scaled = ratio(x, u, unscaled, axes) * scaled
    if master is not None:
      master = x + scaled
      scaled = master - low.astype(master.dtype)
    return scaled, _round(m, m_dtype, count), v, master

  def ratio(x, u, unscaled, axes):
    """phi(|x|) / |u| per layer, 1 where either is zero."""
    xx, uu = squared_norm(x, axes), squared_norm(u, axes)
    if not _is_zero(min_norm):
      xx = jnp.maximum(xx, min_norm**2)
    usual = (xx > 0) & (uu > 0)
    if zero_init == "unscaled":
      usual &= ~unscaled
    if phi_clip is not None:
      xx = jnp.clip(xx, phi_clip[0] ** 2, phi_clip[1] ** 2)
    # two roots: the quotient of the squares overflows
    r = jnp.sqrt(xx) / jnp.sqrt(jnp.where(usual, uu, 1))
    if ratio_clip is not None:
      r = jnp.clip(r, *ratio_clip)
    return jnp.where(usual, r, 1)

  def update(updates, state, params=None):
    if params is None:
      raise ValueError(
        "lamb needs the parameters: update(updates, state, params)"
      )
    count = jnp.asarray(optax.safe_increment(state.count))
    rate = learning_rate
    if callable(rate):
      rate = rate(state.count)
    clip = None
    if max_grad_norm is not None:
      clip = 1 / jnp.maximum(1, global_norm(updates) / max_grad_norm)
    treedef = jax.tree.structure(params)
    column = treedef.flatten_up_to
    master = state.master
    arrays = zip(
      column(updates),
      column(state.mu),
      column(state.nu),
      column(params),
      column(master) if master_params else [None] * treedef.num_leaves,
      column(state.unscaled),
      strict=True,
    )
    decays = mask_leaves(decay_mask, params, layer_axes)
    decays = [decay and not _is_zero(weight_decay) for decay in decays]
    trusts = mask_leaves(trust_mask, params, layer_axes)
    if not always_adapt:
      trusts = [t and d for t, d in zip(trusts, decays, strict=True)]
    kinds = zip(stacked_axes(params, layer_axes), trusts, decays, strict=True)
    scalars = (count, jnp.asarray(rate), clip)
    rows = [
      leaf(*row, scalars, axes=axes, trusts=trust, decays=decay)
      for row, (axes, trust, decay) in zip(arrays, kinds, strict=True)
    ]
    updates, mu, nu, master = (
      treedef.unflatten([row[i] for row in rows]) for i in range(4)
    )
    state = LambState(
      count, mu, nu, state.unscaled, master if master_params else None
    )
    return updates, state

  return optax.GradientTransformation(init, update)


# The published implementations; every keyword of `lamb` can be given.
_FAITHFUL = functools.partial(lamb, zero_init="paper")
# The paper and its first code: no bias correction; biases and scales of norms
# have neither ratio nor decay.
lamb_paper = functools.partial(
  _FAITHFUL,
  bias_correction=False,
  trust_mask=matrices,
  decay_mask=matrices,
)
# TensorFlow Addons with the exclusions of BERT.
lamb_tfa = functools.partial(
  _FAITHFUL, trust_mask=matrices, decay_mask=matrices
)
# apex FusedLAMB(use_nvlamb=True): clipped, the ratio everywhere. apex by
# default: always_adapt=False.
nvlamb = functools.partial(_FAITHFUL, max_grad_norm=1.0, decay_mask=matrices)
# optax.lamb: one ratio per array, stacked or not. Its weight_decay is 0 unless
# given; here it is .01, as in all of these.
lamb_optax = functools.partial(_FAITHFUL, layer_axes={})


def global_norm(tree: Tree) -> jax.Array:
  """|g| over all leaves, [] float32 or wider."""
  square = jax.jit(lambda g: jnp.sum(g.astype(wide(g)) ** 2))
  return jnp.sqrt(sum(map(square, jax.tree.leaves(tree)), jnp.float32(0)))


def _is_zero(value: jax.typing.ArrayLike | None) -> bool:
  """Known to be 0 now; not where a program is to decide (inject_hyperparams)."""
  return isinstance(value, int | float) and value == 0


def _round(x: jax.Array, dtype: jnp.dtype, count: jax.Array) -> jax.Array:
  """x in dtype; float32 to bfloat16 up or down at random, right on average."""
  if x.dtype != jnp.float32 or dtype != jnp.bfloat16:
    return x.astype(dtype)
  noise = jax.random.bits(jax.random.key(count), x.shape, jnp.uint16)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise.astype(jnp.uint32)
  kept = jax.lax.bitcast_convert_type(
    bits & jnp.uint32(0xFFFF0000), jnp.float32
  )
  return jnp.where(jnp.isfinite(x), kept, x).astype(dtype)
