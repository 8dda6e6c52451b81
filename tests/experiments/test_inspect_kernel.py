"""Executed bundles of tiny programs, and of a product of known size."""

import importlib.util

import pytest

from giantsteps.experiments.harness import bundles, config, kernel_report

# Two bundles, then a loop of three trips whose inner region runs in the first
# trip only, four bundles after each branch, one bundle at the end.
PROGRAM = """
LB: loop body
     0   :  { %s1_s0 = smov.u32 0 }
   0x1   :  { %s2_s1 = smov.u32 7  ;;  %9 = sst [smem:[#allocation1]] %s2_s1 }
   0x2 LB: > { %s3_s0 = sphi %s1_s0, %s8_s0 } /* Start region 1 */
   0x3   : > { %p4_p0 = scmp.ne.s32.totalorder %s3_s0, 0 }
   0x4   : > { %5 = sbr.rel (%p4_p0) target = $region2 }
   0x5   : > {}
   0x6   : > {}
   0x7   : > {}
   0x8   : > {}
   0x9   : > { %v6 = vmatmul.bf16.gmra.mxu0 %v7 }
   0xa   : > { %v6 = vmatmul.bf16.gmra.mxu1 %v7
second line of the same bundle */ } /* End region 3 */
   0xb PF: > { %s8_s0 = sadd.s32 1, %s3_s0 } /* Start/End empty region 2 */
   0xc   : > { %p9_p1 = scmp.ge.s32.totalorder %s8_s0, 3 /* loop exit test */ }
   0xd   : > { %10 = sbr.rel (!%p9_p1) target = $region1 }
   0xe   :  {}
   0xf   :  {}
  0x10   :  {}
  0x11   :  {}
  0x12   :  { %12 = vsyncpa [#allocation6], 1 }
"""
UTILIZATION = """== CAPACTIY:
MATMUL, VLOAD:FILL, VSTORE:SPILL
    2     3     2
== UTILIZATION:
""" + "\n".join(["0 0 0"] * 9 + ["1 1 0", "1 0 2"] + ["0 0 0"] * 8)


def test_every_bundle_runs_as_often_as_its_branches_say():
  times, unknown = bundles.executions(bundles.parse(PROGRAM))
  want = [1, 1] + [3] * 7 + [1, 1] + [3] * 7 + [1]
  assert times == want and not unknown


def test_matrix_units_that_are_slower_than_the_bundles_set_the_pace():
  found = bundles.count(PROGRAM, UTILIZATION, issue=8)
  assert found.bundles == 2 + 3 * 7 + 2 + 3 * 7 + 1
  # two products of 8 cycles on two units take 8 cycles, not 2 bundles
  assert found.cycles == found.bundles + 6
  assert found.utilisation == pytest.approx(8 / found.cycles)
  assert (found.spills, found.fills, found.static) == (2, 1, 19)


def test_a_branch_on_data_is_counted_as_not_skipped():
  program = PROGRAM.replace("%s3_s0, 0 }", "%s99_s9, 0 }")
  times, unknown = bundles.executions(bundles.parse(program))
  assert unknown == 3 and times[9] == 3


def test_what_a_store_keeps_and_a_predicate_leaves():
  program = """
     0   :  { %s1_s0 = smov.u32 4294967295 }
   0x1   :  { %2 = sst [smem:[#allocation9_spill]] %s1_s0 }
   0x2   :  { %s3_s1 = sld [smem:[#allocation9_spill]] /* copy */ }
   0x3   :  { %p4_p0 = scmp.lt.s32.totalorder %s3_s1, 0 }
   0x4   :  { %s5_s1 = smov.u32 (!%p4_p0, %s3_s1), 9 }
   0x5   :  { %p6_p1 = scmp.eq.s32.totalorder %s5_s1, 4294967295 }
   0x6   :  { %7 = sbr.rel (%p6_p1) target = $region1 }
   0x7   :  {}
   0x8   :  {}
   0x9   :  {}
   0xa   :  {}
   0xb   :  { %v6 = vmov 0 }
   0xc PF:  { %v7 = vmov 1 } /* Start region 1 */
"""
  times, unknown = bundles.executions(bundles.parse(program))
  assert times[11] == 0 and times[12] == 1 and not unknown


# 1024^3 in blocks of 512, the sum over k in scratch, set and written by `when`.
MATMUL = """
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from giantsteps.kernels_pallas.example import Example

def body(x_ref, y_ref, out_ref, sum_ref):
  @pl.when(pl.program_id(2) == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)
  sum_ref[...] += jnp.dot(
    x_ref[...], y_ref[...], preferred_element_type=jnp.float32
  )
  @pl.when(pl.program_id(2) == 1)
  def _():
    out_ref[...] = sum_ref[...].astype(out_ref.dtype)

def call(x, y, implementation):
  if implementation == "xla":
    return x @ y
  block = lambda f: pl.BlockSpec((512, 512), f)
  return pl.pallas_call(
    body, grid=(2, 2, 2), out_shape=x,
    in_specs=[block(lambda i, j, k: (i, k)), block(lambda i, j, k: (k, j))],
    out_specs=block(lambda i, j, k: (i, j)),
    scratch_shapes=[pltpu.VMEM((512, 512), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")),
    name="product",
  )(x, y)

x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
example = Example("product", call, (x, x), 2.0 * 1024**3)
"""


@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e"])
def test_a_product_of_known_size_takes_the_units_as_long_as_it_must(target):
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed (extra `test` on x86-64 Linux)")
  found = kernel_report.compile_source(MATMUL, target, "pallas_tpu")
  (kernel,) = found["kernels"]
  # multiply-accumulates per cycle of one core's units, from the chips' peaks:
  # 197e12 / 2 / 1.5e9, 459e12 / 2 / 1.75e9 / 2 cores, 918e12 / 2 / 1.75e9
  rate = {"v5e": 2**16, "v5p": 2**16, "v6e": 2**18}[target]
  cores = 2 if target == "v5p" else 1
  busy = kernel["matmul_utilisation"] * kernel["cycles"]
  assert busy == pytest.approx(1024**3 / rate / cores, rel=1e-3)
  assert kernel["unknown_branches"] == 0
  assert 0.3 < kernel["matmul_utilisation"] <= 1
  # two input windows, one output window, each twice, and the float32 sum;
  # less than a tenth more for spills and what the compiler needs itself
  assert 1 <= kernel["vmem"] / 2**20 / (3 * 2 * 0.5 + 1) < 1.1


def test_unknown_names_are_refused_with_those_that_are_known():
  with pytest.raises(config.InputError, match="'x': there are .*newton_schulz"):
    kernel_report.examples("x")
  with pytest.raises(config.InputError, match="'9 x 9' of newton_schulz: 512"):
    kernel_report.examples("newton_schulz", "9 x 9")
  with pytest.raises(config.InputError, match="'v9': there are v5e, v5p, v6e"):
    kernel_report.check_target("v9")
