"""Kernels through the real TPU compiler, which libtpu carries: no TPU needed. The full matrix is `bench kernels`."""

import importlib.util

import pytest

from kernels_pallas.aot import measure_cases
from kernels_pallas.cases import all_cases
from kernels_pallas.tpu import CHIPS

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]
CASES = tuple(case for case in all_cases() if case.in_ci)


@pytest.mark.parametrize("chip", CHIPS)
def test_one_case_of_every_kernel_compiles(chip, record_property):
    """In one process, those that it takes down again alone. Static cycles are left out: they cost minutes."""
    wanted = [case for case in CASES if chip in case.chips]
    failed, counted = [], 0
    for case, result in zip(
        wanted, measure_cases(wanted, CHIPS[chip], batch=len(wanted), static=False), strict=True
    ):  # fmt: skip
        if result.error is not None:
            failed.append(f"{case.label}: {result.error}")
            continue
        # Where a loop ends as the data says, the listing does not tell how often it runs, and there is no count.
        assert result.bundles is None or result.bundles > 0, case.label
        counted += result.bundles is not None
        assert result.vmem_bytes is not None, case.label
        assert result.vmem_bytes <= CHIPS[chip].vmem_bytes, case.label
        record_property(case.label, f"{result.bundles} bundles")
    assert not failed, "\n".join(failed)
    assert counted
