"""Where parameters go, by hand; the numbers that come out are compared on
eight devices in tests/experiments/test_placements.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from giantsteps.models import dit, lact, partitioning, transformer, uvit

MESH = AbstractMesh((2, 4, 8), ("data", "fsdp", "model"))
TOKENS = np.zeros((1, 16), np.int32)


@pytest.mark.parametrize(
  ("path", "shape", "expected"),
  [
    ("embed/embedding", (64, 32), P("model", "fsdp")),
    ("head", (32, 64), P("fsdp", "model")),
    ("layers/q/kernel", (3, 32, 64), P(None, "fsdp", "model")),
    ("layers/q/bias", (3, 64), P(None, "model")),
    ("layers/down/kernel", (3, 64, 32), P(None, "model", "fsdp")),
    ("layers/mixer/o/kernel", (3, 64, 32), P(None, "model", "fsdp")),
    ("layers/mixer/w1", (3, 8, 4, 6), P(None, "model", "fsdp", None)),
    ("decoder/layers/qkv/kernel", (6, 32, 64), P(None, "fsdp", "model")),
    ("decoder/layers/skip/kernel", (6, 64, 32), P(None, "fsdp", None)),
    ("layers/attention_norm/scale", (3, 32), P(None, None)),
    # 3 is no multiple of 4, 12 none of 8
    ("layers/q/kernel", (3, 3, 12), P(None, None, None)),
  ],
)
def test_the_table(path, shape, expected):
  assert partitioning.spec(path, shape, MESH) == expected


def test_axes_that_a_mesh_lacks_or_has_once_are_left_out():
  small = AbstractMesh((8, 1), ("data", "model"))
  assert partitioning.spec("head", (32, 64), small) == P(None, None)


def test_axes_of_a_batch():
  mesh = AbstractMesh((2, 2, 4, 1), ("data_0", "data_1", "fsdp", "model"))
  assert partitioning.data_axes(mesh) == ("data_0", "data_1")
  assert partitioning.batch_axes(mesh) == ("data_0", "data_1", "fsdp")


@pytest.mark.parametrize(
  ("network", "inputs"),
  [
    (transformer.Transformer(transformer.Config(qkv_bias=True)), (TOKENS,)),
    (lact.Lact(lact.Config(width=64, num_heads=2, fast_heads=2)), (TOKENS,)),
    (dit.Dit(dit.Config(patch=2)), (np.zeros((1, 8, 8, 1)), np.zeros(1))),
    (uvit.Uvit(uvit.Config()), (np.zeros((1, 8, 8, 1)), np.zeros(1))),
  ],
)
def test_every_large_matrix_of_the_stacks_is_split(network, inputs):
  mesh = AbstractMesh((1, 2, 2), ("data", "fsdp", "model"))
  shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
  specs = partitioning.specs(shapes, mesh)
  flat = zip(
    jax.tree_util.tree_leaves_with_path(shapes),
    jax.tree.leaves(specs),
    strict=True,
  )
  sizes = {True: 0, False: 0}
  for (_, x), spec in flat:
    sizes[any(spec)] += x.size
  assert sizes[True] > 0.95 * (sizes[True] + sizes[False])


def test_a_state_follows_its_parameters():
  mesh = jax.make_mesh((1,), ("model",))
  params = {"head": jax.ShapeDtypeStruct((4, 6), np.float32)}
  state = {
    "mu": params,
    "other": {"head": jax.ShapeDtypeStruct((4, 1), np.float32)},
    "count": jax.ShapeDtypeStruct((), np.int32),
  }
  places = {"head": P(None, "model")}
  found = partitioning.shardings(state, params, places, mesh)
  assert found["mu"]["head"].spec == P(None, "model")
  assert found["other"]["head"].spec == P()
  assert found["count"].spec == P()


def test_without_a_mesh_nothing_is_constrained():
  x = jnp.ones((4, 2))
  assert partitioning.constrain_rows(x) is x
  assert partitioning.gather_layer(dit.Dit, "layers") is dit.Dit
