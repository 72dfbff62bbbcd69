"""Manifold-constrained hyper-connections: reading, mixing and writing the residual streams."""

from kernels_pallas.hyper_connection.api import leave, seam, sharded_seam, write
from kernels_pallas.hyper_connection.reference import Maps, head, read, sinkhorn, unpack_maps

__all__ = ["Maps", "head", "leave", "read", "seam", "sharded_seam", "sinkhorn", "unpack_maps", "write"]
