"""Tokens of a chunk on eight fake devices: the values, gradients and bytes of
one device."""

# NumPy arrays stand for jax.Array; pytrees have no static type
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from giantsteps.experiments.harness import collectives
from giantsteps.models import lact

D, H = 6, 5
CASES = {  # name -> rows, tokens, options; rows that 8 divides have owners
  "owners": (8, 33, {"chunk_size": 16}),
  "owners, GD, prenorm": (8, 24, {"muon": False, "prenorm": True}),
  "all do all": (2, 20, {"chunk_size": 8, "remat": 2}),
  "padding": (2, 15, {"chunk_size": 6, "valid": True, "muon": False}),
  "documents": (8, 21, {"chunk_size": 4, "segment_ids": True, "muon": False}),
  "sets": (2, 11, {"order": "bidirectional"}),
  "entries": (8, 16, {"order": [(0, 8, 1, 1), (8, 11, 1, 0), (0, 16, 0, 1)]}),
}


def problem(rows, length, options, dtype="float64"):
  rng = np.random.default_rng(length)
  token = lambda: jnp.asarray(rng.normal(size=(rows, length, D)), dtype)
  rate = lambda: jnp.asarray(rng.uniform(size=(rows, length, 1)), dtype)
  weight = lambda *s: jnp.asarray(rng.normal(size=(rows, *s)) / 2, dtype)
  leaves = {
    "q": token(),
    "k": token(),
    "v": token(),
    "learning_rates": (rate(), rate(), rate()),
    "weights": (weight(H, D), weight(D, H), weight(H, D)),
    "momentum": rate(),
  }
  options = dict(options)
  if "valid" in options:
    options["valid"] = rng.uniform(size=(rows, length)) < 0.7
  if "segment_ids" in options:
    options["segment_ids"] = np.cumsum(
      rng.uniform(size=(rows, length)) < 0.12, 1
    )
  return leaves, options


def differences(names: list[str]) -> dict[str, float]:
  """Largest error of outputs, state and gradients, against the largest value."""
  jax.config.update("jax_enable_x64", True)
  mesh = jax.make_mesh((8,), ("cp",))
  found = {}
  for name in names:
    rows, length, options = CASES[name]
    leaves, options = problem(rows, length, options)
    cotangent = np.random.default_rng(0).normal(size=(rows, 1, D))

    def both(scan, cotangent=cotangent, options=options):
      def loss(x):
        out, state = scan(**x, **options)
        total = jnp.sum(out * cotangent)
        for i, w in enumerate(jax.tree.leaves(state)):
          total += jnp.sum(jnp.sin(w + i))
        return total, (out, state)

      return jax.jit(
        jax.grad(loss, has_aux=True),
        compiler_options={"xla_backend_optimization_level": 0},
      )

    parallel = functools.partial(lact.context_parallel_scan, mesh, "cp")
    want = jax.tree.leaves(both(lact.fast_weight_scan)(leaves))
    got = jax.tree.leaves(both(parallel)(leaves))
    assert len(want) == len(got)
    found[name] = max(
      float(np.abs(np.subtract(a, b)).max() / max(np.abs(b).max(), 1e-3))
      for a, b in zip(got, want, strict=True)
    )
  return found


FAST = ["owners, GD, prenorm", "padding", "sets"]


@pytest.mark.parametrize(
  "names",
  [
    FAST,
    pytest.param(
      [name for name in CASES if name not in FAST], marks=pytest.mark.slow
    ),
  ],
)
def test_eight_devices_compute_what_one_does(on_devices, names):
  found = on_devices(8, __file__, f"differences({names})")
  assert list(found) == names
  for name, error in found.items():
    assert error < 1e-11, (name, error)  # float64; Muon amplifies rounding


def traffic() -> dict[str, list]:
  """Collectives of one chunk, forward: kind, dtype, bytes of operands and
  results, times; of the traced program, for CPUs widen bfloat16."""
  mesh = jax.make_mesh((8,), ("cp",))
  found = {}
  for rows, dtype in ((4, "float32"), (8, "float32"), (8, "bfloat16")):
    leaves, _ = problem(rows, 65, {}, "float32")
    for name in ("q", "k", "v"):
      leaves[name] = leaves[name].astype(dtype)
    scan = functools.partial(
      lact.context_parallel_scan, mesh, "cp", chunk_size=16
    )
    lowered = jax.jit(lambda x, scan=scan: scan(**x)).lower(leaves)
    compiled = lowered.compile().as_text()
    found[f"{rows} {dtype}"] = [
      (c.kind, c.operand_bytes, c.bytes, c.count)
      for c in collectives.parse(compiled)
      if c.in_loop
    ]
    gathers = re.findall(
      r"= (\w+)\[[\d,]*\]\S* all-gather\(", lowered.as_text("hlo")
    )
    found[f"gathered {rows} {dtype}"] = sorted(set(gathers))
  return found


def test_bytes_of_a_chunk(on_devices):
  found = on_devices(8, __file__, "traffic()")
  # 3 (N d) h numbers, the three gradients in float32; and the sum and the
  # count of the momentum, 2 numbers per row.
  everyone = found["4 float32"]
  assert {kind for kind, *_ in everyone} == {"all-reduce"}
  assert {count for *_, count in everyone} == {4}  # 65 = 4 * 16 + 1 tokens
  assert sum(out for *_, out, _ in everyone) == 4 * (3 * 4 * D * H + 2 * 4)

  owned, numbers = found["8 float32"], 3 * 8 * D * H
  total = lambda kind, which: sum(c[which] for c in owned if c[0] == kind)
  assert total("reduce-scatter", 1) == 4 * numbers
  assert total("all-gather", 2) == 4 * numbers  # read and write share it
  assert total("all-reduce", 2) == 4 * 2 * 8
  assert {count for *_, count in owned} == {4}
  # the weights travel in the dtype of the products
  assert found["gathered 8 float32"] == ["f32"]
  assert found["gathered 8 bfloat16"] == ["bf16"]


def test_rejects():
  mesh = jax.make_mesh((1,), ("cp",))
  leaves, _ = problem(1, 4, {}, "float32")
  with pytest.raises(ValueError, match="axis='data': the mesh has"):
    lact.context_parallel_scan(mesh, "data", **leaves)
  ids = jnp.zeros((1, 4), int)
  with pytest.raises(ValueError, match="bidirectional documents"):
    lact.context_parallel_scan(
      mesh, "cp", **leaves, segment_ids=ids, order="bidirectional"
    )
