"""The platform of the program chooses, and tuned blocks follow its chip."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from giantsteps.kernels_pallas import dispatch, tuning

add = lambda x: x + 1
subtract = lambda x: x - 1


def test_a_cpu_runs_the_reference():
  call = lambda x: dispatch.call(x, xla=add, pallas_tpu=subtract)
  np.testing.assert_array_equal(jax.jit(call)(jnp.zeros(2)), 1)


@pytest.mark.parametrize(
  ("platform", "word"), [("tpu", "subtract"), ("cuda", "add"), ("cpu", "add")]
)
def test_the_platform_of_the_program_chooses(platform, word):
  call = lambda x: dispatch.call(x, xla=add, pallas_tpu=subtract)
  traced = jax.jit(call).trace(jnp.zeros(2))
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert f"stablehlo.{word}" in text
  other = {"add": "subtract", "subtract": "add"}[word]
  assert f"stablehlo.{other}" not in text


def test_a_name_chooses_everywhere():
  call = lambda name: dispatch.call(
    jnp.zeros(2), xla=add, pallas_tpu=subtract, implementation=name
  )
  np.testing.assert_array_equal(call("pallas_tpu"), -1)
  np.testing.assert_array_equal(call("xla"), 1)


@pytest.mark.parametrize("name", ["pallas_gpu", "triton"])
def test_a_missing_implementation_is_named(name):
  with pytest.raises(ValueError, match=f"{name}.*here there is xla, pallas_tp"):
    dispatch.call(
      jnp.zeros(2), xla=add, pallas_tpu=subtract, implementation=name
    )


def test_blocks_are_those_of_the_named_chip(tmp_path, monkeypatch):
  monkeypatch.setattr(tuning, "FOLDER", tmp_path)
  tuning.table.cache_clear()
  tuned = {"k": {"8x8": {"rows": 64}}}
  (tmp_path / "tpu_v9.json").write_text(json.dumps(tuned))
  default = {"rows": 8, "columns": 128}
  assert tuning.blocks("k", "8x8", default) == default  # a CPU names no chip
  with tuning.target("TPU v9") as asked:
    assert tuning.blocks("k", "8x8", default) == default | {"rows": 64}
    assert tuning.blocks("k", "9x9", default) == default
    with tuning.target("TPU v9", {"rows": 16}):
      assert tuning.blocks("k", "8x8", default)["rows"] == 16
  assert asked == [("k", "8x8"), ("k", "9x9")]
  assert tuning.blocks("k", "8x8", default) == default
  with pytest.raises(ValueError, match="k has no block .'depth'"):
    with tuning.target("TPU v9", {"depth": 1}):
      tuning.blocks("k", "8x8", default)
  tuning.table.cache_clear()
