"""Manifold-constrained hyper-connections: reading, mixing and writing the residual streams."""

from kernels_pallas.hyper_connection.api import head, read, write
from kernels_pallas.hyper_connection.reference import Maps, sinkhorn

__all__ = ["Maps", "head", "read", "sinkhorn", "write"]
