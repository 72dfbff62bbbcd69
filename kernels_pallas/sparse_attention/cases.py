"""Shapes of the attention kernels."""

from kernels_pallas.sparse_attention.cases_decode import DECODE_CASES
from kernels_pallas.sparse_attention.cases_prefill import PREFILL_CASES
from kernels_pallas.sparse_attention.cases_union import UNION_CASES

CASES = (*PREFILL_CASES, *UNION_CASES, *DECODE_CASES)
