"""Collectives, loops and products read from HLO text as XLA writes it (recorded, shortened)."""

# ruff: noqa: E501  (HLO has one instruction a line)

import pytest

from jaxalign.benchmarks.hlo import axes_of, num_bytes, replica_groups, work

MESH = {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
MODULE = """HloModule jit_step, input_output_alias={ {0}: (0, {}, may-alias) }

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (param: (s32[], bf16[16,64], /*index=2*/bf16[3,64,32])) -> (s32[], bf16[16,64], bf16[3,64,32]) {
  %param = (s32[], bf16[16,64]{1,0}, /*index=2*/bf16[3,64,32]{2,1,0}) parameter(0)
  %counter = s32[] get-tuple-element(%param), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%counter, %one)
  %x = bf16[16,64]{1,0} get-tuple-element(%param), index=1
  %w = bf16[3,64,32]{2,1,0} get-tuple-element(%param), index=2
  %zero = s32[] constant(0)
  %slice = bf16[1,64,32]{2,1,0} dynamic-slice(%w, %counter, %zero, %zero), dynamic_slice_sizes={1,64,32}
  %squeeze = bf16[64,32]{1,0} reshape(%slice)
  %all-gather = bf16[64,64]{1,0} all-gather(%squeeze), channel_id=1, replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={1}, use_global_device_ids=true
  %dot = bf16[16,64]{1,0} dot(%x, %all-gather), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/dot_general" stack_frame_id=7}
  %grad = bf16[64,64]{1,0} all-reduce(%all-gather), channel_id=2, replica_groups={{0,2},{1,3},{4,6},{5,7}}, to_apply=%add
  %mine = bf16[32,64]{1,0} dynamic-slice(%grad, %zero, %zero), dynamic_slice_sizes={32,64}
  ROOT %tuple = (s32[], bf16[16,64]{1,0}, /*index=2*/bf16[3,64,32]{2,1,0}) tuple(%next, %dot, %w)
}

%condition (param: (s32[], bf16[16,64], /*index=2*/bf16[3,64,32])) -> pred[] {
  %param = (s32[], bf16[16,64]{1,0}, /*index=2*/bf16[3,64,32]{2,1,0}) parameter(0)
  %counter = s32[] get-tuple-element(%param), index=0
  %copied = s32[] copy(%counter)
  %limit = s32[] constant(3)
  ROOT %lt = pred[] compare(%copied, %limit), direction=LT, metadata={op_name="while/cond/lt"}
}

ENTRY %main (x: bf16[16,64], w: bf16[3,64,32], image: f32[2,8,8,4], kernel: f32[3,3,4,6]) -> f32[] {
  %x = bf16[16,64]{1,0} parameter(0), sharding={devices=[4,1,2]<=[8] last_tile_dim_replicate}
  %w = bf16[3,64,32]{2,1,0} parameter(1)
  %image = f32[2,8,8,4]{3,2,1,0} parameter(2)
  %kernel = f32[3,3,4,6]{3,2,1,0} parameter(3)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[16,64]{1,0}, /*index=2*/bf16[3,64,32]{2,1,0}) tuple(%zero, %x, %w)
  %while = (s32[], bf16[16,64]{1,0}, /*index=2*/bf16[3,64,32]{2,1,0}) while(%start), condition=%condition, body=%body
  %conv = f32[2,8,8,6]{3,2,1,0} convolution(%image, %kernel), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
  %swapped = f32[2,8,8,6]{3,2,1,0} collective-permute(%conv), channel_id=3, source_target_pairs={{0,0},{1,4},{2,2},{3,6},{4,1},{5,5},{6,3},{7,7}}
  %mean = f32[] constant(0)
  ROOT %loss = f32[] all-reduce(%mean), channel_id=4, replica_groups=mesh['axis_0'=8] {'axis_0'}, to_apply=%add
}
"""


def test_what_a_device_sends_and_multiplies():
    done = work(MODULE, MESH)
    assert done.flops == 3 * 2 * 16 * 64 * 64 + 2 * (2 * 8 * 8 * 6) * (3 * 3 * 4)
    gather, scatter, permute, reduce = done.collectives
    assert (gather.kind, gather.axes, gather.size, gather.times) == ("all-gather", ("fsdp",), 64 * 64 * 2, 3)
    assert gather.wire == 3 * 64 * 64 * 2 / 2
    # An all-reduce of which each device keeps its own half only.
    assert (scatter.kind, scatter.axes, scatter.wire) == ("reduce-scatter", ("fsdp",), 3 * 64 * 64 * 2 / 2)
    assert (permute.kind, permute.axes) == ("collective-permute", ("data", "tensor"))
    assert permute.wire == 2 * 8 * 8 * 6 * 4 / 2  # four of eight devices send
    assert (reduce.kind, reduce.axes, reduce.wire) == ("all-reduce", ("data", "fsdp", "tensor"), 2 * 4 * 7 / 8)


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,4,2,6},{1,5,3,7}}, dimensions={0}", [[0, 4, 2, 6], [1, 5, 3, 7]]),
        ("{}, to_apply=%add", [[*range(8)]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0), dimensions={1}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("[4,2]<=[2,2,2]T(1,0,2)", [[0, 1], [4, 5], [2, 3], [6, 7]]),
        ("mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}", [[*range(8)]]),
        ("mesh['a'=2,'b'=4] {'b'}, to_apply=%add", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4] {'b':(2)2}, dimensions={1}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=4,'b'=2], device_ids=([2,2,2]T(2,1,0)) {'a'}", [[0, 2, 1, 3], [4, 6, 5, 7]]),
        ("mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ],
)
def test_groups_of_devices_in_every_form(written, groups):
    assert replica_groups("channel_id=1, replica_groups=" + written, 8) == groups


def test_axes_are_those_along_which_a_group_differs():
    assert axes_of([[0, 4], [1, 5]], MESH) == ("data",)
    assert axes_of([[0, 1, 2, 3]], MESH) == ("fsdp", "tensor")
    assert axes_of([[5]], MESH) == ()
    assert [num_bytes(t) for t in ("(f32[2,3]{1,0}, /*index=1*/bf16[4])", "pred[]", "s4[3]", "f8e4m3fn[5]")] == [
        32,
        1,
        2,
        5,
    ]


def test_a_loop_whose_count_is_unknown_is_an_error_if_it_works():
    known = MODULE.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert work(known, MESH).collectives[0].times == 5
    for change in (
        ("constant(3)", "parameter(9)"),
        ("direction=LT", "direction=LE"),
        ("add(%counter, %one)", "add(%counter, %counter)"),
        ("tuple(%zero, %x, %w)", "tuple(%counted, %x, %w)"),
    ):
        with pytest.raises(ValueError, match="how often does %while run"):
            work(MODULE.replace(*change), MESH)
    with pytest.raises(ValueError, match="unknown form"):
        replica_groups("replica_groups=@mesh", 8)
