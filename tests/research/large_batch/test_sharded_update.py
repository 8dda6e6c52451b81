"""The sharded update against float64 LAMB written out in NumPy, on 1 to 8
devices, and its reductions counted in the compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from giantsteps.research.large_batch import sharded_update

SHARDS = 8
STEPS, ROWS, RATE, DECAY = 4, 16, 0.01, 0.1

# Three layers of 100 x 99 (no multiple of any tile) in one stack, a matrix, a
# stack of vectors and a matrix below one tile per device.
SHAPES = {
  "layers": {"kernel": (3, 100, 99), "bias": (3, 99)},
  "embed": (128, 72),
  "small": (8, 4),
}


def values():
  """Parameters and gradients per step and row, from one seed."""
  rng = np.random.default_rng(0)
  draw = lambda *lead: jax.tree.map(
    lambda s: rng.normal(size=(*lead, *s)).astype(np.float32),
    SHAPES,
    is_leaf=lambda s: isinstance(s, tuple),
  )
  return draw(), draw(STEPS, ROWS)


def loss(params, arrays):
  """Mean over rows of <g_row, x>: its gradient is the mean of the rows."""
  dots = jax.tree.map(
    lambda x, g: jnp.mean(jnp.sum(g * x[None], tuple(range(1, g.ndim)))),
    params,
    arrays,
  )
  return sum(jax.tree.leaves(dots))


def numpy_lamb():
  """Algorithm 2 with bias correction in float64, layer by layer."""
  params, rows = values()
  flat, treedef = jax.tree.flatten(params)
  out = []
  for x, g_rows, stacked in zip(
    flat, jax.tree.leaves(rows), (False, True, True, False), strict=True
  ):
    x, g_rows = x.astype(np.float64), g_rows.astype(np.float64)
    layers = x if stacked else x[None]
    g_layers = g_rows if stacked else g_rows[:, :, None]
    done = []
    for i, layer in enumerate(layers):
      m = v = np.zeros_like(layer)
      for t in range(1, STEPS + 1):
        g = g_layers[t - 1, :, i].mean(0)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        u = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6)
        if layer.ndim > 1:  # vectors: ratio 1, no decay
          u = u + DECAY * layer
          u = u * np.linalg.norm(layer) / np.linalg.norm(u)
        layer = layer - RATE * u
      done.append(layer)
    out.append(np.stack(done) if stacked else done[0])
  return treedef.unflatten(out)


def on_eight_devices():
  """In the child process: per mesh, the distance to `numpy_lamb` and
  to the unsharded transform, and the reductions in the program."""
  from jax.sharding import AxisType, Mesh, NamedSharding

  from giantsteps.research import large_batch

  tx = large_batch.lamb(
    RATE,
    weight_decay=DECAY,
    trust_mask=large_batch.matrices,
    decay_mask=large_batch.matrices,
  )
  params, rows = values()
  layout = sharded_update.layouts(params, SHARDS)

  def distance(found, wanted):
    far = lambda a, b: float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
    return max(map(far, jax.tree.leaves(found), jax.tree.leaves(wanted)))

  batches = [jax.tree.map(lambda r, t=t: r[t], rows) for t in range(STEPS)]

  def run(gradient):
    """Parameters, in the form that `gradient` takes, after all steps."""

    @jax.jit
    def step(x, state, arrays):
      u, state = tx.update(gradient(x, arrays), state, x)
      return jax.tree.map(jnp.add, x, u), state

    def all_steps(x):
      state = jax.jit(tx.init)(x)
      for arrays in batches:
        x, state = step(x, state, arrays)
      return x

    return all_steps

  plain, exact = run(jax.grad(loss))(params), numpy_lamb()
  results = {"unsharded": [distance(plain, exact)]}
  meshes = {"1": (1,), "2": (2,), "4": (4,), "8": (8,), "2x4": (2, 4)}
  for name, shape in meshes.items():
    axes = tuple(f"data_{i}" for i in range(len(shape)))
    count = int(np.prod(shape))
    mesh = Mesh(
      np.array(jax.devices()[:count]).reshape(shape),
      axes,
      axis_types=(AxisType.Auto,) * len(axes),
    )
    for parts in (1, 2) if name in ("8", "2x4") else (1,):
      reduce = sharded_update.local_then_scatter(
        loss, mesh, axes, layout, parts
      )

      def gradient(packed, arrays, reduce=reduce, mesh=mesh, axes=axes):
        x = sharded_update.gather(packed, mesh, axes, layout, jnp.float32)
        return reduce(x, arrays)[1]

      places = jax.tree.map(
        lambda p, mesh=mesh: NamedSharding(mesh, p),
        sharded_update.specs(layout, axes),
      )
      packed = jax.device_put(sharded_update.pack(params, layout), places)
      found = run(gradient)(packed)
      kernel = found["layers"]["kernel"].sharding.shard_shape((3, 128, 128))
      assert kernel == (3, 128 // count, 128), kernel
      found = sharded_update.unpack(jax.device_get(found), layout)
      text = jax.jit(reduce).lower(params, batches[0]).compile().as_text() or ""
      results[f"{name}/{parts}"] = [
        distance(found, exact),
        distance(found, plain),
        text.count(" reduce-scatter("),
        text.count(" all-reduce("),
      ]
  return results


@pytest.fixture(scope="module")
def results(on_devices):
  return on_devices(SHARDS, __file__, "on_eight_devices()")


@pytest.mark.parametrize(
  "mesh", ["1/1", "2/1", "4/1", "8/1", "8/2", "2x4/1", "2x4/2"]
)
def test_equal_to_lamb_on_any_number_of_devices(results, mesh):
  exact, plain, *_ = results[mesh]
  assert results["unsharded"][0] < 1e-6  # the transform itself
  assert exact < 1e-6 and plain < 1e-6


@pytest.mark.parametrize(("mesh", "stages"), [("8", 1), ("2x4", 2)])
def test_one_reduction_per_step_whatever_the_accumulation(
  results, mesh, stages
):
  once, four = results[f"{mesh}/1"][2:], results[f"{mesh}/2"][2:]
  assert once == four
  # two large leaves, each scattered along every mesh axis
  assert once[0] == 2 * stages


def test_layouts_split_large_matrices_alone():
  params, _ = values()
  found = sharded_update.layouts(params, SHARDS)
  # 9,900 numbers per layer in 8 x 1024 blocks: two per device, 16 rows each
  assert found["layers"]["kernel"].packed_shape == (3, 128, 128)
  assert found["embed"].packed_shape == (128, 128)
  assert found["layers"]["bias"].rows == 0
  assert found["small"].rows == 0


def test_packing_pads_with_zeros_and_unpacking_undoes_it():
  params, _ = values()
  layout = sharded_update.layouts(params, SHARDS)
  packed = sharded_update.pack(params, layout)
  kernel = packed["layers"]["kernel"].reshape(3, -1)
  np.testing.assert_array_equal(kernel[:, 9_900:], 0)
  np.testing.assert_array_equal(
    kernel[:, :9_900], params["layers"]["kernel"].reshape(3, -1)
  )
  again = sharded_update.unpack(packed, layout)
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_layers_must_come_first():
  params = {"w": np.zeros((64, 3, 64))}
  with pytest.raises(ValueError, match="first"):
    sharded_update.layouts(params, 1, layer_axes={"w": (1,)})
