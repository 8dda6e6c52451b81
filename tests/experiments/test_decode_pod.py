"""Decoding a published model, compiled for TPU chips that are not here."""

import json
import math

import pytest

from giantsteps.experiments.harness import config as config_lib
from giantsteps.experiments.harness import decode_pod
from giantsteps.models import families, transformer

pytest.importorskip("libtpu", reason="libtpu, the compiler, is not installed")

DEPTH, WIDTH, MLP, VOCABULARY, HEADS = 2, 512, 1024, 16_576, 4
BATCH = decode_pod.Batch(
  rows=4, prompt_length=40, num_tokens=64, block_size=32, cache="dual"
)
SLOTS = 128  # the bucket of 40 + 64


@pytest.fixture
def folder(tmp_path):
  config = transformer.Config(
    vocab_size=VOCABULARY,
    width=WIDTH,
    depth=DEPTH,
    num_heads=HEADS,
    num_kv_heads=HEADS,
    head_dim=WIDTH // HEADS,
    mlp_width=MLP,
    causal=False,
    rope_theta=5e5,
    eps=1e-5,
  )
  raw = families.write(config, "llada")
  (tmp_path / "config.json").write_text(json.dumps(raw))
  return str(tmp_path)


def test_a_model_on_four_chips(folder):
  found = decode_pod.describe(folder, "v5e:2x2", "", BATCH, "bfloat16")
  norms = WIDTH * (2 * DEPTH + 1)
  inner = DEPTH * (4 * WIDTH**2 + 3 * WIDTH * MLP)
  matrices = 2 * VOCABULARY * WIDTH + inner
  assert found["parameters"] == matrices + norms
  memory = found["memory"]
  assert memory["parameters"] == 2 * (matrices // 4 + norms)
  # keys and values, bfloat16, a head of 128 on each chip
  assert memory["cache"] == 2 * 2 * DEPTH * BATCH.rows * SLOTS * 128
  assert found["fits"] and memory["peak"] < 2**30
  window = found["calls"]["window"]
  assert (window["rows"], window["width"]) == (4, 32)
  tokens = 4 * 32
  attention = 4 * tokens * SLOTS * WIDTH * DEPTH
  head = VOCABULARY * WIDTH
  # The head's columns, 4,144 on each chip, are rounded to whole tiles.
  want = (2 * tokens * (inner + head) + attention) / 4
  assert math.isclose(window["flops"], want, rel_tol=0.05)
  assert window["kernels"] == 1  # the head's; short caches are XLA's
  assert 0 < window["seconds"]["memory"] < window["seconds"]["schedule"]
  refresh = found["calls"]["refresh"]
  assert (refresh["rows"], refresh["width"]) == (4, SLOTS)
  assert "fits" in decode_pod.words(found)


def test_a_model_that_does_not_fit(folder):
  huge = BATCH._replace(rows=2_048, prompt_length=30_000, cache="block")
  found = decode_pod.describe(folder, "v5e:2x2", "model=4", huge, "bfloat16")
  assert not found["fits"]
  assert "does NOT fit" in decode_pod.words(found)


@pytest.mark.parametrize(
  ("mesh", "dtype", "said"),
  [("model=8", "bfloat16", "8 chips, v5e:2x2 has 4"), ("", "int8", "int8")],
)
def test_one_clear_error(folder, mesh, dtype, said):
  with pytest.raises(config_lib.InputError, match=said):
    decode_pod.describe(folder, "v5e:2x2", mesh, BATCH, dtype)


def test_a_folder_without_a_config(tmp_path):
  with pytest.raises(config_lib.InputError, match="config.json"):
    decode_pod.describe(str(tmp_path), "v5e:2x2", "", BATCH, "bfloat16")
