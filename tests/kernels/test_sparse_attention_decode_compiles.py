"""The decode kernels through the real TPU compiler: legality, VMEM, and nothing in HBM beyond the result."""

import pytest

from kernels_pallas.aot import measure_cases
from kernels_pallas.sparse_attention.cases_decode import DECODE_CASES
from kernels_pallas.tpu import CHIPS, vmem_budget

pytestmark = pytest.mark.tpu_compile
pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax[tpu]'")


@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_compiles_every_kernel_without_temporaries(chip):
    cases = [case for case in DECODE_CASES if case.in_ci]
    for found in measure_cases(cases, CHIPS[chip], batch=len(cases), static=False):
        assert found.error is None, f"{found.label}: {found.error}"
        assert found.vmem_bytes is not None
        assert found.vmem_bytes <= vmem_budget(CHIPS[chip])
        assert found.memory["temp"] <= 1 << 18, found.label  # indices and counts; a result has 4 MiB
