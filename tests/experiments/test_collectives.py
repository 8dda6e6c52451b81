"""The HLO parser on text written by hand; every count is in the comment."""

import pytest

from giantsteps.experiments.harness import collectives

# A loop of 24 with one all-reduce in its body, a loop of unknown length around
# it, an asynchronous gather, a fused collective that is printed twice.
TEXT = """\
HloModule jit_step, is_scheduled=true, replica_count=1, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused.1 (p: bf16[64]) -> bf16[128] {
  %p = bf16[64]{0} parameter(0)
  ROOT %gather.1 = bf16[128]{0:T(256)} all-gather(%p), channel_id=7, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}

%fused.2 (p: bf16[64]) -> bf16[128] {
  %p = bf16[64]{0} parameter(0)
  ROOT %gather.2 = bf16[128]{0:T(256)S(1)} all-gather(%p), channel_id=7, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}

%inner_condition (s: (s32[], f32[16])) -> pred[] {
  %s = (s32[], f32[16]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %n = s32[]{:T(128)} constant(24)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%inner_body (s: (s32[], f32[16])) -> (s32[], f32[16]) {
  %s = (s32[], f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[16]{0} get-tuple-element(%s), index=1
  %y = f32[16]{0:T(128)} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add, metadata={op_name="jit(step)/mean"}
  ROOT %t = (s32[], f32[16]{0}) tuple(%i, %y)
}

%outer_condition (s: (s32[], s32[], f32[16])) -> pred[] {
  %s = (s32[], s32[], f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%outer_body (s: (s32[], s32[], f32[16])) -> (s32[], s32[], f32[16]) {
  %s = (s32[], s32[], f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  %x = f32[16]{0} get-tuple-element(%s), index=2
  %state = (s32[], f32[16]{0}) tuple(%i, %x), backend_config={"estimated_cycles":"100"}
  %loop = (s32[], f32[16]{0}) while(%state), condition=%inner_condition, body=%inner_body
  %z = f32[16]{0} get-tuple-element(%loop), index=1
  %pair = (f32[16]{0}, /*index=1*/f32[8,4]{1,0:T(8,128)S(1)}) all-reduce(%z, %w), channel_id=1, replica_groups={}, to_apply=%add
  %two = (f32[16]{0}, /*index=1*/f32[8,4]{1,0:T(8,128)S(1)}) all-reduce(%z, %w), channel_id=1, replica_groups={}, to_apply=%add
  ROOT %t = (s32[], s32[], f32[16]{0}) tuple(%i, %n, %z)
}

ENTRY %main (p0: s32[], p1: s32[], p2: f32[16]) -> f32[16] {
  %p0 = s32[] parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[16]{0} parameter(2)
  %h = bf16[64]{0} parameter(3)
  %f1 = bf16[128]{0} fusion(%h), kind=kLoop, calls=%fused.1, metadata={op_name="a"}
  %f2 = bf16[128]{0} fusion(%h), kind=kLoop, calls=%fused.2, metadata={op_name="b"}
  %start = (f32[16]{0}, f32[32]{0}) all-gather-start(%p2), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
  %scatter = f32[4]{0} reduce-scatter(%p2), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add, backend_config={"estimated_cycles":"1000"}
  %move = s8[16]{0} collective-permute(%q), channel_id=4, source_target_pairs={{0,1},{1,0}}
  %state = (s32[], s32[], f32[16]{0}) tuple(%p0, %p1, %p2)
  %loop = (s32[], s32[], f32[16]{0}) while(%state), condition=%outer_condition, body=%outer_body
  ROOT %out = f32[16]{0} get-tuple-element(%loop), index=2
}
"""


def one(kind, **wanted):
  found = [c for c in collectives.parse(TEXT) if c.kind == kind]
  found = [
    c for c in found if all(getattr(c, k) == v for k, v in wanted.items())
  ]
  assert len(found) == 1, collectives.parse(TEXT)
  return found[0]


def test_a_loop_multiplies_and_an_unknown_length_counts_once():
  inside = one("all-reduce", in_loop=True)
  assert (inside.count, inside.bytes, inside.group) == (24, 64, 4)
  assert inside.source == "jit(step)/mean"
  assert inside.wire_bytes == 2 * 64 * 3 / 4


def test_outside_of_fusions_one_channel_does_not_merge_operations():
  both = [
    c
    for c in collectives.parse(TEXT)
    if c.kind == "all-reduce" and not c.in_loop
  ]
  assert len(both) == 2
  assert all(c.bytes == 64 + 128 and c.group == 8 for c in both)


def test_a_collective_printed_in_two_fusions_counts_once():
  fused = one("all-gather", dtype="bf16")
  assert (fused.bytes, fused.operand_bytes, fused.count) == (256, 128, 1)
  assert fused.wire_bytes == 128


def test_a_chain_that_spans_a_loop_counts_once():
  chain = 'channel_id=7, frontend_attributes={chain_id="3"},'
  text = TEXT.replace("channel_id=7,", chain)
  more = "  %g = bf16[128]{0} fusion(%h), kind=kLoop, calls=%fused.2\n"
  body = "  %y = f32[16]{0:T(128)} all-reduce"
  assert len(collectives.parse(text.replace(body, more + body))) == len(
    collectives.parse(text)
  )
  # without the label of a chain it is another one, 24 times
  found = collectives.parse(TEXT.replace(body, more + body))
  assert [c.count for c in found if c.dtype == "bf16"] == [1, 24]


def test_a_start_and_its_done_are_one_with_the_results_of_the_done():
  gather = one("all-gather", dtype="f32")
  assert (gather.bytes, gather.operand_bytes, gather.group) == (128, 64, 2)


def test_a_scatter_sends_its_operands_and_a_permute_its_result():
  scatter = one("reduce-scatter")
  assert (scatter.bytes, scatter.operand_bytes) == (16, 64)
  assert scatter.wire_bytes == 48
  assert one("collective-permute").wire_bytes == 16


@pytest.mark.parametrize(
  ("groups", "size"),
  [
    ("{{0,1,2,3},{4,5,6,7}}", 4),
    ("[4,2]<=[2,4]T(1,0)", 2),
    ("mesh['a'=2,'b'=4] {'b'}", 4),
    ("mesh['a'=2,'b'=4] {'a','b'}", 8),
    ("mesh['a'=2,'b'=4] {'a','b':(2)2}", 4),
    ("{}", 8),
  ],
)
def test_the_notations_of_a_group(groups, size):
  text = TEXT.replace("replica_groups=[2,4]<=[8]", f"replica_groups={groups}")
  (inside,) = (c for c in collectives.parse(text) if c.in_loop)
  assert inside.group == size


def test_a_stated_trip_count_is_taken():
  loop = "body=%inner_body"
  stated = ', backend_config={"known_trip_count":{"n":"5"}}'
  found = collectives.parse(TEXT.replace(loop, loop + stated))
  assert [c.count for c in found if c.in_loop] == [5]


def test_cycles_are_multiplied_by_loops():
  loop = "%y = f32[16]{0:T(128)} all-reduce(%x), channel_id=1,"
  text = TEXT.replace(loop, f'{loop} config={{"estimated_cycles":"7"}},')
  assert collectives.cycles(text) == 1000 + 100 + 24 * 7


def test_a_text_without_a_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    collectives.parse("HloModule empty")
