"""Executed bundles of a tiny program, and of a product of known size."""

import pytest

from giantsteps.experiments.harness import bundles

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
