"""The operator's benchmark: its count of operations, the authors' side, and the
errors of bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from giantsteps.experiments.harness import (
  config,
  flops,
  lact_precision,
  lact_speed,
)
from giantsteps.models import lact

TINY = lact_speed.Shape("tiny", 2, 16, 96, "float32")


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("chunk", [16, 40])
def test_operations_are_those_of_the_program(muon, chunk):
  sds = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  token, rate = sds(2, 96, 16), sds(2, 96, 1)
  run = functools.partial(lact.fast_weight_scan, chunk_size=chunk, muon=muon)
  program = jax.make_jaxpr(run)(
    token, token, token, (rate,) * 3, (sds(2, 16, 16),) * 3
  )
  assert lact_speed.flops(TINY, chunk, muon) == flops.count(program)


def test_rows_hold_what_was_timed():
  lines = []
  rows = lact_speed.measure([TINY], [32, 512], 2, report=lines.append)
  assert [row["inner"] for row in rows] == ["gradient descent", "Muon"]
  assert len(lines) == 2 and "chunk    32" in lines[0]
  for row in rows:
    seconds = row["train_seconds"]["median"]
    assert row["chunk"] == 32 and row["utilization"] is None  # no chip
    assert row["tokens_per_second"] == pytest.approx(96 / seconds)
    assert 0 < row["forward_seconds"]["median"]


def test_a_folder_without_the_source_is_refused(tmp_path):
  with pytest.raises(config.InputError, match="no file lact_llm"):
    lact_speed.measure([TINY], [32], official=tmp_path)


def test_bfloat16_loses_digits_and_more_of_them_in_gradients():
  rows = lact_precision.measure(16, seeds=1)
  assert [row["variant"] for row in rows] == list(lact_precision.VARIANTS)
  for row in rows:
    assert 2**-9 < row["output"] < 0.2
    assert row["gradient_others"] > row["output"]
    assert 0.9 < row["cosine"] < 1


def test_errors_are_relative_lengths():
  ones = {name: np.ones((2, 3)) for name in ("q", "k", "v", "rates", "weights")}
  twice = {name: 2 * x for name, x in ones.items()}
  row = lact_precision._compare((np.ones(4) * 1.1, twice), (np.ones(4), ones))
  want = {"output": 0.1, "gradient_q": 1, "gradient_others": 1, "cosine": 1}
  assert row == pytest.approx(want)
