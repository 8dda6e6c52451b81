"""Block diffusion's training step, compiled for TPUs that are not here: the mask
of the doubled row is computed in the kernel and is nowhere an array."""

import re

import pytest

from giantsteps.experiments.harness import pod

pytest.importorskip("libtpu", reason="libtpu, the compiler, is not installed")

SMALL = [
  *("model.depth=1", "model.width=128", "model.num_heads=2"),
  *("model.num_kv_heads=2", "model.mlp_width=128", "model.remat=none"),
  *("data.seq_len=2048", "batch_size=4", "block_size=32"),
]


def program(*more: str) -> str:
  """Optimised, for one row of 2 x 2,048 tokens per chip."""
  step = pod.compile_step("code_blocks", "v5e:2x2", "data=4", [*SMALL, *more])
  return str(step.as_text())


def squares(text: str) -> list[str]:
  """Arrays whose last two sides are 4,096 or more, such as scores and masks."""
  found = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", text)
  sides = ([int(side) for side in x.split(",")] for x in found)
  return [str(x) for x in sides if len(x) > 1 and min(x[-2:]) >= 4_096]


def test_no_mask_and_no_scores():
  text = program("model.dtype=bfloat16")
  for part in ("fwd", "dq", "dkv"):
    assert f"splash_mha_{part}" in text
  assert not squares(text)


@pytest.mark.slow
def test_they_are_there_without_the_kernel():
  assert squares(program())  # float32
