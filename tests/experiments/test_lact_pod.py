"""LaCT's training step, compiled for TPUs that are not here, is made of the
kernels: chosen for the platform of the program, on meshes of several chips."""

import re

import jax
import pytest

from giantsteps.experiments.harness import config as config_lib
from giantsteps.experiments.harness import mesh as mesh_lib
from giantsteps.experiments.harness import placement, pod, tasks, training
from giantsteps.models import lact

pytest.importorskip("libtpu", reason="libtpu, the compiler, is not installed")

# One layer whose operator is that of the 760M model: d = 384, bfloat16.
SMALL = [
  *("model.depth=1", "model.width=384", "model.num_heads=3"),
  *("model.fast_heads=1", "model.mlp_width=128", "model.vocab_size=256"),
  *("model.low_rank=0", "model.chunk_size=1024", "model.window=256"),
  *("model.remat=none", "data.seq_len=2048", "batch_size=4"),
]
KERNELS = {"fast_weight_apply", "fast_weight_gradient", "fast_weight_update"}
KERNELS |= {"newton_schulz"}
ATTENTION = {"splash_mha_fwd_residuals", "splash_mha_dq_no_residuals"}
ATTENTION |= {"splash_mha_dkv_no_residuals"}
# A long row with the window, the heads' width and the vocabulary of the 760M
# model.
LONG = [
  *("model.num_heads=6", "model.vocab_size=32000", "model.chunk_size=2048"),
  *("model.window=2048", "model.remat=full", "data.seq_len=16384"),
]


def names(program: str) -> set[str]:
  """Of the kernels in an optimised program."""
  calls = [x for x in program.splitlines() if "tpu_custom_call" in x]
  found = (re.match(r"\s*(?:ROOT )?%(\w+?)(?:\.\d+)? =", x) for x in calls)
  return {name[1] for name in found if name}


def kernels(mesh: str, *more: str) -> set[str]:
  step = pod.compile_step("lact_760m", "v5e:2x2", mesh, [*SMALL, *more])
  return calls(step)


def calls(step: jax.stages.Compiled) -> set[str]:
  lines = [
    x for x in str(step.as_text()).splitlines() if "tpu_custom_call" in x
  ]
  names = (re.match(r"\s*(?:ROOT )?%(\w+?)(?:\.\d+)? =", x) for x in lines)
  return {name[1] for name in names if name}


def test_the_step_holds_every_kernel():
  assert kernels("data=4") == KERNELS | ATTENTION


@pytest.mark.slow
def test_a_long_row_is_streamed():
  step = pod.compile_step("lact_760m", "v5e:2x2", "data=4", [*SMALL, *LONG])
  assert calls(step) >= ATTENTION
  logits, scores = 16_384 * 32_000 * 4, 6 * 16_384 * 2 * 2_048 * 4
  memory = step.memory_analysis()
  assert memory is not None
  # one row per chip; formed whole, both would be there twice or more
  assert memory.temp_size_in_bytes < min(logits, scores)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=4", "data=2,model=2"])
def test_every_mesh_does(mesh):
  assert kernels(mesh, "model.fast_heads=2", "model.width=768") == (
    KERNELS | ATTENTION
  )


@pytest.mark.slow
def test_xla_alone_has_none():
  assert kernels("data=4", "model.implementation=xla") == set()
