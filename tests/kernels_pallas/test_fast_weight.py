"""Reading and writing fast weights: kernels against the reference, derivatives
against formulas written out by hand and the authors' values."""

# NumPy arrays stand for jax.Array; pytrees have no static type
# pyright: reportArgumentType=false, reportCallIssue=false

import functools
import pathlib

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from giantsteps.experiments.harness import kernel_report
from giantsteps.kernels_pallas import fast_weight
from giantsteps.kernels_pallas.fast_weight import examples, reference, tpu

GOLDEN = pathlib.Path(__file__).parent.parent / "golden/lact"
SMALL = {"tile": 128, "rows": 128, "depth": 128}  # several at small sizes


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
  monkeypatch.setattr(tpu, "APPLY_BLOCKS", SMALL)
  monkeypatch.setattr(tpu, "GRADIENT_BLOCKS", {**SMALL, "apart": 0})


def problem(n, length, d, h, dtype, seed=0):
  """weights, k, v, rates."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape)
  sizes = ((h, d), (d, h), (h, d))
  weights = tuple(
    jnp.asarray(normal(n, *s) / np.sqrt(s[1]), "float32") for s in sizes
  )
  tokens = [jnp.asarray(normal(n, length, d), dtype) for _ in range(2)]
  rates = tuple(
    jnp.asarray(rng.uniform(size=(n, length, 1)), "float32") for _ in range(3)
  )
  return weights, *tokens, rates


def states(n, h, d, seed=0):
  """total, step, norms, (mu, buffers) of `update`."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), "float32")
  three = lambda: (normal(n, h, d), normal(n, d, h), normal(n, h, d))
  norms = tuple(1 + abs(normal(n, rows, 1)) for rows in (h, d, h))
  return three(), three(), norms, (abs(normal(n, 1, 1)), three())


def interpreted(function):
  """The operation through its TPU kernel, on the CPU."""

  def run(*operands, **static):
    with pltpu.force_tpu_interpret_mode():
      return function(*operands, implementation="pallas_tpu", **static)

  return run


def written(weights, k, v, rates):
  """NumPy float64, one row, token by token: D0, D1, D2 as the paper sums."""
  w0, w1, w2 = weights
  out = [np.zeros_like(w) for w in weights]
  for t in range(len(k)):
    g, u, p = w0 @ k[t], w2 @ k[t], w1.T @ v[t]
    s = 1 / (1 + np.exp(-g))
    out[0] += rates[0][t] * np.outer(p * u * s * (1 + g * (1 - s)), k[t])
    out[1] += rates[1][t] * np.outer(v[t], g * s * u)
    out[2] += rates[2][t] * np.outer(p * g * s, k[t])
  return out


def pulled_back(weights, k, v, rates, cotangents):
  """NumPy float64, one row: the vector-Jacobian product, derived by hand."""
  (w0, w1, w2), (g0, g1, g2), (e0, e1, e2) = weights, cotangents, rates
  g, u, p = k @ w0.T, k @ w2.T, v @ w1
  r0, r2, r1 = k @ g0.T, k @ g2.T, v @ g1
  s = 1 / (1 + np.exp(-g))
  a, slope = g * s, s * (1 + g * (1 - s))
  bend = s * (1 - s) * (2 + g * (1 - 2 * s))
  dp = r0 * e0 * u * slope + r2 * e2 * a
  du = r0 * e0 * p * slope + r1 * e1 * a
  dg = (r2 * e2 * p + r1 * e1 * u) * slope + r0 * e0 * p * u * bend
  x0, x1, x2 = e0 * p * u * slope, e1 * u * a, e2 * p * a
  per_token = [r0 * p * u * slope, r1 * u * a, r2 * p * a]
  return (
    (dg.T @ k, v.T @ dp, du.T @ k),
    x0 @ g0 + x2 @ g2 + dg @ w0 + du @ w2,
    dp @ w1.T + x1 @ g1.T,
    tuple(x.sum(1, keepdims=True) for x in per_token),
  )


def wide(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def assert_close(found, want, rtol):
  for i, error in enumerate(harness.relative_error(found, want)):
    assert error <= rtol, f"result {i}: {error:.3g} > {rtol:.3g}"


# The reference and the formulas


def test_gradient_is_the_sum_over_tokens():
  operands = wide(problem(1, 7, 5, 6, "float32"))
  with jax.enable_x64(True):
    found = jax.jit(fast_weight.gradient)(*operands)
  row = jax.tree.map(lambda x: x[0], operands)
  assert_close([x[0] for x in found], written(*row), 1e-13)


def test_gradient_descends_the_loss():
  weights, k, v, rates = wide(problem(2, 9, 4, 6, "float32"))
  rates = tuple(np.ones_like(x) for x in rates)
  with jax.enable_x64(True):
    gain = lambda w: jnp.sum(fast_weight.apply(w, k) * v)
    want = jax.grad(gain)(jax.tree.map(jnp.asarray, weights))
    assert_close(fast_weight.gradient(weights, k, v, rates), want, 1e-13)


@pytest.mark.parametrize("path", ["reference", "kernel"])
def test_derivatives_are_those_worked_out_by_hand(path):
  """The kernel's path only recomputes, so it differs by float32 alone."""
  n, length, d, h = 1, 40, 24, 16
  operands = problem(n, length, d, h, "float32", seed=3)
  cotangents = harness.random_like(operands[0], 4)
  row = jax.tree.map(lambda x: x[0], wide((*operands, cotangents)))
  want = pulled_back(*row)
  if path == "reference":
    with jax.enable_x64(True):
      xs, c = wide((operands, cotangents))
      found = jax.jit(lambda x, c: jax.vjp(reference.gradient, *x)[1](c))(xs, c)
  else:
    run = interpreted(fast_weight.gradient)
    with jax.default_matmul_precision("highest"):
      found = jax.vjp(run, *operands)[1](cotangents)
  found = jax.tree.map(lambda x: x[0], found)
  assert_close(found, want, 1e-12 if path == "reference" else 2e-6)


def test_backward_of_the_gradient_against_the_authors():
  """With unit vectors for keys and values D0, D1, D2 are the features."""
  golden = np.load(GOLDEN / "swiglu_bwd_bwd.npz")
  f64 = lambda name: golden[name].astype(np.float64)
  length = golden["lr0"].shape[1]
  unit = np.broadcast_to(np.eye(length), (2, length, length))
  w0, w2 = np.split(f64("x0_x2"), 2, axis=1)
  turned = lambda x: np.swapaxes(x, 1, 2)
  weights = w0, turned(f64("dh")), w2
  rates = tuple(f64(f"lr{i}")[..., None] for i in range(3))
  with jax.enable_x64(True):
    write = lambda w, e: reference.gradient(w, unit, unit, e)
    (d0, d1, d2), pull = jax.vjp(write, weights, rates)
    c0, c2 = np.split(f64("grad_dx0_dx2"), 2, axis=1)
    c = jax.tree.map(jnp.asarray, (c0, turned(f64("grad_hidden_lr1")), c2))
    grads, de = pull(c)
  want = golden["out_f64_dx0_dx2"], golden["out_f64_hidden_lr1"]
  assert_close((np.concatenate([d0, d2], 1), turned(d1)), want, 1e-11)
  inner = np.concatenate([grads[0], grads[2]], 1)
  assert_close(
    (inner, turned(grads[1])),
    (golden["out_f64_grad_x0_x2"], golden["out_f64_grad_dh"]),
    1e-11,
  )
  for i in range(3):
    assert_close(de[i][..., 0], golden[f"out_f64_grad_lr{i}"], 1e-11)


# Kernels against the reference


@pytest.mark.parametrize(
  ("n", "length", "d", "h", "dtype"),
  [
    (1, 37, 40, 24, "float32"),  # less than a tile of everything
    (1, 300, 256, 256, "bfloat16"),  # tokens end inside a tile, d in two
  ],
)
@pytest.mark.parametrize("apart", [0, 1])
def test_gradient_kernel(n, length, d, h, dtype, apart, monkeypatch):
  monkeypatch.setitem(tpu.GRADIENT_BLOCKS, "apart", apart)
  harness.assert_parity(
    interpreted(fast_weight.gradient),
    reference.gradient,
    reference.gradient,
    problem(n, length, d, h, dtype),
    modes=("value",),
  )


@pytest.mark.parametrize(
  ("length", "d", "h", "dtype"),
  [(37, 40, 24, "float32"), (130, 256, 256, "bfloat16")],
)
def test_apply_kernel(length, d, h, dtype):
  weights, q, *_ = problem(1, length, d, h, dtype)
  harness.assert_parity(
    interpreted(fast_weight.apply),
    reference.apply,
    reference.apply,
    (weights, q),
    modes=("value",),
  )


@pytest.mark.parametrize("keep_total", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("heavy", [False, True])
def test_update_kernel(keep_total, normed, heavy):
  total, step, norms, momentum = states(2, 24, 40)
  static = {"keep_total": keep_total}
  given = [total, step] + ([norms] if normed else [])
  given += [momentum] if heavy else []

  def call(function):
    def run(total, step, *rest):
      rest = list(rest)
      norms = rest.pop(0) if normed else None
      momentum = rest.pop(0) if heavy else None
      return function(total, step, norms, momentum, **static)

    return run

  harness.assert_parity(
    call(interpreted(fast_weight.update)),
    call(reference.update),
    call(reference.update),
    given,
    modes=("value",),
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["apply", "gradient", "update"])
def test_derivatives_through_the_kernel(name):
  weights, k, v, rates = problem(1, 37, 40, 24, "float32")
  operands = {
    "apply": (weights, k),
    "gradient": (weights, k, v, rates),
    "update": states(1, 24, 40),
  }[name]
  harness.assert_parity(
    interpreted(getattr(fast_weight, name)),
    lambda *xs: getattr(fast_weight, name)(*xs, implementation="xla"),
    lambda *xs: getattr(fast_weight, name)(*xs, implementation="xla"),
    operands,
    modes=("vjp", "jvp"),
  )


def test_update_sets_the_length_of_every_row():
  total, step, norms, _ = states(1, 16, 24)
  weights, *_ = interpreted(fast_weight.update)(total, step, norms)
  for w, z, d, n in zip(weights, total, step, norms, strict=True):
    before = np.linalg.norm(np.asarray(z + d, np.float64), axis=-1)
    want = np.asarray(n[..., 0]) * before / (before + 1e-5)
    got = np.linalg.norm(np.asarray(w, np.float64), axis=-1)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_tokens_without_a_rate_write_nothing():
  weights, k, v, rates = problem(1, 130, 128, 128, "bfloat16")
  zero = tuple(jnp.zeros_like(x) for x in rates)
  for d in interpreted(fast_weight.gradient)(weights, k, v, zero):
    np.testing.assert_array_equal(d, 0)


def test_second_derivatives_through_the_kernel():
  """Forward over reverse: a symmetric Hessian, and a finite difference."""
  weights, k, v, rates = problem(1, 8, 8, 8, "float32", seed=5)
  run = interpreted(fast_weight.gradient)

  def energy(gradient, w):
    return sum(jnp.sum(jnp.sin(d)) for d in gradient(w, k, v, rates))

  a, b = harness.random_like(weights, 6), harness.random_like(weights, 7)
  slope = jax.grad(functools.partial(energy, run))
  dot = lambda x, y: sum(
    np.vdot(np.asarray(p, np.float64), np.asarray(q, np.float64))
    for p, q in zip(x, y, strict=True)
  )
  with jax.default_matmul_precision("highest"):
    ab = dot(a, jax.jvp(slope, (weights,), (b,))[1])
    ba = dot(b, jax.jvp(slope, (weights,), (a,))[1])
  np.testing.assert_allclose(ab, ba, rtol=1e-4)
  with jax.enable_x64(True):
    w, a64, b64, k, v, rates = wide((weights, a, b, k, v, rates))
    exact = jax.grad(functools.partial(energy, reference.gradient))
    at = lambda e: exact(
      tuple(jnp.asarray(x + e * y) for x, y in zip(w, b64, strict=True))
    )
    want = dot(
      a64, jax.tree.map(lambda x, y: (x - y) / 2e-5, at(1e-5), at(-1e-5))
    )
  np.testing.assert_allclose(ab, want, rtol=1e-4)


def test_backward_keeps_the_operands_and_nothing_else():
  operands = problem(1, 256, 128, 256, "bfloat16")
  keep = lambda *xs: jax.vjp(interpreted(fast_weight.gradient), *xs)[1]
  kept = jax.tree.leaves(jax.eval_shape(keep, *operands))
  bytes_of = lambda xs: sum(x.size * x.dtype.itemsize for x in xs)
  assert bytes_of(kept) <= bytes_of(jax.tree.leaves(operands))


def test_kernel_under_scan_and_checkpoint():
  operands = problem(2, 130, 128, 128, "float32")
  run = interpreted(fast_weight.gradient)
  want = reference.gradient(*operands)
  two = jax.tree.map(lambda x: x[:, None], operands)
  body = jax.checkpoint(lambda carry, xs: (carry, run(*xs)))
  scanned = jax.jit(lambda xs: jax.lax.scan(body, 0, xs)[1])(two)
  assert_close([x[:, 0] for x in scanned], want, 2e-6)


# Faults


@pytest.mark.parametrize("kernel", ["apply", "gradient", "update"])
def test_no_race_no_bound_nothing_unset(kernel):
  weights, k, v, rates = problem(2, 130, 128, 256, "bfloat16")
  if kernel == "gradient":
    for apart in (0, 1):
      run = functools.partial(tpu.gradient, blocks={**SMALL, "apart": apart})
      harness.run_checked(run, weights, k, v, rates)
  elif kernel == "apply":
    harness.run_checked(tpu.apply, weights, k)
  else:
    update = functools.partial(tpu.update, keep_total=True)
    harness.run_checked(update, *states(2, 32, 128))


# Chips that are not here


@pytest.mark.parametrize("target", list(harness.TPUS))
@pytest.mark.parametrize(
  "example", examples.examples()[:4], ids=lambda example: example.name
)
def test_default_is_the_kernel(target, example, monkeypatch):
  monkeypatch.undo()
  harness.assert_holds_kernel(harness.compile_for(example, target))


@pytest.mark.slow
@pytest.mark.parametrize("target", list(harness.TPUS))
@pytest.mark.parametrize(
  "example", examples.examples()[4:], ids=lambda example: example.name
)
def test_default_is_the_kernel_at_other_sizes(target, example, monkeypatch):
  monkeypatch.undo()
  harness.assert_holds_kernel(harness.compile_for(example, target))


# Microseconds estimated by libtpu 0.0.52, with 2 % to spare; XLA's estimates
# are 33.0, 83.7, 50.2 for apply and 81.8, 149.5, 112.8 for gradient.
@pytest.mark.slow
@pytest.mark.parametrize(
  ("operation", "target", "most"),
  [
    ("apply", "v6e", 25.5),
    ("apply", "v5e", 77.5),
    ("apply", "v5p", 33.6),
    ("gradient", "v6e", 49.5),
    ("gradient", "v5e", 154.0),
    ("gradient", "v5p", 66.8),
  ],
)
def test_no_spill_and_no_slower_than_recorded(operation, target, most):
  harness.device(target)  # skips without its compiler
  case = f"{operation} 512: 4 x 2048 x 512 x 512"
  found = kernel_report.estimate("fast_weight", case, target, "pallas_tpu")
  assert [kernel["spills"] for kernel in found["kernels"]] == [0]
  assert found["microseconds"] <= most


@pytest.mark.slow
def test_wide_gradient_does_not_spill_on_v6e(monkeypatch):
  monkeypatch.undo()
  (case,) = kernel_report.examples("fast_weight", "gradient language model 3B")
  report = harness.assert_within_record("fast_weight", case, "v6e")
  assert not sum(kernel["spills"] for kernel in report["kernels"])


def test_float64_and_small_sizes_stay_with_xla():
  operands = problem(1, 64, 128, 128, "bfloat16")
  text = str(jax.make_jaxpr(fast_weight.gradient)(*operands))
  assert "pallas" not in text
  with jax.enable_x64(True):
    large = jax.eval_shape(lambda: problem_shapes(2048, 512, "float64"))
    text = str(jax.make_jaxpr(fast_weight.gradient)(*large))
  assert "pallas" not in text


def problem_shapes(length, size, dtype):
  token = jnp.zeros((1, length, size), dtype)
  weights = (jnp.zeros((1, size, size), dtype),) * 3
  return weights, token, token, (jnp.zeros((1, length, 1), dtype),) * 3


@pytest.mark.slow
def test_kernel_under_vmap():
  place = jax.sharding.SingleDeviceSharding(harness.device("v5e"))
  two = lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype, sharding=place)
  operands = jax.tree.map(two, examples.examples()[1].operands)
  mapped = jax.jit(jax.vmap(fast_weight.gradient))
  harness.assert_holds_kernel(mapped.lower(*operands).compile())


def test_kernel_inside_a_shard_map():
  """Tokens of a chunk on two chips, weights on both: local D, then a sum."""
  harness.device("v5e")  # skips without its compiler
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name=harness.TPUS["v5e"]
  ).devices[:2]
  mesh = Mesh(np.array(devices), ("cp",))
  example = examples.examples()[1]
  split = PartitionSpec(None, "cp")
  specs = (PartitionSpec(), split, split, split)

  def write(*operands):
    d = fast_weight.gradient(*operands)
    return jax.lax.psum(d, "cp")

  write = jax.shard_map(
    write, mesh=mesh, in_specs=specs, out_specs=PartitionSpec()
  )
  loss = lambda *xs: sum(jnp.sum(d * d) for d in write(*xs))
  operands = tuple(
    jax.tree.map(
      lambda x, spec=spec: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
      ),
      operand,
    )
    for operand, spec in zip(example.operands, specs, strict=True)
  )
  compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*operands).compile()
  harness.assert_holds_kernel(compiled)


@pytest.mark.parametrize("name", ["apply", "gradient", "update"])
def test_float64_has_no_kernel(name):
  with jax.enable_x64(True):
    w = (jnp.ones((1, 128, 128), jnp.float64),) * 3
    x = jnp.ones((1, 128, 128), jnp.float64)
    rate = (jnp.ones((1, 128, 1), jnp.float64),) * 3
    operands = {"apply": (w, x), "gradient": (w, x, x, rate), "update": (w, w)}
    function = getattr(fast_weight, name)
    with pytest.raises(ValueError, match="'pallas_tpu': here there is xla"):
      function(*operands[name], implementation="pallas_tpu")


def test_a_memory_too_large_for_a_chip_is_left_to_xla():
  sds = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  for h, kernels in ((1_536, 1), (3_072, 0)):
    w = sds(4, h, 768), sds(4, 768, h), sds(4, h, 768)
    lowered = jax.jit(fast_weight.apply).trace(w, sds(4, 2_048, 768))
    text = lowered.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == kernels
