"""The prefill kernels through the real TPU compiler: legality, VMEM, and what lies in HBM."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernels_pallas.aot import measure_cases
from kernels_pallas.sparse_attention.cases_prefill import PREFILL_CASES
from kernels_pallas.sparse_attention.cases_union import UNION_CASES
from kernels_pallas.tpu import CHIPS, vmem_budget

pytestmark = pytest.mark.tpu_compile
pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax[tpu]'")


@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_compiles_forward_and_backward(chip):
    cases = [case for case in (*PREFILL_CASES, *UNION_CASES) if case.in_ci]
    for found in measure_cases(cases, CHIPS[chip], batch=len(cases), static=False):
        assert found.error is None, f"{found.label}: {found.error}"
        assert found.vmem_bytes is not None
        assert found.vmem_bytes <= vmem_budget(CHIPS[chip])


_PRINT_PROGRAM = """
import os
from kernels_pallas import aot
os.environ.update(aot.ENVIRONMENT)
from kernels_pallas.cases import find_cases
from kernels_pallas.tpu import CHIPS
(case,) = find_cases(("sparse_attention/csa_training_16k",))
print(aot.compile_for(CHIPS["v6e"], *case.build()).as_text())
"""


@pytest.mark.slow
def test_training_at_16384_tokens_forms_no_array_of_queries_by_entries_beyond_the_bits():
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run([sys.executable, "-c", _PRINT_PROGRAM], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    shapes = set(re.findall(r"\b([a-z]+[0-9]+|pred)\[([0-9,]+)\]", found.stdout))
    sizes = {(kind, dims): math.prod(map(int, dims.split(","))) for kind, dims in shapes}
    queries, pairs = 16384 * 64 * 512, 16384 * 4096
    assert pairs // 32 in sizes.values()  # the mask of bits
    assert queries in sizes.values()
    wide = {name for name, size in sizes.items() if size >= pairs and size != queries}
    assert not wide
