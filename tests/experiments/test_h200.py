"""What the compiler for the H200 prints is read, or refused if unknown."""

import os

import pytest

from giantsteps.experiments.harness import h200

# The forms of ptxas 12.9 and of Mosaic GPU in jax 0.10, shortened.
CLEAN = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for a_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
  %4 = call ptr @mosaic_gpu_get_function(ptr %3, ptr @a_mosaic_gpu_kernel_name\
, i32 215088, i32 1)
"""
SPILLED = """\
ptxas warning : (C7510) Potential Performance Loss: wgmma.mma_async \
instructions are serialized due to a wait in the function 'b_mosaic_gpu_kernel'
ptxas info    : Compiling entry function 'b_mosaic_gpu_kernel' for 'sm_90a'
    64 bytes stack frame, 60 bytes spill stores, 68 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
  %4 = call ptr @mosaic_gpu_get_function(ptr %3, ptr @b_mosaic_gpu_kernel_name\
, i32 1024, i32 1)
"""


def test_reads_registers_spills_and_shared_memory():
  a, b = h200.kernels(CLEAN + SPILLED)
  assert a == h200.Kernel("a", 168, 0, 215088, False)
  assert b == h200.Kernel("b", 255, 128, 1024, True)
  assert h200.kernels("") == []


def test_refuses_words_it_does_not_know():
  with pytest.raises(ValueError, match="another kind, for a_mosaic"):
    h200.kernels(CLEAN.replace("spill stores", "spilled stores"))


def test_collects_what_compilers_print(capfd):
  os.write(1, b"before ")
  with h200._printed() as text:
    os.write(1, b"a ")
    os.write(2, b"b ")
  os.write(1, b"after")
  assert "".join(text).split() == ["a", "b"]
  assert capfd.readouterr().out.split() == ["before", "after"]


class Program:
  """A compiled program of which only the text is known."""

  def __init__(self, *lines):
    body = "\n".join(f"  {line}" for line in lines)
    self.text = f"HloModule m\n\nENTRY %main () -> f32[] {{\n{body}\n}}\n"

  def as_text(self):
    return self.text


def test_counts_what_is_launched():
  program = Program(
    '%p = bf16[4,8]{1,0} parameter(0), metadata={op_name="f(x)"}',
    "%b = bf16[32]{0} bitcast(%p)",
    "%f = f32[4,8]{1,0} fusion(%p, %b), kind=kLoop, calls=%g",
    '%k = (f32[2]{0}, f32[2]{0}) custom-call(%f), custom_call_target="x"',
    "%e = f32[2]{0} get-tuple-element(%k), index=0",
    "ROOT %t = (f32[2]{0}) tuple(%e)",
  )
  assert h200.launches(program) == 2  # type: ignore[arg-type]
  loop = Program("%w = (s32[]) while(%t), condition=%c, body=%b")
  with pytest.raises(ValueError, match="has a while"):
    h200.launches(loop)  # type: ignore[arg-type]
