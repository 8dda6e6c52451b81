"""LaCT's training step, compiled for TPUs that are not here, is made of the
kernels: chosen for the platform of the program, on meshes of several chips."""

import re

import jax
import jax.numpy as jnp
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
  return names(str(step.as_text()))


def on_chips(config: str, mesh: dict[str, int], overrides: list[str]):
  """A task, four chips that are not here, and its parameters' shapes there."""
  cfg = config_lib.load(config, overrides)
  chips = mesh_lib.make(mesh, pod.slice_devices("v5e:2x2"))
  task = tasks.build(cfg, pod._description(cfg))
  shapes = training.state_shapes(
    cfg, task, tasks.optimizer(cfg), placement.make(cfg, task, chips)
  )
  return cfg, chips, task, shapes.ema


@pytest.mark.parametrize("rows", [4, 3])
def test_held_out_evaluation_too_with_any_number_of_rows(rows):
  cfg, chips, task, params = on_chips("lact_760m", {"data": 4}, SMALL)
  batch = {"tokens": jax.ShapeDtypeStruct((rows, 2048), jnp.int32)}
  key = jax.eval_shape(lambda: jax.random.key(0))
  evaluate = training.compile_evaluate(task, chips)
  program = evaluate.lower(params, batch, key).compile()
  assert names(str(program.as_text())) >= KERNELS


@pytest.mark.slow
def test_views_and_decoding_too():
  views = ["model.width=384", "model.fast_heads=1", "model.heads=3"]
  views += ["model.expansion=1", "model.dtype=bfloat16", "model.depth=1"]
  views += ["model.patch=2", "batch_size=4", "model.expand=1"]
  views += ["model.ns_dtype=bfloat16"]
  step = pod.compile_step("novel_views", "v5e:2x2", "data=4", views)
  assert names(str(step.as_text())) >= KERNELS

  cfg, chips, _, params = on_chips("lact_760m", {"data": 4}, SMALL)
  tokens = jax.ShapeDtypeStruct((4, 2048), jnp.int32)

  def decode(params, tokens):
    hidden, cache = lact.prefill(cfg.model, params, tokens)
    return hidden, lact.decode(cfg.model, params, tokens[:, :2], cache)

  decode = jax.jit(mesh_lib.traced_on(chips, decode))
  program = decode.lower(params, tokens).compile()
  assert names(str(program.as_text())) >= KERNELS


def test_the_step_holds_every_kernel():
  assert kernels("data=4") == KERNELS | ATTENTION


@pytest.mark.slow
def test_a_long_row_is_streamed():
  step = pod.compile_step("lact_760m", "v5e:2x2", "data=4", [*SMALL, *LONG])
  assert names(str(step.as_text())) >= ATTENTION
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
