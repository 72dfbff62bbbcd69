"""What the TPU compiler makes of the index_topk kernels: memory in HBM, at production shapes."""

import pytest

from kernels_pallas import aot
from kernels_pallas.cases import find_cases
from kernels_pallas.tpu import CHIPS

pytestmark = pytest.mark.tpu_compile


@pytest.fixture(autouse=True)
def _compiler():
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax[tpu]'")


def measured(*labels, chip="v6e"):
    found = list(aot.measure_cases(find_cases(labels), CHIPS[chip], batch=len(labels), static=False))
    for result in found:
        assert result.error is None, f"{result.label}: {result.error}"
    return found


def test_no_temporary_of_a_million_token_prefill_exceeds_its_output():
    for result in measured("index_topk/prefill of 2048 at 1M", "index_topk/prefill of 2048 at 1M, fp8, list"):
        assert result.memory["temp"] <= result.memory["output"]


def test_decode_copies_no_layer_of_stacked_caches():
    """Two layers of 64 × 32,768 FP8 keys with scales are 554 MB; all temporaries are smaller than the 131 kB output."""
    (result,) = measured("index_topk_decode/64 at 128K, fp8")
    assert result.memory["argument"] > 2 * 64 * 32768 * 132
    assert result.memory["temp"] <= result.memory["output"]
