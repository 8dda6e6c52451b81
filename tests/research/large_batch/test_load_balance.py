"""Load-balancing losses against golden values, a float64 gradient by hand, and
themselves on eight devices and on one."""

# NumPy arrays stand for jax.Array; pytrees have no static type
# pyright: reportArgumentType=false

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from giantsteps.models import moe, transformer
from giantsteps.research import large_batch

GLOBAL = jax.jit(large_batch.global_batch_loss, static_argnums=1)
MICRO = jax.jit(
  large_batch.micro_batch_loss, static_argnums=1, static_argnames="groups"
)
ROOT = pathlib.Path(__file__).parents[3]
GOLDEN = ROOT / "tests/golden/large_batch"
DEVICES, K = 8, 2
CONFIG = transformer.Config(
  vocab_size=40,
  width=16,
  depth=2,
  num_heads=2,
  num_kv_heads=2,
  head_dim=8,
  mlp_width=16,
  num_experts=6,
)
# Device d has rows of its own domain: tokens 5 d to 5 d + 4.
DOMAIN = 5 * np.repeat(np.arange(DEVICES), 2)[:, None]
TOKENS = DOMAIN + np.random.default_rng(0).integers(0, 5, (2 * DEVICES, 12))
LENGTHS = np.random.default_rng(1).integers(0, 13, (2 * DEVICES, 1))
BATCHES = {
  "full": np.ones((2 * DEVICES, 12), bool),
  "padded": np.arange(12)[None] < LENGTHS,
}


@jax.jit
def load_of(logits, valid=None):
  """logits [..., B, T, E] -> Load."""
  probabilities, _, chosen = moe.route(logits, K)
  return moe.load(probabilities, chosen, valid)


def stack_loss(form, params, tokens, valid):
  """Sum over the layers of a transformer."""
  _, load = transformer.logits_and_load(CONFIG, params, tokens, valid)
  return jnp.sum(form(load))


def init():
  network = transformer.Transformer(CONFIG)
  params = jax.jit(network.init)(jax.random.key(0), TOKENS[:1])["params"]
  # Routers with an opinion, so that domains differ.
  router = params["layers"]["moe"]["router"]
  router["kernel"] = 4 * router["kernel"]
  return params


def on_eight_devices():
  """In the child process: values and gradients of both forms, per batch."""
  from jax.sharding import AxisType, Mesh, NamedSharding
  from jax.sharding import PartitionSpec as P

  axes = ("data_0", "data_1")
  mesh = Mesh(
    np.array(jax.devices()).reshape(2, 4), axes, axis_types=(AxisType.Auto,) * 2
  )
  params = init()
  whole = lambda load: large_batch.global_batch_loss(load, K)[0]
  local = {
    "global": lambda load: large_batch.global_batch_loss(load, K, axes)[0],
    "micro": lambda load: large_batch.micro_batch_loss(load, K),
  }
  gradient = lambda form: jax.value_and_grad(
    functools.partial(stack_loss, form)
  )

  def sharded(form):
    def on_one(params, tokens, valid):
      params = jax.tree.map(
        lambda x: jax.lax.pcast(x, axes, to="varying"), params
      )
      return jax.tree.map(
        lambda x: x[None], gradient(form)(params, tokens, valid)
      )

    rows = P(axes)
    each = jax.shard_map(
      on_one, mesh=mesh, in_specs=(P(), rows, rows), out_specs=rows
    )
    return jax.jit(each).lower(params, TOKENS, BATCHES["full"])

  def far(found, wanted):
    """Largest distance, relative to the largest entry of each array."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    scale = max(float(np.max(np.abs(w))) for w in jax.tree.leaves(wanted[1]))
    return max(
      float(np.max(np.abs(a - b))) / (scale if np.ndim(b) else float(b))
      for a, b in pairs
    )

  lowered = {name: sharded(form) for name, form in local.items()}
  programs = {name: x.compile() for name, x in lowered.items()}
  one = jax.jit(gradient(whole))
  rows = NamedSharding(mesh, P(axes))
  places = lambda params, *arrays: (
    jax.device_put(params, NamedSharding(mesh, P())),
    *jax.device_put(arrays, rows),
  )
  out = {}
  for batch, valid in BATCHES.items():
    wanted = jax.device_get(one(params, TOKENS, valid))
    for name, program in programs.items():
      each = jax.device_get(program(*places(params, TOKENS, valid)))
      found = jax.tree.map(lambda x: x.mean(0), each)
      out[f"{name}/{batch}"] = [far(found, wanted), float(found[0])]
    found = one(*places(params, TOKENS, valid))
    out[f"jit/{batch}"] = [far(jax.device_get(found), wanted)]
    out[f"one/{batch}"] = [0.0, float(wanted[0])]
  for name, program in programs.items():
    out[f"{name}/psums"] = [
      lowered[name].as_text().count("all_reduce"),
      str(program.as_text()).count(" all-reduce("),
    ]
  return out


@pytest.fixture(scope="module")
def results(on_devices):
  return on_devices(DEVICES, __file__, "on_eight_devices()")


@pytest.mark.parametrize("batch", list(BATCHES))
@pytest.mark.parametrize("form", ["global", "jit"])
def test_global_on_eight_devices_is_one_device(results, form, batch):
  # value and gradient of all parameters, sums in another order
  assert results[f"{form}/{batch}"][0] < 1e-6


@pytest.mark.parametrize("batch", list(BATCHES))
def test_micro_on_eight_devices_is_not(results, batch):
  assert results[f"micro/{batch}"][0] > 0.1


def test_micro_is_larger_when_domains_differ(results):
  assert results["micro/full"][1] > 1.05 * results["one/full"][1]


def test_one_psum_for_the_stack_and_none_for_micro(results):
  assert results["global/psums"] == [1, 1]
  assert results["micro/psums"] == [0, 0]


@pytest.mark.parametrize("seed", [0, 1])
def test_golden(seed):
  golden = np.load(GOLDEN / f"load_balance_seed{seed}.npz")
  # ranks stand for rows
  load = load_of(golden["router_logits"].astype(np.float32))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
  tokens = golden["router_logits"].shape[1]
  close(load.counts / (K * tokens), golden["f_micro"])
  close(load.probabilities / tokens, golden["p_micro"], rtol=2e-6)
  close(MICRO(load, K, groups=4), golden["micro"])
  loss, counts = GLOBAL(load, K)
  close(loss, golden["global"])
  np.testing.assert_array_equal(counts, np.sum(load.counts, 0))


def test_the_loss_of_each_device_is_the_golden_one():
  golden = np.load(GOLDEN / "load_balance_seed0.npz")
  logits = golden["router_logits"].astype(np.float32)[:, None]
  loss = lambda x: large_batch.global_batch_loss(load_of(x), K, ("data",))[0]
  found = jax.jit(jax.vmap(loss, axis_name="data"))(logits)
  np.testing.assert_allclose(found, golden["global_per_rank"], rtol=1e-6)


def test_gradient_is_that_of_the_softmax_alone():
  logits = np.random.default_rng(2).normal(size=(3, 7, 5))
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  best = np.argsort(-logits, -1)[..., :K]
  f = np.bincount(best.reshape(-1), minlength=5) / best.size
  # dL/dz_tj = E/N p_tj (f_j - sum_i f_i p_ti), f constant
  exact = 5 / 21 * p * (f - (p @ f)[..., None])
  loss = lambda z: large_batch.global_batch_loss(load_of(z), K)[0]
  found = jax.jit(jax.grad(loss))(jnp.asarray(logits, jnp.float32))
  np.testing.assert_allclose(found, exact, atol=1e-7)


def test_a_uniform_router_has_loss_one_and_one_favourite_has_more():
  load = load_of(jnp.zeros((3, 2, 8, 4)))  # layers first
  for loss in (
    GLOBAL(load, K)[0],
    MICRO(load, K, groups=2),
  ):
    np.testing.assert_allclose(loss, np.ones(3), rtol=1e-6)
  favourites = np.array([20, 20, 0, 0], np.float32) * np.ones((2, 8, 1))
  # all tokens to two of four experts: f = p = 1/2 each, L = 4 (1/4 + 1/4)
  loss = GLOBAL(load_of(favourites.astype(np.float32)), K)[0]
  np.testing.assert_allclose(loss, 2.0, rtol=1e-6)


def test_micro_batches_carry_their_counts():
  logits = np.random.default_rng(3).normal(size=(3, 2, 9, 4)) * 2
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  best = np.argsort(-logits, -1)[..., :K]
  counts = np.zeros(4, np.int32)
  for i in range(3):
    load = load_of(jnp.asarray(logits[i], jnp.float32))
    loss, counts = GLOBAL(load, K, earlier=counts)
    seen = np.bincount(best[: i + 1].reshape(-1), minlength=4)
    np.testing.assert_array_equal(counts, seen)
    wanted = 4 * (seen / seen.sum()) @ p[i].reshape(-1, 4).mean(0)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)


def test_nothing_but_padding_costs_nothing():
  valid = jnp.zeros((2, 8), bool)
  grad = lambda loss: jax.jit(
    jax.value_and_grad(lambda z: loss(load_of(z, valid)))
  )
  for loss in (
    lambda load: large_batch.global_batch_loss(load, K)[0],
    lambda load: large_batch.micro_batch_loss(load, K),
  ):
    value, g = grad(loss)(jnp.ones((2, 8, 4)))
    assert value == 0
    np.testing.assert_array_equal(g, np.zeros((2, 8, 4)))


def test_groups_must_divide_the_rows():
  with pytest.raises(ValueError, match="groups=3 does not divide the 4 rows"):
    large_batch.micro_batch_loss(load_of(jnp.zeros((4, 8, 4))), K, groups=3)


def test_every_expert_is_a_layer_of_lamb():
  params = {"layers": {"moe": {"experts": {"up": jnp.ones((2, 3, 4, 5))}}}}
  state = jax.eval_shape(large_batch.lamb(0.1).init, params)
  [unscaled] = jax.tree.leaves(state.unscaled)
  assert unscaled.shape == (2, 3, 1, 1)
