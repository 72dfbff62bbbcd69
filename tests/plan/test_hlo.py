"""Costs of programs whose figures can be worked out by hand; most are written out, some compiled for this CPU."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from kernels_pallas.grouped_experts import grouped_experts
from kernels_pallas.loops import data_loop, expected_trips
from v4jax.plan.costs import program_costs, replica_groups
from v4jax.plan.hlo import Program, parse_shapes


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def zeros(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_nested_scans_multiply():
    def step(x, w):
        def outer(x, _):
            return jax.lax.scan(lambda x, one: (jnp.tanh(x @ one), None), x, w)[0], None

        return jax.lax.scan(outer, x, None, length=5)[0]

    costs = program_costs(compiled(step, zeros(8, 16), zeros(3, 16, 16)))
    assert costs.flops == 5 * 3 * 2 * 8 * 16 * 16
    assert not costs.loops


def test_a_loop_that_depends_on_data_counts_as_its_author_expects():
    def step(x, w, n):
        return data_loop(0, n, lambda i, x: jnp.tanh(x @ w), x, expected=12.5)

    costs = program_costs(compiled(step, zeros(8, 16), zeros(16, 16), zeros(dtype=jnp.int32)))
    assert costs.flops == 12.5 * 2 * 8 * 16 * 16
    assert len(costs.loops) == 1
    assert costs.loops[0].endswith(": 12.5")

    def silent(x, w, n):
        return jax.lax.fori_loop(0, n, lambda i, x: jnp.tanh(x @ w), x)

    costs = program_costs(compiled(silent, zeros(8, 16), zeros(16, 16), zeros(dtype=jnp.int32)))
    assert costs.flops == 2 * 8 * 16 * 16
    assert costs.loops[0].endswith("unknown, counted once")


def test_expectations_belong_to_the_loop_right_inside_their_scope():
    assert expected_trips("jit(f)/about_3.500_trips/while") == 3.5
    assert expected_trips("jit(f)/about_3_trips/while/body/about_2_trips/while") == 2
    assert expected_trips("jit(f)/about_3_trips/while/body/while") is None
    assert expected_trips("jit(f)/transpose(jvp(about_2.500_trips))/while") == 2.5
    assert expected_trips("jit(f)/transpose(jvp(about_3_trips))/while/body/add") is None


def test_loops_of_a_gradient_count_as_expected():
    def objective(x, w1, w3, w2, weights, experts):
        return jnp.sum(grouped_experts(x, w1, w3, w2, experts, weights, limit=1.0, implementation="xla") ** 2)

    arguments = (zeros(64, 16), *(zeros(4, 8, 16), zeros(4, 8, 16), zeros(4, 16, 8)), zeros(64, 2))
    gradient = jax.grad(objective, argnums=(0, 1, 2, 3))
    costs = program_costs(compiled(gradient, *arguments, zeros(64, 2, dtype=jnp.int32)))
    assert len(costs.loops) == 20, "over experts, first blocks of eight sizes, and further ones; all again backward"
    assert not any(loop.endswith("counted once") for loop in costs.loops)
    # Forward, and twice that backward, of 128 picks in blocks of whole 16 rows, half of that as padding per expert.
    assert costs.flops == pytest.approx(3 * 3 * 2 * 16 * 8 * (128 + 4 * 8), rel=0.02)


def entry(body, *computations):
    return "HloModule m\n\n" + "\n\n".join([*computations, "ENTRY %main () -> f32[] {\n" + body + "}\n"])


def lines(text):
    return textwrap.indent(textwrap.dedent(text).strip("\n"), "  ") + "\n"


@pytest.mark.parametrize(
    ("start", "step", "limit", "direction", "trips"),
    [
        (0, 1, 7, "LT", 7), (2, 1, 7, "LT", 5), (0, 2, 7, "LT", 4), (1, 1, 7, "LE", 7), (9, -3, 0, "GT", 3),
        (7, 1, 7, "LT", 0),
    ],
)  # fmt: skip
def test_trip_counts_follow_start_step_and_bound(start, step, limit, direction, trips):
    body = """%body (p: (s32[], s32[])) -> (s32[], s32[]) {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %one = s32[] constant(STEP)
  %next = s32[] add(%one, %i)
  ROOT %t = (s32[], s32[]) tuple(%next, %n)
}""".replace("STEP", str(step))
    condition = f"""%condition (p: (s32[], s32[])) -> pred[] {{
  %p.1 = (s32[], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n.1 = s32[] get-tuple-element(%p.1), index=1
  ROOT %less = pred[] compare(%i.1, %n.1), direction={direction}
}}"""
    main = lines(f"""
        %start = s32[] constant({start})
        %limit = s32[] constant({limit})
        %carried = s32[] copy(%limit)
        %state = (s32[], s32[]) tuple(%start, %carried)
        ROOT %loop = (s32[], s32[]) while(%state), condition=%condition, body=%body
    """)
    program = Program(entry(main, body, condition))
    found = program.trips(program.entry, program.entry.instructions["loop"])
    assert (found.count, found.source) == (trips, "static")


def test_products_written_as_convolutions_count_real_pairs_alone():
    """A batched product over 8 matrices, as the TPU compiler writes it: a window over a dilated axis."""
    main = lines("""
        %a = bf16[8,32,64]{2,1,0} parameter(0)
        %b = bf16[8,16,64]{2,1,0} parameter(1)
        ROOT %c = f32[8,32,16]{2,1,0} convolution(%a, %b), window={size=8 stride=7 lhs_dilate=8}, dim_labels=LABELS
    """).replace("LABELS", "0bf_0oi->0bf")
    assert program_costs(entry(main)).flops == 2 * 8 * 32 * 16 * 64
    plain = lines("""
        %a = f32[32,64]{1,0} parameter(0)
        %b = f32[64,16]{1,0} parameter(1)
        ROOT %c = f32[32,16]{1,0} convolution(%a, %b), dim_labels=bf_io->bf, operand_precision={highest,highest}
    """)
    costs = program_costs(entry(plain))
    assert (costs.flops, costs.unit_flops) == (2 * 32 * 64 * 16, 6 * 2 * 32 * 64 * 16)


@pytest.mark.parametrize(("precision", "passes"), [("highest", 3), ("high", 2), ("default", 1)])
def test_a_product_with_what_was_bfloat16_takes_fewer_passes(precision: str, passes: int):
    main = lines("""
        %x = bf16[32,64]{1,0} parameter(0)
        %a = f32[32,64]{1,0} convert(%x)
        %b = f32[64,16]{1,0} parameter(1)
        ROOT %c = f32[32,16]{1,0} convolution(%a, %b), dim_labels=bf_io->bf, operand_precision={PRECISION,PRECISION}
    """).replace("PRECISION", precision)
    costs = program_costs(entry(main))
    assert costs.unit_flops == passes * costs.flops == passes * 2 * 32 * 64 * 16


def test_a_kernel_counts_as_much_of_its_grid_as_its_author_expects():
    call = [
        '%c = f32[1024,128]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"',
        'metadata={op_name="jit(f)/about_0.750_of_grid/jit(gmm)/pallas_call"}',
        'backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000","bytes_accessed":"800"}}}',
    ]
    main = lines("%a = bf16[1024,128]{1,0} parameter(0)\nROOT " + ", ".join(call))
    costs = program_costs(entry(main))
    assert (costs.flops, costs.hbm_bytes) == (750, 600)


def test_a_kernel_counts_as_it_says_and_one_that_says_nothing_is_listed():
    call = '%{0} = f32[8,128]{{1,0}} custom-call(%a), custom_call_target="tpu_custom_call"{1}'
    estimate = ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000","bytes_accessed":"77"}}}'
    main = lines("%a = f32[8,128]{1,0} parameter(0)\n" + call.format("k", estimate) + "\nROOT " + call.format("q", ""))
    costs = program_costs(entry(main))
    assert costs.flops == 1000
    assert costs.hbm_bytes == 77 + 2 * 8 * 128 * 4
    assert sum(costs.uncosted.values()) == 1


def test_a_kernel_is_not_charged_for_what_lies_in_vmem():
    estimate = 'backend_config={"custom_call_config":{"cost_estimate":{"flops":"0","bytes_accessed":"20000"}}}'
    main = lines(f"""
        %a = f32[8,128]{{1,0:S(1)}} parameter(0)
        %b = f32[8,128]{{1,0}} parameter(1)
        ROOT %k = f32[8,128]{{1,0:S(1)}} custom-call(%a, %b, %a), custom_call_target="tpu_custom_call", {estimate}
    """)
    assert program_costs(entry(main)).hbm_bytes == 20000 - 2 * 8 * 128 * 4


def test_traffic_is_what_slices_and_updates_touch_and_what_lies_in_hbm():
    fused = """%fused (p: f32[100,128], i: s32[]) -> f32[1,128] {
  %p = f32[100,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %double = f32[100,128]{1,0} add(%p, %p)
  ROOT %s = f32[1,128]{1,0:S(1)} dynamic-slice(%double, %i, %zero), dynamic_slice_sizes={1,128}
}"""
    main = lines("""
        %a = f32[100,128]{1,0} parameter(0)
        %i.1 = s32[]{:S(6)} parameter(1)
        %row = f32[1,128]{1,0:S(1)} fusion(%a, %i.1), kind=kLoop, calls=%fused
        %zero.1 = s32[]{:S(6)} constant(0)
        %u = f32[100,128]{1,0} dynamic-update-slice(%a, %row, %i.1, %zero.1)
        ROOT %n = f32[100,128]{1,0:S(1)} negate(%u)
    """)
    row, whole = 128 * 4, 100 * 128 * 4
    # The fusion reads the row that it slices, the update writes one, the negation reads all.
    assert program_costs(entry(main, fused)).hbm_bytes == row + row + whole


def test_what_runs_beside_the_program_counts_once_and_as_what_it_does():
    beside = """%gather (p: f32[100,128], i: s32[4,1]) -> f32[4,128] {
  %p = f32[100,128]{1,0} parameter(0)
  %i = s32[4,1]{1,0:S(1)} parameter(1)
  ROOT %g = f32[4,128]{1,0} gather(%p, %i), offset_dims={1}, slice_sizes={1,128}
}"""
    main = lines("""
        %a = f32[100,128]{1,0} parameter(0)
        %i.1 = s32[4,1]{1,0:S(1)} parameter(1)
        %s = ((f32[100,128]{1,0}, s32[4,1]{1,0:S(1)}), f32[4,128]{1,0}) call-start(%a, %i.1), to_apply=%gather
        ROOT %d = f32[4,128]{1,0} call-done(%s)
    """)
    assert program_costs(entry(main, beside)).hbm_bytes == 2 * 4 * 128 * 4


def test_a_fusion_may_leave_out_a_parameter_and_spread_a_kernels_configuration_over_lines():
    fused = """
        %fused (p0: f32[4,128], p1: s32[], p2: f32[8,128]) -> f32[8,128] {
          %p0 = f32[4,128]{1,0} parameter(0)
          %p2 = f32[8,128]{1,0} parameter(2)
          %b = f32[8,128]{1,0} custom-call(%p0), custom_call_target="tpu_custom_call", config={"cost_estimate": {
        "flops":123,
        "bytes_accessed":7
        }, "b": 1}
          ROOT %r = f32[8,128]{1,0} add(%b, %p2)
        }"""
    body = """
        %a = f32[4,128]{1,0} parameter(0)
        %n = s32[] parameter(1)
        %c = f32[8,128]{1,0} parameter(2)
        ROOT %f = f32[8,128]{1,0} fusion(%a, %n, %c), kind=kCustom, calls=%fused
    """
    text = entry(textwrap.dedent(body).replace("\n", "\n  ").lstrip("\n"), textwrap.dedent(fused).strip())
    costs = program_costs(text)
    assert costs.hbm_bytes == 4 * 128 * (4 + 8 + 8)  # what crosses the fusion's edge, not what the kernel says
    assert costs.flops == 123
    assert not costs.uncosted


def test_collectives_are_counted_by_kind_and_axis():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "expert", "tensor"))
    sizes = dict(mesh.shape)
    rows = jax.ShapeDtypeStruct((16, 64), jnp.float32)

    def step(x):
        def local(x):
            def body(x, _):
                x = x + jax.lax.psum(x, "tensor")
                return jax.lax.ppermute(x, "expert", [(0, 1), (1, 0)]), None

            x = jax.lax.scan(body, x, None, length=3)[0]
            whole = jax.lax.all_gather(x, ("data", "expert"), tiled=True)
            return x + jax.lax.psum_scatter(whole, ("data", "expert"), tiled=True)

        spec = PartitionSpec(("data", "expert"))
        return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)

    costs = program_costs(compiled(step, rows), sizes)
    part = 16 // 4 * 64 * 4
    assert dict(costs.collectives) == {
        ("all-reduce", "tensor"): 3 * 2 * part / 2,
        ("collective-permute", "expert"): 3 * part,
        ("all-gather", "data+expert"): 4 * part * 3 / 4,
        ("reduce-scatter", "data+expert"): 4 * part * 3 / 4,
    }
    assert costs.largest_gather == 4 * part


def test_both_spellings_of_groups_are_read():
    want = [[0, 2], [1, 3]]
    assert replica_groups("replica_groups={{0,2},{1,3}}, x", 4).tolist() == want
    assert replica_groups("replica_groups=[2,2]<=[2,2]T(1,0), x", 4).tolist() == want
    assert replica_groups("", 4).tolist() == [[0, 1, 2, 3]]


def test_shapes_know_their_memory():
    shapes = parse_shapes("(bf16[6,512]{1,0:T(8,128)(2,1)S(1)}, s4[5]{0}, /*index=2*/u32[]{:S(2)})")
    assert [(shape.dims, shape.nbytes, shape.space) for shape in shapes] == [
        ((6, 512), 6144, 1),
        ((5,), 3, 0),
        ((), 4, 2),
    ]
