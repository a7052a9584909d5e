"""Figures read from compiled text against what was put into the program."""

import jax
import jax.numpy as jnp
import pytest

from qcn_jax.compile import hlo

# As TPU back ends print it: no known trip count, the bound is in the condition; an asynchronous gather; a kernel.
TEXT = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %p = (s32[]{:T(128)}, bf16[64,32]{1,0}) parameter(0)
  %x = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %w = bf16[16,32]{1,0} constant({...})
  %gathered = bf16[32,32]{1,0} all-gather(%w), channel_id=1, dimensions={0}
  %fusion.1 = bf16[64,32]{1,0} fusion(%x, %gathered), kind=kOutput, calls=%product, metadata={op_name="jit(step)/while/body/mlp/dot"}, backend_config={"window_config":{"estimated_cycles":"100"}}
  %reduced = bf16[64,32]{1,0} all-reduce(%fusion.1), channel_id=2, to_apply=%add
  ROOT %t = (s32[], bf16[64,32]) tuple(%i, %reduced)
}

%product (x: bf16[64,32], w: bf16[32,32]) -> bf16[64,32] {
  %x.1 = bf16[64,32]{1,0} parameter(0)
  %w.1 = bf16[32,32]{1,0} parameter(1)
  ROOT %dot = bf16[64,32]{1,0} convolution(%x.1, %w.1), dim_labels=bf_io->bf
}

%condition (p: (s32[], bf16[64,32])) -> pred[] {
  %bound = s32[]{:T(128)} constant(12)
  %p.2 = (s32[]{:T(128)}, bf16[64,32]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%unknown (p: (s32[], s32[])) -> pred[] {
  %p.3 = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%p.3), index=0
  %n = s32[] get-tuple-element(%p.3), index=1
  ROOT %lt.1 = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (param: bf16[64,32]) -> bf16[64,32] {
  %param = bf16[64,32]{1,0} parameter(0)
  %loop = (s32[], bf16[64,32]) while(%start), condition=%condition, body=%body, metadata={op_name="jit(step)/while"}
  %other = (s32[], s32[]) while(%pair), condition=%unknown, body=%body
  %scatter-start = ((bf16[64,32]), bf16[16,32]) async-start(%param), calls=%wrapped
  %scatter-done = bf16[16,32] async-done(%scatter-start), calls=%wrapped
  %part = bf16[64,32]{1,0} get-tuple-element(%loop), index=1, frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/splash"}
  %offloaded-start = ((bf16[64,32]), bf16[128,32]) call-start(%param), async_execution_thread="sparsecore", to_apply=%sparse
  %offloaded-done = bf16[128,32] call-done(%offloaded-start)
  %silent.3 = bf16[64,32]{1,0} custom-call(%param), custom_call_target="tpu_custom_call"
  ROOT %kernel = bf16[64,32]{1,0} custom-call(%param), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":5000,"transcendentals":0}}}
}

%sparse (p: bf16[64,32]) -> bf16[128,32] {
  %p.5 = bf16[64,32]{1,0} parameter(0)
  %room = bf16[128,32]{1,0} broadcast(%zero), dimensions={}
  %sizes = s32[2]{0} constant({1, 2})
  %offloaded = bf16[128,32]{1,0} fusion(%room), kind=kCustom, backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
  ROOT %ra = bf16[128,32]{1,0} ragged-all-to-all(%p.5, %room, %sizes, %sizes, %sizes, %sizes), channel_id=4, replica_groups={{0,1}}
}

%wrapped (p: bf16[64,32]) -> bf16[16,32] {
  %p.4 = bf16[64,32]{1,0} parameter(0)
  ROOT %rs = bf16[16,32]{1,0} reduce-scatter(%p.4), channel_id=3, dimensions={0}, to_apply=%add
}
"""


def test_loops_collectives_flops_and_cycles():
    summary = hlo.summarize(TEXT)
    runs = 12 + 1  # the loop whose bound depends on data counts once, and is said to
    assert summary.unknown_loops == 1
    assert dict(summary.collective_count) == {"all-gather": runs, "all-reduce": runs, "reduce-scatter": 1,
                                               "ragged-all-to-all": 1}
    assert summary.collective_bytes["all-gather"] == runs * 32 * 32 * 2
    assert summary.collective_bytes["all-reduce"] == runs * 64 * 32 * 2
    assert summary.collective_bytes["reduce-scatter"] == 64 * 32 * 2
    assert summary.collective_bytes["ragged-all-to-all"] == 128 * 32 * 2
    assert summary.matmul_flops == runs * 2 * 64 * 32 * 32 and summary.kernel_flops == 5000
    assert summary.silent_kernels == {"silent": 1}
    assert summary.without_estimate == 1
    assert summary.top_cycles(1) == [("fusion.1", 100 * runs)]
    assert hlo.cycles_by_part(summary, {"net": "linear_attn", "moe": "/mlp/"}) == {
        "net": 0.0, "moe": 100.0 * runs, "other": 0.0}
    report = hlo.to_json(summary)
    assert report["largest_collectives"][0] == {
        "bytes": runs * 64 * 32 * 2, "kind": "all-reduce", "count": runs, "origin": ""}


# A gather that goes in steps beside products, a reduction with its slice in one fusion, a gather by a sparse core.
FUSED = """HloModule step, is_scheduled=true

%begin (w: bf16[16,32]) -> bf16[32,32] {
  %w = bf16[16,32]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[32,32]{1,0} all-gather(%w), channel_id=3, frontend_attributes={chain_id="2"}, backend_config={"async_collective_fusion_config":{"flag_end":"-1","flag_start":"-1"}}
}

%async_collective_fusion.1 (w: bf16[16,32]) -> bf16[32,32] {
  %w.1 = bf16[16,32]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[32,32]{1,0} all-gather(%w.1), channel_id=3, frontend_attributes={chain_id="2"}, backend_config={"async_collective_fusion_config":{"flag_end":"8","flag_start":"2"}}
}

%all-reduce-scatter.1 (x: bf16[64,32]) -> bf16[16,32] {
  %x = bf16[64,32]{1,0} parameter(0)
  %all-reduce.1 = bf16[64,32]{1,0} all-reduce(%x), channel_id=4, to_apply=%add
  ROOT %slice = bf16[16,32]{1,0} dynamic-slice(%all-reduce.1, %i, %j), dynamic_slice_sizes={16,32}
}

%called_computation.1 (w: bf16[16,32]) -> bf16[128,32] {
  %w.2 = bf16[16,32]{1,0} parameter(0)
  ROOT %all-gather.3 = bf16[128,32]{1,0} all-gather(%w.2), channel_id=5, dimensions={0}
}, execution_thread="sparsecore"

%async_computation.1 (w: bf16[16,32]) -> bf16[128,32] {
  %w.3 = bf16[16,32]{1,0} parameter(0)
  ROOT %custom-call.1 = bf16[128,32]{1,0} custom-call(%w.3), custom_call_target="sparse", called_computations={%called_computation.1}, frontend_attributes={a="1"}
}, execution_thread="sparsecore"

ENTRY %main (w: bf16[16,32], x: bf16[64,32]) -> bf16[16,32] {
  %w.4 = bf16[16,32]{1,0} parameter(0)
  %x.1 = bf16[64,32]{1,0} parameter(1)
  %start = bf16[32,32]{1,0} fusion(%w.4), kind=kCustom, calls=%begin
  %fusion.1 = bf16[32,32]{1,0} fusion(%w.4), kind=kCustom, calls=%async_collective_fusion.1
  %sparse-start = ((bf16[16,32]), bf16[128,32]) async-start(%w.4), async_execution_thread="sparsecore", calls=%async_computation.1
  %sparse-done = bf16[128,32] async-done(%sparse-start)
  ROOT %scattered = bf16[16,32]{1,0} fusion(%x.1), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_collectives_that_the_compiler_fused_count_once_and_as_what_they_are():
    summary = hlo.summarize(FUSED)
    assert summary.collective_count == {"all-gather": 2, "reduce-scatter": 1}
    assert summary.collective_bytes == {"all-gather": (32 + 128) * 32 * 2, "reduce-scatter": 64 * 32 * 2}


def test_a_loop_whose_first_iterations_run_outside_counts_the_others():
    begun = TEXT.replace("while(%start)", "while(%begun)").replace("  %other =", """  %two = s32[] constant(2)
  %copied = s32[] copy(%two)
  %begun = (s32[], bf16[64,32]) tuple(%copied, %param)
  %other =""")
    gathers = lambda text: hlo.summarize(text).collective_count["all-gather"]
    assert gathers(TEXT) - gathers(begun) == 2


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.summarize("HloModule nothing\n")


def test_flops_of_a_program_that_xla_made():
    """Seven steps of [8, 16] x [16, 16] forward, and two products each backward."""

    def loss(w, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

    shapes = jax.ShapeDtypeStruct((7, 16, 16), jnp.float32), jax.ShapeDtypeStruct((8, 16), jnp.float32)
    text = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().as_text()
    assert hlo.summarize(text).matmul_flops == 3 * 7 * 2 * 8 * 16 * 16


@pytest.mark.parametrize(("left", "right", "options"), [
    ((2, 9, 6), (4, 6, 5), {"window_strides": (1,), "padding": [(3, 0)]}),
    ((2, 9, 6), (4, 1, 6), {"window_strides": (2,), "padding": [(2, 1)], "feature_group_count": 6}),
    ((2, 5, 6), (3, 6, 5), {"window_strides": (1,), "padding": [(2, 2)], "lhs_dilation": (3,), "rhs_dilation": (2,)}),
    # A batch of five products, as a TPU's compiler writes it: each window of five meets one real element.
    ((7, 5, 6), (5, 6, 3), {"window_strides": (4,), "padding": [(4, 4)], "lhs_dilation": (5,)}),
])
def test_flops_of_convolutions_are_those_that_xla_counts(left, right, options):
    run = lambda x, w: jax.lax.conv_general_dilated(x, w, dimension_numbers=("NWC", "WIO", "NWC"), **options)
    lowered = jax.jit(run).lower(jnp.ones(left), jnp.ones(right))
    summary = hlo.summarize(lowered.compiler_ir("hlo").get_hlo_module().to_string())
    assert summary.matmul_flops == lowered.cost_analysis()["flops"] > 0
