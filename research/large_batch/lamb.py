"""LAMB, Adam with one learning rate per layer (arXiv:1904.00962, algorithm 2).

The ratio |x| / |u| belongs to a layer, and a scanned or vmapped stack holds L
layers in one array: one ratio for the stack is another algorithm, in which a
layer of small norm moves at the pace of the largest. So the axes that count
layers are known here, from the name of the stack or from the caller.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

LAYERS = "layers"  # what the models name the stack that nn.scan makes

Tree = Any
Mask = Tree | Callable[[Tree], Tree] | None
Axes = Tree | Callable[[Tree], Tree] | None


class LambState(NamedTuple):
  """State of `lamb`.

  Attributes:
    count: [] int32, steps taken.
    mu, nu: like the parameters, float32 or wider: the moments.
    unscaled: per leaf, bool, 1 in place of all axes but the layers': layers
      whose ratio is 1 for good, since they started at zero.
  """

  count: jax.Array
  mu: optax.Updates
  nu: optax.Updates
  unscaled: Tree


def lamb(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.01,
  bias_correction: bool = True,
  trust_mask: Mask = None,
  decay_mask: Mask = None,
  layer_axes: Axes = None,
  min_norm: float = 0.0,
  zero_init: Literal["unscaled", "paper"] = "unscaled",
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
    trust_mask: True where r applies, False where r = 1; a tree of bools (a
      prefix of the parameters) or a function params -> tree, such as
      `matrices`. None: everywhere.
    decay_mask: likewise, where the parameters decay.
    layer_axes: axes that count layers, () for an array that is one layer.
      None: axis 0 below the key "layers" (0 and 1 below two of them), or
      where flax metadata says "layers". Otherwise a tree of tuples of int: its leaves stand for all
      parameters at or below them, parameters it leaves out are one layer
      each ({} or (): none is stacked); or a function params -> tree.
    min_norm: r = max(|x|, min_norm) / |u|; 0 is the paper.
    zero_init: "unscaled" keeps r = 1 in matrices that start at zero (two axes
      or more besides the layers'); vectors follow the paper. "paper": all do.

  Returns:
    A transform whose `update` needs the parameters. Updates and moments are
    float32, or wider where the parameters are. Memory: two moments.

  Raises:
    ValueError: for an unknown `zero_init`, axes that a parameter does not
      have or names that no parameter has, or, in `init`, for parameters that
      are one flat vector (optax.flatten) without explicit `layer_axes`.
  """
  if zero_init not in ("unscaled", "paper"):
    raise ValueError(f"zero_init={zero_init!r}: choose unscaled or paper")

  def init(params: optax.Params) -> LambState:
    leaves, treedef = jax.tree.flatten(params)
    one_vector = jax.tree_util.treedef_is_leaf(treedef) and leaves[0].ndim == 1
    if one_vector and layer_axes is None:
      raise ValueError(
        f"parameters are one vector {leaves[0].shape}: LAMB would have one"
        " ratio for the model; pass the tree, or layer_axes=() to mean it"
      )
    unscaled = []
    for x, axes in zip(leaves, stacked_axes(params, layer_axes), strict=True):
      zero = _norm(x.astype(_wide(x)), axes) == 0
      matrix = x.ndim - len(axes) >= 2 and zero_init == "unscaled"
      unscaled.append(zero if matrix else jnp.zeros_like(zero))
    zeros = lambda x: jnp.zeros_like(x, _wide(x))
    return LambState(
      count=jnp.zeros((), jnp.int32),
      mu=jax.tree.map(zeros, params),
      nu=jax.tree.map(zeros, params),
      unscaled=treedef.unflatten(unscaled),
    )

  def update(updates, state, params=None):
    if params is None:
      raise ValueError(
        "lamb needs the parameters: update(updates, state, params)"
      )
    count = jnp.asarray(optax.safe_increment(state.count))
    rate = learning_rate
    if callable(rate):
      rate = rate(state.count)

    def leaf(g, m, v, x, unscaled, axes, trusts, decays):
      g, x = g.astype(m.dtype), x.astype(m.dtype)
      m = b1 * m + (1 - b1) * g
      v = b2 * v + (1 - b2) * g**2
      hat = lambda a, b: a / (1 - b ** count.astype(a.dtype))
      m_hat, v_hat = (hat(m, b1), hat(v, b2)) if bias_correction else (m, v)
      u = m_hat / (jnp.sqrt(v_hat) + eps)
      if decays:
        u = u + weight_decay * x
      scaled = -jnp.asarray(rate, u.dtype) * u
      if trusts:
        phi, u_norm = jnp.maximum(_norm(x, axes), min_norm), _norm(u, axes)
        usual = (phi > 0) & (u_norm > 0) & ~unscaled
        scaled = jnp.where(usual, phi / jnp.where(usual, u_norm, 1), 1) * scaled
      return scaled, m, v

    treedef = jax.tree.structure(params)
    trees = (updates, state.mu, state.nu, params, state.unscaled)
    columns = [treedef.flatten_up_to(tree) for tree in trees]
    columns.append(stacked_axes(params, layer_axes))
    columns += [_mask(mask, params) for mask in (trust_mask, decay_mask)]
    rows = [leaf(*row) for row in zip(*columns, strict=True)]
    updates, mu, nu = (
      treedef.unflatten([row[i] for row in rows]) for i in range(3)
    )
    return updates, LambState(count, mu, nu, state.unscaled)

  return optax.GradientTransformation(init, update)


def matrices(params: Tree, layer_axes: Axes = None) -> Tree:
  """The mask that leaves out biases and scales of norms.

  As `trust_mask` and `decay_mask` it is the recipe of BERT.

  Args:
    params: parameters or their shapes.
    layer_axes: as in `lamb`.

  Returns:
    A tree of bools: two axes or more besides those that count layers.
  """
  leaves, treedef = jax.tree.flatten(params)
  axes = stacked_axes(params, layer_axes)
  return treedef.unflatten(
    [jnp.ndim(x) - len(a) >= 2 for x, a in zip(leaves, axes, strict=True)]
  )


def stacked_axes(params: Tree, layer_axes: Axes) -> list[tuple[int, ...]]:
  """The axes that count layers, for each leaf in order; see `lamb`."""
  if callable(layer_axes):
    layer_axes = layer_axes(params)
  if layer_axes is None:
    return _named_axes(params)
  is_axes = lambda a: (
    a is None
    or isinstance(a, int)
    or (isinstance(a, tuple) and all(isinstance(i, int) for i in a))
  )
  given = jax.tree_util.tree_flatten_with_path(layer_axes, is_leaf=is_axes)[0]
  given = {path: (a,) if isinstance(a, int) else a or () for path, a in given}
  used = set()
  out = []
  for path, x in jax.tree_util.tree_flatten_with_path(params)[0]:
    prefixes = (path[:i] for i in range(len(path), -1, -1))
    prefix = next((p for p in prefixes if p in given), None)
    axes = () if prefix is None else given[prefix]
    if any(not -jnp.ndim(x) <= a < jnp.ndim(x) for a in axes):
      name = jax.tree_util.keystr(path)
      raise ValueError(f"layer_axes {axes} of {name}, shape {jnp.shape(x)}")
    used.add(prefix)
    out.append(axes)
  for path in given:
    if path and path not in used:
      name = jax.tree_util.keystr(path)
      raise ValueError(f"layer_axes names {name}, which no parameter has")
  return out


def _named_axes(params: Tree) -> list[tuple[int, ...]]:
  """The axes flax names "layers", or one per key "layers" above the leaf."""
  is_boxed = lambda a: isinstance(a, nn.Partitioned)
  boxes = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_boxed)[0]
  out = []
  for path, leaf in boxes:
    if is_boxed(leaf) and LAYERS in leaf.names:
      out.append(tuple(i for i, n in enumerate(leaf.names) if n == LAYERS))
      continue
    above = sum(getattr(key, "key", None) == LAYERS for key in path)
    value = leaf.value if is_boxed(leaf) else leaf
    out.append(tuple(range(min(above, jnp.ndim(value)))))
  return out


def _mask(mask: Mask, params: Tree) -> list[bool]:
  """One bool per leaf, in order."""
  if mask is None:
    return [True] * len(jax.tree.leaves(params))
  if callable(mask):
    mask = mask(params)
  return [bool(m) for m in jax.tree.leaves(jax.tree.broadcast(mask, params))]


def _wide(x: jax.Array) -> jnp.dtype:
  return jnp.promote_types(x.dtype, jnp.float32)


def _norm(x: jax.Array, layer_axes: tuple[int, ...]) -> jax.Array:
  """Euclidean norm over all axes but these; the reduced axes stay, as 1."""
  kept = {a % x.ndim for a in layer_axes}
  axes = tuple(a for a in range(x.ndim) if a not in kept)
  return jnp.sqrt(jnp.sum(x**2, axes, keepdims=True))
