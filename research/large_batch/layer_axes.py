"""Which axes of a parameter count layers, and which parameters are matrices.

A scanned or vmapped stack holds L layers in one array. What an optimizer does
per layer (a norm, a mask for biases) has to know those axes, from the name of
the stack or from the caller.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

LAYERS = "layers"  # what the models name the stack that nn.scan makes
EXPERTS = "experts"  # and the matrices of all experts of a block

Tree = Any
Mask = Tree | Callable[[Tree], Tree] | None
Axes = Tree | Callable[[Tree], Tree] | None


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
    above = sum(getattr(key, "key", None) in (LAYERS, EXPERTS) for key in path)
    value = leaf.value if is_boxed(leaf) else leaf
    out.append(tuple(range(min(above, jnp.ndim(value)))))
  return out


def mask_leaves(mask: Mask, params: Tree, layer_axes: Axes) -> list[bool]:
  """One bool per leaf, in order; `matrices` is told the layer axes."""
  if mask is None:
    return [True] * len(jax.tree.leaves(params))
  if mask is matrices:
    mask = matrices(params, layer_axes)
  if callable(mask):
    mask = mask(params)
  return [bool(m) for m in jax.tree.leaves(jax.tree.broadcast(mask, params))]


def wide(x: jax.Array) -> jnp.dtype:
  """float32, or wider where x is: the type of norms and moments."""
  is_wide = jnp.issubdtype(x.dtype, jnp.inexact) and x.dtype.itemsize >= 4
  return x.dtype if is_wide else jnp.dtype(jnp.float32)


def squared_norm(x: jax.Array, layer_axes: tuple[int, ...]) -> jax.Array:
  """Sum of squares over all axes but these; the reduced axes stay, as 1."""
  kept = {a % x.ndim for a in layer_axes}
  axes = tuple(a for a in range(x.ndim) if a not in kept)
  return jnp.sum(x**2, axes, keepdims=True)


def require_tree(params: Tree, layer_axes: Axes) -> None:
  """Refuses one flat vector, where all layers would share one ratio.

  Raises:
    ValueError: for a lone vector (optax.flatten) without explicit axes.
  """
  leaves, treedef = jax.tree.flatten(params)
  one_vector = jax.tree_util.treedef_is_leaf(treedef) and leaves[0].ndim == 1
  if one_vector and layer_axes is None:
    raise ValueError(
      f"parameters are one vector {leaves[0].shape}: the model would have one"
      " ratio; pass the tree, or layer_axes=() to mean it"
    )
