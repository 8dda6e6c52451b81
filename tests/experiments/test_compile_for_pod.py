"""The collective budget of a shared update on a 4 x 4 torus, and the binary."""

import importlib.util
import json

import jax
import pytest

from giantsteps.experiments.harness import chips, collectives, config, pod


def lower(mesh, *overrides):
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed (extra `test` on x86-64 Linux)")
  try:
    return pod.lower("bert_smoke", "v5e:4x4", mesh, overrides)
  except config.InputError as error:  # libtpu of another jax, a locked device
    pytest.skip(f"libtpu gives no topology here: {error}")


@pytest.fixture(scope="module")
def step():
  return lower("data=16", "accumulate=2")


@pytest.fixture(scope="module")
def report(step):
  return pod.report(step)


def rows(report, kind):
  return [row for row in report["collectives"] if row["kind"] == kind]


def test_the_data_axis_lies_on_both_sides_of_the_torus(report):
  assert report["mesh"] == {"data_0": 4, "data_1": 4, "fsdp": 1, "model": 1}


def test_gradients_are_scattered_once_and_for_real(report):
  # P numbers in float32 along one side, a quarter of them along the other
  size = 4 * report["parameters"]
  scattered = sum(
    row["operand_bytes"] for row in rows(report, "reduce-scatter")
  )
  assert 0.99 * size * 5 / 4 < scattered < 1.01 * size * 5 / 4
  assert all(row["count"] == 1 for row in rows(report, "reduce-scatter"))


def test_parameters_are_gathered_in_bfloat16(report):
  gathered = rows(report, "all-gather")
  assert {row["dtype"] for row in gathered} == {"bf16"}
  size = 2 * report["parameters"] * (1 + 1 / 4)
  assert 0.99 * size < sum(row["bytes"] for row in gathered) < 1.01 * size


def test_nothing_is_reduced_whole_but_vectors_and_norms(report):
  # five vectors of 1024 float32, the norms of 9 parameters, loss and flags
  reduced = rows(report, "all-reduce")
  assert sum(row["bytes"] for row in reduced) < 64_000
  # vectors with the gradient's norm, |x| and |u| of all layers, what is logged
  assert len(reduced) <= 3


def test_nothing_is_sent_inside_the_accumulation(report):
  assert not any(row["in_loop"] for row in report["collectives"])


def test_every_collective_is_in_the_budget(report):
  known = {"all-reduce", "all-gather", "reduce-scatter"}
  small = [r for r in report["collectives"] if r["kind"] not in known]
  assert sum(row["bytes"] for row in small) < 64_000, small


def test_memory_and_time(step, report):
  memory, n = report["memory"], report["chips"]
  p = report["parameters"]
  # float32 parameters, their average and two moments, shared by all chips
  state = memory["parameters"] + memory["optimizer"] + memory["average"]
  assert state == pytest.approx(16 * p / n, rel=0.02)
  assert memory["arguments"] <= 2 * p + 12 * p / n + memory["batch"]
  assert memory["reused"] >= 0.99 * state
  assert report["fits"] and memory["peak"] < 2**30
  # 6 P per token without the embedding, which is tied and used once as a
  # product, 8 with the blocks run twice
  tokens = step.cfg.batch_size * step.cfg.data.seq_len / n
  assert 6 * p * tokens < report["flops"] < 8 * p * tokens
  assert report["seconds"]["products"] == report["flops"] / 197e12
  json.dumps(report)


def test_the_words_say_what_matters(report):
  text = pod.words(report)
  for word in ("fits", "dominate", "reduce-scatter", "arguments", "16 chips"):
    assert word in text


def test_fully_sharded_layers_are_gathered_and_activations_stay():
  small = ("model.width=512", "model.mlp_width=1408", "model.head_dim=32")
  step = lower("fsdp=16", "optim.shards=0", *small)
  report = pod.report(step)
  params = step.state.params["layers"]
  size = 2 * sum(x.size for x in jax.tree.leaves(params) if x.ndim == 3)
  inside = [row for row in report["collectives"] if row["in_loop"]]
  total = lambda kind: sum(r["bytes"] for r in inside if r["kind"] == kind)
  # bfloat16 weights forward, again backward, and their gradients once
  assert total("all-gather") == 2 * size
  assert size <= total("all-reduce") < 1.01 * size
  assert {row["kind"] for row in inside} == {"all-gather", "all-reduce"}
  # one layer at a time: far below the 103 MB of all float32 parameters
  assert report["memory"]["temporaries"] < 2**25


def test_a_ring_uses_the_sides_that_its_group_needs():
  def seconds(group):
    one = collectives.Collective(
      "all-gather", "f32", 90e9, 0, group, 1, False, ""
    )
    return pod.network_seconds([one], "v5e:4x8")

  # 90 GB, all but the own part of 1/n, over 2 or 4 links of 45 GB/s
  assert seconds(8) == pytest.approx(7 / 8)
  assert seconds(16) == pytest.approx(15 / 16 / 2)


def test_topologies_have_the_names_of_their_chips():
  assert "v5e:16x16" in chips.known() and "v5p:8x8x8" in chips.known()
  assert chips.sides("v5e:4x8") == (4, 8)
