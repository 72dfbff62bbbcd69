"""Routed experts over the tokens that chose them."""

from kernels_pallas.grouped_experts.api import grouped_experts

__all__ = ["grouped_experts"]
