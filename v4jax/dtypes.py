"""Which arithmetic runs in which dtype: one policy, and what stays float32 in all of them, as in the official model."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from v4jax.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class NativeWeights:
    """How a released checkpoint stores its quantised matrices, where a model keeps them so (architecture.md §10)."""

    experts: str
    """Routed experts: "fp4" or "fp8". All other quantised matrices are FP8."""
    tile: tuple[int, int] = (128, 128)
    """Rows and columns per FP8 scale."""


@dataclasses.dataclass(frozen=True, slots=True)
class DTypePolicy:
    """Dtypes by purpose (architecture.md §2, §10, §13). Hashable, so that it can be static under jit."""

    island: ClassVar[DTypeLike] = jnp.float32
    """Norms, hyper-connections, router, compressor, softmax, RoPE angles and logits, whatever `compute` is, as in the
    official code; dots inside them ask for full float32 precision, which a TPU otherwise would not give."""
    param: DTypeLike = jnp.float32
    """Matrices and embeddings. Norm weights, hyper-connections, `ape`, sinks and biases are always float32."""
    compute: DTypeLike = jnp.float32
    """Residual streams, projections and attention operands."""
    native: NativeWeights | None = None
    """Keep quantised matrices in their released bytes, dequantised where they are used; None: in the `param` dtype."""
    quant_sim: bool = False
    """Simulated quantisation of keys, values and index vectors, as the released weights were trained (§12)."""

    @classmethod
    def named(cls, dtype: str, *, quant_sim: bool = False, param: str | None = None) -> "DTypePolicy":
        """The policy of `--dtype float32` (parity mode: everything in float32) or `--dtype bfloat16`."""
        names = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
        for name in (dtype, param or dtype):
            if name not in names:
                raise UserError(f"dtype: got {name!r}, need one of {', '.join(names)}")
        return cls(param=names[param or dtype], compute=names[dtype], quant_sim=quant_sim)

    @property
    def precision(self) -> jax.lax.Precision:
        """Precision of dots on compute-dtype operands: full for float32, the hardware's own for bfloat16."""
        is_float32 = jnp.dtype(self.compute) == jnp.float32
        return jax.lax.Precision.HIGHEST if is_float32 else jax.lax.Precision.DEFAULT
