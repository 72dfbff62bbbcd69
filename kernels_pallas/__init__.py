"""Kernels for TPUs, each with a plain reference beside it. Usable without v4jax."""
