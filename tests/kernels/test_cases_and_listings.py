"""Floors, the chip table, and the reader of the compiler's listings."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import llo
from kernels_pallas.cases import Case, Matmul, accepted_cycles, all_cases, find_cases, floor_cycles
from kernels_pallas.tpu import CHIPS, check_vmem, chip_named, current_chip, current_platform, tile_bytes

LISTING = """
     0   :  { %7 = vsyncpa [#allocation3], 0 }
   0x1 LB: > { %s1_s1 = sadd.s32 1, %s0_s0 /* iteration index, stage = 1 */ }
   0x2   :  {}
   0x3   : > { %p5_p0 = scmp.ne.s32.totalorder %s3_s1, 9 ;; %4 = sbr.rel (%p5_p0) target = $region1 }
   0x4 LB: >> { %p8_p1 = scmp.ge.s32.totalorder %s3_s1, 4 /* loop exit test */ }
   0x5   : > { %v1_v1 = vadd.f32 %v0_v0, %v0_v0 }
   0x6   : >> { %188 = sbr.rel (!%p8_p1) target = $region2 }
   0x7   :  {}
   0x8   : > { %p9_p2 = scmp.ge.s32.totalorder %s3_s1, 5 /* loop exit test */ }
   0x9   : > { %15 = sbr.rel (!%p9_p2) target = $region3 }
   0xa   :  { %8 = vsyncpa [#allocation3], 1 }
"""


def test_bundles_are_counted_with_the_trips_of_their_loops():
    # Outside 2; a grid of 3 in a loop of 3 + 2 steps: 5 bundles of its own and an inner loop of 4 × 4.
    assert llo.count_bundles(LISTING) == 2 + 3 * (5 + 4 * 4)


def test_an_exit_test_under_a_predicate_gives_its_trips_too():
    assert llo.count_bundles(LISTING.replace("%s3_s1, 4 /* loop", "(%p4_p9), %s3_s1, 4 /* loop")) == 2 + 3 * (5 + 4 * 4)


def test_a_loop_that_counts_in_steps_has_fewer_trips():
    step = "%s6_s1 = sadd.s32 2, %s4_s1 ;; %p8_p1 = scmp.ge.s32.totalorder %s6_s1, 4"
    unrolled = LISTING.replace("%p8_p1 = scmp.ge.s32.totalorder %s3_s1, 4", step)
    assert llo.count_bundles(unrolled) == 2 + 3 * (5 + 2 * 4)


def test_a_trip_count_that_the_listing_lacks_leaves_no_figure():
    assert llo.count_bundles(LISTING.replace("%s3_s1, 4 /* loop", "%s3_s1, %s4_s2 /* loop")) is None


REGIONS = """
   0x1 LB: > { %s1_s1 = sadd.s32 1, %s0_s0 /* iteration index, stage = 1 */ }
   0x2   : > { %779 = sbr.rel (%p1_p2) target = $region60 }
   0x3   : > { %1068 = sbr.rel (%p2_p0) target = $region88 }
   0x4   : > { %v1_v1 = vadd.f32 %v0_v0, %v0_v0 }
   0x5   : > { %v1_v1 = vadd.f32 %v0_v0, %v0_v0 }
   0x6 PF: > { %s2_s3 = sld [smem:[#allocation45_spill]] } /* Start/End empty region 88 :: Start region 89 */
   0x7   : > { %1069 = sbr.rel (%p3_p0) target = $region92 }
   0x8   : > { %v1_v1 = vadd.f32 %v0_v0, %v0_v0 }
   0x9 PF: > { %s2_s3 = sld [smem:[#allocation45_spill]] } /* Start/End empty region 92 */
   0xa PF: > { %p9_p2 = scmp.ge.s32.totalorder %s3_s1, 6 /* loop exit test */ } /* Start/End empty region 60 */
   0xb   : > { %15 = sbr.rel (!%p9_p2) target = $region187 }
   0xc   :  { %8 = vsyncpa [#allocation3], 1 }
"""


def test_regions_that_run_in_some_steps_only_count_for_their_share():
    assert llo.count_bundles(REGIONS) == 1 + 4 * 11
    assert llo.count_bundles(REGIONS, (1 / 4, 3 / 4)) == 1 + 4 * (11 - 3) + 2 + 3


def test_other_regions_than_said_leave_no_figure():
    assert llo.count_bundles(REGIONS, (1 / 4,)) is None
    assert llo.count_bundles(LISTING, (1 / 4, 3 / 4)) is None


def case(**fields):
    build = lambda: (jnp.sin, (jax.ShapeDtypeStruct((8,), jnp.float32),))  # noqa: E731
    return Case(**{"op": "probe", "name": "a", "model": "ugly", "build": build, "hbm_bytes": 0} | fields)


def test_the_floor_is_the_larger_of_matrix_work_and_traffic():
    v6e, tpu7x = CHIPS["v6e"], CHIPS["tpu7x"]
    assert floor_cycles(case(hbm_bytes=937 * 100), v6e) == 100
    full = Matmul(524288 * 1000, depth=256)
    assert floor_cycles(case(hbm_bytes=937 * 100, matmuls=(full, full)), v6e) == 2000
    # Depth 128 fills half of a 256-deep unit, all of a 128-deep one.
    shallow = Matmul(524288 * 1000, depth=128)
    assert floor_cycles(case(matmuls=(shallow,)), v6e) == 2000
    assert floor_cycles(case(matmuls=(shallow,)), CHIPS["v5p"]) == 2000
    assert floor_cycles(case(matmuls=(Matmul(1048576 * 10, 256, "fp8"),)), tpu7x) == 10
    assert accepted_cycles(case(hbm_bytes=937 * 100), v6e, 60) == 100


def test_case_labels_are_unique_and_name_declared_operations():
    from kernels_pallas.dispatch import operations

    cases = all_cases()
    assert {c.op for c in cases} <= set(operations())
    assert find_cases((cases[-1].label,)) == (cases[-1],)
    with pytest.raises(ValueError, match="got nothing/here"):
        find_cases(("nothing/here",))
    with pytest.raises(ValueError, match="v7"):
        case(targets={"v7": 1.0})


def test_every_kernel_has_cases_of_both_models_and_one_in_ci():
    cases = all_cases()
    for op in {c.op for c in cases}:
        of_op = [c for c in cases if c.op == op]
        assert {"flash", "pro"} <= {c.model for c in of_op}, op
        assert any(c.in_ci for c in of_op), op


def test_the_chip_is_that_of_the_argument_or_the_default_device():
    assert current_chip("v5e") is CHIPS["v5e"]
    assert current_chip(CHIPS["v6e"]) is CHIPS["v6e"]
    with jax.default_device(jax.devices("cpu")[0]):
        assert current_chip().vmem_bytes == min(chip.vmem_bytes for chip in CHIPS.values())
        assert current_platform() == "cpu"
    with pytest.raises(ValueError, match="got 'v9', need one of v5e"):
        chip_named("v9")


def test_blocks_that_do_not_fit_are_refused_with_both_sizes():
    assert tile_bytes((3, 100), "bfloat16") == 16 * 128 * 2
    assert tile_bytes((2, 9, 129), "float32") == 2 * 16 * 256 * 4
    check_vmem("probe", 1000, CHIPS["v5p"], "shrink it")
    with pytest.raises(ValueError, match=r"probe: needs 70,000,000 bytes of VMEM, v5p has 62,914,560 .*shrink it"):
        check_vmem("probe", 70_000_000, CHIPS["v5p"], "shrink it")
