"""LaCT's training step, compiled for TPUs that are not here, is made of the
kernels: chosen for the platform of the program, on meshes of several chips."""

import re

import pytest

from giantsteps.experiments.harness import pod

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


def kernels(mesh: str, *more: str) -> set[str]:
  step = pod.compile_step("lact_760m", "v5e:2x2", mesh, [*SMALL, *more])
  calls = [
    x for x in str(step.as_text()).splitlines() if "tpu_custom_call" in x
  ]
  names = (re.match(r"\s*(?:ROOT )?%(\w+?)(?:\.\d+)? =", x) for x in calls)
  return {name[1] for name in names if name}


def test_the_step_holds_every_kernel():
  assert kernels("data=4") == KERNELS


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=4", "data=2,model=2"])
def test_every_mesh_does(mesh):
  assert kernels(mesh, "model.fast_heads=2", "model.width=768") == KERNELS


@pytest.mark.slow
def test_xla_alone_has_none():
  assert kernels("data=4", "model.implementation=xla") == set()
