"""Padding, packed documents, recomputation and decoding of LaCT's operator,
against a float64 transcription of the paper in NumPy; the authors' own numbers
are in test_lact.py."""

# NumPy arrays stand for jax.Array; pytrees have no static type
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOperatorIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from giantsteps.models import fast_weight_decode, fast_weight_update, lact

C, D, H = 4, 6, 5
TIGHT = 1e-11  # float64; Muon amplifies rounding to 1e-13
COEFFICIENTS = (
  (4.0848, -6.8946, 2.9270),
  (3.9505, -6.3029, 2.6377),
  (3.7418, -5.5913, 2.3037),
  (2.8769, -3.1427, 1.2046),
  (2.8366, -3.0525, 1.2012),
)
quick_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def problem(seed, length, rows=2, momentum=True):
  """Keyword arguments of `fast_weight_scan`, NumPy float64."""
  rng = np.random.default_rng(seed)
  token = lambda: rng.normal(size=(rows, length, D))
  rate = lambda: rng.uniform(size=(rows, length, 1))
  weight = lambda *s: rng.normal(size=(rows, *s)) / 2
  out = {
    "q": token(),
    "k": token(),
    "v": token(),
    "learning_rates": (rate(), rate(), rate()),
    "weights": (weight(H, D), weight(D, H), weight(H, D)),
  }
  return out | ({"momentum": rate()} if momentum else {})


def tokens_of(x, take):
  """x with `take` done to every array of tokens."""
  return {
    name: leaf if name == "weights" else jax.tree.map(take, leaf)
    for name, leaf in x.items()
  }


def orthogonal(g):
  x = g / (np.linalg.norm(g) + 1e-7)
  for a, b, c in COEFFICIENTS:
    gram = x @ x.T
    x = a * x + (b * gram + c * gram @ gram) @ x
  return x


def read(weights, q):
  w0, w1, w2 = weights
  gate = q @ w0.T
  return (gate / (1 + np.exp(-gate)) * (q @ w2.T)) @ w1.T


def written(weights, x, row, where, momenta, muon):
  """One step's three matrices from the tokens `where` of a row."""
  w0, w1, w2 = weights
  steps = [np.zeros_like(w) for w in weights]
  for t in where:
    k, v = x["k"][row, t], x["v"][row, t]
    eta0, eta1, eta2 = (eta[row, t, 0] for eta in x["learning_rates"])
    g, u, p = w0 @ k, w2 @ k, w1.T @ v
    s = 1 / (1 + np.exp(-g))
    steps[0] += eta0 * np.outer(p * u * s * (1 + g * (1 - s)), k)
    steps[1] += eta1 * np.outer(v, g * s * u)
    steps[2] += eta2 * np.outer(p * g * s, k)
  if "momentum" in x:
    mu = np.mean([x["momentum"][row, t, 0] for t in where])
    steps = [d + mu * m for d, m in zip(steps, momenta, strict=True)]
    momenta = steps
  return [orthogonal(d) for d in steps] if muon else steps, momenta


def alone(
  x, row, positions, order="causal", muon=True, prenorm=False, real=None
):
  """Outputs [T, D] and weights after every write of the tokens `positions`,
  of which those in `real` (None: all) are no padding."""
  real = positions if real is None else real
  weights = initial = [w[row] for w in x["weights"]]
  lengths = [np.linalg.norm(w, axis=1, keepdims=True) for w in initial]
  total, momenta = initial, [np.zeros_like(w) for w in initial]
  history, out = [initial], np.zeros((len(positions), D))
  size = C if order == "causal" else len(positions)
  for start in range(0, len(positions), size):
    chunk = positions[start : start + size]
    here = [t for t in chunk if t in real]
    later = [t for t in positions[start + size :] if t in real]
    places = [i + start for i, t in enumerate(chunk) if t in real]
    if order == "causal" and here:
      out[places] = read(weights, x["q"][row, here])
    if here and (later or order != "causal"):
      steps, momenta = written(weights, x, row, here, momenta, muon)
      base = total if prenorm else weights
      total = [w + d for w, d in zip(base, steps, strict=True)]
      weights = [
        w / (np.linalg.norm(w, axis=1, keepdims=True) + 1e-5) * n
        for w, n in zip(total, lengths, strict=True)
      ]
      history.append(weights)
    if order != "causal" and here:
      out[places] = read(weights, x["q"][row, here])
  return out, history


def close(got, want, rtol=TIGHT):
  want = np.asarray(want)
  scale = max(np.abs(want).max(initial=0), 1e-3)
  np.testing.assert_allclose(got, want, rtol=0, atol=rtol * scale)


def run(x, **options):
  scan = functools.partial(lact.fast_weight_scan, chunk_size=C, **options)
  return quick_jit(lambda x: scan(**x))(x)


LENGTH = 23
IDS = np.stack(  # edges in the middle of chunks, on them, and one-token ones
  [
    np.repeat([3, 1, 3, 9], [6, 4, 9, 4]),
    np.repeat([0, 5, 2, 4], [1, 1, 13, 8]),
  ]
)


def documents(ids):
  edges = [0, *(np.flatnonzero(np.diff(ids)) + 1), len(ids)]
  return [list(range(a, b)) for a, b in zip(edges, edges[1:], strict=False)]


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
@pytest.mark.parametrize(
  ("muon", "prenorm", "momentum"), [(True, False, True), (False, True, False)]
)
def test_every_document_is_as_if_alone(order, muon, prenorm, momentum):
  x = problem(0, LENGTH, momentum=momentum)
  rule = {"order": order, "muon": muon, "prenorm": prenorm}
  out, state = run(x | {"segment_ids": IDS}, **rule)
  for row in range(2):
    for positions in documents(IDS[row]):
      want, history = alone(x, row, positions, **rule)
      close(out[row, positions], want)
      for w, last in zip(state.weights, history[-1], strict=True):
        assert last is not None
        if positions[-1] == LENGTH - 1:  # the state is the last document's
          close(w[row], last)


def test_one_document_is_no_document():
  x = problem(1, 14)
  out, state = run(x)
  one, same = run(x | {"segment_ids": np.full((2, 14), 7)})
  close(one, out)
  jax.tree.map(close, same, state)


def test_nothing_of_a_document_reaches_another():
  x = problem(2, LENGTH)
  inside = IDS == np.array([[1], [2]])  # one document per row

  def loss(x):
    out, _ = lact.fast_weight_scan(
      **x, chunk_size=C, segment_ids=IDS, remat="two_level"
    )
    return jnp.sum(jnp.where(inside[..., None], out, 0) ** 2)

  grads = quick_jit(jax.grad(loss))(x)
  for name in ("q", "k", "v", "learning_rates", "momentum"):
    for grad in jax.tree.leaves(grads[name]):
      np.testing.assert_array_equal(grad[~inside], 0)
      if name != "q":  # the second row's 13 tokens write three chunks
        first = 6 if name == "momentum" else 2  # of nothing in the first
        assert np.all(np.asarray(grad)[1, first:14] != 0)


def garbage(x, valid):
  return tokens_of(x, lambda y: np.where(valid[..., None], y, np.nan))


@pytest.mark.parametrize("muon", [True, False])
def test_padding_of_any_value_does_nothing(muon):
  x = problem(3, 18)
  valid = np.random.default_rng(0).uniform(size=(2, 18)) < 0.6
  valid[0, 4:8] = False  # a chunk without a token is not written
  valid[1, 11:] = False  # filled up on the right
  out, state = run(garbage(x, valid) | {"valid": valid}, muon=muon)
  for row in range(2):
    real = np.flatnonzero(valid[row]).tolist()
    want, history = alone(x, row, list(range(18)), muon=muon, real=real)
    close(out[row], want)
    for w, last in zip(state.weights, history[-1], strict=True):
      close(w[row], last)


def test_a_row_filled_on_the_right_is_the_short_row():
  x = problem(4, 18)
  valid = np.arange(18)[None] < np.array([[9], [8]])
  out, state = run(garbage(x, valid) | {"valid": valid})
  for row, length in enumerate((9, 8)):
    want, history = alone(x, row, list(range(length)))
    close(out[row, :length], want)
    assert len(history) == 1 + {9: 2, 8: 1}[length]
    for w, last in zip(state.weights, history[-1], strict=True):
      close(w[row], last)


def test_a_row_filled_on_the_left_counts_from_its_first_token():
  x = problem(5, 18)
  valid = np.arange(18)[None] >= np.array([[3], [7]])
  out, _ = run(garbage(x, valid) | {"valid": valid, "segment_ids": valid + 0})
  for row, begin in enumerate((3, 7)):
    want, _ = alone(x, row, list(range(begin, 18)))
    close(out[row, begin:], want)
    np.testing.assert_array_equal(out[row, :begin], 0)


def test_padding_has_no_gradient_and_no_nan():
  x = problem(6, 14)
  valid = np.arange(14)[None] < np.array([[11], [14]])

  def loss(x):
    out, _ = lact.fast_weight_scan(**x, chunk_size=C, valid=valid)
    return jnp.sum(out**2)

  bad = quick_jit(jax.grad(loss))(garbage(x, valid))
  good = quick_jit(jax.grad(loss))(x)
  for a, b in zip(jax.tree.leaves(bad), jax.tree.leaves(good), strict=True):
    np.testing.assert_array_equal(a, b)
    if a.shape[1] == 14:
      np.testing.assert_array_equal(a[~valid], 0)


@pytest.mark.parametrize(
  "order", ["bidirectional", [(0, 9, 1, 1), (9, 14, 1, 1)]]
)
def test_padding_in_other_orders(order):
  x = problem(7, 14)
  valid = np.arange(14)[None] < np.array([[6], [14]])
  out, state = run(garbage(x, valid) | {"valid": valid}, order=order)
  short = tokens_of(x, lambda y: y[:1, :6])
  short["weights"] = tuple(w[:1] for w in x["weights"])
  want, same = run(short, order="bidirectional")
  close(out[0, :6], want[0])  # the entry that is all padding writes nothing
  for w, last in zip(state.weights, same.weights, strict=True):
    close(w[0], last[0])
  assert np.isfinite(out).all()


def test_what_is_recomputed_changes_nothing():
  x = problem(8, 7 * C + 3)
  cotangent = np.random.default_rng(1).normal(size=x["q"].shape)

  def both(remat):
    def loss(x):
      out, state = lact.fast_weight_scan(
        **x, chunk_size=C, muon=False, remat=remat
      )
      return jnp.sum(out * cotangent), (out, state)

    return quick_jit(jax.grad(loss, has_aux=True))(x)

  want = both(False)
  for remat in ("chunk", 3, "two_level"):
    jax.tree.map(close, both(remat), want)


def gradient_memory(length, chunk, heads, size, dtype, remat, device):
  """Bytes of temporaries of all gradients, by the compiler."""
  place = NamedSharding(Mesh(np.array([device]), ("x",)), P())
  put = lambda shape, kind: jax.ShapeDtypeStruct(shape, kind, sharding=place)
  token = put((heads, length, size), dtype)
  rate = put((heads, length, 1), "float32")
  weight = put((heads, size, size), "float32")

  def loss(q, k, v, rates, weights, momentum, cotangent):
    out, _ = lact.fast_weight_scan(
      q, k, v, rates, weights, chunk_size=chunk, momentum=momentum, remat=remat
    )
    return jnp.sum(out.astype("float32") * cotangent.astype("float32"))

  grad = jax.jit(jax.grad(loss, range(6)))
  arguments = (token,) * 3 + ((rate,) * 3, (weight,) * 3, rate, token)
  compiled = grad.lower(*arguments).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def check_memory(length, chunk, heads, size, dtype, device, group):
  """Two-level recomputation against the states it keeps and one chunk, which
  is what a sequence with a single write takes beside its one state."""
  memory = functools.partial(
    gradient_memory,
    chunk=chunk,
    heads=heads,
    size=size,
    dtype=dtype,
    device=device,
  )
  state = 2 * 3 * heads * size * size * 4  # weights and momenta, float32
  tokens = heads * chunk * size * np.dtype(dtype).itemsize
  inside = memory(2 * chunk, remat=True) - state
  groups = length // chunk // group
  predicted = inside + groups * state + group * (state + 7 * tokens)
  found = memory(length, remat="two_level")
  assert found == pytest.approx(predicted, rel=0.15)


def test_memory_is_less_than_the_states_of_all_chunks():
  with jax.enable_x64(False):
    device = jax.devices()[0]
    found = gradient_memory(64 * 4, 4, 1, 128, "float32", "two_level", device)
    assert found < 64 * 2 * 3 * 128 * 128 * 4  # weights and momenta, float32


@pytest.mark.slow
def test_memory_of_131072_tokens_on_a_tpu():
  # 760M width on v5e by libtpu 0.0.52: 630 MB, predicted 588; 3838 MB with a
  # state per chunk, most of it copies of tokens that groups avoid.
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed (extra `test` on x86-64 Linux)")
  topology = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:2x2"
  )
  with jax.enable_x64(False):
    check_memory(131_072, 2048, 4, 384, jnp.bfloat16, topology.devices[0], 4)


def test_the_group_with_fewest_bytes_is_chosen():
  # 64 chunks of states of 14 and tokens of 6: 32 + 2, 16 + 4, 8 + 8 states
  # and 7 g tokens are 560, 448 and 560
  kept = functools.partial(fast_weight_update.kept_bytes, 64)
  assert [kept(g, 14, 6) for g in (1, 2, 4, 8)] == [896, 560, 448, 560]


@pytest.mark.parametrize(
  ("muon", "prenorm", "momentum"),
  [(True, False, True), (True, True, False), (False, False, False)],
)
def test_decoding_is_the_scan_at_every_length(muon, prenorm, momentum):
  length = 3 * C + 2
  x = problem(9, length, momentum=momentum)
  rule = {"muon": muon, "prenorm": prenorm}
  traces = []

  def step(state, q, k, v, rates, momentum):
    traces.append(0)
    return lact.decode_step(state, q, k, v, rates, momentum, muon, prenorm)

  step, state = quick_jit(step), lact.decode_state(x["weights"], C)
  want = [alone(x, row, list(range(length)), **rule) for row in range(2)]
  for t in range(length):
    at = tokens_of(x, lambda y, t=t: y[:, t : t + 1])
    at.setdefault("momentum", None)
    out, state = step(
      state, at["q"], at["k"], at["v"], at["learning_rates"], at["momentum"]
    )
    for row, (values, history) in enumerate(want):
      close(out[row, 0], values[t])
      for w, last in zip(state.fast.weights, history[t // C], strict=True):
        close(w[row], last)
  assert len(traces) == 1


def test_rows_at_different_lengths_decode_together():
  length = 3 * C + 2
  x = problem(10, length)
  lengths = np.array([C, 2 * C + 1])
  bad = garbage(x, np.arange(length)[None] < lengths[:, None])
  scan = functools.partial(fast_weight_decode.prefill, chunk_size=C)
  out, state = quick_jit(
    lambda x, n: scan(
      x["q"],
      x["k"],
      x["v"],
      x["learning_rates"],
      x["weights"],
      momentum=x["momentum"],
      lengths=n,
    )
  )(bad, lengths)
  want = [alone(x, row, list(range(length)))[0] for row in range(2)]
  for row in range(2):
    close(out[row, : lengths[row]], want[row][: lengths[row]])
  step = quick_jit(lact.decode_step)
  for i in range(length - max(lengths)):
    place = lengths + i
    at = tokens_of(x, lambda y, place=place: y[np.arange(2), place])  # [N, d]
    out, state = step(
      state, at["q"], at["k"], at["v"], at["learning_rates"], at["momentum"]
    )
    for row in range(2):
      close(out[row], want[row][place[row]])


def test_many_tokens_in_one_call():
  x = problem(11, 3 * C + 2)
  state = lact.decode_state([w[0] for w in x["weights"]], C, rows=2)
  x["weights"] = tuple(np.stack([w[0], w[0]]) for w in x["weights"])
  out, _ = quick_jit(lact.decode_step)(
    state, x["q"], x["k"], x["v"], x["learning_rates"], x["momentum"]
  )
  for row in range(2):
    close(out[row], alone(x, row, list(range(3 * C + 2)))[0])


def test_the_implementation_is_handed_to_the_kernels():
  x = problem(12, 6)
  np.testing.assert_array_equal(
    run(x, implementation="xla")[0], run(x, implementation=None)[0]
  )
  with pytest.raises(ValueError, match="implementation='fast'"):
    lact.fast_weight_scan(**x, chunk_size=C, implementation="fast")


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"valid": np.ones((2, 5), bool)}, r"valid \(2, 5\): want \(2, 6\)"),
    ({"valid": np.ones((2, 6))}, "valid is float64: want bool"),
    ({"segment_ids": np.ones(6, int)}, r"segment_ids \(6,\)"),
    (
      {"segment_ids": np.ones((2, 6), int), "order": [(0, 6, 1, 1)]},
      "segment_ids with order=",
    ),
    ({"remat": "some"}, "remat='some': choose none, chunk"),
    ({"remat": -1}, "remat=-1"),
  ],
)
def test_rejects(options, message):
  with pytest.raises(ValueError, match=message):
    lact.fast_weight_scan(**problem(0, 6), chunk_size=C, **options)


def test_decoding_rejects():
  x = problem(0, 1)
  state = lact.decode_state(x["weights"], C, momentum=False, prenorm=False)
  token = (x["q"], x["k"], x["v"], x["learning_rates"])
  with pytest.raises(ValueError, match="made with momentum=False"):
    lact.decode_step(state, *token, x["momentum"])
  with pytest.raises(ValueError, match="made with prenorm=False"):
    lact.decode_step(state, *token, prenorm=True)
  with pytest.raises(ValueError, match=r"q \(2, 1, 5\): this state is for"):
    short = tuple(y[..., :5] for y in token[:3])
    lact.decode_step(state, *short, x["learning_rates"])
  with pytest.raises(ValueError, match="chunk_size=0"):
    lact.decode_state(x["weights"], 0)
  with pytest.raises(ValueError, match="have no rows"):
    lact.decode_state([w[0] for w in x["weights"]], C)


@pytest.mark.parametrize("momentum", [False, True])
def test_a_state_goes_on_as_it_was_begun(momentum):
  token = jnp.ones((2, 6, 4))
  rate = jnp.ones((2, 6, 1))
  call = functools.partial(
    lact.fast_weight_scan, token, token, token, (rate,) * 3, (jnp.eye(4),) * 3
  )
  _, begun = call(chunk_size=2, momentum=rate if momentum else None)
  with pytest.raises(ValueError, match="with(out)? momentum"):
    call(chunk_size=2, state=begun, momentum=None if momentum else rate)
  with pytest.raises(ValueError, match="without prenorm"):
    call(chunk_size=2, state=begun, prenorm=True)
