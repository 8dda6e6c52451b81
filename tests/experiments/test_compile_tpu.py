"""The real programs compile for TPUs on a machine that has none."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from giantsteps.experiments.configs import digits_flow
from giantsteps.experiments.harness import mesh as mesh_lib
from giantsteps.experiments.harness import sampling, tasks, training

DESCRIPTION = {
  "kind": "image",
  "shape": [8, 8, 1],
  "std": 0.75,
  "num_classes": 10,
}


@pytest.fixture(scope="module")
def mesh():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed (extra `test` on x86-64 Linux)")
  try:
    topology = topologies.get_topology_desc(
      platform="tpu", topology_name="v5e:2x4"
    )
  except Exception as error:  # libtpu of another jax, a locked device
    pytest.skip(f"libtpu gives no topology here: {error}")
  return Mesh(np.array(topology.devices).reshape(8), ("data",))


def test_training_step_on_eight_chips_reduces_gradients(mesh):
  cfg = dataclasses.replace(digits_flow.get_config(), steps_per_dispatch=2)
  task = tasks.build(cfg, DESCRIPTION)
  tx = tasks.optimizer(cfg)
  update = training.compile_update(cfg, task, tx, mesh)
  whole = mesh_lib.replicated(mesh)
  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    jax.eval_shape(lambda: training.init_state(cfg, task, tx)),
  )
  rows = mesh_lib.batch_sharding(mesh, axis=1)
  put = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
  batches = {
    "image": put((2, cfg.batch_size, 8, 8, 1), jnp.float32),
    "label": put((2, cfg.batch_size), jnp.int32),
  }
  compiled = update.lower(state, batches, jnp.int32(2)).compile()
  assert "all-reduce" in compiled.as_text()
  memory = compiled.memory_analysis()
  size = lambda tree: sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
  # the donated state is held once, the batch by an eighth
  assert memory.alias_size_in_bytes >= 0.99 * size(state)
  assert memory.argument_size_in_bytes < 2 * size(state) + size(batches)


def test_sampler_lowers_with_one_copy_of_the_model(mesh):
  task = tasks.build(digits_flow.get_config(), DESCRIPTION)
  draw = sampling.sampler(task, 0.75)
  chip = mesh_lib.replicated(Mesh(mesh.devices[:1], ("data",)))
  put = lambda x: jax.ShapeDtypeStruct(
    jnp.shape(x), jnp.result_type(x), sharding=chip
  )
  params = jax.eval_shape(task.init, jax.random.key(0))
  x = jnp.zeros((16, 8, 8, 1))
  table = sampling.table("unipc", 8, 0.75)
  arguments = jax.tree.map(put, (params, x, table))
  compiled = draw.lower(*arguments).compile()
  assert compiled.memory_analysis().argument_size_in_bytes > 0
